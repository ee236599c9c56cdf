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
_MADV_HUGEPAGE = 14  # of Linux's mman.h
_HUGE = 512 << 20


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed for the next tensor, and the system back it with huge pages.

    An update allocates the same tensors of a megabyte again and again, and pages from the system have to be cleared each
    time. Blocks above 32 MB still go back, as does what is free above 1 GB. Without effect where the C library is not glibc, or
    where a variable ``MALLOC_...`` or ``GLIBC_TUNABLES`` is in the environment: somebody has made settings of his own.
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TOP_PAD, 64 << 20)
    _want_huge_pages(libc)


def _want_huge_pages(libc: Any) -> None:
    """Grow the heap and ask for huge pages in what it grew by: matrices strewn over small ones miss the processor's tables.

    Nothing is touched, so nothing is used yet; where the system gives huge pages to nobody, the request changes nothing.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size, page = 31 << 20, os.sysconf("SC_PAGE_SIZE")  # below the threshold: of the heap, which keeps it
    blocks = [libc.malloc(size) for _ in range(_HUGE // size)]
    for block in blocks:
        if block is not None:
            start = block - block % page
            libc.madvise(start, size, _MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)


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
