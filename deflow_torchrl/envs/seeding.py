# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Resets that a seed fixes completely."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np


class SeededReset(gymnasium.Wrapper):
    """Make a seed fix every random draw of the resets from then on, without touching numpy's global generator.

    OGBench's environments leave two holes: mazes draw the start from numpy's *global* generator, and manipulation
    scenes settle under random actions of an action space that is built anew, unseeded, at every access (with a warning
    about its float64 bounds each time). Here the space is built once and seeded, and a reset with a seed starts a stream
    that takes the global generator's place during this reset and the unseeded ones after it (TorchRL's ``set_seed``
    resets with the seed and then again without). An environment never seeded draws from the global generator.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        base = env.unwrapped
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
            self._space = base.action_space
        if isinstance(getattr(type(base), "action_space", None), property):
            # A class attribute in a subclass of its own is what the simulator's `self.action_space` then finds.
            base.__class__ = type(type(base).__name__, (type(base),), {"action_space": self._space})
        self._stream: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; with a seed, this episode and the resets that follow depend on the seed alone."""
        if seed is None and self._stream is None:
            return self.env.reset(options=options)
        outside = np.random.get_state()
        try:
            if seed is None:
                np.random.set_state(self._stream)
            else:
                np.random.seed(seed % 2**32)
                self._space.seed(seed)
            result = self.env.reset(seed=seed, options=options)
            self._stream = np.random.get_state()
            return result
        finally:
            np.random.set_state(outside)
