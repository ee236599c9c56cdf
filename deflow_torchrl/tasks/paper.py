# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The paper's tasks with their settings of training, evaluation and tuning (Table 6), read from ``paper.json``.

Values are the paper's; :attr:`PaperTask.released` holds those of the authors' code or README where they differ.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from deflow_torchrl.envs.d4rl import d4rl_task
from deflow_torchrl.errors import InputError, did_you_mean
from deflow_torchrl.tasks.registry import get_task
from deflow_torchrl.tasks.tables import read_table, row_tasks

SETTINGS = ("offline", "offline_to_online")


@dataclass(frozen=True)
class PaperTask:
    """A row of the paper's tables.

    Attributes:
        name: as ``deflow train task=NAME`` takes it.
        setting: ``offline`` or ``offline_to_online``.
        family: one of :func:`families`.
        benchmark: ``ogbench-state``, ``ogbench-visual`` or ``d4rl``.
        dataset: the published set: name of OGBench's files, or Minari's id.
        environment: as :func:`deflow_torchrl.envs.make_gym_env` takes it.
        default_task: whether OGBench's methods were tuned on this task for the whole family; ``None`` where each task was
            tuned, and for visual tasks.
        trainable: whether this package can train on it.
        horizon: environment steps until an episode is cut.
        discount: gamma.
        q_aggregation: aggregation of the target critics, ``mean`` or ``min``.
        target_divergence: delta of DeFlow, mean square per action dimension.
        offline_steps: gradient steps on the data set.
        online_steps: environment steps after them, with one gradient step each.
        eval_interval: steps between evaluations.
        eval_episodes: episodes of each.
        eval_checkpoints: steps whose evaluations are averaged in a cell of the table; offline to online: the two steps that a
            cell shows.
        seeds: number of runs behind the mean and standard deviation of a cell.
        metric: ``success`` (share of episodes, x 100 in the tables) or ``score`` (D4RL's normalised return).
        hidden_dims: method -> widths of its networks, if they differ from :attr:`default_hidden_dims`.
        default_hidden_dims: widths of all other networks.
        hyperparameters: method -> setting -> value, by the names of ``algo.<name>``; DeFlow's is ``target_divergence``. A
            method without an entry has no value in the paper for this task.
        released: field of this class -> value in the authors' code or README, where it differs from the paper.
        copied: source and protocol of the numbers that the paper copied for some methods; ``None`` if nothing is known.
        pixels: encoder, probability of the random crop and number of stacked frames; ``None`` for states.
    """

    name: str
    setting: Literal["offline", "offline_to_online"]
    family: str
    benchmark: str
    dataset: str
    environment: str
    default_task: bool | None
    trainable: bool
    horizon: int
    discount: float
    q_aggregation: str
    target_divergence: float
    offline_steps: int
    online_steps: int
    eval_interval: int
    eval_episodes: int
    eval_checkpoints: tuple[int, ...]
    seeds: int
    metric: Literal["success", "score", "return"]
    hidden_dims: Mapping[str, tuple[int, ...]]
    default_hidden_dims: tuple[int, ...]
    hyperparameters: Mapping[str, Mapping[str, float]]
    released: Mapping[str, Any]
    copied: str | None
    pixels: Mapping[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self) | {"eval_checkpoints": list(self.eval_checkpoints)}


def paper_tasks(setting: str, family: str | None = None) -> list[PaperTask]:
    """The paper's tasks in the order of its tables: 73 offline, 15 offline-to-online.

    Args:
        setting: ``"offline"`` or ``"offline_to_online"``.
        family: name of a family or group (``cube`` is ``cube-single`` and ``cube-double``); all families by default. A family
            may have no task in a setting.

    Raises:
        InputError: on an unknown setting or family, with the nearest names.

    Examples:
        >>> [len(paper_tasks(setting)) for setting in SETTINGS]
        [73, 15]
        >>> [task.name for task in paper_tasks("offline_to_online", "cube")]
        ['cube-double-play-singletask-v0']
    """
    if setting not in SETTINGS:
        raise InputError(f"unknown setting {setting!r}; {did_you_mean(setting, SETTINGS)}")
    chosen = families() if family is None else families_of(family)
    return [task for task in _tasks()[setting] if task.family in chosen]


def families() -> list[str]:
    """The families of the paper's tasks, in the order of its tables."""
    return list(dict.fromkeys(row["family"] for row in read_table("paper.json")["offline"]))


def family_groups() -> dict[str, list[str]]:
    """Names of groups -> their families."""
    return {name: list(members) for name, members in read_table("paper.json")["groups"].items()}


def families_of(name: str) -> list[str]:
    """The families of a family's or a group's name.

    Raises:
        InputError: on an unknown name, with the nearest ones.
    """
    groups = family_groups()
    if name in families():
        return [name]
    if name not in groups:
        raise InputError(f"unknown family {name!r}; {did_you_mean(name, [*families(), *groups])}")
    return groups[name]


def paper_task(name: str, setting: str = "offline") -> PaperTask | None:
    """The paper's task of a name in any form of :func:`~deflow_torchrl.tasks.get_task`; ``None`` if it is not in the paper.

    Raises:
        InputError: if the name is not a task at all.
    """
    return _by_task()[setting].get(get_task(name).identity)


def published_settings(method: str, task: PaperTask, *, online: bool = False) -> dict[str, Any]:
    """Values that the authors of a method outside the paper published for a task's family.

    Args:
        method: name of the method.
        task: the task.

    Keyword Args:
        online: of runs that go online.

    Examples:
        >>> published_settings("floq", paper_tasks("offline", "cube-double")[0])
        {'alpha': 300, 'critic_hidden_dims': [512, 512]}
    """
    table = read_table("published.json")
    values: dict[str, Any] = {}
    for setting in SETTINGS[: 1 + online]:
        of_method = table[setting].get(method, {})
        values |= {**of_method.get(task.family, {}), **of_method.get(task.name, {})}
    return values


def original_settings(method: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``algo.footing=original`` changes: settings of ``deflow train``, those of the method as ``algo.NAME``.

    Args:
        method: name of the method.
        name: of the task.
        given: settings of the method, of which some decide about others.

    Examples:
        >>> original_settings("fan", "cube-double-play-singletask-v0", {})
        {'algo.gamma': 0.995}
    """
    task, row = get_task(name), paper_task(name)
    of_task = {
        "domains": task.domain, "datasets": task.data_name, "families": row and row.family, "tasks": row and row.name
    }  # fmt: skip
    values: dict[str, Any] = {}
    for entry in read_table("footings.json")["original"]:
        matches = all(value in entry[kind] for kind, value in of_task.items() if kind in entry)
        chosen = all(given.get(key) == value for key, value in entry.get("when", {}).items())
        if method in entry["methods"] and matches and chosen:
            values |= entry["settings"]
    return values


def has_own_footing(method: str) -> bool:
    """Whether a method was published with settings of its own (``algo.footing=original``): numbers of it are of these.

    Examples:
        >>> has_own_footing("idql"), has_own_footing("rlpd")
        (True, False)
    """
    return any(method in entry["methods"] for entry in read_table("footings.json")["original"])


def paper_settings(method: str) -> list[str]:
    """Settings of a method that the paper chooses for each task (Table 6)."""
    return list(dict.fromkeys(name for task in paper_tasks("offline") for name in task.hyperparameters.get(method, {})))


def chosen_by_task(method: str) -> list[str]:
    """Settings of a method that the paper, or the method's own authors, choose for each task or family.

    Examples:
        >>> chosen_by_task("fql"), chosen_by_task("fedit"), chosen_by_task("flow_bc")
        (['alpha'], ['edit_scale'], [])
    """
    table = read_table("published.json")
    published = [name for setting in SETTINGS for row in table[setting].get(method, {}).values() for name in row]
    return list(dict.fromkeys([*paper_settings(method), *published]))


def usual_protocol(*, pixels: bool = False) -> dict[str, Any]:
    """Settings of tasks outside the paper: those of OGBench's tasks with states, or with pictures."""
    table = read_table("paper.json")
    protocol = table["protocols"]["ogbench-visual" if pixels else "ogbench-state"]
    names = ("offline_steps", "eval_interval", "eval_episodes", "pixels")
    return {name: protocol[name] for name in names} | {"hidden_dims": list(table["hidden_dims"])}


@functools.cache
def _by_task() -> dict[str, dict[tuple[str, str, int | str | None], PaperTask]]:
    return {setting: {get_task(task.name).identity: task for task in tasks} for setting, tasks in _tasks().items()}


@functools.cache
def _tasks() -> dict[str, list[PaperTask]]:
    table = read_table("paper.json")
    offline = [_offline(table, row, name) for row in table["offline"] for name in row_tasks(row)]
    known = {get_task(task.name).identity: task for task in offline}
    online = []
    for row in table["offline_to_online"]:
        for name in row_tasks(row):
            # Values that this setting's table lacks are those of the offline table.
            task = known[get_task(name).identity]
            assert task.family == row["family"], name
            protocol = dict(table["protocols"]["offline_to_online"])
            checkpoints = tuple(protocol.pop("eval_checkpoints"))
            hyperparameters = _with_delta(row["hyperparameters"], task.target_divergence)
            released = {**task.released, **row.get("released", {})}
            online.append(
                replace(
                    task,
                    name=name,
                    setting="offline_to_online",
                    environment=get_task(name).environment or "",
                    eval_checkpoints=checkpoints,
                    hyperparameters=hyperparameters,
                    released=released,
                    **(protocol if task.benchmark == "d4rl" else {**protocol, "copied": None}),
                )
            )
    return {"offline": offline, "offline_to_online": online}


def _offline(table: dict[str, Any], row: dict[str, Any], name: str) -> PaperTask:
    task = get_task(name)
    assert task.environment is not None, name
    protocol = {"copied": None, **table["protocols"][row["protocol"]]}
    checkpoints = tuple(protocol.pop("eval_checkpoints"))
    facts = d4rl_task(name)
    state = row["protocol"] == "ogbench-state"
    return PaperTask(
        name=name,
        setting="offline",
        family=row["family"],
        benchmark=row["protocol"],
        dataset=task.data_name,
        environment=task.environment,
        default_task=task.number == task.default_number if state else None,
        trainable=True,
        horizon=row["horizon"] if facts is None else facts.max_steps,
        discount=task.gamma,
        q_aggregation=task.q_aggregation,
        target_divergence=task.target_divergence,
        metric=task.metric,
        hidden_dims={method: tuple(widths) for method, widths in row.get("hidden_dims", {}).items()},
        default_hidden_dims=tuple(table["hidden_dims"]),
        hyperparameters=_with_delta(row["hyperparameters"], task.target_divergence),
        released=dict(row.get("released", {})),
        eval_checkpoints=checkpoints,
        **protocol,
    )


def _with_delta(hyperparameters: dict[str, dict[str, float]], delta: float) -> dict[str, dict[str, float]]:
    return {
        **{method: dict(values) for method, values in hyperparameters.items()},
        "deflow": {"target_divergence": delta},
    }
