# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One update: sum the losses, one step of the targets, one optimiser step over all groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from deflow_torchrl.algorithms.base import Learner
from deflow_torchrl.errors import InputError, NonFiniteLossError


class UpdateStep:
    """Callable that trains a learner on a batch.

    The loop stays free of host synchronisation on an accelerator: a non-finite loss is remembered on the device, with
    its step, and raised by :meth:`check_finite`, which the trainer calls before it logs or saves. On a CPU, where looking
    costs nothing, every call checks.

    Args:
        learner: the method. Its loss's parameters live on one device.

    Keyword Args:
        compile_loss: run the losses through ``torch.compile(fullgraph=True)``.

    Raises:
        NonFiniteLossError: by calls, on a CPU, as soon as a loss is NaN or infinite.
    """

    def __init__(self, learner: Learner, *, compile_loss: bool = False) -> None:
        self.learner = learner
        self._device = next(learner.loss.parameters()).device
        self.optimizer = torch.optim.Adam(
            [dict(group) for group in learner.param_groups], fused=True, capturable=self._device.type == "cuda"
        )
        self.step = 0
        self._count = torch.zeros((), dtype=torch.int64, device=self._device)
        self._mover = (learner.target_updater, self._make_mover())
        self._watch_losses()
        self._losses = torch.compile(self._compute, fullgraph=True) if compile_loss else self._compute

    def _compute(self, batch: TensorDictBase) -> TensorDictBase:
        return self.learner.loss(batch)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Train on ``batch`` (on the loss's device) and return the losses and metadata, detached."""
        self.step += 1
        out = self.run(batch)
        if self._device.type == "cpu":
            self.check_finite()
        return out

    def run(self, batch: TensorDictBase) -> TensorDictBase:
        """The work of a call, on the device alone: what a CUDA graph can hold. :attr:`step` is left to the caller."""
        self._count += 1
        out = self._losses(batch)
        terms = torch.stack([out.get(name) for name in self._names])
        self.optimizer.zero_grad()
        total(terms, self._names, self.learner.term_periods, self._count).backward()
        # The order of the authors' code: targets move towards the critics of before this step (one step's lag). In the
        # other order the losses leave the reference's by some 1e-3 within eight updates at the paper's sizes.
        self._move_targets()
        self.optimizer.step()
        bad = ~terms.detach().isfinite() & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._count, self._first_bad))
        return out.detach()

    def _move_targets(self) -> None:
        updater = self.learner.target_updater
        if self._mover[0] is not updater:
            self._mover = (updater, self._make_mover())
        self._mover[1]()

    def _make_mover(self) -> Callable[[], None]:
        learner = self.learner
        return target_mover(learner.target_updater, period=learner.target_period, count=self._count)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a call changes in place, but for the optimiser's own and the gradients."""
        loss = self.learner.loss
        return [*{id(t): t for t in (*loss.parameters(), *loss.buffers(), self._count, self._first_bad)}.values()]

    @property
    def prior_frozen(self) -> bool:
        """Whether the prior is fixed."""
        return bool(getattr(self.learner.loss, "prior_frozen", False))

    def freeze_prior(self) -> None:
        """Fix the prior for good: it leaves the loss's terms and the optimiser, and its weights do not move by a bit.

        Everything else goes on as it was, Adam's moments and step counts included. Without effect where the prior is frozen.

        Raises:
            InputError: if the method has no prior.
            NonFiniteLossError: if a call so far met a NaN or infinite loss.
        """
        if self.learner.prior is None:
            raise InputError(f"{type(self.learner.loss).__name__} has no prior to freeze; leave freeze_prior off")
        if self.prior_frozen:
            return
        self.check_finite()
        self.learner.loss.freeze_prior_()
        # Left in the optimiser, the prior would be moved on by Adam's momentum as soon as it had a gradient of zero.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    self.optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        self._watch_losses()

    def _watch_losses(self) -> None:
        self._names = self.learner.loss_names
        self._first_bad = torch.full((len(self._names),), -1, dtype=torch.int64, device=self._device)

    def check_finite(self) -> None:
        """Raise NonFiniteLossError if any call so far met a NaN or infinite loss, naming the first term and step."""
        if bool((self._first_bad < 0).all()):
            return
        steps = {name: step for name, step in zip(self._names, self._first_bad.tolist(), strict=True) if step >= 0}
        name = min(steps, key=lambda key: steps[key])
        raise NonFiniteLossError(f"{name} became NaN or infinite at gradient step {steps[name]}")

    def is_finite(self) -> bool:
        """Whether every parameter is finite; makes the host wait for an accelerator."""
        parameters = [parameter.detach() for parameter in self.learner.loss.parameters()]
        return bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all())

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped: step, networks, targets, optimiser."""
        return {
            "step": self.step,
            "prior_frozen": self.prior_frozen,
            "loss": self.learner.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_settings: bool = False) -> None:
        """Restore what :meth:`state_dict` gave; the prior is frozen if it was.

        Args:
            state: what it gave.

        Keyword Args:
            keep_settings: leave learning rates and the loss's constants (gamma, delta, a fixed alpha) as they are here, for a
                run that goes on with other settings; the state's otherwise.

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
            group["capturable"] = own["capturable"]  # a matter of the device, not of the state
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
        """The loss's buffers that are settings; those of networks are state."""
        return {name: buffer for name, buffer in self.learner.loss.named_buffers() if "_params." not in name}


def total(terms: Tensor, names: Sequence[str], periods: Mapping[str, int], count: Tensor) -> Tensor:
    """What an update minimises: the sum of the terms ``[T, ...]`` that count at this update (``Learner.term_periods``)."""
    if periods:
        weights = [due(count, periods[name]) if name in periods else 1.0 for name in names]
        terms = torch.stack([term * weight for term, weight in zip(terms, weights, strict=True)])
    return terms.sum()


def restore_learner(update: UpdateStep, state: dict[str, Any], path: Path, *, keep_settings: bool = False) -> None:
    """Load networks and optimiser of a loaded checkpoint; ``keep_settings`` as in :meth:`UpdateStep.load_state_dict`.

    Raises:
        InputError: if it does not fit the networks.
    """
    try:
        update.load_state_dict(state["update"], keep_settings=keep_settings)
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not fit this run's networks: {str(error).splitlines()[0]}") from error


def soft_pairs(updater: TargetNetUpdater | None) -> tuple[list[Tensor], list[Tensor]] | None:
    """The targets and what they follow, tensor by tensor; None where ``updater`` is not a plain ``SoftUpdate``."""
    if updater is None:
        return [], []
    if type(updater) is not SoftUpdate:
        return None
    inner: Any = updater
    pairs = [(inner._targets[f"target_{key[0]}", *key[1:]], source) for key, source in inner._sources.items(True, True)]
    return [target for target, _ in pairs], [source for _, source in pairs]


def target_mover(
    updater: TargetNetUpdater | None, *, period: int = 1, count: Tensor | None = None
) -> Callable[[], None]:
    """``updater.step``, of a ``SoftUpdate`` as one lerp over all tensors: on a CPU a fifth of the time of its own.

    The tensors are looked up here, once: a later ``loss.to(...)`` that makes new ones needs a new mover.

    Args:
        updater: what moves the targets; None where there are none.

    Keyword Args:
        period: move only where ``count`` is a multiple of it; that is decided on the device, so that a CUDA graph can hold it.
        count: the updates so far, a number on the device.

    Raises:
        ValueError: on a period of an updater that is no ``SoftUpdate``.
    """
    if updater is None:
        return lambda: None
    pairs = soft_pairs(updater)
    if period == 1:
        return updater.step if pairs is None else lambda: move_softly(*pairs, 1 - updater.eps)
    if pairs is None or count is None:
        raise ValueError(f"a target_period needs a SoftUpdate and a count, got {type(updater).__name__} and {count}")
    return lambda: move_softly(*pairs, (1 - updater.eps) * due(count, period))


def due(count: Tensor, period: int) -> Tensor:
    """1.0 where ``count`` is a multiple of ``period``, else 0.0, on its device."""
    return (count % period == 0).to(torch.get_default_dtype())


def move_softly(targets: list[Tensor], sources: list[Tensor], weight: float | Tensor) -> None:
    """``target <- target + weight (source - target)``."""
    with torch.no_grad():
        if isinstance(weight, float):
            torch._foreach_lerp_(targets, sources, weight)
            return
        for target, source in zip(targets, sources, strict=True):  # there is no foreach form for a weight on the device
            target.lerp_(source, weight.to(target.dtype))
