# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Run a sweep: an engine runs the jobs, failed jobs are tried again, ``status.jsonl`` logs every change of a job's state."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import deque
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from deflow_torchrl import __version__
from deflow_torchrl.errors import InputError, MissingExtraError, RunInterrupted
from deflow_torchrl.paths import hold_lock, make_writable_folder, write_text
from deflow_torchrl.processes import interruptible, raise_if_stopped
from deflow_torchrl.runs.folder import SWEEP_LOCK
from deflow_torchrl.sweep.jobs import (
    Job,
    JobProgress,
    Outcome,
    check_devices,
    have_data,
    is_done,
    jobs_at_once,
    plan_jobs,
)
from deflow_torchrl.sweep.plan import PLAN_FILE, STATUS_FILE, SweepPlan, uses_gpu

if TYPE_CHECKING:
    from deflow_torchrl.sweep.progress import SweepProgress

_LOOK_SECONDS = 1.0
_SAVING_SECONDS = 120.0  # after Ctrl-C, before jobs that still run are killed
_LOSSES = 10  # a job that was lost more often is not started again


class Engine(AbstractContextManager["Engine"], Protocol):
    """Interface of what runs jobs."""

    @property
    def free(self) -> int:
        """Number of further jobs that can start now."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Wait up to so many seconds for a job to end; returns the jobs that have ended."""

    def interrupt(self) -> None:
        """Ask every job to save and end."""

    def kill(self) -> None:
        """Kill every running job."""


def run_sweep(plan: SweepPlan, *, show_progress: bool = True, live: bool | None = None) -> dict[str, Any]:
    """Run the jobs of a sweep that are not finished.

    Args:
        plan: the jobs and how to run them, for example from :func:`~deflow_torchrl.sweep.parse_sweep`.

    Keyword Args:
        show_progress: show its progress on standard error.
        live: show bars that are redrawn instead of lines; by default if standard error is a terminal.

    Returns:
        ``out``; ``jobs`` (job -> ``state``, ``attempts``, ``folder``, ``host``, ``message``, ``log``); ``done``, the number of
        finished jobs; ``ran``, the number of those finished by this call; ``failed``, the names of the unfinished jobs;
        ``left_out`` (cell -> the reason why it cannot be trained); ``seconds``.

    Raises:
        InputError: if another sweep works in the folder, a run in it has other settings, or the engine, the device or the data
            are not available; nothing was run then.
        MissingExtraError: without the extra ``ray``, for that engine.
        RunInterrupted: on Ctrl-C, after every running job has saved; the same call resumes the sweep.
    """
    make_writable_folder(plan.out)
    busy = f"another sweep works in {plan.out}, wait for it or choose another folder with out="
    with interruptible(), hold_lock(plan.out / SWEEP_LOCK, busy=busy, distrust_hosts=True):
        return _Sweep(plan).run(show_progress=show_progress, live=live)


def make_engine(plan: SweepPlan) -> Engine:
    """Make the engine of a plan, to be used in a ``with`` block.

    Raises:
        MissingExtraError: without the extra ``ray``, for that engine.
    """
    gpu = uses_gpu(plan)
    if plan.engine == "ray":
        from deflow_torchrl.sweep.ray import RayEngine

        gpus = float(gpu) if plan.num_gpus is None else plan.num_gpus
        return RayEngine(plan.ray_address, num_cpus=plan.num_cpus, num_gpus=gpus)
    from deflow_torchrl.sweep.local import LocalEngine

    return LocalEngine(jobs_at_once(plan), plan.out, gpu=gpu)


class _Sweep:
    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.local = plan.engine == "local"
        self.jobs = {job.name: JobProgress(job) for job in plan_jobs(plan)}
        self.ran = 0
        self.shown: SweepProgress | None = None

    def run(self, *, show_progress: bool, live: bool | None) -> dict[str, Any]:
        plan, began = self.plan, time.monotonic()
        for progress in self.jobs.values():
            progress.state = "done" if is_done(progress.job) else "waiting"
        waiting = deque(progress.job for progress in self.jobs.values() if progress.state == "waiting")
        if waiting and self.local:
            check_devices(plan)
        have_data(plan, waiting, show_progress=show_progress)
        with ExitStack() as stack:
            engine = stack.enter_context(make_engine(plan)) if waiting else None
            _write_plan(plan)
            if show_progress:
                self.shown = stack.enter_context(_progress(self.jobs, live=live))
            if left_out := len(plan.cells) - len(plan.trained):
                self._say(f"{left_out} of {len(plan.cells)} cells cannot be trained in this version: see {PLAN_FILE}")
            self._show()
            if engine is not None:
                self._work(engine, waiting)
        failed = [name for name, progress in self.jobs.items() if progress.state != "done"]
        return {
            "out": str(plan.out),
            "done": len(self.jobs) - len(failed),
            "ran": self.ran,
            "failed": failed,
            "left_out": plan.left_out,
            "jobs": {
                name: {
                    "state": progress.state,
                    "attempts": progress.attempts,
                    "folder": progress.job.out,
                    "host": progress.host,
                    "message": progress.message,
                    "log": str(progress.job.log(plan.out)) if self.local else None,
                }
                for name, progress in self.jobs.items()
            },
            "seconds": round(time.monotonic() - began, 1),
        }

    def _work(self, engine: Engine, waiting: deque[Job]) -> None:
        running: set[str] = set()
        try:
            while waiting or running:
                raise_if_stopped()
                while waiting and engine.free > 0:
                    job = waiting.popleft()
                    self._start(engine, job)
                    running.add(job.name)
                for job, outcome in engine.wait(_LOOK_SECONDS):
                    running.discard(job.name)
                    if self._take(job, outcome):
                        waiting.append(job)
                for name in running:
                    self._look(self.jobs[name])
                self._show()
        except KeyboardInterrupt as error:
            self._interrupt(engine, running)
            command = self.plan.command
            how = f"the same command goes on: {command}" if command.startswith("deflow ") else "the same call goes on"
            done = sum(progress.state == "done" for progress in self.jobs.values())
            raise RunInterrupted(
                f"interrupted, {done} of {len(self.jobs)} jobs are done and the others kept; {how}"
            ) from error

    def _start(self, engine: Engine, job: Job) -> None:
        progress = self.jobs[job.name]
        progress.attempts += 1
        progress.message, progress.host, progress.started = "", None, time.time()
        progress.look()
        engine.start(job)
        if self.local:
            progress.state = "running"
            self._note(progress)

    def _look(self, progress: JobProgress) -> None:
        """Read a job's metrics; a job on Ray counts as running while its lock is held."""
        progress.look()
        if progress.state == "running":
            return
        with contextlib.suppress(OSError):
            if progress.job.lock.stat().st_mtime < progress.started - 1:
                return  # left by a process that was killed
            if host := progress.job.lock.read_text(encoding="utf-8").split():
                progress.state, progress.host = "running", host[0]
                self._note(progress)

    def _take(self, job: Job, outcome: Outcome) -> bool:
        """Record a job's end; returns whether the job is to be started again."""
        progress = self.jobs[job.name]
        again = False
        if outcome.kind == "done":
            self.ran += 1
        elif outcome.kind in ("lost", "interrupted"):  # by something other than this sweep
            progress.losses += 1
            again = progress.losses <= _LOSSES
        elif outcome.kind == "failed":
            again = progress.attempts - progress.losses <= self.plan.retries
        self._end(progress, outcome, "waiting" if again else "failed")
        return again

    def _end(self, progress: JobProgress, outcome: Outcome, otherwise: str) -> None:
        progress.state = "done" if outcome.kind == "done" else otherwise
        progress.host, progress.message = outcome.host or progress.host, outcome.message
        progress.look()
        self._note(progress, outcome)

    def _interrupt(self, engine: Engine, running: set[str]) -> None:
        self._say(f"interrupted: {len(running)} jobs save their state (again Ctrl-C: end them now)")
        with contextlib.suppress(KeyboardInterrupt):
            engine.interrupt()
            until = time.monotonic() + _SAVING_SECONDS
            while running and time.monotonic() < until:
                for job, outcome in engine.wait(_LOOK_SECONDS):
                    running.discard(job.name)
                    self._end(self.jobs[job.name], outcome, "interrupted")
        engine.kill()
        for name in running:
            self.jobs[name].state = "interrupted"
            self._note(self.jobs[name])
        self._show()

    def _note(self, progress: JobProgress, outcome: Outcome | None = None) -> None:
        """Append a job's state to ``status.jsonl``, a line in one write, so that a reader sees whole lines."""
        row = {
            "time": round(time.time(), 3),
            "job": progress.job.name,
            "state": progress.state,
            "outcome": None if outcome is None else outcome.kind,
            "attempt": progress.attempts,
            "host": progress.host or (socket.gethostname() if self.local else None),
            "step": progress.step,
            "message": progress.message,
        }
        with (self.plan.out / STATUS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _show(self) -> None:
        if self.shown is not None:
            self.shown.show()

    def _say(self, text: str) -> None:
        if self.shown is not None:
            self.shown.say(text)


def _progress(jobs: dict[str, JobProgress], *, live: bool | None) -> SweepProgress:
    try:
        from deflow_torchrl.sweep.progress import SweepProgress
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "rich", "cli") from error
    return SweepProgress(jobs, live=live)


def _write_plan(plan: SweepPlan) -> None:
    """Add the plan to those that have filled the folder, unless it is the last one again."""
    path = plan.out / PLAN_FILE
    new = plan.as_dict() | {"version": __version__}
    plans: list[dict[str, Any]] = []
    if path.is_file():
        try:
            plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} is damaged; move it away, the runs do not need it") from error
    if not plans or {**plans[-1], "command": None} != {**new, "command": None}:
        write_text(path, json.dumps({"plans": [*plans, new]}, indent=2) + "\n")
