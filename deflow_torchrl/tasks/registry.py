# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The tasks by name: data, environment and what a method takes from the task, from ``ogbench.json`` and ``d4rl.json``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from deflow_torchrl.envs.d4rl import d4rl_task
from deflow_torchrl.errors import InputError, did_you_mean
from deflow_torchrl.sources.base import get_source, split_name
from deflow_torchrl.tasks.tables import paper_names, read_table


@dataclass(frozen=True)
class Task:
    """Data, environment and the settings that come with them.

    Attributes:
        name: the name as given, for example ``cube-single-play-singletask-task2-v0``, ``door-human-v1``,
            ``minari:mujoco/hopper/medium-v0`` or ``file:FOLDER``.
        source: prefix of the source of its data, as :func:`deflow_torchrl.sources.get_source` takes it.
        dataset: the source's name of the data: single-task name, Minari id, folder of a transition set.
        environment: name of the environment for :func:`deflow_torchrl.envs.make_gym_env`; ``None`` if there is none.
        metric: measure of its evaluations: ``success``, ``score`` (normalised return) or ``return``.
        gamma: discount.
        q_aggregation: aggregation of the target critics.
        target_divergence: delta of DeFlow.
        in_paper: whether the three values before are the paper's for this task (Table 6), not the package's own choice.
        domain: the paper's rule from action variance to delta: ``manipulation``, ``navigation`` or ``d4rl``; ``None`` if unknown.
        reward_meaning: meaning of the data's rewards; ``None`` if unknown.
        number: number of an OGBench task; that of the environment's default task if the name has none.
        default_number: number of its environment's default task; ``None`` for other tasks.
        images: whether observations are known to be uint8 images ``[H, W, C]`` instead of states.
        sparse_rewards: whether rewards may be made sparse: -1 until the task is solved, then 0.
        reward: ``task``, the environment's rewards, or ``sparse``.
        published: name of the published set, if several tasks share it; ``None`` if it is ``dataset``.
    """

    name: str
    source: str
    dataset: str
    environment: str | None
    metric: Literal["success", "score", "return"]
    gamma: float = 0.99
    q_aggregation: str = "mean"
    target_divergence: float = 0.001
    in_paper: bool = False
    domain: str | None = None
    reward_meaning: str | None = None
    number: int | None = None
    default_number: int | None = None
    images: bool = False
    sparse_rewards: bool = False
    reward: str = "task"
    published: str | None = None

    @property
    def data_name(self) -> str:
        """Name of the data set; tasks that share a set have the same."""
        return self.published or self.dataset

    @property
    def identity(self) -> tuple[str, str, int | str | None]:
        """Key of the task, equal for two names of one task."""
        return self.source, self.data_name, self.number or self.environment


def get_task(name: str, *, environment: str | None = None, reward: str | None = None) -> Task:
    """Look a task up.

    Args:
        name: an OGBench single-task name (also ``ogbench:NAME``), one of the paper's D4RL names (``door-human-v1``),
            ``minari:ID`` for any Minari set, ``file:FOLDER`` for a set made by ``deflow data import``, or ``PREFIX:NAME`` for a
            set of a source that another package adds.

    Keyword Args:
        environment: environment for evaluation, for sources without a fixed one (``file:``, ``minari:``): a gymnasium id, an
            OGBench single-task name, or ``none``. By default a Minari set's own environment, and none for files.
        reward: ``sparse`` for sparse rewards, in data and environment; the environment's where None or ``task``.

    Raises:
        InputError: on an unknown name or prefix, with the nearest ones, and on sparse rewards of a task that has none.
    """
    task = _find_task(name, environment)
    if reward != "sparse":
        return task
    if not task.sparse_rewards:
        raise InputError(f"reward=sparse is of OGBench's scene and puzzle tasks, and {name} is none; leave reward=task")
    meaning = read_table("ogbench.json")["reward_meaning"]["sparse"]
    return replace(task, reward="sparse", environment=f"sparse:{task.environment}", reward_meaning=meaning)


def _find_task(name: str, environment: str | None) -> Task:
    prefix, rest = split_name(name)
    source = None if prefix is None else get_source(prefix)
    if environment is not None and (source is None or source.fixed_environment):
        raise InputError(f"env={environment} is for file: and minari: data; {name} has an environment of its own")
    if prefix is None or source is None:
        found = _ogbench_tasks().get(name) or _d4rl_tasks().get(name)
    else:
        found = _tasks_of_data().get((prefix, rest))
    if found is None and source is not None and not source.fixed_environment:
        found = Task(name, source=str(prefix), dataset=rest, environment=source.environment(rest), metric="return")
    if found is None:
        known = [*_ogbench_tasks(), *_d4rl_tasks()]
        hint = did_you_mean(name, known, otherwise="names look like cube-single-play-singletask-task2-v0")
        raise InputError(f"unknown task {name!r}; {hint}")
    if environment is None:
        return replace(found, name=name)
    task = _ogbench_tasks().get(environment)
    where = None if environment == "none" else environment if task else f"gym:{environment}"
    return replace(found, name=name, environment=where, metric=task.metric if task else "return")


@functools.cache
def _ogbench_tasks() -> Mapping[str, Task]:
    table = read_table("ogbench.json")
    tasks = {}
    for group in table["groups"]:
        numbers = range(1, table["tasks_per_environment"] + 1)
        default = group["default_task"]
        for environment in group["environments"]:
            for data in group["data"]:
                for number in (None, *numbers):
                    name = f"{environment}-{data}-singletask{'' if number is None else f'-task{number}'}-v0"
                    tasks[name] = Task(
                        name=name,
                        source="ogbench",
                        dataset=name,
                        environment=name,
                        metric="success",
                        **_settings(group),
                        in_paper=f"{environment}-{data}-singletask-task{number or default}-v0" in paper_names(),
                        domain=group["domain"],
                        reward_meaning=table["reward_meaning"][group["domain"]],
                        number=number or default,
                        default_number=default,
                        images=group.get("images", False),
                        sparse_rewards=group.get("sparse_rewards", False),
                        published=f"{environment}-{data}-v0",
                    )
    return tasks


@functools.cache
def _d4rl_tasks() -> Mapping[str, Task]:
    """The paper's D4RL tasks, by D4RL's name and by the Minari id of the data."""
    table = read_table("d4rl.json")
    tasks = {}
    for group in table["groups"]:
        for name in group["tasks"]:
            facts = d4rl_task(name)
            assert facts is not None, f"{name} is in tasks/d4rl.json and not in envs/d4rl.json"
            tasks[name] = tasks[facts.dataset_id] = Task(
                name=name,
                source="minari",
                dataset=facts.dataset_id,
                environment=f"minari:{facts.dataset_id}",
                metric="success" if facts.ends_early == "success" else "score",
                **_settings(group),
                in_paper=name in paper_names(),
                domain="d4rl",
                reward_meaning=group["reward_meaning"],
            )
    return tasks


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gamma": group["discount"],
        "q_aggregation": group["q_aggregation"],
        "target_divergence": group["target_divergence"],
    }


@functools.cache
def _tasks_of_data() -> Mapping[tuple[str, str], Task]:
    """The tasks of both tables by prefix and name of their data."""
    return {(task.source, task.dataset): task for task in (*_ogbench_tasks().values(), *_d4rl_tasks().values())}


def ogbench_task_names() -> list[str]:
    """All OGBench single-task names, in the table's order."""
    return list(_ogbench_tasks())


def d4rl_task_names() -> list[str]:
    """The paper's D4RL names, in the table's order."""
    return [name for name, task in _d4rl_tasks().items() if name != task.dataset]


def ogbench_dataset_name(name: str) -> str:
    """Name of the data set that a data-set or task name means, with or without the ending ``-v0``.

    Raises:
        InputError: on an unknown name, with the nearest ones.

    Examples:
        >>> ogbench_dataset_name("cube-single-play-singletask-task2-v0")
        'cube-single-play-v0'
        >>> ogbench_dataset_name("scene-noisy")
        'scene-noisy-v0'
    """
    datasets = dict.fromkeys(task.data_name for task in _ogbench_tasks().values())
    full = f"{name.removesuffix('-v0')}-v0"
    if full in datasets:
        return full
    if full in _ogbench_tasks():
        return _ogbench_tasks()[full].data_name
    known = _ogbench_tasks() if "singletask" in name else datasets
    raise InputError(
        f"unknown data set {name!r}; {did_you_mean(full, known, otherwise='names look like cube-single-play-v0')}"
    )
