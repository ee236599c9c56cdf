# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The training loop, offline and then online: act, sample, update, log, evaluate, save."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from deflow_torchrl.errors import EnvironmentFaultError, NonFiniteLossError
from deflow_torchrl.generators import capture_generators, generators_set_aside, restore_generators
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.trainers.alarms import Alarms
from deflow_torchrl.trainers.checkpoint import CheckpointNotWritten, load_checkpoint, save_checkpoint
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.metrics import MetricsLog
from deflow_torchrl.trainers.online import OnlinePhase
from deflow_torchrl.trainers.resume import RunHistory, drop_later_checkpoints
from deflow_torchrl.trainers.update import Update, UpdateStep, restore_learner

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerSchedule:
    """When things happen, in steps: gradient steps offline, then environment steps.

    An interval of 0 means never, but for the last step of each phase, which always logs, evaluates and saves.

    Attributes:
        offline_steps: gradient steps on the data set.
        online_steps: environment steps after them.
        log_interval: steps between rows of metrics.
        eval_interval: steps between evaluations.
        save_interval: steps between checkpoints.
        utd: gradient steps per environment step.
        warmup_steps: environment steps before the first of those.
    """

    offline_steps: int
    log_interval: int
    eval_interval: int
    save_interval: int
    online_steps: int = 0
    utd: float = 1.0
    warmup_steps: int = 0

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.offline_steps + self.online_steps

    def due(self, interval: int, step: int) -> bool:
        """Whether something of this interval happens at this step."""
        return (interval > 0 and step % interval == 0) or step in (self.offline_steps, self.steps)

    def steps_ahead(self, step: int) -> int:
        """Steps from ``step`` to the next at which something happens: a row, an evaluation, a checkpoint, a phase's end."""
        intervals = (self.log_interval, self.eval_interval, self.save_interval)
        due = [(step // interval + 1) * interval for interval in intervals if interval > 0]
        return min([*due, *(end for end in (self.offline_steps, self.steps) if end > step)]) - step

    def is_online(self, step: int) -> bool:
        """Whether this step (counted from 1) acts in the environment."""
        return step > self.offline_steps

    def phase(self, step: int) -> str:
        """``offline`` or ``online``, as rows and records name the phase of a step."""
        return "online" if self.is_online(step) else "offline"

    def updates_at(self, step: int) -> int:
        """Gradient steps of this step."""
        if not self.is_online(step):
            return 1
        acted = step - self.offline_steps - self.warmup_steps
        # A share of the count so far, not of this step: with utd=0.5 every second step has one.
        after, before = (math.floor(max(count, 0) * self.utd + 1e-9) for count in (acted, acted - 1))
        return after - before


class Interrupts:
    """Context in which SIGINT and SIGTERM raise KeyboardInterrupt, but never inside :meth:`deferred` blocks.

    An exception in the middle of an update would leave networks, optimiser and random generators at different steps, and such
    a state could not be resumed exactly. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back; one that came is raised at the end of the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


class TrainingLoop(ABC):
    """Takes steps until there are as many as the schedule has; a step is trained, then evaluated, then finished.

    Steps at which nothing is due may be trained several at once. A step is trained and finished without interruption: Ctrl-C
    takes effect before, after, or in an evaluation.

    Args:
        update: the update to call.

    Keyword Args:
        schedule: when to log, evaluate and save.
        step: steps trained so far.
        graphed: ``update`` with its batches, several at once; offline steps at which nothing is due are left to it.
        show_progress: show a progress bar on standard error.
    """

    update: Update

    def __init__(
        self,
        update: Update,
        *,
        schedule: TrainerSchedule,
        step: int = 0,
        graphed: GraphedUpdate | None,
        show_progress: bool,
    ) -> None:
        self.update = update
        self.schedule = schedule
        self.step = step
        self.graphed = graphed
        self.show_progress = show_progress
        self._saved_step = step
        # True while a step is half done: the state is between two steps, and no checkpoint may be written.
        self._torn = False

    def run(self) -> None:
        """Train from the current step to ``schedule.steps``."""
        bar = progress_bar(
            total=self.schedule.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not self.show_progress,
        )
        with bar, Interrupts() as interrupts:
            try:
                while self.unfinished or self.step < self.schedule.steps:
                    if not self.unfinished:
                        self._prepare_step()
                        with interrupts.deferred():
                            before = self.step
                            self._train_step()
                            self._torn = False
                            bar.update(self.step - before)
                    self.evaluate_step()
                    with interrupts.deferred():
                        self._finish_step()
            except NonFiniteLossError:
                raise
            except (KeyboardInterrupt, Exception):
                # A failed evaluation costs its own time, never the steps before it.
                with interrupts.deferred():
                    self._save_whole_step()
                raise
            finally:
                self._close()

    @property
    @abstractmethod
    def unfinished(self) -> bool:
        """Whether the current step is trained but not yet evaluated and written."""

    @property
    def restorable(self) -> bool:
        """Whether a checkpoint of this moment goes on exactly."""
        return True

    @abstractmethod
    def evaluate_step(self) -> None:
        """Evaluate, if the current step is to be evaluated."""

    @abstractmethod
    def _train_step(self) -> None:
        """Train one step, or several up to the next one at which something is due."""

    @abstractmethod
    def _finish_step(self) -> None:
        """Write the step's row of metrics and, where one is due, a checkpoint."""

    @abstractmethod
    def save(self) -> Any:
        """Write a checkpoint of the current step."""

    def _prepare_step(self) -> None:  # noqa: B027 # most have nothing to prepare
        """Do before a step what may be interrupted."""

    def _close(self) -> None:  # noqa: B027
        """End the processes beside the loop."""

    def _run_updates(
        self, sample: Callable[[], TensorDictBase]
    ) -> tuple[int, TensorDictBase | None, TensorDictBase | None, float]:
        """Do the updates of the next step, or of all steps up to the next due one where there is a graph.

        Returns:
            How many steps that were, output and batch of the last update (None where the step has none), and the seconds.
        """
        began = time.perf_counter()
        count, out, batch = 1, None, None
        if self.graphed is not None:
            count = self.schedule.steps_ahead(self.step)
            self._torn = True
            out, batch = self.graphed(count)
        else:
            for _ in range(self.schedule.updates_at(self.step + 1)):
                batch = sample()
                self._torn = True
                out = self.update(batch)
        if self.schedule.due(self.schedule.log_interval, self.step + count):
            self.update.check_finite()  # waits for the device, whose time the clock is to count
        return count, out, batch, time.perf_counter() - began

    def _save_whole_step(self) -> None:
        """Save before an error or Ctrl-C ends the run, unless the state is between two steps or saved already."""
        if self._torn or (self._saved_step == self.step and not self.unfinished):
            return
        if self.restorable:
            self._save_or_warn()
        else:
            _log.warning("step %d is not saved: the environment cannot be restored in mid-episode", self.step)

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except CheckpointNotWritten as error:
            if self.step == self.schedule.steps:
                raise  # nothing comes after it that could make up for it
            _log.warning("%s; the older ones are whole and the training goes on", error)


class Trainer(TrainingLoop):
    """Trains a learner on a data set and, where there is an online phase, on its own experience.

    A checkpoint is written at every ``save_interval``, at the end of each phase, after the best evaluation so far and on
    Ctrl-C (once the step is whole), never after a non-finite loss. A run resumed from one continues bit for bit on a CPU. An
    environment that cannot be restored in mid-episode moves the checkpoint to the episode's end; Ctrl-C then saves nothing
    in between, and says so.

    Args:
        update: the update to call.
        buffer: samples training batches on the learner's device.

    Keyword Args:
        schedule: when to log, evaluate and save.
        checkpoints: folder of checkpoints.
        online: acts and samples in the online phase; ``schedule.online_steps`` need it.
        metrics: where rows go; nowhere, if None.
        identity: what the checkpoints belong to (:func:`~deflow_torchrl.trainers.resume.run_identity`).
        history: commands and wall times of the run, kept in each checkpoint.
        extra_state: plain values to keep in each checkpoint beside the training state.
        alarms: look at each row of metrics.
        validation: samples batches for ``val/`` losses at evaluations.
        evaluate: returns metrics of an evaluation; called every ``eval_interval`` steps.
        score: name of the metric the best checkpoint has most of.
        show_progress: show a progress bar on standard error.
        label: put before warnings, where several runs share a terminal.
        graphed: ``update`` with its batches, several at once: offline steps at which nothing is due are left to it.

    Raises:
        NonFiniteLossError: by :meth:`run`; the last checkpoint is from before.
        EnvironmentFaultError: by :meth:`run`, if too many episodes failed; a checkpoint was saved.
    """

    update: UpdateStep

    def __init__(
        self,
        update: UpdateStep,
        buffer: ReplayBuffer,
        *,
        schedule: TrainerSchedule,
        checkpoints: Path,
        online: OnlinePhase | None = None,
        metrics: MetricsLog | None = None,
        identity: Mapping[str, Any] | None = None,
        history: RunHistory | None = None,
        extra_state: Mapping[str, Any] | None = None,
        alarms: Alarms | None = None,
        validation: ReplayBuffer | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        score: str | None = None,
        show_progress: bool = True,
        label: str = "",
        graphed: GraphedUpdate | None = None,
    ) -> None:
        super().__init__(update, schedule=schedule, graphed=graphed, show_progress=show_progress)
        self.buffer = buffer
        self.metrics = metrics
        self.checkpoints = checkpoints
        self.online = online
        self.identity = identity
        self.history = history
        self.extra_state = dict(extra_state or {})
        self.alarms = alarms
        self.validation = validation
        self.evaluate = evaluate
        self.score = score
        self.label = label
        self.notes: dict[str, Any] = {}
        """Plain values that belong to the run so far: kept in each checkpoint, found again after :meth:`restore`."""
        self.trained_seconds = 0.0
        # The row of a step that is trained but not yet evaluated and written. It goes into a checkpoint made meanwhile, so
        # that the resumed run finishes that step first.
        self._row: dict[str, Any] | None = None
        self._best: float | None = None
        self._score: float | None = None  # of the closed step
        self._scored: float | None = None  # of the evaluation that the next checkpoint stands for
        self._stop: EnvironmentFaultError | None = None
        self._save_at_episode_end = False

    @property
    def unfinished(self) -> bool:
        """Whether the current step is trained but not yet evaluated and written."""
        return self._row is not None

    @property
    def restorable(self) -> bool:
        """Whether a checkpoint of this moment goes on exactly: not where an episode runs that cannot be restored."""
        return self.online is None or self.online.restorable

    def _prepare_step(self) -> None:
        if self.online is not None and not self.online.begun and self.schedule.is_online(self.step + 1):
            self.graphed = None  # and the memory of its graphs with it
            self.online.begin(self.update)

    def _close(self) -> None:
        if self.online is not None:
            self.online.close()

    def _train_step(self) -> None:
        """Act (online) and update."""
        online = self.online if self.schedule.is_online(self.step + 1) else None
        if online is not None:
            self._torn = True
            try:
                online.step()
            except EnvironmentFaultError as error:
                self._stop = error  # once this step is whole
        count, out, batch, seconds = self._run_updates(lambda: self._sample(online))
        self.take_step(out, batch, count=count, seconds=seconds)

    def take_step(
        self, out: TensorDictBase | None, batch: TensorDictBase | None, *, count: int = 1, seconds: float
    ) -> None:
        """Count a step as trained and make its row of metrics, empty where none is due.

        Args:
            out: what the step's last update returned; None, if it had none.
            batch: what that update was called with.

        Keyword Args:
            count: how many steps were trained at once.
            seconds: how long that took.
        """
        self.trained_seconds += seconds
        self.step += count
        self._score = None
        online = self.online if self.schedule.is_online(self.step) else None
        due = self.schedule.due(self.schedule.log_interval, self.step)
        self._row = self._row_of(online, out, batch) if due else {}

    def _sample(self, online: OnlinePhase | None) -> TensorDictBase:
        return self.buffer.sample() if online is None else online.sample()

    def _row_of(
        self, online: OnlinePhase | None, out: TensorDictBase | None, batch: TensorDictBase | None
    ) -> dict[str, Any]:
        self.update.check_finite()
        if out is None or batch is None:  # a step without an update (utd, warm-up) is looked at all the same
            with torch.no_grad(), generators_set_aside():
                batch = self._sample(online)
                out = self.update.learner.loss(batch)
        numbers: dict[str, torch.Tensor] = dict(out.items())
        if self.update.learner.diagnostics is not None:
            numbers |= self.update.learner.diagnostics(batch)
        row = {f"train/{name}": float(value) for name, value in numbers.items()}
        if online is not None:
            row |= online.metrics(batch)
        for name, value in row.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(f"{name} became NaN or infinite at step {self.step}")
        if self.alarms is not None:
            if self.online is not None:
                self.alarms.see_reward(self.online.largest_reward)
            for alarm in self.alarms.check({"step": self.step, **row}):
                _log.warning("%sstep %d: %s", self.label, alarm.step, alarm.message)
        return row

    def evaluate_step(self) -> None:
        """Add an evaluation to the current step's row, if one is due."""
        if self._row is None or not self.schedule.due(self.schedule.eval_interval, self.step):
            return
        self.update.check_finite()
        if self.validation is not None:
            # Its own random stream: a run with evaluations ends with the same weights as one without.
            with torch.no_grad(), generators_set_aside(seed=0):
                losses = self.update.learner.loss(self.validation.sample())
            self._row |= {f"val/{name}": float(losses[name]) for name in self.update.learner.loss_names}
        if self.evaluate is not None:
            self._row |= self.evaluate()

    def _finish_step(self) -> None:
        if self.close_step() or self._save_at_episode_end:
            self._keep_score()
            if self.restorable or self.step == self.schedule.steps:
                self._save_at_episode_end = False
                self._save_or_warn()
            elif not self._save_at_episode_end:
                self._save_at_episode_end = True
                _log.warning(
                    "the environment cannot be restored in mid-episode: the checkpoint of step %d falls on the end of this "
                    "episode",
                    self.step,
                )
        if self._stop is not None:
            raise self._stop

    def close_step(self) -> bool:
        """Write the current step's row of metrics; whether a checkpoint is due."""
        row = self._row or {}
        if row and self.metrics is not None:
            seconds = {"time/trained_seconds": round(self.trained_seconds, 3)}
            if self.online is not None and self.online.begun:
                seconds["time/waiting_seconds"] = round(self.online.waiting_seconds, 3)
            self.metrics.write({"step": self.step, "phase": self.schedule.phase(self.step), **row, **seconds})
        self._row = None
        self._score = row.get(self.score) if self.score is not None else None
        best = self._score is not None and (self._best is None or self._score >= self._best)
        if best:
            self._best = self._score
        return best or self.schedule.due(self.schedule.save_interval, self.step)

    def save_closed_step(self) -> Path:
        """:meth:`save` the step that was closed last, with the score of its evaluation."""
        self._keep_score()
        return self.save()

    def _keep_score(self) -> None:
        self._scored = self._scored if self._score is None else self._score

    def save(self) -> Path:
        """Write a checkpoint of the current step.

        Raises:
            NonFiniteLossError: if a loss or a weight was not finite; nothing is written then.
            CheckpointNotWritten: on a full disk; the older checkpoints stay whole.
        """
        self.update.check_finite()
        if not self.update.is_finite():  # a finite loss may have had a gradient that was not
            raise NonFiniteLossError(f"the weights became NaN or infinite at step {self.step}")
        if self.metrics is not None:
            self.metrics.sync()
        state = {
            **self.extra_state,
            "step": self.step,
            "update": self.update.state_dict(),
            **{name: None if part is None else part.state_dict() for name, part in self._parts.items()},
            "best": self._best,
            "notes": self.notes,
            "generators": capture_generators(),
            "trained_seconds": self.trained_seconds,
            "unfinished_row": self._row,
        }
        path = save_checkpoint(self.checkpoints, self.step, state, identity=self.identity, score=self._scored)
        self._saved_step = self.step
        self._scored = None
        return path

    @property
    def written_step(self) -> int:
        """The last step whose row of metrics is final: the current one, or the one before while its row is unfinished."""
        return self.step if self._row is None else self.step - 1

    def restore(self, path: Path, *, keep_settings: bool = False) -> None:
        """Take the state of a checkpoint of an equal run; its folder is left as it is, see :meth:`resume`.

        Args:
            path: the checkpoint.

        Keyword Args:
            keep_settings: where settings have changed, go on with this run's; see :meth:`UpdateStep.load_state_dict`.

        Raises:
            InputError: if it is damaged, of another run, or does not fit the networks.
        """
        state = load_checkpoint(path, device="cpu", identity=self.identity)
        restore_learner(self.update, state, path, keep_settings=keep_settings)
        if self.graphed is not None:
            self.graphed.reset()
        for name, part in self._parts.items():
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])
        self.step = self._saved_step = state["step"]
        self._best = state["best"]
        self.notes = state["notes"]
        self.trained_seconds = state["trained_seconds"]
        self._row = state["unfinished_row"]
        restore_generators(state["generators"])

    def resume(self, path: Path, *, keep_settings: bool = False) -> None:
        """:meth:`restore`, and remove the rows of metrics and the checkpoints of later steps.

        With ``keep_settings`` the checkpoint is written again with the new settings, so that a later resume finds no change.
        """
        self.restore(path, keep_settings=keep_settings)
        drop_later_checkpoints(self.checkpoints, self.step)
        if keep_settings:
            self.save()
        if self.metrics is not None:
            self.metrics.rewind(self.written_step)

    @property
    def _parts(self) -> dict[str, Any]:
        """The parts of the run that have a state of their own."""
        return {"online": self.online, "history": self.history, "alarms": self.alarms}
