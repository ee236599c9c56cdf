# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TorchRL's collectors behind one small interface: begin a chunk of transitions, and take it when it is complete.

A chunk is a TensorDict ``[n]`` in the order of delivery: row i comes from worker ``i % W``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector, MultiSyncCollector

from deflow_torchrl.errors import InputError
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.processes import children_ignore_signals, die_with_parent, ignore_stop_signals

_GRACE_S = 5.0  # from a worker's death until its chunk is abandoned


class WorkerDied(RuntimeError):
    """A chunk could not be collected because a worker process ended."""


class LocalSource:
    """A ``Collector`` in this process, which acts with the live weights of the policy.

    Args:
        env: makes the environment.
        policy: the acting policy.
        device: device of the policy.
        steps: length of a chunk.
    """

    running = False

    def __init__(self, env: Callable[[], Any], policy: TensorDictModuleBase, device: torch.device, steps: int) -> None:
        # Unused features that cost time are off: trajectory numbers, wrapping and probing of the policy, buffers (a chunk is
        # stacked anew each time, so nothing needs to be cloned), host synchronisation.
        self._collector = Collector(
            env,
            acting(policy),
            frames_per_batch=steps,
            total_frames=-1,
            policy_device=device,
            env_device="cpu",
            storing_device="cpu",
            trust_policy=True,
            track_traj_ids=False,
            use_buffers=False,
            return_same_td=True,
            no_cuda_sync=True,
            auto_register_policy_transforms=False,
        )
        self._chunks = iter(self._collector)

    def begin(self) -> None:
        """Do nothing: the chunk is collected by :meth:`finish`."""

    def finish(self) -> TensorDictBase:
        """Collect a chunk."""
        chunk = next(self._chunks)
        chunk.names = None  # other transitions have no dimension name "time"
        return chunk

    def close(self) -> None:
        """Close the environment."""
        self._collector.shutdown(raise_on_error=False)  # a broken simulator may fail in its close, too


class ProcessSource:
    """A ``MultiSyncCollector`` that is waited for in a thread, so that this process is not blocked.

    Args:
        envs: one maker of an environment for each worker.
        policy: the acting policy of every process; its weights are in shared memory, so weights written between two chunks
            hold for the next one.
        steps: length of a chunk, a multiple of the number of workers.

    Raises:
        InputError: if an environment cannot be made.
        WorkerDied: if a process ended during its set-up.
    """

    def __init__(self, envs: Sequence[Callable[[], Any]], policy: TensorDictModuleBase, steps: int) -> None:
        # TorchRL takes one of this process's threads for each worker, and gives them back at its shutdown; with another number
        # of threads the learner computes other last digits.
        with _threads_kept(), children_ignore_signals():
            try:
                self._collector = MultiSyncCollector(
                    list(envs),
                    # A plain callable, pickled as it is, shared memory included: TorchRL would send a module's weights through
                    # queues and wait for an answer, also of a worker that has died.
                    functools.partial(acting(policy)),
                    frames_per_batch=steps,
                    total_frames=-1,
                    device="cpu",
                    trust_policy=True,
                    use_buffers=True,
                    cat_results="stack",
                    num_threads=torch.get_num_threads(),
                    num_sub_threads=1,
                    no_cuda_sync=True,
                    auto_register_policy_transforms=False,
                    init_fn=_prepare_worker,
                )
            except InputError as error:  # TorchRL appends the worker's traceback
                raise InputError(str(error).split("\n\nWorker traceback", maxsplit=1)[0]) from None
            except (EOFError, OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not isinstance(error.__cause__, EOFError):
                    raise
                raise WorkerDied("a collector worker died while it was being set up") from error
        self._processes = list(self._collector.procs)
        self._chunks = iter(self._collector)
        self._thread: threading.Thread | None = None
        self._result: TensorDictBase | BaseException | None = None
        # Runs before multiprocessing's own handler, which would wait for the workers to end by themselves.
        atexit.register(self.close)

    @property
    def running(self) -> bool:
        """Whether a chunk was begun and not yet taken."""
        return self._thread is not None

    def begin(self) -> None:
        """Start the collection of the next chunk."""
        self._result = None
        self._thread = threading.Thread(target=self._collect, name="collect a chunk", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            chunk = next(self._chunks)  # [W, n / W], in memory that the workers overwrite
            self._result = chunk.transpose(0, 1).clone().reshape(-1).exclude("collector")
        except BaseException as error:  # finish() raises it
            self._result = error

    def finish(self) -> TensorDictBase:
        """Wait for the chunk.

        Raises:
            WorkerDied: if a process ended.
        """
        thread, dead_since = self._thread, None
        assert thread is not None
        while thread.is_alive():
            thread.join(0.2)
            if thread.is_alive() and self._ended():
                dead_since = dead_since or time.monotonic()
                # TorchRL checks its processes once a second, but waits forever for the rest of an answer if a worker died while
                # writing it.
                if time.monotonic() - dead_since > _GRACE_S:
                    break
        self._thread = None
        if self._result is None or isinstance(self._result, BaseException):
            said = f": {type(self._result).__name__}: {self._result}" if self._result is not None else ""
            raise WorkerDied(
                f"a collector worker died ({', '.join(self._ended()) or 'no exit code'}){said}"
            ) from self._result
        return self._result

    def _ended(self) -> list[str]:
        """Exit codes of the processes that have ended."""
        codes = {}
        for worker, process in enumerate(self._processes):
            with contextlib.suppress(ValueError):  # TorchRL ends and closes the others after a death
                codes[worker] = process.exitcode
        return [f"worker {worker}: exit code {code}" for worker, code in codes.items() if code is not None]

    def close(self) -> None:
        """End the processes; a chunk that is being collected is lost."""
        atexit.unregister(self.close)
        if self.running:
            self._kill()  # an orderly shutdown would wait for the chunk
            self._thread = None
        with _threads_kept():
            self._collector.shutdown(timeout=10, raise_on_error=False)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ValueError):
                process.kill()
                process.join(5)


class _OwnGenerator:
    """A policy that draws random numbers itself: every draw is determined by the step's ``noise`` entry."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        self.policy = policy

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        seed = hashlib.blake2b(tensordict["noise"].cpu().numpy().tobytes(), digest_size=8).digest()
        with generators_set_aside(int.from_bytes(seed) >> 1):
            return self.policy(tensordict)


def acting(policy: TensorDictModuleBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """Make a policy's draws reproducible if it does not read ``noise``."""
    return policy if "noise" in policy.in_keys else _OwnGenerator(policy)


def _prepare_worker() -> None:
    ignore_stop_signals()
    die_with_parent()
    logging.getLogger("deflow_torchrl").setLevel(logging.ERROR)  # the parent logs warnings


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
