# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Several seeds trained at once: parameters, moments and targets stacked, losses under ``torch.vmap``.

Every seed stays an ordinary learner with an ordinary :class:`UpdateStep`, whose tensors are rows of the stacked ones. Its
evaluation, diagnostics and checkpoints are therefore the code of a single run, and it can be trained further without the
stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.objectives.common import LossModule

from deflow_torchrl.algorithms.base import Learner
from deflow_torchrl.errors import CheckpointNotWritten, InputError, NonFiniteLossError
from deflow_torchrl.trainers.checkpoint import list_checkpoints
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.loop import Trainer, TrainingLoop
from deflow_torchrl.trainers.update import Update, UpdateStep, compute_terms, soft_pairs

_COUNT = "step"  # the one entry of a parameter's optimiser state that does not have the parameter's shape
_ATTRIBUTE = " (of the loss)"


class StackedUpdate(Update):
    """Trains S learners of one method on S batches, each as its own :class:`UpdateStep` would.

    Call either the stack or, after it is no longer used, the updates: a seed trained alone no longer fits the others.

    Args:
        updates: one for each seed, with equal methods, settings and step; only the learned tensors may differ.

    Keyword Args:
        seeds: names of the updates in messages; their numbers by default.

    Raises:
        InputError: if the updates cannot be stacked; the message says what differs, and between which seeds.
        NonFiniteLossError: by calls, on a CPU, as soon as a loss of any seed is NaN or infinite.
        ValueError: by calls, if the batch's first dimension is not S.
    """

    def __init__(self, updates: Sequence[UpdateStep], *, seeds: Sequence[int] | None = None) -> None:
        if not updates:
            raise InputError("there are no updates to stack")
        self.updates = list(updates)
        self.seeds = list(range(len(updates))) if seeds is None else list(seeds)
        self.learner = updates[0].learner
        self.precision = updates[0].precision
        self.gather()

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Train each seed on its row of ``batch [S, B]``; its loss may write into the row.

        Returns:
            The losses and metadata of each seed ``[S]``, detached.
        """
        if batch.shape[:1] != (len(self.updates),):
            raise ValueError(f"a batch [{len(self.updates)}, B] is needed, got {list(batch.shape)}")
        return super().__call__(batch)

    @property
    def step(self) -> int:
        """Gradient steps of every seed so far."""
        return self.updates[0].step

    @step.setter
    def step(self, step: int) -> None:
        for update in self.updates:
            update.step = step

    def gather(self) -> None:
        """Stack the updates' present tensors: needed after any of them loaded a state.

        Raises:
            InputError: as the constructor.
        """
        _check_alike(self.updates, self.seeds)
        own = [_state_of(update.learner.loss) for update in self.updates]
        # id of a tensor of the first seed -> the stacked tensor
        self._stack: dict[int, Tensor] = {}
        for rows in zip(*(tensors.values() for tensors in own), strict=True):
            stacked = torch.stack([row.detach() for row in rows])
            for row, part in zip(rows, stacked, strict=True):
                row.data = part
            if isinstance(rows[0], nn.Parameter):
                stacked = nn.Parameter(stacked, requires_grad=rows[0].requires_grad)
            self._stack[id(rows[0])] = stacked
        self._tensors = list(self._stack.values())
        self._own = TensorDict.from_module(self.learner.loss)
        pairs = soft_pairs(self.learner.target_updater)
        self._pairs = None if pairs is None else [[self._stack[id(tensor)].data for tensor in side] for side in pairs]
        self._gather_optimizer()
        self._watch(next(self.learner.loss.parameters()).device, len(self.updates))

    @property
    def _learners(self) -> list[Learner]:
        return [update.learner for update in self.updates]

    def _compute_losses(self, batch: TensorDictBase, terms: tuple[str, ...]) -> TensorDictBase:
        """Compute losses and metadata of each seed; entries that a loss writes into its row are written into the batch."""
        template = self.learner.loss

        def one(tensors: Sequence[Tensor], batch: TensorDictBase) -> tuple[dict[str, Tensor], dict[NestedKey, Tensor]]:
            given = dict(batch.items(True, True))
            of_seed = dict(zip(self._stack, tensors, strict=True))
            swapped = self._own.apply(lambda tensor: of_seed.get(id(tensor), tensor), filter_empty=False)
            with swapped.to_module(template, preserve_module_state=False):
                out = compute_terms(template, batch, terms)
            written = {key: value for key, value in batch.items(True, True) if given.get(key) is not value}
            return out, written

        # A seed's terms depend on its own parameters only, so the gradient of the sum over seeds is each seed's gradient.
        out, written = torch.vmap(one, randomness="different")(self._tensors, batch)
        for key, value in written.items():
            batch.set(key, value)
        return TensorDict(out, batch_size=[len(self.updates)])

    def _pairs_of(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        targets, sources = (
            [self._stack[id(tensor)].data for tensor in side] for side in self.updates[0]._pairs_of(name)
        )
        return targets, sources

    def _learned(self) -> list[Tensor]:
        return self._tensors

    def _move_targets(self) -> None:
        if self._pairs is not None:
            self._move_softly(*self._pairs)
            return
        for update in self.updates:
            update._move_targets()

    def _step_optimizer(self) -> None:
        self.optimizer.step()
        if len(self.optimizer.state) != len(self._counts):
            self._share_state()
        self._steps.copy_(torch.stack(self._counts))

    def _gather_optimizer(self) -> None:
        optimizer = self.updates[0].optimizer
        groups = [
            {**group, "params": [self._stack[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.optimizer = type(optimizer)(groups)
        for rows in _trained(self.updates):
            states = [update.optimizer.state.get(row, {}) for update, row in zip(self.updates, rows, strict=True)]
            if states[0]:
                self.optimizer.state[self._stack[id(rows[0])]] = {
                    name: value.clone() if name == _COUNT else torch.stack([state[name] for state in states])
                    for name, value in states[0].items()
                }
        self._share_state()

    def _share_state(self) -> None:
        """Make each update's moments rows of the stacked moments, and its step counts rows of :attr:`_steps`."""
        stacked = self.optimizer.state
        self._counts = [state[_COUNT] for state in stacked.values()]
        if self._counts:
            self._steps = torch.stack(self._counts).repeat(len(self.updates), 1)
        position = {id(parameter): at for at, parameter in enumerate(stacked)}
        for rows in _trained(self.updates):
            parameter = self._stack[id(rows[0])]
            if parameter not in stacked:
                continue
            for number, (update, row) in enumerate(zip(self.updates, rows, strict=True)):
                update.optimizer.state[row] = {
                    name: self._steps[number, position[id(parameter)]] if name == _COUNT else value[number]
                    for name, value in stacked[parameter].items()
                }


@dataclass(eq=False, repr=False)
class StackedTrainer(TrainingLoop):
    """Trains a stack; every seed's trainer keeps its rows, alarms, evaluations and checkpoints.

    Whenever a checkpoint is due for one seed, all seeds save, so that they have checkpoints of the same steps: a group that
    is killed between two of the writes resumes from the step before. Random numbers come from torch's global generator,
    whose state is in every checkpoint, so a resumed group continues bit for bit on a CPU.

    Args:
        update: the seeds' updates, stacked.
        buffer: samples S B transitions on the learners' device, B for each seed.
        trainers: one for each of the stack's updates, in their order and at one step; their own ``run`` is not called.

    Keyword Args:
        show_progress: show a progress bar on standard error.
        graphed: does several steps of ``update`` at once, up to the next step at which something is due.

    Raises:
        NonFiniteLossError: by :meth:`run`, naming the seed; the last checkpoints are from before.
        CheckpointNotWritten: by :meth:`run`, if the last checkpoint of a seed could not be written.
    """

    update: StackedUpdate
    buffer: ReplayBuffer
    trainers: Sequence[Trainer]
    _: KW_ONLY
    show_progress: bool = True
    graphed: GraphedUpdate | None = None

    def __post_init__(self) -> None:
        steps = {trainer.step for trainer in self.trainers}
        if len(steps) != 1 or len(self.trainers) != len(self.update.updates):
            raise ValueError(
                f"a trainer at one step is needed for each seed, got {len(self.trainers)} at steps {steps}"
            )
        self.schedule = self.trainers[0].schedule
        self.step = self._saved_step = self.trainers[0].step

    @property
    def unfinished(self) -> bool:
        """Whether the current step of any seed is trained but not yet evaluated and written."""
        return any(trainer.unfinished for trainer in self.trainers)

    def evaluate_step(self) -> None:
        """Evaluate each seed, if the current step is to be evaluated."""
        for seed, trainer in self._each():
            with _naming(seed):
                trainer.evaluate_step()

    def _each(self) -> Iterator[tuple[int, Trainer]]:
        return zip(self.update.seeds, self.trainers, strict=True)

    def _train_step(self) -> None:
        count, out, batch, seconds = self._run_updates(self._sample)
        assert out is not None
        assert batch is not None
        self.step += count
        due = self.schedule.due(self.schedule.log_interval, self.step)
        for row, (seed, trainer) in enumerate(self._each()):
            with _naming(seed):
                trainer.take_step(out[row] if due else None, batch[row] if due else None, count=count, seconds=seconds)

    def _sample(self) -> TensorDictBase:
        return self.buffer.sample().reshape(len(self.trainers), -1)

    def _finish_step(self) -> None:
        due = [trainer.close_step() for trainer in self.trainers if trainer.unfinished]
        if any(due):
            self._save_or_warn()

    def save(self) -> None:
        """Write a checkpoint of the current step for every seed, or for none.

        Raises:
            NonFiniteLossError: if a loss or a weight of any seed was not finite.
            CheckpointNotWritten: on a full disk; the older checkpoints stay whole.
        """
        self.update.check_finite()
        before = {path for trainer in self.trainers for path in list_checkpoints(trainer.checkpoints)}
        written: list[Path] = []
        try:
            for seed, trainer in self._each():
                with _naming(seed):
                    written.append(trainer.save_closed_step())
        except (NonFiniteLossError, CheckpointNotWritten):
            # If they stayed, older checkpoints, which all seeds have, would be dropped for them.
            for path in written:
                if path not in before:  # an earlier checkpoint of the same step stays
                    path.unlink(missing_ok=True)
            raise
        self._saved_step = self.step


def _trained(updates: Sequence[UpdateStep]) -> Iterator[tuple[Tensor, ...]]:
    """Yield each optimised parameter as a tuple over the updates."""
    for groups in zip(*(update.optimizer.param_groups for update in updates), strict=True):
        yield from zip(*(group["params"] for group in groups), strict=True)


def _state_of(loss: LossModule) -> dict[str, Tensor]:
    """List a loss's learned tensors by name, each once: parameters, buffers of networks (targets, statistics), multipliers."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in loss.named_modules():
        networks = isinstance(module, TensorDictParams)
        own = {name: module._buffers[name] for name in getattr(module, "state_buffers", ())}
        for registry in (module._parameters, module._buffers if networks else own):
            for name, tensor in registry.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (f"{prefix}.{name}".lstrip("."), tensor))
    return dict(found.values())


def _constants_of(loss: LossModule) -> dict[str, Tensor]:
    """List a loss's buffers that are settings."""
    learned = {id(tensor) for tensor in _state_of(loss).values()}
    return {name: buffer for name, buffer in loss.named_buffers() if id(buffer) not in learned}


def _check_alike(updates: Sequence[UpdateStep], seeds: Sequence[int]) -> None:
    """Raise InputError if the updates differ in more than their learned tensors."""
    first = _description(updates[0])
    for update, seed in zip(updates[1:], seeds[1:], strict=True):
        described = _description(update)
        for name in {**first, **described}:
            if name.endswith(_ATTRIBUTE) and not (name in first and name in described):
                continue  # one of the losses has not set it yet
            one, other = first.get(name), described.get(name)
            if not _equal(one, other):
                raise InputError(
                    f"seeds {seeds[0]} and {seed} cannot be stacked, they differ in {name}: {one} and {other}"
                )
    tensors = [id(tensor) for update in updates for tensor in _state_of(update.learner.loss).values()]
    if len(set(tensors)) < len(tensors):
        raise InputError("seeds that share a tensor cannot be stacked; build each its own learner")


def _description(update: UpdateStep) -> dict[str, Any]:
    loss, updater = update.learner.loss, update.learner.target_updater
    plain = (bool, int, float, str, tuple)
    described: dict[str, Any] = {
        "method": type(loss).__name__,
        "steps done": update.step,
        "outputs": list(loss.out_keys),
        **{f"{name}{_ATTRIBUTE}": value for name, value in vars(loss).items() if isinstance(value, plain)},
        **_constants_of(loss),
        "target updater": type(updater).__name__,
        "target updater's rate": getattr(updater, "eps", None),
        "periods": (dict(update.learner.term_periods), update.learner.target_period),
        "stages": tuple(update.learner.stages),
        "precision": update.precision,
        "optimiser": type(update.optimizer).__name__,
    }
    for name, tensor in _state_of(loss).items():
        described[f"the shape of {name}"] = (*tensor.shape, tensor.dtype, str(tensor.device), tensor.requires_grad)
    for number, group in enumerate(update.optimizer.param_groups):
        described |= {f"{name} of optimiser group {number}": value for name, value in group.items() if name != "params"}
    return described


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


@contextmanager
def _naming(seed: int) -> Iterator[None]:
    """Name the seed in a NonFiniteLossError."""
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"seed {seed}: {error}") from error
