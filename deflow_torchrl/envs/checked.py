# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Steps in plain types, checked; and one reset and one step that show, before a training, whether an environment can be used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from deflow_torchrl.envs.seeding import without_precision_warnings
from deflow_torchrl.errors import InputError, one_line

_LOG = logging.getLogger(__name__)
_BEYOND = 1e-3  # of a declared bound: simulators overstep theirs by rounding


class StepError(ValueError):
    """An environment returned a value of another kind than gymnasium's interface has: the message names the value."""


class CheckedSteps(gymnasium.Wrapper):
    """Return observations as float32 arrays (pictures stay uint8), rewards as floats and flags as bools.

    A number may come in any type and any shape that holds one number: ``info["success"]``, where it is there, the reward,
    ``terminated`` and ``truncated``. Observations are cast as the data are, and copied: some simulators overwrite their arrays.
    NaN in the final observation of a terminated episode, which nobody reads, becomes 0.

    OGBench's scenes reset themselves wherever they are asked for their observation space. It is therefore asked for once, and
    neither when the environment is made nor by its steps.

    Args:
        env: the environment; its observation space has a shape.

    Raises:
        StepError: by ``reset`` and ``step``, on an observation of another shape than the one before, or a value that is no
            number.
        FloatingPointError: by ``reset`` and ``step``, on other NaN or infinity in observation or reward.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        # Several observations are bytes too: deflow_torchrl.envs.wrappers.PackedObservations.
        self._packed = env.has_wrapper_attr("entries")
        self._shape: tuple[int, ...] | None = None

    @functools.cached_property
    def declared_space(self) -> Any:
        """The simulator's own observation space."""
        with without_precision_warnings():
            return self.env.observation_space

    @functools.cached_property
    def observation_space(self) -> Any:  # type: ignore[override]
        """Space of the observations as they are given."""
        space = self.declared_space
        if space.dtype == np.uint8 and self._stays_bytes(space.shape):
            return space
        return gymnasium.spaces.Box(-np.inf, np.inf, space.shape, np.float32)

    def _stays_bytes(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3 or self._packed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment."""
        result: Any = self.env.reset(seed=seed, options=options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise StepError("reset returns no pair (observation, info)")
        return self._checked(result[0]), _checked_info(result[1])

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        ended = _flag("terminated", terminated)
        observation, number = self._checked(observation, unused=ended), _number("the reward", reward)
        if not np.isfinite(number):
            raise FloatingPointError(f"the reward is {number}")
        return observation, number, ended, _flag("truncated", truncated), _checked_info(info)

    def _checked(self, observation: Any, *, unused: bool = False) -> np.ndarray:
        if isinstance(observation, Mapping):
            raise StepError(f"the observation is a dictionary of {', '.join(map(str, observation))}, not an array")
        array = np.asarray(observation)
        if array.dtype.kind not in "fiub":
            raise StepError(f"the observation has type {array.dtype}, expected numbers")
        if array.shape != (self._shape or array.shape):
            raise StepError(f"the observation has shape {array.shape}, the one before it {self._shape}")
        self._shape = array.shape
        dtype = np.uint8 if array.dtype == np.uint8 and self._stays_bytes(array.shape) else np.float32
        with np.errstate(over="ignore"):  # numbers too large for float32 become infinite
            array = np.array(array, dtype)
        if unused and dtype == np.float32:
            array[np.isnan(array)] = 0.0
        if not np.isfinite(array).all():
            raise FloatingPointError("the observation is not finite")
        return array


def _number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.size != 1:
        raise StepError(f"{name} is {value!r:.80}, not a number")
    return float(array.reshape(()))


def _flag(name: str, value: Any) -> bool:
    if (number := _number(name, value)) not in (0, 1):
        raise StepError(f"{name} is {value!r:.80}, neither true nor false")
    return bool(number)


def _checked_info(info: Any) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise StepError(f"info is {info!r:.80}, not a dictionary")
    if "success" not in info:
        return info
    success = _number('info["success"]', info["success"])
    if np.isnan(success):
        raise StepError('info["success"] is nan, neither true nor false')
    return {**info, "success": bool(success)}


def fault(error: Exception) -> str:
    """The cause of a failed reset or step, in one line."""
    if isinstance(error, StepError | FloatingPointError):
        return one_line(error)
    if isinstance(error, ValueError) and "values to unpack" in str(error):
        return f"it does not return what gymnasium's interface has: {one_line(error)}"
    return f"{type(error).__name__}: {one_line(error)}"


def check_environment(
    env: gymnasium.Env,
    name: str,
    *,
    observation_shape: tuple[int, ...],
    action_shape: tuple[int, ...],
    action_bounds: tuple[Any, Any] | None = None,
) -> None:
    """Compare an environment with data, and reset it and step it once.

    Args:
        env: as :func:`deflow_torchrl.envs.make_gym_env` makes it.
        name: its name, for messages.

    Keyword Args:
        observation_shape: of the data's observations.
        action_shape: of the data's actions.
        action_bounds: (low, high) that the data's actions had before they were mapped to [-1, 1], numbers or ``[A]``; None if
            they were not mapped.

    Raises:
        InputError: if data and environment do not fit, or the reset or the step fails or returns what cannot be used.
    """
    for what, shape, space in (
        ("observations", observation_shape, env.observation_space),
        ("actions", action_shape, env.action_space),
    ):
        if shape != space.shape:
            raise InputError(
                f"{name}: {what} have shape {space.shape}, those of the data {shape}; the data belong to another environment"
            )
    _check_bounds(env, name, action_bounds)
    where, space = "its reset", env.observation_space
    try:
        observations = [env.reset(seed=0)[0]]
        for what, given, declared in (
            ("shape", observations[0].shape, space.shape),
            ("type", observations[0].dtype, space.dtype),
        ):
            if given != declared:
                raise StepError(f"the observation has {what} {given}, observation_space says {declared}")
        where = "its first step"
        observations.append(env.step(np.zeros(action_shape, np.float32))[0])
    except Exception as error:  # simulators raise anything
        raise InputError(f"{name}: {where} cannot be used: {fault(error)}; mend the environment, or wrap it") from error
    own = env.get_wrapper_attr("declared_space")
    for observation in observations:
        if isinstance(own, gymnasium.spaces.Box):
            _warn_outside(name, observation, own)


def own_action_space(env: gymnasium.Env) -> Any:
    """The space of the simulator's actions, before they were mapped to [-1, 1]."""
    own, inner = env.action_space, env
    while isinstance(inner, gymnasium.Wrapper):
        inner = inner.env
        if isinstance(inner, gymnasium.wrappers.RescaleAction):
            own = inner.env.action_space
    return own


def _check_bounds(env: gymnasium.Env, name: str, of_data: tuple[Any, Any] | None) -> None:
    """Refuse an environment in which an action would mean another one than in the data."""
    outer: Any = env.action_space
    if not (np.allclose(outer.low, -1) and np.allclose(outer.high, 1)):
        raise InputError(f"{name} takes actions in {outer}; policies act in [-1, 1]")
    if of_data is None:
        return
    own = own_action_space(env)
    for data, bound in zip(of_data, (own.low, own.high), strict=True):
        if not np.allclose(np.asarray(data, np.float64), bound, rtol=1e-6, atol=1e-6):
            raise InputError(
                f"{name} takes actions in {own}, the data's were mapped from {list(of_data)}: the same action would mean "
                "another one; import the data with the environment's bounds (deflow data import --action-bounds)"
            )


def _warn_outside(name: str, observation: np.ndarray, space: gymnasium.spaces.Box) -> None:
    low, high = (np.asarray(bound, np.float64) for bound in (space.low, space.high))
    margin = [
        _BEYOND * np.maximum(1, np.abs(bound, where=np.isfinite(bound), out=np.ones_like(bound)))
        for bound in (low, high)
    ]
    outside = (observation < low - margin[0]) | (observation > high + margin[1])
    if outside.any():
        where = tuple(int(index) for index in np.argwhere(outside)[0])
        _LOG.warning(
            "%s: entry %s of an observation is %g, outside its declared bounds [%g, %g], which are not used",
            name, where[0] if len(where) == 1 else where, observation[where], low[where], high[where],
        )  # fmt: skip
