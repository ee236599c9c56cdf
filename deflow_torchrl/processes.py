# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What everything that starts processes shares."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
