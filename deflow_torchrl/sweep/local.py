# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The engine ``local``: one process per job, as many at once as this machine has cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from deflow_torchrl.processes import (
    available_cores,
    children_ignore_signals,
    die_with_parent,
    keep_freed_memory,
    signals_delayed,
    take_stop_signals,
    unblock_stop_signals,
)
from deflow_torchrl.sweep.jobs import Job, Outcome, describe_error, run_job

# Modules that every job needs, imported once.
_PRELOADED = ["deflow_torchrl.runs.run", "deflow_torchrl.reports.page", "yaml", "gymnasium"]


@dataclass
class _Running:
    job: Job
    process: Any
    results: Connection


class LocalEngine:
    """Run each job in a process of its own, so that a crash or a lack of memory ends that job only.

    On a CPU the processes are forked from a process that has only imported the package. A forked process cannot use a GPU, so
    there, and on Windows, each process is started anew.

    Args:
        jobs: how many run at once.
        sweep: the sweep's folder; the jobs' output is written below it.

    Keyword Args:
        gpu: whether they use an accelerator.
    """

    def __init__(self, jobs: int, sweep: Path, *, gpu: bool) -> None:
        self.jobs = jobs
        self.threads = max(1, available_cores() // jobs)
        self._sweep = sweep
        self._forked = not gpu and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if self._forked else "spawn")
        self._running: list[_Running] = []

    def __enter__(self) -> LocalEngine:
        if self._forked:
            self._context.set_forkserver_preload(_PRELOADED)
            with children_ignore_signals(), _few_threads(self.threads):
                forkserver.ensure_running()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def free(self) -> int:
        """Number of further jobs that can start now."""
        return self.jobs - len(self._running)

    def start(self, job: Job) -> None:
        """Start a job's process."""
        log = job.log(self._sweep)
        log.parent.mkdir(parents=True, exist_ok=True)
        results, theirs = self._context.Pipe(duplex=False)
        arguments = (job, theirs, str(log), self.threads)
        process = self._context.Process(target=_work, args=arguments, name=job.name)
        with children_ignore_signals(), _few_threads(self.threads):
            process.start()
        theirs.close()
        self._running.append(_Running(job, process, results))

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Wait up to so many seconds for a job to end; returns the jobs that have ended."""
        if not self._running:
            time.sleep(seconds)
            return []
        ended = set(wait([running.process.sentinel for running in self._running], timeout=seconds))
        over = [running for running in self._running if running.process.sentinel in ended]
        self._running = [running for running in self._running if running not in over]
        return [(running.job, _outcome(running)) for running in over]

    def interrupt(self) -> None:
        """Ask every job to save and end."""
        for running in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill every running job; checkpoints are whole at any moment."""
        for running in self._running:
            _kill_group(running.process.pid)
            running.process.kill()
            running.process.join()
        self._running = []


def _outcome(running: _Running) -> Outcome:
    process, outcome = running.process, None
    process.join()
    with contextlib.suppress(EOFError, OSError):
        if running.results.poll():
            outcome = running.results.recv()
    running.results.close()
    _kill_group(process.pid)  # processes that it has left running
    if outcome is not None:
        return outcome
    if process.exitcode is not None and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        memory = " (was the memory full?)" if name == "SIGKILL" else ""
        return Outcome("failed", f"the process was ended by {name}{memory}")
    return Outcome("failed", f"the process ended with exit code {process.exitcode}")


def _work(job: Job, results: Connection, log: str, threads: int) -> None:
    """Run a job in this process of its own."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches the sweep, which interrupts its jobs
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 # for the life of the process
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    die_with_parent()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(torch|tensordict|torchrl)")
    try:
        take_stop_signals()
        unblock_stop_signals()
        import torch

        keep_freed_memory()
        torch.set_num_threads(threads)  # the job's own setting of threads overrides it later
        outcome = run_job(job)
    except KeyboardInterrupt:
        outcome = Outcome("interrupted")
    except BaseException as error:
        traceback.print_exc()
        outcome = Outcome("failed", describe_error(error))
    if outcome.kind != "done":
        print(f"{outcome.kind}: {outcome.message}", file=sys.stderr)  # noqa: T201 # the job's log
    with signals_delayed(closing=True):
        results.send(outcome)
        results.close()


def _kill_group(pid: int) -> None:
    """Kill a job's process and the processes it has started to step its environments; on Windows those end by themselves."""
    if not hasattr(os, "killpg"):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def _few_threads(number: int) -> Iterator[None]:
    """Set the number of threads of processes started in this block; :func:`_work` sets it again for builds without OpenMP."""
    saved = os.environ.copy()
    os.environ["OMP_NUM_THREADS"] = str(number)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see deflow_torchrl.cli.main
    try:
        yield
    finally:
        for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
            os.environ.pop(name, None)
            if name in saved:
                os.environ[name] = saved[name]
