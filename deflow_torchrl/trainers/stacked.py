# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One update of several seeds at once: parameters, moments and targets stacked, losses under ``torch.vmap``.

Every seed stays an ordinary learner with an ordinary :class:`UpdateStep`: its tensors are rows of the stacked ones. Its
evaluation, diagnostics and checkpoints are therefore the code of a single run, and what the stack trained goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.objectives.common import LossModule

from deflow_torchrl.errors import CheckpointNotWritten, InputError, NonFiniteLossError
from deflow_torchrl.trainers.checkpoint import list_checkpoints
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.loop import Trainer, TrainingLoop
from deflow_torchrl.trainers.update import Update, UpdateStep, soft_pairs

_COUNT = "step"  # of an optimiser's state of a parameter: the one entry that is no tensor of the parameter's shape
_ATTRIBUTE = " (of the loss)"


class StackedUpdate(Update):
    """Callable that trains S learners of one method on S batches, each as its own :class:`UpdateStep` would.

    Call the stack or, once it is given up, the updates: a seed that was trained alone no longer fits the others.

    Args:
        updates: one for each seed, of equal methods, settings and step; only what they have learned may differ.

    Keyword Args:
        seeds: names of the updates in messages; their numbers by default.

    Raises:
        InputError: if the updates cannot be stacked: what differs, and between which seeds.
        NonFiniteLossError: by calls, on a CPU, as soon as a loss of any seed is NaN or infinite.
        ValueError: by calls, on a batch that is not of S seeds.
    """

    def __init__(self, updates: Sequence[UpdateStep], *, seeds: Sequence[int] | None = None) -> None:
        if not updates:
            raise InputError("there are no updates to stack")
        self.updates = list(updates)
        self.seeds = list(range(len(updates))) if seeds is None else list(seeds)
        self.learner = updates[0].learner
        self.gather()

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Train each seed on its row of ``batch [S, B]``, in which its loss may write, as its update alone would.

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
        """Stack what the updates hold now: needed after any of them loaded a state.

        Raises:
            InputError: as the constructor.
        """
        _check_alike(self.updates, self.seeds)
        own = [_state_of(update.learner.loss) for update in self.updates]
        # id of the template's tensor -> the stacked one
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

    def _compute_losses(self, batch: TensorDictBase) -> TensorDictBase:
        """Losses and metadata of each seed; what the loss writes into its batch is written into the stacked one."""
        template = self.learner.loss

        def one(tensors: Sequence[Tensor], batch: TensorDictBase) -> tuple[dict[str, Tensor], dict[NestedKey, Tensor]]:
            given = dict(batch.items(True, True))
            of_seed = dict(zip(self._stack, tensors, strict=True))
            swapped = self._own.apply(lambda tensor: of_seed.get(id(tensor), tensor), filter_empty=False)
            with swapped.to_module(template, preserve_module_state=False):
                out = template(batch)
            written = {key: value for key, value in batch.items(True, True) if given.get(key) is not value}
            return dict(out.items()), written

        # The terms of a seed depend on its parameters alone: the gradient of the sum holds every seed's own.
        out, written = torch.vmap(one, randomness="different")(self._tensors, batch)
        for key, value in written.items():
            batch.set(key, value)
        return TensorDict(out, batch_size=[len(self.updates)])

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
        """Make each update's moments rows of the stacked ones, and its counts of steps rows of :attr:`_steps`."""
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


class StackedTrainer(TrainingLoop):
    """Trains what a stack holds; every seed's trainer keeps its rows, alarms, evaluations and checkpoints.

    Whenever a checkpoint is due for one seed, all save, so that they always have checkpoints of the same steps and a
    group that was killed between two of them goes on from the step before. Random draws are of torch's global generator,
    whose state every checkpoint has: what goes on from equal steps goes on bit for bit on a CPU.

    Args:
        update: the seeds' updates, stacked.
        buffer: samples the transitions of all seeds' batches on the learners' device: a batch of S B is one of B for each.
        trainers: each seed's, of the stack's updates in their order, at one step; they do not run themselves.

    Keyword Args:
        show_progress: show a progress bar on standard error.
        graphed: ``update`` with its batches, several at once: steps at which nothing is due are left to it.

    Raises:
        NonFiniteLossError: by :meth:`run`, naming the seed; the last checkpoints are from before.
        CheckpointNotWritten: by :meth:`run`, if the last checkpoint of a seed could not be written.
    """

    update: StackedUpdate

    def __init__(
        self,
        update: StackedUpdate,
        buffer: ReplayBuffer,
        trainers: Sequence[Trainer],
        *,
        show_progress: bool = True,
        graphed: GraphedUpdate | None = None,
    ) -> None:
        steps = {trainer.step for trainer in trainers}
        if len(steps) != 1 or len(trainers) != len(update.updates):
            raise ValueError(f"a trainer at one step is needed for each seed, got {len(trainers)} at steps {steps}")
        super().__init__(
            update,
            schedule=trainers[0].schedule,
            step=trainers[0].step,
            graphed=graphed,
            show_progress=show_progress,
        )
        self.buffer = buffer
        self.trainers = list(trainers)

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
            # Kept, they would push out the older ones, which the other seeds have too.
            for path in written:
                if path not in before:  # one that was there already is the same step's
                    path.unlink(missing_ok=True)
            raise
        self._saved_step = self.step


def _trained(updates: Sequence[UpdateStep]) -> Iterator[tuple[Tensor, ...]]:
    """Each parameter of the optimisers, with its like in every update."""
    for groups in zip(*(update.optimizer.param_groups for update in updates), strict=True):
        yield from zip(*(group["params"] for group in groups), strict=True)


def _state_of(loss: LossModule) -> dict[str, Tensor]:
    """What a loss learns, by name: parameters, and buffers of networks (targets, running statistics); each tensor once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in loss.named_modules():
        networks = isinstance(module, TensorDictParams)
        for registry in (module._parameters, module._buffers if networks else {}):
            for name, tensor in registry.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (f"{prefix}.{name}".lstrip("."), tensor))
    return dict(found.values())


def _constants_of(loss: LossModule) -> dict[str, Tensor]:
    """Buffers that are settings."""
    learned = {id(tensor) for tensor in _state_of(loss).values()}
    return {name: buffer for name, buffer in loss.named_buffers() if id(buffer) not in learned}


def _check_alike(updates: Sequence[UpdateStep], seeds: Sequence[int]) -> None:
    """Raise InputError unless the updates differ in nothing but what they have learned."""
    first = _description(updates[0])
    for update, seed in zip(updates[1:], seeds[1:], strict=True):
        described = _description(update)
        for name in {**first, **described}:
            if name.endswith(_ATTRIBUTE) and not (name in first and name in described):
                continue  # not yet computed by one of them
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
        "optimiser": type(update.optimizer).__name__,
    }
    for name, tensor in _state_of(loss).items():
        described[f"the shape of {name}"] = (*tensor.shape, tensor.dtype, str(tensor.device), tensor.requires_grad)
    for number, group in enumerate(update.optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        described |= {f"{name} of optimiser group {number}": value for name, value in options.items()}
        for at, parameter in enumerate(group["params"]):
            state = update.optimizer.state.get(parameter, {})
            described[f"optimiser state {number}.{at}"] = sorted(state)
            if _COUNT in state:
                described[f"optimiser step {number}.{at}"] = float(state[_COUNT])
    return described


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


@contextmanager
def _naming(seed: int) -> Iterator[None]:
    """Say in an error which seed it is of."""
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"seed {seed}: {error}") from error
