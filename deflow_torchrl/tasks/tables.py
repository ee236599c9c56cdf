# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The JSON files of this package, and the names of the paper's tasks."""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any


@functools.cache
def read_table(name: str) -> dict[str, Any]:
    """Read one of this package's JSON files; the result is shared and must not be changed."""
    table: dict[str, Any] = json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
    return table


def row_tasks(row: dict[str, Any]) -> list[str]:
    """The tasks of a row of ``paper.json``, in order.

    Examples:
        >>> row_tasks({"tasks": "scene-play-singletask-task{1,2}-v0"})
        ['scene-play-singletask-task1-v0', 'scene-play-singletask-task2-v0']
        >>> row_tasks({"tasks": ["door-human-v1"]})
        ['door-human-v1']
    """
    tasks = row["tasks"]
    if not isinstance(tasks, str):
        return list(tasks)
    parts = re.fullmatch(r"(.*)\{([\d,]+)\}(.*)", tasks)
    assert parts is not None, tasks
    return [f"{parts[1]}{number}{parts[3]}" for number in parts[2].split(",")]


@functools.cache
def paper_names() -> frozenset[str]:
    """The names of the paper's offline tasks, OGBench's with their number."""
    return frozenset(name for row in read_table("paper.json")["offline"] for name in row_tasks(row))
