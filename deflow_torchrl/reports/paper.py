# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Printed results of the paper and of QAM's authors, from ``paper_tables.json``: marked as copied wherever they are shown."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.grids import Entry, Grid, grid_row, make_grid
from deflow_torchrl.tasks import PaperTask, paper_task, paper_tasks

_FURTHER = ("offline_to_online", "flow_critics")
_EARLIER, _LATER = ("flow BC",), ("FEdit", "QAM", "QAM-E", "QAM-F", "TRQAM", "DSRL", "FAN")
_PHASES = {"offline_training": "offline update", "online_training": "online update", "inference": "one action"}


@functools.cache
def paper_tables() -> Mapping[str, Any]:
    """The data file: Tables 1 (``offline_families``), 2 (``offline_to_online``), 3 (``flow_critics``), 4, 5 and 7 (``offline``).

    ``qam_authors`` are results that QAM's authors published, under a protocol of their own.
    """
    return json.loads(resources.files(__package__).joinpath("paper_tables.json").read_text(encoding="utf-8"))


def find_paper_task(task: str, *, online: bool = False) -> PaperTask | None:
    """The paper's task of this name; None where it is none, or this version does not know the name of a record."""
    try:
        return paper_task(task, "offline_to_online" if online else "offline")
    except InputError:
        return None


def family_of(task: str) -> str:
    """The family a task is listed under: the paper's; that of the data set for other OGBench tasks; else ``other``.

    Examples:
        >>> family_of("antmaze-umaze-v2"), family_of("cube-single-noisy-singletask-v0"), family_of("own:mine")
        ('d4rl-antmaze', 'cube-single-noisy', 'other')
    """
    if known := find_paper_task(task):
        return paper_tables()["families"][known.family]
    match = re.fullmatch(r"(.+)-singletask(-task\d+)?-v\d+", task)
    return match[1] if match else "other"


def task_order(task: str) -> tuple[int, str]:
    """Sort key: the paper's order, other tasks after it by name."""
    order, known = [it.name for it in paper_tasks("offline")], find_paper_task(task)
    return (order.index(known.name) if known else len(order), task)


def averaged_evaluations(task: str) -> tuple[int, ...]:
    """The steps whose evaluations the paper averages into an offline cell; none for a task it does not have.

    Examples:
        >>> averaged_evaluations("cube-single-play-singletask-v0"), averaged_evaluations("pen-human-v1")
        ((800000, 900000, 1000000), (500000,))
    """
    known = find_paper_task(task)
    return known.eval_checkpoints if known else ()


def paper_cells(task: str, *, online: bool) -> Mapping[str, Sequence[float | None]]:
    """The paper's cells of a task by its names of the methods; none where it does not have the task."""
    known = find_paper_task(task, online=online)
    return paper_tables()["offline_to_online" if online else "offline"][known.name] if known else {}


def paper_methods() -> list[str]:
    """The methods of the paper's tables in their order, by title; its own is the last."""
    return list(next(iter(paper_tables()["offline_families"].values())))


def table_methods(table: str) -> list[str]:
    """The methods of one of :func:`paper_tables`, by title, in its order.

    Examples:
        >>> table_methods("flow_critics")
        ['FQL', 'floq', 'DeFlow', 'DeFlow + floq']
    """
    return list(dict.fromkeys(name for cells in paper_tables()[table].values() for name in cells))


@functools.cache
def method_order() -> tuple[str, ...]:
    """All methods by title, in the one order of every table: flow BC, the paper's in the order of its tables, the later ones.

    The order of Tables 1 and 7, with those that Tables 2 and 3 alone have behind the method that they follow there.
    """
    order = paper_methods()
    for before, title in itertools.chain(*(itertools.pairwise(table_methods(name)) for name in _FURTHER)):
        if title not in order:
            order.insert(order.index(before) + 1, title)
    return (*_EARLIER, *order, *_LATER)


def paper_means(task: str, *, online: bool) -> dict[str, float]:
    """Method -> the mean the paper prints for it on this task, offline to online that of the end; only those it prints."""
    cells = paper_cells(task, online=online)
    return {name: mean for name, cell in cells.items() if (mean := cell[-2]) is not None}


def paper_grids(
    tasks: Sequence[str], online_tasks: Sequence[str], *, ablation: bool, flow_critics: bool = False
) -> list[Grid]:
    """The paper's figures for these tasks, and those of QAM's authors for their families, each table of its own.

    Args:
        tasks: tasks trained offline.
        online_tasks: tasks that went online.

    Keyword Args:
        ablation: with the table of fixed multipliers.
        flow_critics: with that of floq's critics.
    """
    tables = paper_tables()
    families: dict[str, list[Any]] = {}
    for task in tasks:
        if cells := paper_cells(task, online=False):
            families.setdefault(family_of(task), []).append((family_of(task), task, "task", cells))
    for family, rows in families.items():
        average = "average over the family's tasks in the paper"
        rows.append((family, average, "average", tables["offline_families"][family]))
    online = [(task, paper_cells(task, online=True)) for task in online_tasks]
    grids = []
    if families:
        grids.append(_grid("paper_offline", [row for rows in families.values() for row in rows]))
    if rows := [(family_of(task), task, "task", cells) for task, cells in online if cells]:
        grids.append(_grid("paper_online", rows))
    if flow_critics:
        rows = [(family, "five tasks", "average", cells) for family, cells in tables["flow_critics"].items()]
        grids.append(_grid("paper_flow_critics", rows))
    if ablation:
        names = ["0.03", "0.1", "0.3", "1", "3", "adaptive"]
        rows = [
            (family_of(task), task, "task", {f"alpha {name}": cells.get(name) for name in names})
            for task, cells in tables["alpha_ablation"].items()
        ]
        grids.append(_grid("paper_ablation", rows))
    domains = {family: tables["qam_authors"].get(family) for family in map(family_of, (*tasks, *online_tasks))}
    if rows := [(family, "five tasks", "average", cells) for family, cells in domains.items() if cells]:
        grids.append(_grid("paper_qam", rows))
    return grids


def paper_runtime() -> Grid:
    """Table 4: milliseconds a step on the authors' RTX 3090."""
    rows = [
        grid_row(method, _PHASES[phase], Entry(_number(mean, std), mean))
        for method, phase, mean, std in paper_tables()["runtime_ms"]
    ]
    return make_grid("paper_time", rows)


def _grid(kind: str, rows: Sequence[tuple[str, str, str, Mapping[str, Any]]]) -> Grid:
    columns = list(dict.fromkeys(name for *_, cells in rows for name in cells))
    columns.sort(key=lambda name: method_order().index(name) if name in method_order() else -1)
    lines = [
        grid_row(family, task, *(_cell(cells.get(name)) for name in columns), kind=row_kind)
        for family, task, row_kind, cells in rows
    ]
    return make_grid(kind, lines, columns=columns)


def _cell(cell: Sequence[float] | None) -> Entry:
    if cell is None:
        return Entry("")
    return Entry(" → ".join(map(_number, cell[::2], cell[1::2])), cell[-2])


def _number(mean: float, std: float | None) -> str:
    return f"{mean:g}" + ("" if std is None else f"±{std:g}")
