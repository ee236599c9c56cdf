"""Resets that a seed fixes completely."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np


class SeededReset(gymnasium.Wrapper):
    """Make ``reset(seed=...)`` fix every random draw of the reset, without touching numpy's global generator.

    OGBench's environments leave two holes: mazes draw the start from numpy's *global* generator, and manipulation
    scenes settle under random actions of an action space that is built anew, unseeded, at every access (with a warning
    about its float64 bounds each time). Here the space is built once and seeded, and the global generator is seeded
    for the reset and put back.
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; with a seed, the same seed gives the same episode."""
        if seed is None:
            return self.env.reset(options=options)
        state = np.random.get_state()
        try:
            np.random.seed(seed % 2**32)
            self._space.seed(seed)
            return self.env.reset(seed=seed, options=options)
        finally:
            np.random.set_state(state)
