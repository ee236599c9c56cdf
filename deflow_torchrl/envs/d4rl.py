# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Facts about D4RL's tasks, read from ``d4rl.json``: reference returns, sizes, conventions; and the normalised score."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from deflow_torchrl.errors import InputError

_LOG = logging.getLogger(__name__)
_Returns = TypeVar("_Returns")


@dataclass(frozen=True)
class D4RLTask:
    """One of the 18 D4RL tasks of the paper.

    Attributes:
        name: D4RL's name, for example ``door-human-v1``.
        dataset_id: Minari's id of its data, for example ``D4RL/door/human-v2``.
        task: ``pen``, ``door``, ``hammer``, ``relocate`` or ``antmaze``.
        environment: gymnasium's name of the environment without version; ``None`` for antmaze, whose sets carry their own.
        reference_min: return of a random policy.
        reference_max: return of the expert.
        observation_dim: width of D4RL's observations.
        action_dim: width of its actions.
        max_steps: steps until an episode is cut.
        ends_early: what terminates an episode before that: ``never``, ``dropped`` (the pen) or ``success``.
        reward_shift: what the paper adds to each reward for training; scores are of the raw reward.
        observation_keys: entries of Minari's goal observations that make D4RL's, in order; ``None`` for plain ones.
    """

    name: str
    dataset_id: str
    task: str
    environment: str | None
    reference_min: float
    reference_max: float
    observation_dim: int
    action_dim: int
    max_steps: int
    ends_early: str
    reward_shift: float
    observation_keys: tuple[str, ...] | None


@functools.cache
def _tasks() -> Mapping[str, D4RLTask]:
    table = json.loads(resources.files(__package__).joinpath("d4rl.json").read_text(encoding="utf-8"))
    tasks = {}
    for group in table["groups"]:
        keys = group.pop("observation_keys")
        name, dataset_id, data = group.pop("name"), group.pop("minari"), group.pop("data")
        for kind in data:
            tasks[name.format(data=kind)] = D4RLTask(
                name=name.format(data=kind),
                dataset_id=dataset_id.format(data=kind),
                observation_keys=None if keys is None else tuple(keys),
                **group,
            )
    return tasks


def d4rl_task_names() -> list[str]:
    """The paper's 18 names, in the table's order."""
    return list(_tasks())


def d4rl_task(name: str) -> D4RLTask | None:
    """Look a task up by D4RL's name (``door-human-v1``) or any version of its Minari id (``D4RL/door/human-v2``).

    Minari ids of D4RL's namespace with other data (``D4RL/door/mine-v0``) give the first task of their family. ``None`` for
    any other name.
    """
    if name in _tasks():
        return _tasks()[name]
    parts = re.fullmatch(r"D4RL/(\w+)/([\w-]+?)(?:-v\d+)?", name)
    family = [] if parts is None else [task for task in _tasks().values() if task.task == parts[1]]
    if parts is None or not family:
        return None
    same = [task for task in family if re.sub(r"-v\d+$", "", task.dataset_id) == f"D4RL/{parts[1]}/{parts[2]}"]
    return (same or family)[0]


def scoring_task(name: str, environment_id: str | None = None) -> D4RLTask | None:
    """Find the task whose constants score a set: by the set's name (:func:`d4rl_task`), else by its Adroit environment.

    Args:
        name: D4RL's name, a Minari id, or a gymnasium id.
        environment_id: gymnasium id of the set's environment.
    """
    task = d4rl_task(name)
    for candidate in (environment_id, name):
        if task is None and candidate is not None:
            base = re.sub(r"(Dense)?-v\d+$", "", candidate)
            task = next((known for known in _tasks().values() if known.environment == base), None)
    return task


def normalized_score(returns: _Returns, low: float, high: float) -> _Returns:
    """Compute D4RL's score 100 (R - low) / (high - low): 0 for a random policy, 100 for the expert.

    Args:
        returns: undiscounted returns of *raw* rewards: a number, array or tensor of any shape.
        low: reference return of a random policy.
        high: reference return of the expert.

    Raises:
        InputError: where the references are equal or not finite.

    Examples:
        >>> normalized_score(2880.5693087298737, *reference_returns("door-human-v1"))
        100.0
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise InputError(f"reference returns {low} and {high} cannot normalise a score; they must differ and be finite")
    return 100.0 * (returns - low) / (high - low)  # type: ignore[operator,return-value]


def reference_returns(
    name: str, *, environment_id: str | None = None, metadata: Mapping[str, Any] | None = None
) -> tuple[float, float] | None:
    """Find the two returns a score is normalised with.

    Args:
        name: D4RL's name, a Minari id, or a gymnasium id.

    Keyword Args:
        environment_id: gymnasium id of the set's environment; a set of any name from an Adroit environment has D4RL's
            references.
        metadata: the Minari set's, for ``ref_min_score`` and ``ref_max_score``. D4RL's constants come first; a set that
            disagrees with them is reported in the log.

    Returns:
        (low, high), or ``None`` where neither D4RL nor the set has them.

    Examples:
        >>> reference_returns("D4RL/antmaze/umaze-v1")
        (0.0, 1.0)
    """
    task = scoring_task(name, environment_id)
    given = None
    if metadata is not None and metadata.get("ref_min_score") is not None and metadata.get("ref_max_score") is not None:
        given = float(metadata["ref_min_score"]), float(metadata["ref_max_score"])
    if task is None:
        return given
    known = task.reference_min, task.reference_max
    if given is not None and not all(
        math.isclose(mine, theirs, rel_tol=1e-3, abs_tol=1e-3) for mine, theirs in zip(known, given, strict=True)
    ):
        _LOG.warning(
            f"{name}: the set's reference returns {given} are not D4RL's {known}; scores are computed with D4RL's"
        )
    return known
