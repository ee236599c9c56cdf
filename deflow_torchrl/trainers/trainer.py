# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The offline training loop: sample, update, log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from deflow_torchrl.errors import InputError, NonFiniteLossError
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.trainers.checkpoint import load_checkpoint, save_checkpoint
from deflow_torchrl.trainers.interrupts import Interrupts
from deflow_torchrl.trainers.metrics import MetricsLog
from deflow_torchrl.trainers.update import UpdateStep


@dataclass(frozen=True)
class TrainerSchedule:
    """When things happen, in gradient steps; 0 means never (but for the last step, which always logs and saves).

    Attributes:
        steps: total gradient steps.
        log_interval: steps between rows of metrics.
        eval_interval: steps between evaluations.
        save_interval: steps between checkpoints.
    """

    steps: int
    log_interval: int
    eval_interval: int
    save_interval: int

    def due(self, interval: int, step: int) -> bool:
        """Whether something of this interval happens at this step."""
        return (interval > 0 and step % interval == 0) or step == self.steps


class OfflineTrainer:
    """Trains a learner on a replay buffer.

    A checkpoint is written at every ``save_interval``, at the end and on Ctrl-C (once the step is whole), never after a
    non-finite loss. A run
    resumed from one continues bit for bit on a CPU.

    Args:
        update: the update to call.
        buffer: samples training batches on the learner's device.

    Keyword Args:
        schedule: when to log, evaluate and save.
        checkpoints: folder of checkpoints.
        metrics: where rows go; nowhere, if None.
        identity: what the run is; checkpoints of another one are refused.
        extra_state: plain values to keep in each checkpoint beside the training state.
        validation: samples batches for ``val/`` losses at evaluations.
        evaluate: returns metrics of an evaluation; called every ``eval_interval`` steps.
        show_progress: show a progress bar on standard error.

    Raises:
        NonFiniteLossError: by :meth:`run`; the last checkpoint is from before.
    """

    def __init__(
        self,
        update: UpdateStep,
        buffer: ReplayBuffer,
        *,
        schedule: TrainerSchedule,
        checkpoints: Path,
        metrics: MetricsLog | None = None,
        identity: Mapping[str, Any] | None = None,
        extra_state: Mapping[str, Any] | None = None,
        validation: ReplayBuffer | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.update = update
        self.buffer = buffer
        self.schedule = schedule
        self.metrics = metrics
        self.checkpoints = checkpoints
        self.identity = identity
        self.extra_state = dict(extra_state or {})
        self.validation = validation
        self.evaluate = evaluate
        self.show_progress = show_progress
        self.trained_seconds = 0.0
        # The row of a step that is trained but not yet evaluated and written. It goes into a checkpoint made meanwhile, so
        # that the resumed run finishes that step first.
        self._row: dict[str, Any] | None = None
        self._saved_step = 0

    def run(self) -> None:
        """Train from the current step to ``schedule.steps``."""
        bar = progress_bar(
            total=self.schedule.steps,
            initial=self.update.step,
            desc="train",
            unit="step",
            disable=not self.show_progress,
        )
        with bar, Interrupts() as interrupts:
            try:
                while self._row is not None or self.update.step < self.schedule.steps:
                    if self._row is None:
                        with interrupts.deferred():
                            self._row = self._train_step()
                            bar.update()
                    self._evaluate_if_due(self._row)
                    with interrupts.deferred():
                        self._finish_step(self._row)
                        self._row = None
            except NonFiniteLossError:
                raise
            except (KeyboardInterrupt, Exception):
                # A failed evaluation costs its own time, never the steps before it.
                with interrupts.deferred():
                    if self._saved_step != self.update.step or self._row is not None:
                        self.save()
                raise

    def _train_step(self) -> dict[str, Any]:
        """Update once and return the step's row of metrics, empty where no row is due."""
        began = time.perf_counter()
        out = self.update(self.buffer.sample())
        self.trained_seconds += time.perf_counter() - began
        if not self.schedule.due(self.schedule.log_interval, self.update.step):
            return {}
        self.update.check_finite()
        return {f"train/{name}": float(value) for name, value in out.items()}

    def _evaluate_if_due(self, row: dict[str, Any]) -> None:
        if self.schedule.due(self.schedule.eval_interval, self.update.step):
            self.update.check_finite()
            row.update(self._validation_losses() | ({} if self.evaluate is None else self.evaluate()))

    def _finish_step(self, row: dict[str, Any]) -> None:
        step = self.update.step
        if row and self.metrics is not None:
            seconds = {"time/trained_seconds": round(self.trained_seconds, 3)}
            self.metrics.write({"step": step, "phase": "offline", **row, **seconds})
        if self.schedule.due(self.schedule.save_interval, step):
            self._row = None
            self.save()

    def _validation_losses(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        # Its own random stream: a run with evaluations ends with the same weights as one without.
        state = torch.random.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                losses: TensorDictBase = self.update.learner.loss(self.validation.sample())
        finally:
            torch.random.set_rng_state(state)
            if cuda is not None:
                torch.cuda.set_rng_state_all(cuda)
        return {f"val/{name}": float(losses[name]) for name in self.update.learner.loss_names}

    def save(self) -> Path:
        """Write a checkpoint of the current step.

        Raises:
            NonFiniteLossError: if a loss was not finite; nothing is written then.
        """
        self.update.check_finite()
        generators: dict[str, Any] = {"torch": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state_all()
        state = {
            **self.extra_state,
            "update": self.update.state_dict(),
            "generators": generators,
            "trained_seconds": self.trained_seconds,
            "unfinished_row": self._row,
        }
        path = save_checkpoint(self.checkpoints, self.update.step, state, identity=self.identity)
        self._saved_step = self.update.step
        return path

    @property
    def written_step(self) -> int:
        """The last step whose row of metrics is final: the current one, or the one before while its row is unfinished."""
        return self.update.step if self._row is None else self.update.step - 1

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of an equal run.

        Raises:
            InputError: if it does not fit the networks.
        """
        state = load_checkpoint(path, device="cpu", identity=self.identity)
        restore_learner(self.update, state, path)
        self.trained_seconds = state["trained_seconds"]
        self._row = state["unfinished_row"]
        self._saved_step = self.update.step
        torch.random.set_rng_state(state["generators"]["torch"])
        if "cuda" in state["generators"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["generators"]["cuda"])


def restore_learner(update: UpdateStep, state: dict[str, Any], path: Path) -> None:
    """Load networks and optimiser of a loaded checkpoint.

    Raises:
        InputError: if it does not fit the networks.
    """
    try:
        update.load_state_dict(state["update"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not fit this run's networks: {str(error).splitlines()[0]}") from error
