# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The Adroit hand: where gymnasium-robotics' environments differ from D4RL's, and wrappers that remove the differences.

1. **The hand-to-object term.** D4RL's door, hammer and relocate pay -0.1 |palm - object|, which draws the hand to the object.
   gymnasium-robotics pays +0.1 |palm - object| in its ``-v1`` environments (package versions 1.2.1 to 1.4.2) and has D4RL's
   sign again in ``-v2``: :data:`HAND_SIGNS`. :class:`D4RLAdroitReward` gives an environment D4RL's sign. A data set of the
   user's own may have either sign, whatever environment it names: :func:`hand_to_object_sign` finds it from the rewards.
2. **The dropped pen.** D4RL's pen ends (``terminated``) when the pen's centre falls below 7.5 cm. gymnasium-robotics' goes on
   to the time limit: :class:`PenDrop`.

``info["success"]`` describes the state *after this step* in all four tasks: the door is open beyond 1.35 rad, the nail within
1 cm of its goal, the ball within 10 cm of the target, the pen within 7.5 cm and 0.95 in cosine of its target. Episodes may be
counted by their last step (:mod:`deflow_torchrl.trainers.evaluation`) or by any step, which gives the larger number. D4RL
itself scores only the undiscounted return.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import gymnasium
import numpy as np

from deflow_torchrl.errors import InputError

HAND_SIGNS: Mapping[int, int] = MappingProxyType({1: 1, 2: -1})
"""Version of gymnasium-robotics' environments -> sign of the hand-to-object term of their dense rewards."""

HAND_WEIGHT = 0.1
"""Weight of |palm - object| (metres) in the dense rewards of door, hammer and relocate."""

PEN_DROPPED_BELOW = 0.075
"""Height (metres) of the pen's centre under which D4RL calls it dropped."""

_STEP_S = 0.01  # seconds of simulated time in a step
_MINIMUM_ROWS = 20
_ROWS_TO_FIT = 500
_CLEARLY = 3.0  # the better sign must explain the rewards this many times better


@dataclass(frozen=True)
class AdroitTask:
    """One task of the family.

    Attributes:
        name: ``door``, ``hammer``, ``pen`` or ``relocate``, as in D4RL.
        environment: name of the gymnasium environment, without version.
        observation_dim: width of its observations.
        action_dim: width of its actions.
        object_site: the simulator's site at the object's position; ``None`` where it is the body ``Object``.
        has_hand_term: whether the dense reward contains the distance from palm to object.
    """

    name: str
    environment: str
    observation_dim: int
    action_dim: int
    object_site: str | None
    has_hand_term: bool


ADROIT_TASKS: Mapping[str, AdroitTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            AdroitTask("door", "AdroitHandDoor", 39, 28, "S_handle", True),
            AdroitTask("hammer", "AdroitHandHammer", 46, 26, None, True),
            AdroitTask("pen", "AdroitHandPen", 45, 24, None, False),
            AdroitTask("relocate", "AdroitHandRelocate", 39, 30, None, True),
        )
    }
)


def adroit_task(environment_name: str | None) -> AdroitTask | None:
    """The task of a gymnasium environment with dense rewards, by its name without version; ``None`` for any other."""
    for task in ADROIT_TASKS.values():
        if environment_name in (task.environment, f"{task.environment}Dense"):
            return task
    return None


def hand_to_object_distance(task: AdroitTask, observations: np.ndarray) -> np.ndarray:
    """|palm - object| in metres, read off observations ``[..., O]`` of door, hammer or relocate: ``[...]``."""
    if task.name == "door":
        difference = observations[..., 35:38]
    elif task.name == "hammer":
        difference = observations[..., 33:36] - observations[..., 36:39]
    elif task.name == "relocate":
        difference = observations[..., 30:33]
    else:
        raise InputError(f"the {task.name} task's reward has no hand-to-object term")
    return np.linalg.norm(difference, axis=-1)


def pen_dropped(observations: np.ndarray) -> np.ndarray:
    """Whether the pen lies below D4RL's height, read off observations ``[..., 45]`` of the pen task: bool ``[...]``."""
    return observations[..., 26] < PEN_DROPPED_BELOW


def _other_terms(task: AdroitTask, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The dense reward without its hand-to-object term, as far as observations tell it.

    Args:
        task: door, hammer or relocate.
        observations: one episode, ``[T + 1, O]``; row t + 1 is the state that the reward of step t is computed from.

    Returns:
        the terms, one column for each possible case, ``[T, cases]``; and an estimate of the generalised speed where the
        reward has a weight on it that matters, ``[T]``, else zeros.
    """
    after = observations[1:]
    still = np.zeros(len(after))
    if task.name == "door":
        hinge = after[:, 28]
        bonus = 2.0 * (hinge > 0.2) + 8.0 * (hinge > 1.0) + 10.0 * (hinge > 1.35)
        return (bonus - 0.1 * (hinge - 1.57) ** 2)[:, None], still
    if task.name == "relocate":
        hand, ball = np.linalg.norm(after[:, 33:36], axis=-1), np.linalg.norm(after[:, 36:39], axis=-1)
        bonus = 10.0 * (ball < 0.1) + 20.0 * (ball < 0.05)
        # Whether the ball is off the table is not observed.
        return np.stack([bonus, bonus + 1.0 - 0.5 * (hand + ball)], axis=-1), still
    from gymnasium_robotics.utils.rotations import euler2mat

    hammer, nail = after[:, 36:39], after[:, 42:45]
    head = hammer + euler2mat(after[:, 39:42]) @ np.array([-0.2, 0.0, -0.04])  # the site `tool` in the hammer's frame
    depth = np.abs(0.091 - after[:, 26])  # from the nail's head to its goal, along the nail
    bonus = 2.0 * ((hammer[:, 2] > 0.04) & (head[:, 2] > 0.04)) + 25.0 * (depth < 0.02) + 75.0 * (depth < 0.01)
    joints = np.gradient(observations[:, :27], _STEP_S, axis=0)[1:]
    speed = np.sqrt((joints**2).sum(-1) + (after[:, 27:33] ** 2).sum(-1))
    return (bonus - np.linalg.norm(head - nail, axis=-1) - 10.0 * depth)[:, None], speed


def hand_to_object_sign(task: AdroitTask, episodes: Iterable[tuple[np.ndarray, np.ndarray]]) -> int | None:
    """Measure the sign of the hand-to-object term in the rewards of recorded episodes.

    The other terms of the dense reward are computed from the observations; the sign under which the rewards are explained
    is the answer. The hammer's reward also has -0.01 times the speed of all joints, which finite differences of the
    observations underestimate: slow rows are taken where there are enough, else the term's weight is fitted.

    Args:
        task: the task the episodes are of.
        episodes: pairs of observations ``[T + 1, O]`` and rewards ``[T]``.

    Returns:
        -1 for D4RL's sign, +1 for the opposite one, ``None`` where the rewards do not tell: too few steps, another reward
        (sparse, shifted, scaled), or a task without the term.
    """
    if not task.has_hand_term:
        return None
    distances, unexplained, speeds = [], [], []
    for recorded, rewards in episodes:
        observations = np.asarray(recorded, dtype=np.float64)
        if len(rewards) < 2 or observations.shape[-1] != task.observation_dim:
            continue
        terms, speed = _other_terms(task, observations)
        distances.append(hand_to_object_distance(task, observations[1:]))
        unexplained.append(np.asarray(rewards, dtype=np.float64).reshape(-1, 1) - terms)
        speeds.append(speed)
    if not distances:
        return None
    distance, rest, speed = np.concatenate(distances), np.concatenate(unexplained), np.concatenate(speeds)
    slow = distance >= 0.1 * speed  # here an error of the speed by a fifth is a tenth of the difference looked for
    if slow.sum() >= _MINIMUM_ROWS:
        rest = rest + 0.01 * speed[:, None]
        minus, plus = (
            float(np.median(np.abs(rest - sign * HAND_WEIGHT * distance[:, None]).min(-1)[slow])) for sign in (-1, 1)
        )
        if minus * _CLEARLY < plus:
            return -1
        return 1 if plus * _CLEARLY < minus else None
    if len(distance) < _ROWS_TO_FIT:
        return None
    weight = _least_absolute(np.stack([distance, speed, np.ones_like(distance)], axis=-1), rest[:, 0])[0]
    return next((sign for sign in (-1, 1) if abs(weight - sign * HAND_WEIGHT) < HAND_WEIGHT / 2), None)


def _least_absolute(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Weights of the linear fit with the least absolute error (outliers count little), by reweighted least squares."""
    weights = np.zeros(inputs.shape[1])
    scale = np.ones_like(outputs)
    for _ in range(20):
        weights = np.linalg.lstsq(inputs * scale[:, None], outputs * scale, rcond=None)[0]
        scale = 1.0 / np.sqrt(np.maximum(np.abs(outputs - inputs @ weights), 1e-4))
    return weights


def environment_sign(env: gymnasium.Env) -> int | None:
    """Look up the sign of the hand-to-object term in an environment's reward, by its version and wrappers.

    Args:
        env: an environment.

    Returns:
        -1 for D4RL's sign, also of versions later than those in :data:`HAND_SIGNS`, +1 for the opposite one, ``None`` where the
        reward has no such term.
    """
    task = adroit_task(env.spec.name if env.spec else None)
    if env.spec is None or task is None or not task.has_hand_term or getattr(env.unwrapped, "sparse_reward", False):
        return None
    return -1 if env.has_wrapper_attr("d4rl_hand_sign") else HAND_SIGNS.get(env.spec.version or 0, -1)


def _name(env: gymnasium.Env) -> str:
    return env.spec.id if env.spec else str(env)


class D4RLAdroitReward(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Give door, hammer or relocate D4RL's sign of the hand-to-object term: -0.1 |palm - object| instead of +0.1.

    The distance is read from the simulator, where the environment itself reads it.

    Args:
        env: a dense Adroit environment whose term has the opposite sign (:func:`environment_sign`).

    Raises:
        InputError: for an environment without the term, or one that has D4RL's sign already.
    """

    d4rl_hand_sign = True

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)  # sets recorded with it name it in their metadata
        gymnasium.Wrapper.__init__(self, env)
        task, sign, name = adroit_task(env.spec.name if env.spec else None), environment_sign(env), _name(env)
        if task is None or sign is None:
            raise InputError(
                f"{name} has no hand-to-object term; "
                "D4RLAdroitReward is for the dense AdroitHandDoor, AdroitHandHammer and AdroitHandRelocate"
            )
        if sign == -1:
            raise InputError(f"{name} has D4RL's sign already; use it as it is")
        self._task = task

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment; the reward has D4RL's sign."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        data: Any = self.env.unwrapped.data  # type: ignore[attr-defined]
        site = self._task.object_site
        position = data.body("Object").xpos if site is None else data.site(site).xpos
        distance = float(np.linalg.norm(data.site("S_grasp").xpos - position))
        return observation, float(reward) - 2 * HAND_WEIGHT * distance, terminated, truncated, info


class PenDrop(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """End an episode of the pen task (``terminated``) when the pen is dropped, as D4RL does.

    The reward of that step, with its penalty of 5, is the environment's own.

    Args:
        env: an ``AdroitHandPen`` environment.

    Raises:
        InputError: for any other environment.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)  # sets recorded with it name it in their metadata
        gymnasium.Wrapper.__init__(self, env)
        if not _name(env).startswith(ADROIT_TASKS["pen"].environment):
            raise InputError(f"{_name(env)} has no pen; PenDrop is for AdroitHandPen")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment; a dropped pen ends the episode."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        height = self.env.unwrapped.data.body("Object").xpos[2]  # type: ignore[attr-defined]
        return observation, float(reward), bool(terminated or height < PEN_DROPPED_BELOW), truncated, info
