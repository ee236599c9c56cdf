# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One update: sum the losses, move the targets, take one optimiser step over all groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from deflow_torchrl.algorithms.base import Learner
from deflow_torchrl.errors import InputError, NonFiniteLossError


class Update(ABC):
    """Base of the updates of one learner and of several stacked learners.

    The host never waits for an accelerator: a non-finite loss is recorded on the device, with its step, and raised by
    :meth:`check_finite`, which the trainer calls before it logs or saves. On a CPU, where the check costs nothing, every
    call makes it.

    Attributes:
        learner: gives the terms, their periods and the target updater.
        optimizer: the one optimiser.
        step: updates so far.
        seeds: names of the stacked learners in messages; empty for a single learner.
    """

    learner: Learner
    optimizer: torch.optim.Adam
    step: int
    seeds: Sequence[int] = ()

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Train on ``batch`` (on the loss's device) and return the losses and metadata, detached."""
        self.step += 1
        out = self.run(batch)
        if self._count.device.type == "cpu":
            self.check_finite()
        return out

    def run(self, batch: TensorDictBase) -> TensorDictBase:
        """Do the work of a call on the device alone, as a CUDA graph can record it; :attr:`step` is left to the caller."""
        self._count += 1
        out = self._compute_losses(batch)
        terms = torch.stack([out.get(name) for name in self._names])
        self.optimizer.zero_grad()
        self._total(terms).backward()
        # The authors' order: targets move towards the critics from before this optimiser step (a lag of one step). In the
        # other order the losses differ from the reference's by about 1e-3 within eight updates at the paper's sizes.
        self._move_targets()
        self._step_optimizer()
        bad = ~terms.detach().isfinite() & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._count, self._first_bad))
        return out.detach()

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

    @abstractmethod
    def _compute_losses(self, batch: TensorDictBase) -> TensorDictBase:
        """Compute losses and metadata of a batch."""

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

    def _total(self, terms: Tensor) -> Tensor:
        """Sum the terms ``[T, ...]`` that count at this step (``Learner.term_periods``): the update minimises the sum."""
        periods = self.learner.term_periods
        if periods:
            weights = [self._due(periods[name]) if name in periods else 1.0 for name in self._names]
            terms = torch.stack([term * weight for term, weight in zip(terms, weights, strict=True)])
        return terms.sum()

    def _due(self, period: int) -> Tensor:
        """Return 1.0 at every n-th update, else 0.0; computed on the device, so that a CUDA graph can record it."""
        return (self._count % period == 0).to(torch.get_default_dtype())

    @abstractmethod
    def _move_targets(self) -> None:
        """Move the targets by one step."""

    @torch.no_grad()
    def _move_softly(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Do ``SoftUpdate.step`` as one lerp over all tensors: on a CPU a fifth of TorchRL's time."""
        updater: Any = self.learner.target_updater
        if not targets:
            return
        if self.learner.target_period == 1:
            torch._foreach_lerp_(targets, sources, 1 - updater.eps)
            return
        weight = (1 - updater.eps) * self._due(self.learner.target_period)
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


class UpdateStep(Update):
    """Trains a learner on a batch.

    Args:
        learner: the method. Its loss's parameters live on one device.

    Keyword Args:
        compile_loss: run the losses through ``torch.compile(fullgraph=True)``.

    Raises:
        NonFiniteLossError: by calls, on a CPU, as soon as a loss is NaN or infinite.
    """

    def __init__(self, learner: Learner, *, compile_loss: bool = False) -> None:
        self.learner = learner
        device = next(learner.loss.parameters()).device
        self.optimizer = torch.optim.Adam(
            [dict(group) for group in learner.param_groups], fused=True, capturable=device.type == "cuda"
        )
        self.step = 0
        self._watch(device)
        self._find_targets()
        self._losses = torch.compile(self._call_loss, fullgraph=True) if compile_loss else self._call_loss

    def _call_loss(self, batch: TensorDictBase) -> TensorDictBase:
        return self.learner.loss(batch)

    def _compute_losses(self, batch: TensorDictBase) -> TensorDictBase:
        return self._losses(batch)

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
        """Return what a resumed run needs to continue exactly: step, networks, targets, optimiser."""
        return {
            "step": self.step,
            "prior_frozen": self.prior_frozen,
            "loss": self.learner.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
        """The loss's buffers that are settings; buffers of networks are state."""
        return {name: buffer for name, buffer in self.learner.loss.named_buffers() if "_params." not in name}


def restore_learner(update: UpdateStep, state: dict[str, Any], path: Path, *, keep_settings: bool = False) -> None:
    """Load networks and optimiser of a loaded checkpoint; ``keep_settings`` as in :meth:`UpdateStep.load_state_dict`.

    Raises:
        InputError: if it does not fit the networks.
    """
    try:
        update.load_state_dict(state["update"], keep_settings=keep_settings)
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not fit this run's networks: {str(error).splitlines()[0]}") from error
