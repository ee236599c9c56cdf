# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Execution of chunks of actions, one action a step: the same in evaluation, collection and an exported policy."""

from __future__ import annotations

from typing import Any

import numpy as np


class OpenLoop:
    """Executes chunks of h actions open loop: the observations in between are not used.

    Args:
        length: h.

    Examples:
        >>> loop = OpenLoop(2)
        >>> [loop(np.array(chunk)).tolist() for chunk in ([1, 2], [3, 4], [5, 6])]
        [[1], [2], [5]]
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._rest: list[np.ndarray] = []

    def reset(self) -> None:
        """Forget the rest of the chunk that is being executed: an episode begins."""
        self._rest = []

    @property
    def rest(self) -> int:
        """Actions of the chunk that are left to execute."""
        return len(self._rest)

    def __call__(self, chunk: Any = None) -> np.ndarray:
        """Give the next action ``[..., A]``.

        Args:
            chunk: ``[..., h * A]``, step after step; used only where no chunk is being executed.
        """
        if not self._rest:
            self._rest = np.split(np.asarray(chunk), self.length, axis=-1)
        return self._rest.pop(0)
