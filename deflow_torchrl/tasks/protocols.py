# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Protocols of a sweep: which part of the benchmark is run and how; ``paper`` and ``small``, read from ``protocols.json``."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from deflow_torchrl.errors import InputError, did_you_mean
from deflow_torchrl.tasks.tables import read_table


@dataclass(frozen=True)
class GeneratedData:
    """Arguments of ``deflow data generate`` for a protocol's data sets.

    Attributes:
        datasets: names of the generated sets -> training episodes of each.
        val_episodes: validation episodes of each.
        seed: seed of each.
    """

    datasets: Mapping[str, int]
    val_episodes: int
    seed: int


@dataclass(frozen=True)
class TaskSettings:
    """What a protocol fixes for a task that the paper does not have.

    Attributes:
        like: tasks of the paper whose values the methods take, each setting from the first that has it.
        settings: as :attr:`Protocol.settings`, before which they come.
    """

    like: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FixedAlpha:
    """The ablation of DeFlow's multiplier (Table 5).

    Attributes:
        values: the fixed multipliers that are compared with the adaptive one.
        online: whether the runs continue online after the offline steps.
        tasks: names of the tasks.
    """

    values: tuple[float, ...]
    online: bool
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """A protocol; settings that it does not name are those of task and method, which are the paper's.

    Attributes:
        name: as in ``protocol=NAME``.
        summary: description in a sentence.
        comparable: whether its numbers are comparable with the paper's.
        seeds: seeds of training.
        settings: ``key=value`` of ``deflow train``; see :meth:`settings_of` for those of the method.
        online_settings: further settings of runs from offline to online.
        methods: names of the methods offline; see :meth:`methods_of`.
        family_methods: family -> these names, for families that differ.
        online_methods: names of the methods offline to online.
        tasks: family -> tasks offline; ``None`` for the paper's.
        generated: the data sets that are generated; ``None`` if all data are published ones.
        fixed_alpha: the ablation of the multiplier.
        averaged: evaluations at the end of a run that are averaged into its score; ``None`` for the report's own rule.
        task_settings: task -> what is fixed for it.
        scaled: method -> setting -> factor of the value that is taken from another task: by how much a scale that was
            chosen for the paper's budget is changed for this one.
    """

    name: str
    summary: str
    comparable: bool
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    online_settings: Mapping[str, Any]
    methods: tuple[str, ...]
    family_methods: Mapping[str, tuple[str, ...]]
    online_methods: tuple[str, ...]
    tasks: Mapping[str, tuple[str, ...]] | None
    generated: GeneratedData | None
    fixed_alpha: FixedAlpha
    averaged: int | None = None
    task_settings: Mapping[str, TaskSettings] = field(default_factory=dict)
    scaled: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def methods_of(self, family: str) -> tuple[str, ...]:
        """Names of the methods that are compared on a family's tasks."""
        return self.family_methods.get(family, self.methods)

    def settings_of(
        self, method_settings: Collection[str], *, online: bool = False, task: str | None = None
    ) -> dict[str, Any]:
        """The ``key=value`` settings of a run.

        Args:
            method_settings: names of the method's settings, without ``algo.``; others are left out, such as ``tau`` for a
                method without a critic.

        Keyword Args:
            online: whether the run continues online after the offline steps.
            task: name of the task; by default the settings are those of every task.
        """
        own = self.task_settings.get(task or "", TaskSettings()).settings
        settings = {**self.settings, **(self.online_settings if online else {}), **own}
        return {
            name: value
            for name, value in settings.items()
            if not name.startswith("algo.") or name.removeprefix("algo.") in method_settings
        }


def protocol_names() -> list[str]:
    """The names of all protocols."""
    return list(_protocols())


def get_protocol(name: str) -> Protocol:
    """Look a protocol up.

    Raises:
        InputError: on an unknown name, with the nearest ones.
    """
    if name not in _protocols():
        raise InputError(f"unknown protocol {name!r}; {did_you_mean(name, _protocols(), n=1)}")
    return _protocols()[name]


@functools.cache
def _protocols() -> Mapping[str, Protocol]:
    return {name: _protocol(name, dict(row)) for name, row in read_table("protocols.json")["protocols"].items()}


def _protocol(name: str, row: dict[str, Any]) -> Protocol:
    def by_family(names: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
        return {family: tuple(several) for family, several in names.items()}

    made, alpha, tasks = row.pop("generated"), row.pop("fixed_alpha"), row.pop("tasks")
    for key in ("seeds", "methods", "online_methods"):
        row[key] = tuple(row[key])
    return Protocol(
        name=name,
        tasks=None if tasks is None else by_family(tasks),
        family_methods=by_family(row.pop("family_methods")),
        generated=None if made is None else GeneratedData(**made),
        task_settings={
            task: TaskSettings(tuple(each["like"]), each["settings"])
            for task, each in row.pop("task_settings", {}).items()
        },
        fixed_alpha=FixedAlpha(tuple(alpha["values"]), alpha["online"], tuple(alpha["tasks"])),
        **row,
    )
