# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The running of a sweep: jobs to an engine, failures again, every change of a job's state to ``status.jsonl``."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from contextlib import ExitStack
from typing import Any, Protocol

from deflow_torchrl import __version__
from deflow_torchrl.errors import InputError, RunInterrupted
from deflow_torchrl.paths import hold_lock, make_writable_folder, write_text
from deflow_torchrl.sweep.jobs import Job, Outcome, check_devices, have_data, is_done, jobs_at_once, plan_jobs
from deflow_torchrl.sweep.plan import PLAN_FILE, STATUS_FILE, SweepPlan, uses_gpu
from deflow_torchrl.sweep.table import JobProgress, Table

_LOOK_SECONDS = 1.0
_SAVING_SECONDS = 120.0  # after Ctrl-C, until what still runs is ended
_LOSSES = 10  # of machines or processes, that one job is sent again after


class Engine(Protocol):
    """Where jobs run."""

    @property
    def free(self) -> int:
        """How many more jobs can start now."""

    def start(self, job: Job) -> None:
        """Start a job."""

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Jobs that have ended, at once or within so many seconds."""

    def interrupt(self) -> None:
        """Ask every job to save and end."""

    def kill(self) -> None:
        """End what still runs at once."""


def run_sweep(plan: SweepPlan, *, show_progress: bool = True, live: bool | None = None) -> dict[str, Any]:
    """Run what is not finished of a sweep, or go on with it.

    Args:
        plan: what is to run, for example of :func:`~deflow_torchrl.sweep.parse_sweep`.

    Keyword Args:
        show_progress: show on standard error how it is doing.
        live: as a table that is drawn again and again; where standard error is a terminal by default.

    Returns:
        ``out``; ``jobs`` (job -> ``state``, ``attempts``, ``folder``, ``host``, ``message``); ``done``, how many are finished,
        and ``ran``, how many of them now; ``failed``, the names of those that are not; ``left_out``, cell -> why it cannot be
        trained; and ``seconds``.

    Raises:
        InputError: if another sweep works in the folder, a run in it has other settings, or the engine, the device or the data
            cannot be had; nothing was run then.
        MissingExtraError: without the extra ``ray``, for that engine.
        RunInterrupted: on Ctrl-C, when every running job has saved; the same call goes on.
    """
    make_writable_folder(plan.out)
    busy = f"another sweep works in {plan.out}; wait for it, or choose another folder with out="
    with hold_lock(plan.out / ".sweep.lock", busy=busy, note=f"{socket.gethostname()} {os.getpid()}"):
        jobs = plan_jobs(plan)
        return _Sweep(plan, jobs, show_progress=show_progress, live=live).run()


def make_engine(plan: SweepPlan) -> Any:
    """The engine a plan asks for, to be used in a ``with`` block.

    Raises:
        MissingExtraError: without the extra ``ray``, for that engine.
    """
    gpu = uses_gpu(plan)
    if plan.engine == "ray":
        from deflow_torchrl.sweep.on_ray import RayEngine

        gpus = float(gpu) if plan.num_gpus is None else plan.num_gpus
        return RayEngine(plan.ray_address, num_cpus=plan.num_cpus, num_gpus=gpus)
    from deflow_torchrl.sweep.local import LocalEngine

    return LocalEngine(jobs_at_once(plan), plan.out, gpu=gpu)


class _Sweep:
    def __init__(self, plan: SweepPlan, jobs: list[Job], *, show_progress: bool, live: bool | None) -> None:
        self.plan = plan
        self.jobs = {job.name: JobProgress(job) for job in jobs}
        self.losses: dict[str, int] = {}
        self.ran = 0
        self.began = time.monotonic()
        self.started: dict[str, float] = {}
        self.shown = show_progress
        self.table = Table(self.jobs, show=show_progress, live=live)

    def run(self) -> dict[str, Any]:
        plan, waiting = self.plan, deque[Job]()
        for name, progress in self.jobs.items():
            if is_done(progress.job):
                progress.state = "done"
            else:
                waiting.append(self.jobs[name].job)
        if waiting and plan.engine == "local":
            check_devices(plan)
        have_data(plan, waiting, show_progress=self.shown)
        with ExitStack() as stack:
            engine: Engine | None = stack.enter_context(make_engine(plan)) if waiting else None
            _write_plan(plan)
            stack.enter_context(self.table)
            if left_out := len(plan.cells) - len(plan.trained):
                self.table.say(
                    f"{left_out} of {len(plan.cells)} cells cannot be trained in this version: see {PLAN_FILE}"
                )
            self.table.update()
            if engine is not None:
                self._work(engine, waiting)
        return self._summary()

    def _work(self, engine: Engine, waiting: deque[Job]) -> None:
        running: set[str] = set()
        try:
            while waiting or running:
                while waiting and engine.free > 0:
                    job = waiting.popleft()
                    self._start(engine, job)
                    running.add(job.name)
                for job, outcome in engine.wait(_LOOK_SECONDS):
                    running.discard(job.name)
                    if self._take(job, outcome):
                        waiting.append(job)
                for name in running:
                    self._see_holder(self.jobs[name])
                self.table.update()
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
        progress.message, progress.host = "", None
        self.started[job.name] = time.time()
        engine.start(job)
        if self.plan.engine == "local":
            progress.state, progress.host = "running", None
            self._note(progress)

    def _see_holder(self, progress: JobProgress) -> None:
        """On Ray a job runs from when somebody has its lock."""
        if self.plan.engine == "local" or progress.state == "running":
            return
        try:
            if progress.job.lock.stat().st_mtime < self.started[progress.job.name] - 1:
                return  # of a process that was killed
            host = progress.job.lock.read_text(encoding="utf-8").split()
        except OSError:
            return
        if host:
            progress.state, progress.host = "running", host[0]
            self._note(progress)

    def _take(self, job: Job, outcome: Outcome) -> bool:
        """Note how a job ended; whether it is to be started again."""
        progress = self.jobs[job.name]
        progress.host = outcome.host or progress.host
        progress.message = outcome.message
        again = False
        if outcome.kind == "done":
            progress.state, progress.message = "done", ""
            self.ran += 1
        elif outcome.kind in ("lost", "interrupted"):  # by others than this sweep
            self.losses[job.name] = self.losses.get(job.name, 0) + 1
            again = self.losses[job.name] <= _LOSSES
        elif outcome.kind == "failed":
            again = progress.attempts - self.losses.get(job.name, 0) <= self.plan.retries
        if outcome.kind != "done":
            progress.state = "waiting" if again else "failed"
        progress.look()
        self._note(progress, outcome)
        return again

    def _interrupt(self, engine: Engine, running: set[str]) -> None:
        self.table.say(f"interrupted: {len(running)} jobs save their state (again Ctrl-C: end them now)")
        try:
            engine.interrupt()
            until = time.monotonic() + _SAVING_SECONDS
            while running and time.monotonic() < until:
                for job, outcome in engine.wait(_LOOK_SECONDS):
                    running.discard(job.name)
                    progress = self.jobs[job.name]
                    progress.state = "done" if outcome.kind == "done" else "interrupted"
                    progress.message = outcome.message
                    progress.look()
                    self._note(progress, outcome)
        except KeyboardInterrupt:
            pass
        engine.kill()
        for name in running:
            self.jobs[name].state = "interrupted"
            self._note(self.jobs[name])

    def _note(self, progress: JobProgress, outcome: Outcome | None = None) -> None:
        """Append a job's state to ``status.jsonl``: a line in one write, so that a reader meets whole ones."""
        row = {
            "time": round(time.time(), 3),
            "job": progress.job.name,
            "state": progress.state,
            "outcome": None if outcome is None else outcome.kind,
            "attempt": progress.attempts,
            "host": progress.host or (socket.gethostname() if self.plan.engine == "local" else None),
            "step": progress.step,
            "message": progress.message,
        }
        with (self.plan.out / STATUS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _summary(self) -> dict[str, Any]:
        failed = [name for name, progress in self.jobs.items() if progress.state != "done"]
        return {
            "out": str(self.plan.out),
            "done": len(self.jobs) - len(failed),
            "ran": self.ran,
            "failed": failed,
            "left_out": {cell.name: cell.left_out for cell in self.plan.cells if cell.left_out is not None},
            "jobs": {
                name: {
                    "state": progress.state,
                    "attempts": progress.attempts,
                    "folder": progress.job.out,
                    "host": progress.host,
                    "message": progress.message,
                    "log": str(progress.job.log(self.plan.out)) if self.plan.engine == "local" else None,
                }
                for name, progress in self.jobs.items()
            },
            "seconds": round(time.monotonic() - self.began, 1),
        }


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
