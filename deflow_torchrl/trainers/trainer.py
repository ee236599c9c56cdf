# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The training loop, offline and then online: act, sample, update, log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from deflow_torchrl.errors import EnvironmentFaultError, InputError, NonFiniteLossError
from deflow_torchrl.trainers.alarms import Alarms
from deflow_torchrl.trainers.checkpoint import CheckpointNotWritten, load_checkpoint, save_checkpoint
from deflow_torchrl.trainers.generators import capture_generators, generators_set_aside, restore_generators
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.history import RunHistory
from deflow_torchrl.trainers.loop import TrainingLoop
from deflow_torchrl.trainers.metrics import MetricsLog
from deflow_torchrl.trainers.online import OnlinePhase
from deflow_torchrl.trainers.update import UpdateStep

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

    def updates_at(self, step: int) -> int:
        """Gradient steps of this step."""
        if not self.is_online(step):
            return 1
        acted = step - self.offline_steps - self.warmup_steps
        # A share of the count so far, not of this step: with utd=0.5 every second step has one.
        return self._updates_after(acted) - self._updates_after(acted - 1)

    def _updates_after(self, acted: int) -> int:
        return math.floor(max(acted, 0) * self.utd + 1e-9)


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
        identity: what the checkpoints belong to (:func:`~deflow_torchrl.trainers.identity.run_identity`).
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
        self.update = update
        self.graphed = graphed
        self.buffer = buffer
        self.schedule = schedule
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
        self.show_progress = show_progress
        self.label = label
        self.step = 0
        self.notes: dict[str, Any] = {}
        """Plain values that belong to the run so far: kept in each checkpoint, found again after :meth:`restore`."""
        self.trained_seconds = 0.0
        # The row of a step that is trained but not yet evaluated and written. It goes into a checkpoint made meanwhile, so
        # that the resumed run finishes that step first.
        self._row: dict[str, Any] | None = None
        self._saved_step = 0
        self._best: float | None = None
        self._score: float | None = None  # of the closed step
        self._scored: float | None = None  # of the evaluation that the next checkpoint stands for
        # Up while a step is half done: its state is of no step, and no checkpoint may be made of it.
        self._torn = False
        self._stop: EnvironmentFaultError | None = None
        self._save_at_episode_end = False

    @property
    def unfinished(self) -> bool:
        """Whether the current step is trained but not yet evaluated and written."""
        return self._row is not None

    def _prepare_step(self) -> None:
        if self.online is not None and not self.online.begun and self.schedule.is_online(self.step + 1):
            self.graphed = None  # and the memory of its graphs with it
            self.online.begin(self.update)

    def _close(self) -> None:
        if self.online is not None:
            self.online.close()

    def _save_what_is_whole(self) -> None:
        if self._torn or (self._saved_step == self.step and self._row is None):
            return
        if self._restorable:
            self._save_or_warn()
        else:
            _log.warning("step %d is not saved: the environment cannot be restored in mid-episode", self.step)

    @property
    def _restorable(self) -> bool:
        return self.online is None or self.online.restorable

    def _train_step(self) -> None:
        """Act (online) and update."""
        step = self.step + 1
        online = self.online if self.schedule.is_online(step) else None
        if online is not None:
            self._torn = True
            try:
                online.step()
            except EnvironmentFaultError as error:
                self._stop = error  # once this step is whole
        out, batch = None, None
        if self.graphed is not None and online is None:
            count = self.schedule.steps_ahead(self.step)
            self._torn = True
            began = time.perf_counter()
            out, batch = self.graphed(count)
            if self.schedule.due(self.schedule.log_interval, self.step + count):
                self.update.check_finite()  # waits for the device, whose time the clock is to count
            self.trained_seconds += time.perf_counter() - began
            self.take_step(out, batch, count=count)
            self._torn = False
            return
        for _ in range(self.schedule.updates_at(step)):
            began = time.perf_counter()
            batch = self._sample(online)
            self._torn = True
            out = self.update(batch)
            self.trained_seconds += time.perf_counter() - began
        self.take_step(out, batch)
        self._torn = False

    def take_step(self, out: TensorDictBase | None, batch: TensorDictBase | None, *, count: int = 1) -> None:
        """Count a step as trained and make its row of metrics, empty where none is due.

        Args:
            out: what the step's last update returned; None, if it had none.
            batch: what that update was called with.

        Keyword Args:
            count: how many steps were trained at once.
        """
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
        self._check_alarms(self.step, row)
        return row

    def _check_alarms(self, step: int, row: Mapping[str, float]) -> None:
        if self.alarms is None:
            return
        if self.online is not None:
            self.alarms.see_reward(self.online.largest_reward)
        for alarm in self.alarms.check({"step": step, **row}):
            _log.warning("%sstep %d: %s", self.label, alarm.step, alarm.message)

    def evaluate_step(self) -> None:
        """Add an evaluation to the current step's row, if one is due."""
        if self._row is not None and self.schedule.due(self.schedule.eval_interval, self.step):
            self.update.check_finite()
            self._row.update(self._validation_losses() | ({} if self.evaluate is None else self.evaluate()))

    def _finish_step(self) -> None:
        if self.close_step() or self._save_at_episode_end:
            self._keep_score()
            self._save_when_restorable()
        if self._stop is not None:
            raise self._stop

    def close_step(self) -> bool:
        """Write the current step's row of metrics; whether a checkpoint is due."""
        row = self._row or {}
        if row and self.metrics is not None:
            phase = "online" if self.schedule.is_online(self.step) else "offline"
            self.metrics.write({"step": self.step, "phase": phase, **row, **self._seconds()})
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

    def _seconds(self) -> dict[str, float]:
        seconds = {"time/trained_seconds": round(self.trained_seconds, 3)}
        if self.online is not None and self.online.begun:
            seconds["time/waiting_seconds"] = round(self.online.waiting_seconds, 3)
        return seconds

    def _save_when_restorable(self) -> None:
        if self._restorable or self.step == self.schedule.steps:
            self._save_at_episode_end = False
            self._save_or_warn()
        elif not self._save_at_episode_end:
            self._save_at_episode_end = True
            _log.warning(
                "the environment cannot be restored in mid-episode: the checkpoint of step %d falls on the end of this episode",
                self.step,
            )

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except CheckpointNotWritten as error:
            if self.step == self.schedule.steps:
                raise  # nothing comes after it that could make up for it
            _log.warning("%s; the older ones are whole and the run goes on", error)

    def _validation_losses(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        # Its own random stream: a run with evaluations ends with the same weights as one without.
        with torch.no_grad(), generators_set_aside(seed=0):
            losses: TensorDictBase = self.update.learner.loss(self.validation.sample())
        return {f"val/{name}": float(losses[name]) for name in self.update.learner.loss_names}

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
            "online": None if self.online is None else self.online.state_dict(),
            "best": self._best,
            "notes": self.notes,
            "history": None if self.history is None else self.history.state_dict(),
            "generators": capture_generators(),
            "alarms": None if self.alarms is None else self.alarms.state_dict(),
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
        """Go on from a checkpoint of an equal run.

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
        if self.online is not None and state["online"] is not None:
            self.online.load_state_dict(state["online"])
        self.step = state["step"]
        self._best = state["best"]
        self.notes = state["notes"]
        if self.history is not None and state["history"] is not None:
            self.history.load_state_dict(state["history"])
        self.trained_seconds = state["trained_seconds"]
        self._row = state["unfinished_row"]
        self._saved_step = self.step
        if self.alarms is not None and state["alarms"] is not None:
            self.alarms.load_state_dict(state["alarms"])
        restore_generators(state["generators"])


def restore_learner(update: UpdateStep, state: dict[str, Any], path: Path, *, keep_settings: bool = False) -> None:
    """Load networks and optimiser of a loaded checkpoint; ``keep_settings`` as in :meth:`UpdateStep.load_state_dict`.

    Raises:
        InputError: if it does not fit the networks.
    """
    try:
        update.load_state_dict(state["update"], keep_settings=keep_settings)
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not fit this run's networks: {str(error).splitlines()[0]}") from error
