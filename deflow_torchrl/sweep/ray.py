# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The engine ``ray``: one Ray task per job, on a cluster whose nodes share the sweep's folder."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import Any

from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.sweep.jobs import Job, Outcome, describe_error, run_job

_ANSWER_SECONDS = 5.0
_CONNECT_SECONDS = 40.0
_STORE_BYTES = 100 << 20  # Ray takes a third of the memory by default, and a job returns one line


class RayEngine:
    """Run each job as a Ray task in a process of its own, on any node with free resources.

    Ray retries nothing. A lost task has the outcome ``lost``, and the sweep starts its job again from its checkpoints.

    Args:
        address: of the cluster. If None: the cluster this process is connected to, else ``$RAY_ADDRESS``, else a new cluster of
            this machine alone.

    Keyword Args:
        num_cpus: cores of a job.
        num_gpus: GPUs of a job.

    Raises:
        MissingExtraError: without the extra ``ray``.
        InputError: where nothing answers at ``address`` within a minute.
    """

    def __init__(self, address: str | None, *, num_cpus: float, num_gpus: float) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "ray", "ray") from error
        self._ray = ray
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._running: dict[Any, Job] = {}
        self._connected = False

    def __enter__(self) -> RayEngine:
        ray = self._ray
        if not ray.is_initialized():
            if self._address is not None:
                _check_reachable(self._address)
                ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
            else:
                ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, log_to_driver=False,
                         logging_level="ERROR", configure_logging=True)  # fmt: skip
            self._connected = True
        # One process per job: threads, kernels and memory of one job must not affect the next.
        self._task = ray.remote(**self._resources, max_retries=0, max_calls=1)(_run_on_node)
        total = ray.cluster_resources()
        for name, key in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            if self._resources[name] > total.get(key, 0.0):
                self._leave()
                raise InputError(
                    f"a job needs {name}={self._resources[name]:g} and the Ray cluster has {total.get(key, 0.0):g} {key} in all"
                )
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._leave()

    def _leave(self) -> None:
        if self._connected:
            self._ray.shutdown()

    @property
    def free(self) -> int:
        """Number of further jobs that can start now: unlimited, because Ray queues them."""
        return sys.maxsize

    def start(self, job: Job) -> None:
        """Send a job to the cluster."""
        self._running[self._task.options(name=job.name).remote(job)] = job

    def wait(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Wait up to so many seconds for a job to end; returns the jobs that have ended."""
        if not self._running:
            time.sleep(seconds)
            return []
        tasks = list(self._running)
        over, _ = self._ray.wait(tasks, num_returns=len(tasks), timeout=0, fetch_local=False)
        if not over:
            over, _ = self._ray.wait(tasks, num_returns=1, timeout=seconds, fetch_local=False)
        return [(self._running.pop(task), self._outcome(task)) for task in over]

    def _outcome(self, task: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.TaskCancelledError:
            return Outcome("interrupted")
        except errors.RayTaskError as error:  # the job's own errors are outcomes; this one was raised outside the job
            return Outcome("failed", f"on the node: {describe_error(error.cause or error)[:500]}")
        except errors.RayError as error:  # of node, worker or memory
            return Outcome("lost", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def interrupt(self) -> None:
        """Ask every running job to save and end, and cancel those that wait."""
        for task in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(task, force=False)

    def kill(self) -> None:
        """Kill every running job; checkpoints are whole at any moment."""
        for task in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(task, force=True)
        self._running = {}


def _run_on_node(job: Job) -> Outcome:
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or 1)))  # Ray sets it to the task's cores
    return run_job(job)


def _check_reachable(address: str) -> None:
    """Raise InputError if no Ray cluster answers; Ray itself would try for minutes."""
    unreachable = f"no Ray cluster answers at ray_address={address}"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and not port.isdecimal():
        raise InputError(f"ray_address={address} is no address; write HOST:PORT, ray://HOST:PORT or auto")
    if colon:
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"{unreachable} ({getattr(error, 'strerror', None) or error})") from error
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        found = subprocess.run(
            [sys.executable, "-c", code, address],
            capture_output=True,
            text=True,
            timeout=_CONNECT_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{unreachable} (it accepts connections, and is silent for {_CONNECT_SECONDS:g} s)") from error
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise InputError(f"{unreachable} ({lines[-1][:300]})")
