# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Cores, memory and child processes."""

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

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, up to 1 GB of it and blocks of up to 32 MB.

    An update allocates the same tensors of about a megabyte again and again. Otherwise their memory goes back to the system,
    which has to clear every page that it gives out: 3 to 4% of an update of the paper's networks. Without effect unless the C
    library is glibc, and where the user has set a variable ``MALLOC_...`` or ``GLIBC_TUNABLES``.
    """
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform == "linux" and not set_by_user:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TOP_PAD, 64 << 20)


@contextmanager
def children_ignore_ctrl_c() -> Iterator[None]:
    """Let processes that are started in this block ignore Ctrl-C, which a terminal sends to them too; the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an ignored signal stays ignored in a spawned process
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class KillableSpawnContext(SpawnContext):
    """Start processes that can be ended at once; an executor has no public way to end its workers before Python 3.14."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override] # a class there
        """Make a process, as the class of this name does in a plain context."""
        process = SpawnProcess(*args, **kwargs)
        self._started.append(process)
        return process

    def kill(self) -> None:
        """End all processes of this context, also those that are importing or inside compiled code."""
        for process in self._started:
            if process.is_alive():
                process.kill()


def die_with_parent() -> None:
    """End this process as soon as its parent is gone, also after a kill that left the parent no time to end it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # an orderly exit would wait for the current work and for a queue that no process reads

    threading.Thread(target=watch, name="die with parent", daemon=True).start()
