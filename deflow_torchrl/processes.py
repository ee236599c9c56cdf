# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What everything that starts processes shares."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed for the next tensor, rather than give it back to the system.

    An update allocates the same tensors of a megabyte again and again, and pages from the system have to be cleared each
    time. Blocks above 32 MB still go back, as does what is free above 1 GB. Without effect where the C library is not glibc, or
    where a variable ``MALLOC_...`` is in the environment: somebody has made settings of his own.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_TOP_PAD, 64 << 20)


@contextmanager
def children_ignore_ctrl_c() -> Iterator[None]:
    """Processes started in this block leave Ctrl-C, which a terminal sends to all, to their parent from the very start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an ignored signal stays ignored in a spawned process
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class KillableSpawnContext(SpawnContext):
    """Spawned processes that can be ended at once; an executor has no public way to end its workers before Python 3.14."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override] # a class there
        """Make one, as the class of this name would."""
        process = SpawnProcess(*args, **kwargs)
        self._started.append(process)
        return process

    def kill(self) -> None:
        """End all processes of this context, also one that is still importing or deep in compiled code."""
        for process in self._started:
            if process.is_alive():
                process.kill()


def die_with_parent() -> None:
    """End this process as soon as the one that started it is gone, be it by a kill that lets nobody clean up."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # an orderly exit would wait for the work at hand and for a queue that nobody serves

    threading.Thread(target=watch, name="die with parent", daemon=True).start()
