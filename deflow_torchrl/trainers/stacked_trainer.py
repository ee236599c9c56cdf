# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The training loop of several seeds at once, offline: one update trains them all, the rest is each run's own."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchrl.data import ReplayBuffer

from deflow_torchrl.errors import CheckpointNotWritten, NonFiniteLossError
from deflow_torchrl.trainers.checkpoint import list_checkpoints
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.loop import TrainingLoop
from deflow_torchrl.trainers.stacked import StackedUpdate
from deflow_torchrl.trainers.trainer import Trainer

_log = logging.getLogger(__name__)


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
        self.update = update
        self.buffer = buffer
        self.trainers = list(trainers)
        self.schedule = trainers[0].schedule
        self.step = trainers[0].step
        self.show_progress = show_progress
        self.graphed = graphed
        self._saved_step = self.step
        self._torn = False

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
        began = time.perf_counter()
        count = 1 if self.graphed is None else self.schedule.steps_ahead(self.step)
        if self.graphed is None:
            batch = self.buffer.sample().reshape(len(self.trainers), -1)
            self._torn = True
            out = self.update(batch)
        else:
            self._torn = True
            out, batch = self.graphed(count)
        self.step += count
        due = self.schedule.due(self.schedule.log_interval, self.step)
        if due:
            self.update.check_finite()  # waits for the device, whose time the clock is to count
        seconds = time.perf_counter() - began
        for row, (seed, trainer) in enumerate(self._each()):
            trainer.trained_seconds += seconds
            with _naming(seed):
                trainer.take_step(out[row] if due else None, batch[row] if due else None, count=count)
        self._torn = False

    def _finish_step(self) -> None:
        due = [trainer.close_step() for trainer in self.trainers if trainer.unfinished]
        if any(due):
            self._save_or_warn()

    def _save_what_is_whole(self) -> None:
        if not self._torn and (self._saved_step != self.step or self.unfinished):
            self._save_or_warn()

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except CheckpointNotWritten as error:
            if self.step == self.schedule.steps:
                raise  # nothing comes after it that could make up for it
            _log.warning("%s; the older ones of every seed are whole and the runs go on", error)

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


@contextmanager
def _naming(seed: int) -> Iterator[None]:
    """Say in an error which seed it is of."""
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"seed {seed}: {error}") from error
