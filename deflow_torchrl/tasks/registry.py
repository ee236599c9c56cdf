# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The OGBench single-task problems and what a method takes from them, read from ``ogbench.json``."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from deflow_torchrl.errors import InputError


@dataclass(frozen=True)
class OGBenchTask:
    """One single-task problem of OGBench.

    Attributes:
        name: the name as given, for example ``cube-single-play-singletask-task2-v0``.
        number: the task's number; the environment's default task where the name has none.
        gamma: discount.
        q_aggregation: how the target critics are aggregated.
        target_divergence: delta of DeFlow.
        in_paper: whether the three values before are the paper's (Table 6) for this very task or the package's own choice.
        domain: which of the paper's rules from action variance to delta applies: ``manipulation`` or ``navigation``.
        images: whether observations are uint8 pictures ``[H, W, C]`` instead of states.
    """

    name: str
    number: int
    gamma: float
    q_aggregation: str
    target_divergence: float
    in_paper: bool
    domain: str
    images: bool


@functools.cache
def _tasks() -> Mapping[str, OGBenchTask]:
    table = json.loads(resources.files(__package__).joinpath("ogbench.json").read_text(encoding="utf-8"))
    tasks = {}
    for group in table["groups"]:
        numbers = range(1, table["tasks_per_environment"] + 1)
        for environment in group["environments"]:
            for data in group["data"]:
                for number in (None, *numbers):
                    name = f"{environment}-{data}-singletask{'' if number is None else f'-task{number}'}-v0"
                    tasks[name] = OGBenchTask(
                        name=name,
                        number=number or group["default_task"],
                        gamma=group["discount"],
                        q_aggregation=group["q_aggregation"],
                        target_divergence=group["target_divergence"],
                        in_paper=group["in_paper"]
                        and data == group["data"][0]
                        and (number or group["default_task"]) in group.get("paper_tasks", numbers),
                        domain=group["domain"],
                        images=group.get("images", False),
                    )
    return tasks


def ogbench_task_names() -> list[str]:
    """All known names, in the table's order."""
    return list(_tasks())


def ogbench_task(name: str) -> OGBenchTask:
    """Look a task up by its OGBench name.

    Raises:
        InputError: on an unknown name, with the nearest ones.
    """
    task = _tasks().get(name)
    if task is None:
        near = difflib.get_close_matches(name, _tasks(), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "names look like cube-single-play-singletask-task2-v0"
        raise InputError(f"unknown task {name!r}; {hint}")
    return task
