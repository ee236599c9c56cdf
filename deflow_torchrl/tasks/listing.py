# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The paper's tasks as plain text of at most 100 columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from deflow_torchrl.tasks.paper import PaperTask
from deflow_torchrl.tasks.tables import read_table

WIDTH = 100
_TITLES = {"offline": "Offline", "offline_to_online": "Offline to online"}


def list_tasks(setting: str, tasks: Sequence[PaperTask]) -> str:
    """Tables of tasks of one setting: protocol, DeFlow's settings, other methods' settings.

    Args:
        setting: setting of the tasks.
        tasks: tasks to list; those that differ only in their number share a line.
    """
    title = f"{_TITLES[setting]}: {len(tasks)} task{'' if len(tasks) == 1 else 's'}"
    if not tasks:
        return title
    rows = _merged(tasks)
    lines = [title, "", *(f"  {line}" for line in _protocols(tasks))]
    lines += ["", *_table(rows, ("episode", "gamma", "Q", "delta"), _of_task)]
    if any("target_divergence" in task.released for task in tasks):
        readme = sorted({task.released.get("target_divergence", 0.0) for task in tasks} - {0.0})
        lines.append(
            f"  * {', '.join(map(str, readme))} in the authors' README; deflow train --preset released takes it"
        )
    meanings: dict[str, list[str]] = {}
    for method, meaning in _listed_methods().items():
        meanings.setdefault(meaning, []).append(method)
    lines += ["", *_table(rows, list(_listed_methods()), _of_methods)]
    lines.append("  " + "; ".join(f"{', '.join(methods)}: {meaning}" for meaning, methods in meanings.items()))
    return "\n".join(lines)


def _merged(tasks: Sequence[PaperTask]) -> list[tuple[str, PaperTask]]:
    """For each line its name, with the numbers of its tasks, and the first of them."""
    found: dict[tuple[str, ...], list[PaperTask]] = {}
    for task in tasks:
        stem = re.sub(r"-task\d+-", "-task#-", task.name)
        found.setdefault((stem, *_of_task(task), *_of_methods(task)), []).append(task)
    rows = []
    for (stem, *_), members in found.items():
        numbers = [int(number) for task in members for number in re.findall(r"-task(\d+)-", task.name)]
        if len(members) == 1:
            label = members[0].name
        elif numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
            label = stem.replace("#", f"{{{numbers[0]}..{numbers[-1]}}}")
        else:
            label = stem.replace("#", f"{{{','.join(map(str, numbers))}}}")
        rows.append((label, members[0]))
    return rows


def _protocols(tasks: Sequence[PaperTask]) -> list[str]:
    lines = {}
    for task in tasks:
        steps = f"{short(task.offline_steps)} steps"
        if task.online_steps:
            steps += f", then {short(task.online_steps)} online"
        shown = ", ".join(short(step) for step in task.eval_checkpoints)
        cell = "of" if len(task.eval_checkpoints) == 1 else "at" if task.online_steps else "mean of"
        lines[task.benchmark] = (
            f"{task.benchmark}: {steps}; {task.eval_episodes} episodes each {short(task.eval_interval)}; "
            f"{task.metric if task.benchmark != 'd4rl' else 'score'} {cell} {shown}; {task.seeds} seeds"
        )
        if "offline_steps" in task.released:
            fewer = short(task.released["offline_steps"])
            lines[f"{task.benchmark}, released"] = (
                f"{task.benchmark}: {fewer} steps in the authors' README; deflow train --preset released takes them"
            )
    return list(lines.values())


def _of_task(task: PaperTask) -> tuple[str, ...]:
    star = "*" if "target_divergence" in task.released else ""
    return str(task.horizon), f"{task.discount:g}", task.q_aggregation, f"{task.target_divergence:g}{star}"


def _listed_methods() -> dict[str, str]:
    """Methods with a column -> meaning of their settings."""
    return read_table("paper.json")["listed"]


def _of_methods(task: PaperTask) -> tuple[str, ...]:
    return tuple(
        "/".join(f"{value:g}" for value in task.hyperparameters.get(method, {}).values()) or "-"
        for method in _listed_methods()
    )


def _table(
    rows: Sequence[tuple[str, PaperTask]], header: Sequence[str], cells: Callable[[PaperTask], tuple[str, ...]]
) -> list[str]:
    table = [("task", *header), *((name, *cells(task)) for name, task in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in table
    ]


def short(steps: int) -> str:
    """Write a number of steps as papers do.

    Examples:
        >>> short(1_000_000), short(100_000), short(1_500)
        ('1M', '100K', '1500')
    """
    for size, letter in ((1_000_000, "M"), (1_000, "K")):
        if steps and steps % size == 0:
            return f"{steps // size}{letter}"
    return str(steps)
