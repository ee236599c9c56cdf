# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Ctrl-C and polite kills, held back while a step is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context in which SIGINT and SIGTERM raise KeyboardInterrupt, but never inside :meth:`deferred` blocks.

    An exception in the middle of an update would leave networks, optimiser and random generators at different steps, and a
    checkpoint of that could not be resumed exactly. Outside the main thread, where Python delivers no signals, it does
    nothing.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back; one that came is raised at the end of the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
