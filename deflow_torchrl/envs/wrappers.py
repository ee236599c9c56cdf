# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Small gymnasium wrappers: flat and stacked observations, ``info["success"]`` in every step, an end at success."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
import numpy as np

from deflow_torchrl.envs.observations import ObservationLayout, flatten_observation
from deflow_torchrl.open_loop import OpenLoop


class FlatObservation(gymnasium.ObservationWrapper):
    """Give observations as one array: float32, or uint8 for an image.

    Args:
        env: the environment.
        layout: layout of its observations.
    """

    def __init__(self, env: gymnasium.Env, layout: ObservationLayout) -> None:
        super().__init__(env)
        self._layout = layout
        image = layout.dtype == np.uint8
        self.observation_space = gymnasium.spaces.Box(
            0 if image else -np.inf, 255 if image else np.inf, layout.shape, layout.dtype.type
        )

    def observation(self, observation: Any) -> np.ndarray:
        """Flatten one observation."""
        return flatten_observation(observation, self._layout)


class ReportSuccess(gymnasium.Wrapper):
    """Set ``info["success"]`` in every step: the environment's ``success`` or ``is_success`` as a bool, else false."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "success": _success(info)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), bool(terminated), bool(truncated), {**info, "success": _success(info)}


class EndAtSuccess(gymnasium.Wrapper):
    """End an episode (``terminated``) with the first successful step, by the rule of :class:`ReportSuccess`."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), bool(terminated or _success(info)), truncated, info


class StackedFrames(gymnasium.ObservationWrapper):
    """Give the last k observations, the oldest first, joined along the last dimension; at a reset the first stands k times.

    The stacks are those of :meth:`deflow_torchrl.data.TransitionDataset.stacked`.

    Args:
        env: the environment, whose observations are arrays.
        frame_stack: k.
    """

    def __init__(self, env: gymnasium.Env, frame_stack: int) -> None:
        super().__init__(env)
        self._frames: deque[np.ndarray] = deque(maxlen=frame_stack)
        space: Any = env.observation_space
        low, high = (np.concatenate([bound] * frame_stack, -1) for bound in (space.low, space.high))
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment and forget the frames before."""
        self._frames.clear()
        return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> np.ndarray:
        """Add a frame and join the last ones."""
        missing = self._frames.maxlen or 1
        frame = np.array(observation)  # some simulators overwrite the array that they return
        self._frames.extend([frame] * (1 if self._frames else missing))
        return np.concatenate(self._frames, axis=-1)


class PackedObservations(gymnasium.ObservationWrapper):
    """Give a dictionary of pictures and vectors as the bytes in which a data set holds several observations.

    Attributes:
        entries: name -> shape, by name.

    Args:
        env: the environment, whose observations are a ``Dict`` of boxes.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        self.entries = {name: list(space.spaces[name].shape) for name in sorted(space.spaces)}
        kinds = {3: np.uint8, 1: np.float32}
        self._row = np.zeros(1, [(name, kinds[len(shape)], tuple(shape)) for name, shape in self.entries.items()])
        self.observation_space = gymnasium.spaces.Box(0, 255, (self._row.nbytes,), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        """Pack one observation."""
        for name in self.entries:
            self._row[name] = observation[name]
            if not np.isfinite(self._row[name]).all():
                raise FloatingPointError(f"the observation {name!r} is not finite")
        return self._row.view(np.uint8).copy()


class OpenLoopActions(gymnasium.Wrapper):
    """Take chunks of h actions and execute each of them in h steps; a chunk given in between is not used.

    Args:
        env: the environment.
        length: h.
    """

    def __init__(self, env: gymnasium.Env, length: int) -> None:
        super().__init__(env)
        self._loop = OpenLoop(length)
        space: Any = env.action_space
        low, high = np.tile(space.low, length), np.tile(space.high, length)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; the next step begins a chunk."""
        self._loop.reset()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Execute one action of the running chunk, or the first of ``action`` ``[h * A]``."""
        return self.env.step(self._loop(action))


def _success(info: dict[str, Any]) -> bool:
    return bool(np.asarray(info.get("success", info.get("is_success", False))).all())
