# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What happened to a run so far, over all its interruptions: the commands that worked on it and the wall time by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class RunHistory:
    """Commands and seconds of a run; a resumed one goes on with those of its checkpoint.

    Args:
        commands: the commands so far, this one last.

    Keyword Args:
        seconds: wall time of phases before this process.

    Attributes:
        commands: every command that worked on the run, in order. The time of a process that was killed counts up to its last
            checkpoint.
    """

    def __init__(self, commands: Sequence[str], *, seconds: Mapping[str, float] | None = None) -> None:
        self.commands = list(commands)
        self._seconds = dict(seconds or {})
        self._running: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the block's wall time as ``phase``."""
        self._running[phase] = time.perf_counter()
        try:
            yield
        finally:
            self._seconds = self.seconds
            del self._running[phase]

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by phase, with those that are running now."""
        now, total = time.perf_counter(), dict(self._seconds)
        for phase, began in self._running.items():
            total[phase] = total.get(phase, 0.0) + now - began
        return total

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"commands": list(self.commands), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put what a checkpoint knows before what this process has done since; its command stays the last."""
        self.commands = [*state["commands"], self.commands[-1]]
        for phase, seconds in state["seconds"].items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
