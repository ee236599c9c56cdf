# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Resets that depend on the seed only."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np


class SeededReset(gymnasium.Wrapper):
    """Make every random draw of a reset depend on the seed, and leave numpy's global generator unchanged.

    OGBench's environments use two other generators: mazes draw the start from numpy's *global* generator, and manipulation
    scenes settle under random actions of an action space that is built again, unseeded, at every access (with a warning about
    its float64 bounds each time). Here the space is built once and seeded. A reset with a seed starts a random stream, which
    replaces the global generator during this reset and the following resets without a seed (TorchRL's ``set_seed`` resets
    with the seed and then again without). An environment that was never seeded draws from the global generator.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        base = env.unwrapped
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
            self._space = base.action_space
        if isinstance(getattr(type(base), "action_space", None), property):
            # The simulator reads self.action_space inside its own reset, where no wrapper is asked: a subclass overrides it.
            base.__class__ = type(type(base).__name__, (type(base),), {"action_space": self._space})
        self._stream: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; with a seed, this episode and the following resets depend on the seed only."""
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
