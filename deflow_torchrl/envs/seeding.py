# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Resets that depend on the seed only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding


class SeededReset(gymnasium.Wrapper):
    """Make every random draw of a reset depend on the seed, and leave numpy's global generator unchanged.

    OGBench's environments use two other generators: mazes draw the start from numpy's *global* generator, and manipulation
    scenes settle under random actions of an action space that is built again, unseeded, at every access (with a warning about
    its float64 bounds each time). During a reset, spaces without a seed draw from the generator of one seeded action space. A
    reset with a seed starts a random stream, which replaces the global generator during this reset and the following resets
    without a seed (TorchRL's ``set_seed`` resets with the seed and then again without). An environment that was never seeded
    draws from the global generator.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        with without_precision_warnings():
            self._space, outer = env.unwrapped.action_space, env.action_space
        self.action_space = self._space if outer == self._space else outer
        self._stream: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; with a seed, this episode and the following resets depend on the seed only."""
        if seed is not None:
            self._space.seed(seed)
        with _unseeded_generators(self._space.np_random), without_precision_warnings():
            if seed is None and self._stream is None:
                return self.env.reset(options=options)
            outside = np.random.get_state()
            try:
                if seed is None:
                    np.random.set_state(self._stream)
                else:
                    np.random.seed(seed % 2**32)
                result = self.env.reset(seed=seed, options=options)
                self._stream = np.random.get_state()
                return result
            finally:
                np.random.set_state(outside)


@contextlib.contextmanager
def _unseeded_generators(generator: np.random.Generator) -> Iterator[None]:
    """Give ``generator`` to what asks gymnasium for a generator without a seed."""
    make = seeding.np_random
    seeding.np_random = lambda seed=None: (generator, 0) if seed is None else make(seed)
    try:
        yield
    finally:
        seeding.np_random = make


@contextlib.contextmanager
def without_precision_warnings() -> Iterator[None]:
    """Silence gymnasium's warning about float64 bounds of float32 spaces."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
        yield
