# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The training loop, offline and then online: act, sample, update, log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler

from deflow_torchrl.data.union.sampler import native_sampler_state, sampler_state
from deflow_torchrl.errors import EnvironmentFaultError, InputError, NonFiniteLossError
from deflow_torchrl.generators import capture_generators, generators_set_aside, restore_generators
from deflow_torchrl.processes import interruptible, signals_delayed, stop_forced
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.trainers.alarms import Alarms
from deflow_torchrl.trainers.checkpoint import CheckpointNotWritten, load_checkpoint, read_header, save_checkpoint
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.metrics import MetricsLog
from deflow_torchrl.trainers.online import OnlinePhase
from deflow_torchrl.trainers.resume import RunHistory, drop_later_checkpoints
from deflow_torchrl.trainers.update import Update, UpdateStep, restore_learner

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerSchedule:
    """The steps of a run, gradient steps offline and then environment steps, and the intervals between its events.

    An interval of 0 means never, except at the last step of each phase, which always logs, evaluates and saves.

    Attributes:
        offline_steps: gradient steps on the data set.
        online_steps: environment steps after them.
        log_interval: steps between rows of metrics.
        eval_interval: steps between evaluations.
        save_interval: steps between checkpoints.
        utd: gradient steps per environment step.
        warmup_steps: environment steps before the first of these gradient steps.
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
        """Number of steps of both phases."""
        return self.offline_steps + self.online_steps

    def due(self, interval: int, step: int) -> bool:
        """Return whether an event of this interval happens at this step."""
        return (interval > 0 and step % interval == 0) or step in (self.offline_steps, self.steps)

    def steps_ahead(self, step: int) -> int:
        """Count the steps to the next event after ``step``: a row, an evaluation, a checkpoint or the end of a phase."""
        intervals = (self.log_interval, self.eval_interval, self.save_interval)
        due = [(step // interval + 1) * interval for interval in intervals if interval > 0]
        return min([*due, *(end for end in (self.offline_steps, self.steps) if end > step)]) - step

    def is_online(self, step: int) -> bool:
        """Return whether this step (counted from 1) acts in the environment."""
        return step > self.offline_steps

    def phase(self, step: int) -> str:
        """Return the name of a step's phase in rows and records: ``offline`` or ``online``."""
        return "online" if self.is_online(step) else "offline"

    def updates_at(self, step: int) -> int:
        """Return the number of gradient steps at this step."""
        if not self.is_online(step):
            return 1
        acted = step - self.offline_steps - self.warmup_steps
        # The difference of rounded totals: with utd=0.5 every second step has a gradient step.
        after, before = (math.floor(max(count, 0) * self.utd + 1e-9) for count in (acted, acted - 1))
        return after - before


class TrainingLoop(ABC):
    """Takes the steps of a schedule; each is trained, then evaluated, then finished.

    Several steps may be trained at once if nothing is due between them. A step is not interrupted: a signal
    (:data:`~deflow_torchrl.processes.STOP_SIGNALS`) takes effect after it, or between two environment steps of its evaluation.

    Attributes:
        update: the update to call.
        schedule: when to log, evaluate and save.
        step: steps trained so far.
        graphed: does several offline steps of ``update`` at once, up to the next step at which something is due.
        show_progress: show a progress bar on standard error.
    """

    update: Update
    schedule: TrainerSchedule
    graphed: GraphedUpdate | None
    show_progress: bool
    step = 0
    _saved_step = 0
    _torn = False  # whether the state is between two steps: no checkpoint may be written then

    def run(self) -> None:
        """Train from the current step to ``schedule.steps``."""
        bar = progress_bar(
            total=self.schedule.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not self.show_progress,
        )
        with bar, interruptible():
            try:
                while self.unfinished or self.step < self.schedule.steps:
                    if not self.unfinished:
                        self._prepare_step()
                    # An exception anywhere in it would leave networks, optimiser and random generators at different steps.
                    with signals_delayed():
                        if not self.unfinished:
                            before = self.step
                            self._train_step()
                            self._torn = False
                            bar.update(self.step - before)
                        self.evaluate_step()
                        self._finish_step()
            except NonFiniteLossError:
                raise
            except (KeyboardInterrupt, Exception):
                # The steps before a failed evaluation are saved.
                with signals_delayed(closing=True):
                    self._save_whole_step()
                raise
            finally:
                with signals_delayed(closing=True):
                    self._close()

    @property
    @abstractmethod
    def unfinished(self) -> bool:
        """Whether the current step is trained but not yet evaluated and written."""

    @property
    def restorable(self) -> bool:
        """Whether a run can continue exactly from a checkpoint written now."""
        return True

    @abstractmethod
    def evaluate_step(self) -> None:
        """Evaluate if an evaluation is due at the current step."""

    @abstractmethod
    def _train_step(self) -> None:
        """Train one step, or all steps up to the next at which something is due."""

    @abstractmethod
    def _finish_step(self) -> None:
        """Write the step's row of metrics and, if one is due, a checkpoint."""

    @abstractmethod
    def save(self) -> Any:
        """Write a checkpoint of the current step."""

    def _prepare_step(self) -> None:  # noqa: B027 # optional
        """Prepare a step; may be interrupted."""

    def _close(self) -> None:  # noqa: B027
        """End the loop's processes."""

    def _run_updates(
        self, sample: Callable[[], TensorDictBase]
    ) -> tuple[int, TensorDictBase | None, TensorDictBase | None, float]:
        """Do the updates of the next step or, with a graph, of all steps up to the next at which something is due.

        Returns:
            Number of steps, output and batch of the last update (None if the step has no update), and seconds taken.
        """
        began = time.perf_counter()
        count, out, batch = 1, None, None
        if self.graphed is not None:
            count = int(min(self.schedule.steps_ahead(self.step), self.update.updates_to_next_phase))
            self._torn = True
            out, batch = self.graphed(count)
        else:
            for _ in range(self._updates_of_next_step()):
                batch = sample()
                self._torn = True
                out = self.update(batch)
        if self.schedule.due(self.schedule.log_interval, self.step + count):
            self.update.check_finite()  # waits for the device, so that its time is counted
        return count, out, batch, time.perf_counter() - began

    def _updates_of_next_step(self) -> int:
        return self.schedule.updates_at(self.step + 1)

    def _save_whole_step(self) -> None:
        """Save before an error or a signal ends the run, unless the state is between two steps or already saved."""
        if stop_forced() or self._torn or (self._saved_step == self.step and not self.unfinished):
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
                raise  # there is no later checkpoint
            _log.warning("%s; the older ones are whole and the training goes on", error)


@dataclass(eq=False, repr=False)
class Trainer(TrainingLoop):
    """Trains a learner on a data set and, in an online phase, on its own experience.

    A checkpoint is written every ``save_interval`` steps, at the end of each phase, after the best evaluation so far and on
    Ctrl-C (when the step is complete), never after a non-finite loss. A resumed run continues bit for bit on a CPU, with the
    states of the buffer's sampler and generator. Batches that were drawn ahead (``prefetch``) are kept by the union buffer
    alone: after a resume another buffer draws others. If an environment cannot be restored in mid-episode, checkpoints wait
    for the end of the episode, and Ctrl-C before it saves nothing, with a warning.

    Args:
        update: the update to call.
        buffer: samples training batches on the learner's device.

    Keyword Args:
        schedule: when to log, evaluate and save.
        checkpoints: folder of checkpoints.
        online: acts and samples in the online phase; needed with ``schedule.online_steps``.
        metrics: receives the rows; they are dropped if None.
        identity: identity of the run, written into checkpoints (:func:`~deflow_torchrl.trainers.resume.run_identity`).
        history: commands and wall times of the run, kept in each checkpoint.
        extra_state: further plain values for each checkpoint.
        alarms: checks each row of metrics.
        validation: samples batches for ``val/`` losses at evaluations.
        evaluate: evaluates and returns metrics; called every ``eval_interval`` steps.
        score: name of the metric by which checkpoints are compared, larger is better.
        show_progress: show a progress bar on standard error.
        label: prefix of warnings, for several runs in one terminal.
        graphed: does several offline steps of ``update`` at once, up to the next step at which something is due.

    Raises:
        InputError: if the buffer's sampler has a state that cannot be saved without pickle.
        NonFiniteLossError: by :meth:`run`; the last checkpoint is from an earlier step.
        EnvironmentFaultError: by :meth:`run`, if too many episodes failed; a checkpoint was saved.
    """

    update: UpdateStep
    buffer: ReplayBuffer
    _: KW_ONLY
    schedule: TrainerSchedule
    checkpoints: Path
    online: OnlinePhase | None = None
    metrics: MetricsLog | None = None
    identity: Mapping[str, Any] | None = None
    history: RunHistory | None = None
    extra_state: Mapping[str, Any] | None = None
    alarms: Alarms | None = None
    validation: ReplayBuffer | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    score: str | None = None
    show_progress: bool = True
    label: str = ""
    graphed: GraphedUpdate | None = None

    def __post_init__(self) -> None:
        self.notes: dict[str, Any] = {}
        """Plain values about the run, written into each checkpoint and read by :meth:`restore`."""
        self.trained_seconds = 0.0
        # The row of a step that is trained but not yet evaluated and written. A checkpoint written in between holds it, so that
        # the resumed run finishes that step first.
        self._row: dict[str, Any] | None = None
        self._best: float | None = None
        self._score: float | None = None  # of the last finished step
        self._scored: float | None = None  # for the next checkpoint
        self._stop: EnvironmentFaultError | None = None
        self._save_at_episode_end = False
        self._sampling_state()  # one that cannot be saved is refused now

    @property
    def unfinished(self) -> bool:
        """Whether the current step is trained but not yet evaluated and written."""
        return self._row is not None

    @property
    def restorable(self) -> bool:
        """Whether a run can continue exactly from a checkpoint written now: not during an episode that cannot be restored."""
        return self.online is None or self.online.restorable

    def _prepare_step(self) -> None:
        if self.online is not None and not self.online.begun and self.schedule.is_online(self.step + 1):
            self.graphed = None  # frees the memory of its graphs
            self.online.begin(self.update)
            for name, value in self.update.learner.online.items():
                setattr(self.update.learner.loss, name, value)

    def _close(self) -> None:
        if self.online is not None:
            self.online.close()

    def _train_step(self) -> None:
        """Act (in the online phase) and update."""
        online = self.online if self.schedule.is_online(self.step + 1) else None
        if online is not None:
            self._torn = True
            try:
                online.step()
            except EnvironmentFaultError as error:
                self._stop = error  # raised when this step is complete
        count, out, batch, seconds = self._run_updates(lambda: self._sample(online))
        self.take_step(out, batch, count=count, seconds=seconds)

    def take_step(
        self, out: TensorDictBase | None, batch: TensorDictBase | None, *, count: int = 1, seconds: float
    ) -> None:
        """Count a step as trained and make its row of metrics, empty if none is due.

        Args:
            out: output of the step's last update; None if the step has no update.
            batch: batch of that update.

        Keyword Args:
            count: number of steps trained at once.
            seconds: time they took.
        """
        self.trained_seconds += seconds
        self.step += count
        self._score = None
        self._row = {}
        if self.schedule.due(self.schedule.log_interval, self.step):
            self._row = self._row_of(self.online if self.schedule.is_online(self.step) else None, out, batch)

    def _updates_of_next_step(self) -> int:
        step = self.step + 1
        due = super()._updates_of_next_step()
        if self.online is None or not (self.update.learner.whole_episodes and self.schedule.is_online(step)):
            return due
        return self.online.updates_of_ended_episodes(due, last=step == self.schedule.steps)

    def _sample(self, online: OnlinePhase | None) -> TensorDictBase:
        return self.buffer.sample() if online is None else online.sample()

    def _row_of(
        self, online: OnlinePhase | None, out: TensorDictBase | None, batch: TensorDictBase | None
    ) -> dict[str, Any]:
        self.update.check_finite()
        if out is None or batch is None:  # a step without an update (utd, warm-up) is logged too
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
        """Add an evaluation to the current step's row if one is due."""
        if self._row is None or not self.schedule.due(self.schedule.eval_interval, self.step):
            return
        self.update.check_finite()
        if self.validation is not None:
            # A random stream of its own: evaluations do not change the weights that a run ends with.
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
        """Write the current step's row of metrics and return whether a checkpoint is due."""
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
        """Call :meth:`save` with the score of the last closed step's evaluation."""
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
        if not self.update.is_finite():  # a finite loss may have an infinite gradient
            raise NonFiniteLossError(f"the weights became NaN or infinite at step {self.step}")
        if self.metrics is not None:
            self.metrics.sync()
        state = {
            **(self.extra_state or {}),
            "step": self.step,
            "update": self.update.state_dict(),
            **{name: None if part is None else part.state_dict() for name, part in self._parts.items()},
            "sampling": self._sampling_state(),
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
        """The last step whose row is final: the current step, or the one before it while its row is unfinished."""
        return self.step if self._row is None else self.step - 1

    def restore(self, path: Path, *, keep_settings: bool = False) -> None:
        """Load the state of a checkpoint of an equal run; :meth:`resume` also puts the run's folder back.

        Args:
            path: the checkpoint.

        Keyword Args:
            keep_settings: keep this run's settings if they have changed; see :meth:`UpdateStep.load_state_dict`.

        Raises:
            InputError: if the checkpoint is damaged, belongs to another run or does not fit the networks.
        """
        state = load_checkpoint(path, device="cpu", identity=self.identity)
        restore_learner(self.update, state, path, keep_settings=keep_settings)
        if self.graphed is not None:
            self.graphed.reset()
        for name, part in self._parts.items():
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])
        self._load_sampling_state(state.get("sampling"), path)
        self.step = self._saved_step = state["step"]
        self._best = state["best"]
        self.notes = state["notes"]
        self.trained_seconds = state["trained_seconds"]
        self._row = state["unfinished_row"]
        restore_generators(state["generators"])

    def resume(self, path: Path, *, keep_settings: bool = False) -> None:
        """Call :meth:`restore`, and remove rows of metrics and checkpoints of later steps.

        With ``keep_settings`` the checkpoint is rewritten with the new settings, so that the next resume finds no change.
        """
        self.restore(path, keep_settings=keep_settings)
        drop_later_checkpoints(self.checkpoints, self.step)
        if keep_settings:
            self._scored = read_header(path)["score"]
            self.save()
        if self.metrics is not None:
            self.metrics.rewind(self.written_step)

    @property
    def _draws(self) -> tuple[Sampler, torch.Generator | None] | None:
        """The buffer's sampler and generator; None where the online phase's state holds them, or the buffer has none."""
        if not isinstance(self.buffer, ReplayBuffer) or (self.online is not None and self.online.buffer is self.buffer):
            return None
        return self.buffer.sampler, self.buffer._rng

    def _sampling_state(self) -> dict[str, Any] | None:
        if self._draws is None:
            return None
        sampler, generator = self._draws
        numbers = None if generator is None else generator.get_state()
        return {"class": type(sampler).__name__, "sampler": sampler_state(sampler), "generator": numbers}

    def _load_sampling_state(self, state: dict[str, Any] | None, path: Path) -> None:
        if state is None or self._draws is None:
            return
        sampler, generator = self._draws
        if state["class"] != type(sampler).__name__:
            raise InputError(f"{path}: its buffer's sampler is a {state['class']}, here a {type(sampler).__name__}")
        sampler.load_state_dict(native_sampler_state(sampler, state["sampler"]))
        if generator is not None and state["generator"] is not None:
            generator.set_state(state["generator"])

    @property
    def _parts(self) -> dict[str, Any]:
        """The parts of the run with a state of their own."""
        return {"online": self.online, "history": self.history, "alarms": self.alarms}
