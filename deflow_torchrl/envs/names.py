# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""OGBench single-task names: ``ENVIRONMENT-DATA-singletask[-taskN]-v0``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deflow_torchrl.errors import InputError

_IMAGES = "visual-"
_PATTERN = re.compile(
    r"(?P<environment>[a-z0-9]+(-[a-z0-9]+)*)-(?P<data>[a-z]+)-(?P<task>singletask(-task[1-9])?)-(?P<version>v\d+)"
)


@dataclass(frozen=True)
class OGBenchName:
    """The parts of a single-task name.

    Attributes:
        environment_id: gymnasium id, for example ``cube-single-singletask-task2-v0``.
        dataset: name of the data files without suffix, for example ``cube-single-play-v0``.
        state_environment_id: id of the same task with states; for a task with states ``environment_id`` itself.
        images: whether observations are images.
    """

    environment_id: str
    dataset: str
    state_environment_id: str
    images: bool


def task_with_states(name: str) -> str:
    """The name of the same OGBench task with states as observations; other names stay."""
    return name if ":" in name else name.removeprefix(_IMAGES)


def parse_ogbench_name(name: str) -> OGBenchName:
    """Split a single-task name into its parts, as the ``ogbench`` package does.

    Raises:
        InputError: if the name has another form; goal-conditioned sets, which have no reward, are refused too.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name!r} is no OGBench single-task name; they look like cube-single-play-singletask-task2-v0"
        )
    part = match.groupdict()
    environment = part["environment"]
    return OGBenchName(
        environment_id=f"{environment}-{part['task']}-{part['version']}",
        dataset=f"{environment}-{part['data']}-{part['version']}",
        state_environment_id=f"{environment.removeprefix(_IMAGES)}-{part['task']}-{part['version']}",
        images=environment.startswith(_IMAGES),
    )
