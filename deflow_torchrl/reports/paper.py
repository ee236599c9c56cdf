# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The paper's printed results, read from ``paper_tables.json``: copied figures, marked as copied wherever they are shown."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from deflow_torchrl.reports.grids import Entry, Grid, GridRow

COPIED = "Copied from the paper"
_PHASES = {"offline_training": "offline update", "online_training": "online update", "inference": "one action"}


@functools.cache
def paper_tables() -> Mapping[str, Any]:
    """The data file: Tables 1 (``offline_families``), 2 (``offline_to_online``), 4, 5 and 7 (``offline``)."""
    return json.loads(resources.files(__package__).joinpath("paper_tables.json").read_text(encoding="utf-8"))


def numbered_task(task: str) -> str:
    """The name with its number of an OGBench default task that is called without one; any other name as it is."""
    return paper_tables()["default_tasks"].get(task, task)


def family_of(task: str) -> str:
    """The family a task is listed under: the paper's; of other OGBench tasks the data set's; else ``other``.

    Examples:
        >>> family_of("antmaze-umaze-v2"), family_of("cube-single-noisy-singletask-v0"), family_of("own:mine")
        ('d4rl-antmaze', 'cube-single-noisy', 'other')
    """
    known = paper_tables()["family_of"].get(numbered_task(task))
    match = re.fullmatch(r"(.+)-singletask(-task\d+)?-v\d+", task)
    return known or (match[1] if match else "other")


def task_order(task: str) -> tuple[int, str]:
    """Sort key: the paper's order, other tasks after it by name."""
    order = list(paper_tables()["family_of"])
    name = numbered_task(task)
    return (order.index(name) if name in order else len(order), task)


def averaged_evaluations(task: str) -> tuple[int, ...]:
    """The steps whose evaluations the paper averages into an offline cell; none for a task it does not have.

    Examples:
        >>> averaged_evaluations("cube-single-play-singletask-v0"), averaged_evaluations("pen-human-v1")
        ((800000, 900000, 1000000), (500000,))
    """
    family = paper_tables()["family_of"].get(numbered_task(task))
    steps = paper_tables()["averaged_evaluations"]
    return () if family is None else tuple(steps.get(family, steps["other families"]))


def paper_means(task: str, *, online: bool) -> dict[str, float]:
    """Algorithm -> the mean the paper prints for it on this task, offline to online that of the end; only those it prints."""
    tables = paper_tables()
    name = _online_name(task) if online else numbered_task(task)
    cells = tables["offline_to_online" if online else "offline"].get(name, {})
    found = {algo: cells[column][-2] for algo, column in tables["columns"].items() if column in cells}
    return {algo: mean for algo, mean in found.items() if mean is not None}


def paper_grids(tasks: Sequence[str], online_tasks: Sequence[str], *, ablation: bool) -> list[Grid]:
    """The paper's figures for these tasks, each table of its own.

    Args:
        tasks: tasks trained offline.
        online_tasks: tasks that went online.

    Keyword Args:
        ablation: with the table of fixed multipliers.
    """
    tables = paper_tables()
    offline = {
        task: tables["offline"][numbered_task(task)] for task in tasks if numbered_task(task) in tables["offline"]
    }
    families = list(dict.fromkeys(family_of(task) for task in offline))
    rows = []
    for family in families:
        rows += [(family, task, "task", cells) for task, cells in offline.items() if family_of(task) == family]
        rows.append(
            (family, "average over the family's tasks in the paper", "average", tables["offline_families"][family])
        )
    online = [
        (family_of(task), task, "task", tables["offline_to_online"][name])
        for task in online_tasks
        for name in [_online_name(task)]
        if name is not None
    ]
    grids = []
    if rows:
        caption = "Tables 1 and 7: success in % or normalised score, mean±std over 8 seeds (pixels 4; from prior work without ±)"
        grids.append(_grid(f"{COPIED}: offline", caption, rows))
    if online:
        caption = "Table 2: before → after 1M online steps, mean±std over 8 seeds (from prior work without ±)"
        grids.append(_grid(f"{COPIED}: offline to online", caption, online))
    if ablation:
        caption = "Table 5: DeFlow with a fixed multiplier, before → after 1M online steps, mean±std"
        grids.append(_grid(f"{COPIED}: fixed alpha", caption, [
            (family_of(task), task, "task", {f"alpha {name}": cell for name, cell in cells.items()})
            for task, cells in tables["alpha_ablation"].items()
        ], columns=[f"alpha {name}" for name in ("0.03", "0.1", "0.3", "1", "3", "adaptive")]))  # fmt: skip
    return grids


def paper_runtime() -> Grid:
    """Table 4: milliseconds a step on the authors' RTX 3090."""
    rows = [
        GridRow("task", (Entry(method), Entry(_PHASES[phase]), Entry(f"{mean:g}{_spread(std)}", mean)))
        for method, phase, mean, std in paper_tables()["runtime_ms"]
    ]
    headers = ("method", "phase", "ms per step")
    return Grid(f"{COPIED}: time", "Table 4, RTX 3090, mean±std", headers, tuple(rows), copied=True)


def _online_name(task: str) -> str | None:
    """The name Table 2 has for a task; None where it has none."""
    tables = paper_tables()
    for name in tables["offline_to_online"]:
        if numbered_task(name) == numbered_task(task):
            return name
    return None


def _grid(
    title: str,
    caption: str,
    rows: Sequence[tuple[str, str, str, Mapping[str, Sequence[float | None]]]],
    columns: Sequence[str] = (),
) -> Grid:
    columns = columns or list(dict.fromkeys(name for *_, cells in rows for name in cells))
    lines = tuple(
        GridRow(kind, (Entry(family), Entry(task), *(_cell(cells.get(name)) for name in columns)))
        for family, task, kind, cells in rows
    )
    return Grid(title, caption, ("family", "task", *columns), lines, copied=True)


def _cell(cell: Sequence[float | None] | None) -> Entry:
    if cell is None:
        return Entry("")
    parts = [f"{mean:g}{_spread(std)}" for mean, std in zip(cell[::2], cell[1::2], strict=True)]
    return Entry(" → ".join(parts), cell[-2])


def _spread(std: float | None) -> str:
    return "" if std is None else f"±{std:g}"
