# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One update: sum the losses, move the targets, take one optimiser step over all groups."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from deflow_torchrl.algorithms.base import Learner, Stage
from deflow_torchrl.algorithms.settings import UPDATE_PRECISIONS
from deflow_torchrl.errors import InputError, NonFiniteLossError
from deflow_torchrl.modules.flow import Precision, matmul_precision


class Update(ABC):
    """Base of the updates of one learner and of several stacked learners.

    The host never waits for an accelerator: a non-finite loss is recorded on the device, with its step, and raised by
    :meth:`check_finite`, which the trainer calls before it logs or saves. On a CPU, where the check costs nothing, every
    call makes it.

    Attributes:
        learner: gives the terms, their periods and the target updater.
        optimizer: the one optimiser.
        step: updates so far.
        precision: of every matrix product of an update, as :func:`~deflow_torchrl.modules.flow.matmul_precision` takes it.
        seeds: names of the stacked learners in messages; empty for a single learner.
    """

    learner: Learner
    optimizer: torch.optim.Adam
    step: int
    precision: str = "highest"
    seeds: Sequence[int] = ()
    _active: Sequence[Stage] = (Stage(),)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Train on ``batch`` (on the loss's device) and return the losses and metadata, detached."""
        self.begin_phase()
        self.step += 1
        out = self.run(batch)
        if self._count.device.type == "cpu":
            self.check_finite()
        return out

    def run(self, batch: TensorDictBase) -> TensorDictBase:
        """Do the work of a call on the device alone, as a CUDA graph can record it; :attr:`step` is left to the caller."""
        with matmul_precision(cast("Precision", self.precision), self._count.device):
            return self._run(batch)

    def _run(self, batch: TensorDictBase) -> TensorDictBase:
        self._count += 1
        for learner in self._learners:
            if learner.before_update is not None:
                learner.before_update(self._count)
        *earlier, last = self._active
        results = TensorDict(batch_size=self._first_bad.shape[1:])
        for stage in earlier:
            results.update(self._train_stage(stage, batch, last=False))
        results.update(self._train_stage(last, batch, last=True))
        for learner, own in zip(self._learners, results.unbind(0) if results.ndim else [results], strict=True):
            if learner.after_update is not None:
                learner.after_update(own)
        terms = torch.stack([results.get(name, torch.zeros_like(self._first_bad[0])) for name in self._names])
        bad = ~terms.isfinite() & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._count, self._first_bad))
        return results

    def _train_stage(self, stage: Stage, batch: TensorDictBase, *, last: bool) -> TensorDictBase:
        out = self._compute_losses(batch if stage.rows is None else batch[..., : stage.rows], tuple(stage.terms))
        self.optimizer.zero_grad()
        self._total({name: out[name] for name in self._names if name in out}).backward()
        if stage.max_grad_norm is not None:
            self._clip_gradients(stage.max_grad_norm)
        if last:
            # The authors' order: targets move towards the critics from before this optimiser step (a lag of one step). In the
            # other order the losses differ from the reference's by about 1e-3 within eight updates at the paper's sizes.
            self._move_targets()
        for group in self.optimizer.param_groups:
            if "cosine_steps" in group:
                progress = (self._count - 1 - group.get("cosine_begin", 0)) / group["cosine_steps"]
                group["lr"].copy_(group["initial_lr"] * (1 + torch.cos(math.pi * progress.clamp(0, 1))) / 2)
        self._step_optimizer()
        for target in stage.targets:
            self._follow(*self._pairs_of(target.name), target.rate, target.period, target.first)
        return out.detach()

    @property
    def active_stages(self) -> Sequence[Stage]:
        """Stages of the next update."""
        stages = self.learner.stages or (Stage(),)
        return [stage for stage in stages if stage.begin <= self.step and (stage.end is None or self.step < stage.end)]

    @property
    def updates_to_next_phase(self) -> float:
        """Number of updates until a stage begins or ends; infinite where none does."""
        borders = [border for stage in self.learner.stages for border in (stage.begin, stage.end) if border is not None]
        return min((border - self.step for border in borders if border > self.step), default=math.inf)

    @torch.no_grad()
    def begin_phase(self) -> None:
        """Choose the stages of the next calls of :meth:`run`, and copy weights as those that begin now ask for."""
        self._active = self.active_stages
        for stage in self.learner.stages:
            if stage.begin == self.step:
                for copy, original in stage.copies.items():
                    for learner in self._learners:
                        torch._foreach_copy_(_leaves(learner.loss, copy), _leaves(learner.loss, original))

    def tensors(self) -> list[Tensor]:
        """List every tensor that a call changes in place, except the optimiser's and the gradients."""
        return [*self._learned(), self._count, self._first_bad]

    def check_finite(self) -> None:
        """Raise NonFiniteLossError if a loss of any call so far was NaN or infinite, naming the first step, seed and term."""
        if bool((self._first_bad < 0).all()):
            return
        firsts = self._first_bad.reshape(len(self._names), -1).tolist()
        step, number, name = min(
            (
                (step, number, name)
                for name, steps in zip(self._names, firsts, strict=True)
                for number, step in enumerate(steps)
                if step >= 0
            ),
            key=lambda found: found[:2],
        )
        seed = f"seed {self.seeds[number]}: " if self.seeds else ""
        raise NonFiniteLossError(f"{seed}{name} became NaN or infinite at gradient step {step}")

    @property
    @abstractmethod
    def _learners(self) -> Sequence[Learner]:
        """Every learner that is trained."""

    @abstractmethod
    def _compute_losses(self, batch: TensorDictBase, terms: tuple[str, ...]) -> TensorDictBase:
        """Compute these terms (all where empty) and their metadata."""

    @abstractmethod
    def _pairs_of(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """List ``target_NAME_params`` and ``NAME_params``."""

    @abstractmethod
    def _learned(self) -> list[Tensor]:
        """List parameters and targets."""

    def _step_optimizer(self) -> None:
        self.optimizer.step()

    def _watch(self, device: torch.device, *shape: int) -> None:
        """Count from :attr:`step` on, and record the steps at which losses ``[*shape]`` become non-finite."""
        self._names = self.learner.loss_names
        self._count = torch.tensor(self.step, device=device)
        self._first_bad = torch.full((len(self._names), *shape), -1, device=device)

    def _total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Sum the terms that count at this step (``Learner.term_periods``): the update minimises the sum."""
        periods = self.learner.term_periods
        return torch.stack(
            [term * self._due(periods[name]) if name in periods else term for name, term in terms.items()]
        ).sum()

    def _due(self, period: int, first: int = 0) -> Tensor:
        """Return 1.0 at every n-th update, else 0.0; computed on the device, so that a CUDA graph can record it."""
        return ((self._count % period == 0) & (self._count >= first)).to(torch.get_default_dtype())

    @torch.no_grad()
    def _clip_gradients(self, limit: float) -> None:
        """Scale the gradients of a learner down to this norm of all of them together."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        rows = self._first_bad.shape[1:]  # of stacked learners, each its own norm
        norm = torch.stack([gradient.reshape(*rows, -1).square().sum(-1) for gradient in gradients]).sum(0).sqrt()
        scale = (limit / norm).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale.reshape((*rows, *(1,) * (gradient.ndim - len(rows)))))

    @abstractmethod
    def _move_targets(self) -> None:
        """Move the targets by one step."""

    def _move_softly(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Do ``SoftUpdate.step``."""
        if targets:
            updater: Any = self.learner.target_updater
            self._follow(targets, sources, 1 - updater.eps, self.learner.target_period)

    @torch.no_grad()
    def _follow(
        self, targets: list[Tensor], sources: list[Tensor], rate: float, period: int = 1, first: int = 0
    ) -> None:
        """Move targets as one lerp over all tensors: on a CPU a fifth of the time of TorchRL's ``SoftUpdate``."""
        if period == 1 and first == 0:
            torch._foreach_lerp_(targets, sources, rate)
            return
        weight = rate * self._due(period, first)
        for target, source in zip(targets, sources, strict=True):  # foreach_lerp_ takes no weight on the device
            target.lerp_(source, weight.to(target.dtype))


def soft_pairs(updater: TargetNetUpdater | None) -> tuple[list[Tensor], list[Tensor]] | None:
    """List the targets and the tensors they follow; None if ``updater`` is not a plain ``SoftUpdate``.

    After a ``loss.to(...)`` that makes new tensors the lists are out of date.
    """
    if updater is None:
        return [], []
    if type(updater) is not SoftUpdate:
        return None
    inner: Any = updater
    pairs = [(inner._targets[f"target_{key[0]}", *key[1:]], source) for key, source in inner._sources.items(True, True)]
    return [target for target, _ in pairs], [source for _, source in pairs]


def _leaves(loss: LossModule, name: str) -> list[Tensor]:
    """List the tensors of a network's parameters, those of a target without gradient."""
    return list(getattr(loss, f"{name}_params").values(True, True))


def compute_terms(loss: LossModule, batch: TensorDictBase, terms: tuple[str, ...]) -> dict[str, Tensor]:
    """Compute these terms and their metadata, by the methods of the loss that are named after them, or all by one call."""
    if not terms:
        return dict(loss(batch).items())
    out: dict[str, Tensor] = {}
    for name in terms:
        value, metadata = getattr(loss, f"{name.removeprefix('loss_')}_loss")(batch)
        out |= {**metadata, name: value}
    if "td_error" in out:
        batch.set(loss.tensor_keys.priority, out.pop("td_error"))
    return out


class UpdateStep(Update):
    """Trains a learner on a batch.

    Args:
        learner: the method. Its loss's parameters live on one device.

    Keyword Args:
        compile_loss: run the losses through ``torch.compile(fullgraph=True)``.
        precision: of every matrix product, forward and backward (:func:`~deflow_torchrl.modules.flow.matmul_precision`).

    Raises:
        ValueError: on an unknown precision.
        NonFiniteLossError: by calls, on a CPU, as soon as a loss is NaN or infinite.
    """

    def __init__(self, learner: Learner, *, compile_loss: bool = False, precision: str = "highest") -> None:
        if precision not in UPDATE_PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(UPDATE_PRECISIONS)}, got {precision!r}")
        self.learner = learner
        self.precision = precision
        device = next(learner.loss.parameters()).device
        groups = [dict(group) for group in learner.param_groups]
        for group in groups:
            if "cosine_steps" in group:  # a rate that a graph can change
                group |= {"initial_lr": group["lr"], "lr": torch.tensor(group["lr"], device=device)}
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")
        self.step = 0
        self._watch(device)
        self._find_targets()
        self._losses = torch.compile(self._call_loss, fullgraph=True) if compile_loss else self._call_loss
        unknown = {name for stage in learner.stages for name in stage.terms}.difference(self._names)
        if unknown:
            raise ValueError(f"a stage has the terms {sorted(unknown)}; the loss has {self._names}")

    @property
    def _learners(self) -> list[Learner]:
        return [self.learner]

    def _call_loss(self, batch: TensorDictBase, terms: tuple[str, ...]) -> dict[str, Tensor]:
        return compute_terms(self.learner.loss, batch, terms)

    def _compute_losses(self, batch: TensorDictBase, terms: tuple[str, ...]) -> TensorDictBase:
        return TensorDict(self._losses(batch, terms))

    def _pairs_of(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        return _leaves(self.learner.loss, f"target_{name}"), _leaves(self.learner.loss, name)

    def _find_targets(self) -> None:
        self._followed = self.learner.target_updater
        self._pairs = soft_pairs(self._followed)
        if self._pairs is None and self.learner.target_period != 1:
            raise ValueError(f"a target_period needs a SoftUpdate, got {type(self._followed).__name__}")

    def _move_targets(self) -> None:
        if self._followed is not self.learner.target_updater:
            self._find_targets()
        if self._pairs is not None:
            self._move_softly(*self._pairs)
        elif self._followed is not None:
            self._followed.step()

    def _learned(self) -> list[Tensor]:
        loss = self.learner.loss
        return list(dict.fromkeys([*loss.parameters(), *loss.buffers()]))

    @property
    def prior_frozen(self) -> bool:
        """Whether the prior is frozen."""
        return bool(getattr(self.learner.loss, "prior_frozen", False))

    def freeze_prior(self) -> None:
        """Freeze the prior: it leaves the loss's terms and the optimiser, and its weights do not change by a bit.

        Everything else stays as it was, Adam's moments and step counts included. Without effect if the prior is frozen.

        Raises:
            InputError: if the method has no prior.
            NonFiniteLossError: if a loss of any call so far was NaN or infinite.
        """
        if self.learner.prior is None:
            raise InputError(f"{type(self.learner.loss).__name__} has no prior to freeze; leave freeze_prior off")
        if self.prior_frozen:
            return
        self.check_finite()
        self.learner.loss.freeze_prior_()
        # If the prior stayed in the optimiser, Adam's momentum would go on moving it.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    self.optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        self._watch(self._count.device)

    def is_finite(self) -> bool:
        """Return whether every parameter is finite; the host waits for an accelerator."""
        parameters = [parameter.detach() for parameter in self.learner.loss.parameters()]
        return bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue exactly: step, networks, targets, optimiser, a ``HardUpdate``'s count."""
        updater = self.learner.target_updater
        return {
            "step": self.step,
            "prior_frozen": self.prior_frozen,
            "loss": self.learner.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({"target_counter": updater.counter} if isinstance(updater, HardUpdate) else {}),
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_settings: bool = False) -> None:
        """Restore a result of :meth:`state_dict`; the prior is frozen if it was.

        Args:
            state: the result.

        Keyword Args:
            keep_settings: keep the learning rates and the loss's constants (gamma, delta, a fixed alpha) of this update, for
                a run that continues with other settings; otherwise the state's are used.

        Raises:
            ValueError: if the prior is frozen here and was not there, or the networks differ.
        """
        if state.get("prior_frozen", False):
            self.freeze_prior()
        elif self.prior_frozen:
            raise ValueError("the prior is frozen here and was not in the state: load it first, then freeze")
        options = [{name: value for name, value in group.items() if name != "params"} for group in self._groups]
        constants = {name: buffer.clone() for name, buffer in self._constants.items()}
        self.step = state["step"]
        self._count.fill_(self.step)
        self.learner.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        updater = self.learner.target_updater
        if isinstance(updater, HardUpdate) and "target_counter" in state:
            updater.counter = state["target_counter"]
        for group, own in zip(self._groups, options, strict=True):
            group["capturable"] = own["capturable"]  # depends on the device
        if keep_settings:
            for group, own in zip(self._groups, options, strict=True):
                group.update(own)
            for name, buffer in self._constants.items():
                buffer.copy_(constants[name])

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def _constants(self) -> dict[str, Tensor]:
        """The loss's buffers that are settings; buffers of networks and those that training moves are state."""
        loss = self.learner.loss
        moved = getattr(loss, "state_buffers", ())
        return {name: it for name, it in loss.named_buffers() if "_params." not in name and name not in moved}


def restore_learner(update: UpdateStep, state: dict[str, Any], path: Path, *, keep_settings: bool = False) -> None:
    """Load networks and optimiser of a loaded checkpoint; ``keep_settings`` as in :meth:`UpdateStep.load_state_dict`.

    Raises:
        InputError: if it does not fit the networks.
    """
    try:
        update.load_state_dict(state["update"], keep_settings=keep_settings)
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not fit this run's networks: {str(error).splitlines()[0]}") from error
