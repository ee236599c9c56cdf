# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The plan of a sweep: tasks x methods, each a cell with its seeds, and the settings of every cell's runs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deflow_torchrl.algorithms.registry import ALGORITHMS, get_algorithm
from deflow_torchrl.algorithms.settings import needed
from deflow_torchrl.errors import InputError, did_you_mean
from deflow_torchrl.paths import file_name
from deflow_torchrl.runs.overrides import put, read_overrides
from deflow_torchrl.runs.settings import (
    SettledConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    footing_settings,
    setting_names,
    values_like,
    with_task_defaults,
)
from deflow_torchrl.sources.base import settled_name
from deflow_torchrl.tasks import families, family_groups, get_task, paper_task, paper_tasks
from deflow_torchrl.tasks.protocols import get_protocol

PLAN_FILE = "sweep.json"
STATUS_FILE = "status.jsonl"
LOGS = "logs"
_MOST_SEEDS = 1000  # a larger number is a typing error: each seed is a job and a folder in every cell


@dataclass(frozen=True)
class Variant:
    """A method, possibly with settings that differ from its defaults.

    Attributes:
        method: its name.
        settings: ``NAME=VALUE`` of ``algo.NAME=VALUE``, in the order given.
    """

    method: str
    settings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name of its folder: the method's name, then its settings.

        Examples:
            >>> Variant("deflow", ("fixed_alpha=0.3",)).label
            'deflow-fixed_alpha=0.3'
        """
        return "-".join([self.method, *(re.sub(r"[^\w.=+-]+", "-", text) for text in self.settings)])


@dataclass(frozen=True)
class Cell:
    """A cell of the benchmark's table.

    Attributes:
        task: its name.
        variant: the method.
        config: all settings of its runs except seeds and folder; None if it cannot be trained.
        left_out: the reason why it cannot be trained; None if it can.
    """

    task: str
    variant: Variant
    config: SettledConfig | None
    left_out: str | None = None

    @property
    def name(self) -> str:
        """``TASK/ALGO``, its folder below the sweep's."""
        return f"{file_name(self.task)}/{self.variant.label}"

    @property
    def settled(self) -> SettledConfig:
        """The settings of a cell that can be trained."""
        assert self.config is not None
        return self.config


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        cells: tasks x methods, task by task.
        seeds: of every cell.
        out: the sweep's folder; a run's is ``OUT/TASK/ALGO/seedN``.
        engine: ``local``, this machine's cores, or ``ray``.
        ray_address: address of the Ray cluster; if None a cluster of this machine alone is started.
        jobs: number of jobs that run at once (``local``); if None one per core, or one if ``device`` is a GPU.
        stacked: whether a cell's seeds train together in one process: ``true``, ``false``, or ``auto``: on a GPU and on Ray.
            Cells that cannot (online steps, compile, wandb, mlflow) train one by one with ``auto``.
        retries: number of times that a failed job is tried again from its last checkpoint.
        num_cpus: cores of a job on Ray.
        num_gpus: GPUs of a job on Ray; if None one if ``device`` is a GPU, else none.
        protocol: name of the protocol whose settings hold where ``settings`` gives none; None without one.
        settings: ``KEY=VALUE`` of ``deflow train``, as given.
        command: the command line, for the records.
    """

    cells: Sequence[Cell]
    seeds: Sequence[int]
    out: Path
    engine: str = "local"
    ray_address: str | None = None
    jobs: int | None = None
    stacked: str = "auto"
    retries: int = 1
    num_cpus: float = 1.0
    num_gpus: float | None = None
    protocol: str | None = None
    settings: Sequence[str] = field(default_factory=tuple)
    command: str = "deflow_torchrl.sweep.run_sweep"

    @property
    def trained(self) -> list[Cell]:
        """The cells that can be trained."""
        return [cell for cell in self.cells if cell.left_out is None]

    @property
    def left_out(self) -> dict[str, str]:
        """Cells that cannot be trained -> the reason."""
        return {cell.name: cell.left_out for cell in self.cells if cell.left_out is not None}

    def as_dict(self) -> dict[str, Any]:
        """The plan as ``sweep.json`` has it."""
        return {
            "tasks": list(dict.fromkeys(cell.task for cell in self.cells)),
            "algos": list(dict.fromkeys(cell.variant.label for cell in self.cells)),
            "seeds": list(self.seeds),
            "protocol": self.protocol,
            "settings": list(self.settings),
            "stacked": self.stacked,
            "engine": self.engine,
            "left_out": self.left_out,
            "command": self.command,
        }


def parse_sweep(arguments: Sequence[str], *, command: str | None = None) -> SweepPlan:
    """Read ``tasks=... algos=... seeds=... out=DIR [KEY=VALUE...]``, as ``deflow sweep`` takes them.

    Args:
        arguments: ``KEY=VALUE`` of the sweep (:data:`OPTIONS`); all others are settings of ``deflow train`` for every run.
            Tasks: names, families or groups of families, ``all`` (the paper's 73 offline tasks) or ``o2o`` (its 15
            offline-to-online tasks, with their online steps). Methods: ``all``, or names, with settings of their own behind
            colons (``deflow:fixed_alpha=0.3``). Seeds: ``0..7`` or a list.

    Keyword Args:
        command: the command line, for the records.

    Raises:
        InputError: on an unknown key, task, family, method, setting or protocol (with the nearest names), or a value out of
            range.
        MissingExtraError: without the ``cli`` extra.
    """
    options, settings = _split(arguments)
    if missing := [name for name in ("tasks", "algos", "out") if name not in options]:
        raise InputError(f"{missing[0]}= is missing; a sweep needs tasks=, algos= and out=")
    protocol = None if "protocol" not in options else get_protocol(options["protocol"])
    if "seeds" not in options and protocol is None:
        raise InputError("seeds= is missing; give them, for example seeds=0..7, or a protocol=")
    algos = list(ALGORITHMS) if options["algos"] == "all" else _list(options["algos"], "algos")
    variants = [_variant(text) for text in algos]
    if double := _double(variant.label for variant in variants):
        raise InputError(f"algos={options['algos']}: {double} is there twice")
    tasks = _tasks(_list(options["tasks"], "tasks"))
    if double := _double(file_name(task) for task, _, _ in tasks):
        raise InputError(
            f"tasks={options['tasks']}: two of them have the folder {double}; give each a sweep of its own"
        )
    if "seeds" in options or protocol is None:
        seeds = _seeds(options["seeds"])
    else:
        in_paper = [
            found.seeds for task, online, _ in tasks if (found := paper_task(task, _SETTINGS[online])) is not None
        ]
        seeds = list(protocol.seeds)[: max(in_paper, default=None)]  # visual tasks have four
    plan = SweepPlan(
        cells=_cells(tasks, variants, settings, protocol),
        seeds=seeds,
        out=Path(options["out"]).expanduser(),
        engine=_one_of("engine", options.get("engine", "local"), ("local", "ray")),
        ray_address=options.get("ray_address"),
        jobs=_number("jobs", options, int, at_least=1),
        stacked=_one_of("stacked", options.get("stacked", "auto").lower(), ("auto", "true", "false")),
        retries=_number("retries", {"retries": "1", **options}, int, at_least=0),
        num_cpus=_number("num_cpus", {"num_cpus": "1", **options}, float, at_least=0),
        num_gpus=_number("num_gpus", options, float, at_least=0),
        protocol=options.get("protocol"),
        settings=tuple(settings),
        **({} if command is None else {"command": command}),
    )
    _check_engine(plan, options)
    return plan


# The keys of a sweep; every other key is a setting of ``deflow train``.
OPTIONS = (
    "tasks", "algos", "seeds", "out", "engine", "ray_address", "jobs", "stacked", "retries", "num_cpus", "num_gpus", "protocol",
)  # fmt: skip
_SETTINGS = ("offline", "offline_to_online")
_INSTEAD = {"task": "tasks", "algo": "algos", "seed": "seeds"}


def can_stack(config: TrainConfig) -> bool:
    """Whether seeds of these settings can train together in one process."""
    return not config.online_steps and not config.compile and config.logger not in ("wandb", "mlflow")


def is_gpu(config: TrainConfig) -> bool:
    """Whether these settings train on an accelerator."""
    return not config.device.startswith("cpu")


def uses_gpu(plan: SweepPlan) -> bool:
    """Whether any cell trains on an accelerator."""
    return any(is_gpu(cell.settled) for cell in plan.trained)


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    settings = []
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{text!r} is not a setting; write key=value, for example seeds=0..7")
        if key in _INSTEAD:
            raise InputError(f"{text}: a sweep has several; write {_INSTEAD[key]}=")
        if key not in OPTIONS:
            names = [name for name in setting_names(TrainConfig) if name not in _INSTEAD]
            if "." not in key and key not in names:
                hint = did_you_mean(key, [*OPTIONS, *names], otherwise=f"a sweep's own are {', '.join(OPTIONS)}")
                raise InputError(f"unknown setting {key!r}; {hint}")
            settings.append(text)
        elif key in options:
            raise InputError(f"{key}= is given twice")
        elif not value.strip():
            raise InputError(f"{key}= is empty")
        else:
            options[key] = value
    return options, settings


def _list(text: str, name: str) -> list[str]:
    items = [item.strip() for item in text.removeprefix("[").removesuffix("]").split(",")]
    if not all(items):
        raise InputError(f"{name}={text}: a list has names and commas, for example {name}=a,b")
    return items


def _seeds(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    items = [first, last] if dots else _list(text, "seeds")
    try:
        seeds = [int(item) for item in items]
    except ValueError as error:
        raise InputError(f"seeds={text} are no seeds; write seeds=0..7 or seeds=0,1,2") from error
    if dots:
        if not 0 <= seeds[1] - seeds[0] < _MOST_SEEDS:
            raise InputError(
                f"seeds={text} is out of range; expected the lower one first, and at most {_MOST_SEEDS} seeds"
            )
        seeds = list(range(seeds[0], seeds[1] + 1))
    if len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
        raise InputError(f"seeds={text} is out of range; expected numbers from 0 to below 2**63, each once")
    return seeds


def _variant(text: str) -> Variant:
    method, *settings = text.split(":")
    known = setting_names(get_algorithm(method).config)
    for setting in settings:
        name, equals, _ = setting.partition("=")
        if not equals:
            raise InputError(f"{text}: write METHOD:NAME=VALUE, for example deflow:fixed_alpha=0.3")
        if name not in known:
            raise InputError(f"{text}: {method} has no setting {name!r}; {did_you_mean(name, known)}")
    return Variant(method, tuple(settings))


def _tasks(names: Sequence[str]) -> list[tuple[str, bool, bool]]:
    """Task names, each with two flags: whether it continues online as in the paper, and whether the user named it itself."""
    tasks: dict[str, tuple[str, bool, bool]] = {}
    for name in names:
        online, named = name == "o2o", name not in ("all", "o2o", *families(), *family_groups())
        if named:
            found = [_known(name)]
        else:
            family = None if name in ("all", "o2o") else name
            found = [task.name for task in paper_tasks(_SETTINGS[online], family)]
        for task in found:
            if tasks.setdefault(task, (task, online, named))[1] != online:
                raise InputError(f"{task} is asked for offline and offline to online; give each a sweep of its own")
    return list(tasks.values())


def _known(name: str) -> str:
    """A task's name, with an absolute path where it names a folder."""
    try:
        get_task(name)
    except InputError as error:
        hint = did_you_mean(name, ["all", "o2o", *families(), *family_groups()], otherwise="see deflow tasks")
        raise InputError(f"{error} (families: {hint})") from error
    return settled_name(name)


def _cells(
    tasks: Sequence[tuple[str, bool, bool]], variants: Sequence[Variant], settings: Sequence[str], protocol: Any
) -> list[Cell]:
    readers = {variant: _reader(variant, settings, protocol) for variant in variants}
    cells = []
    for (task, online, named), variant in itertools.product(tasks, variants):
        try:
            if get_task(task).images and not get_algorithm(variant.method).pictures:
                raise InputError(f"{variant.method} has no version for images")
            cells.append(Cell(task, variant, readers[variant](task, online)))
        except InputError as error:
            # A task of a family is left out if the method has no values for it; for a task that the user named this is an error.
            if named:
                raise InputError(f"{task} with {variant.label}: {error}") from error
            cells.append(Cell(task, variant, None, str(error)))
    if cells and all(cell.left_out is not None for cell in cells):
        raise InputError(f"none of the {len(cells)} cells can be trained; {cells[0].name}: {cells[0].left_out}")
    return cells


def _reader(variant: Variant, settings: Sequence[str], protocol: Any) -> Callable[[str, bool], SettledConfig]:
    """Read the given settings once; returns a function from a task, and whether it continues online, to its settings."""
    base = TrainConfig(algo=get_algorithm(variant.method).config())
    method_settings = setting_names(type(base.algo))
    given = read_overrides([*settings, *(f"algo.{text}" for text in variant.settings)], base)
    footing = given.get("algo.footing", "common")
    if footing != "common" and protocol is not None and not protocol.comparable:
        raise InputError(
            f"algo.footing={footing} of {variant.method} has steps, batches and networks of its own, and protocol="
            f"{protocol.name} others; take protocol=paper, or none"
        )
    if given.get("data_root") is not None:
        given["data_root"] = str(Path(given["data_root"]).expanduser().absolute())

    def config_of(task: str, online: bool) -> SettledConfig:
        values = config_to_dict(replace(base, task=task))
        fixed = {}
        if protocol is not None:
            own = protocol.task_settings.get(task)
            like = {} if own is None else values_like(base, own.like)
            scaled = protocol.scaled.get(variant.method, {})
            fixed = {
                f"algo.{name}": value * scaled.get(name, 1) if name in scaled else value for name, value in like.items()
            }
            fixed |= protocol.settings_of(method_settings, online=online, task=task)
        if not get_algorithm(variant.method).trains_offline:
            fixed = {name: value for name, value in fixed.items() if name != "offline_steps"}
        put(values, fixed)
        if protocol is not None and not given.keys() & fixed.keys():
            values["protocol"] = protocol.name  # a run that overrides a setting of the protocol does not follow it
        known = paper_task(task, "offline_to_online") if online else None
        untold = known is not None and not values["online_steps"]
        if known is not None and untold:
            values["online_steps"] = known.online_steps
        put(values, given)
        config = config_from_dict(values)
        if untold and "online_steps" not in given:
            config = replace(config, online_steps=footing_settings(config).get("online_steps", config.online_steps))
        settled = with_task_defaults(config)
        for name in settled.algo.needs:  # building the method would ask for it too, and late
            needed(getattr(settled.algo, name), name)
        return settled

    return config_of


def _check_engine(plan: SweepPlan, options: Mapping[str, str]) -> None:
    if plan.engine == "local":
        for name in ("ray_address", "num_cpus", "num_gpus"):
            if name in options:
                raise InputError(f"{name}= is for engine=ray")
    elif plan.jobs is not None:
        raise InputError("jobs= is for engine=local; on Ray num_cpus= says how many jobs a node takes")
    for cell in plan.trained:
        if plan.stacked == "true" and not can_stack(cell.settled):
            raise InputError(
                f"stacked=true: {cell.name} cannot train its seeds together (online_steps, compile=true, logger=wandb or "
                "mlflow); leave stacked off"
            )


def _double(names: Iterable[str]) -> str | None:
    return next((name for name, number in Counter(names).items() if number > 1), None)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise InputError(f"{name}={value} is out of range; expected one of {', '.join(choices)}")
    return value


def _number(name: str, options: Mapping[str, str], kind: Callable[[str], Any], *, at_least: float) -> Any:
    if name not in options:
        return None
    try:
        value = kind(options[name])
    except ValueError as error:
        raise InputError(f"{name}={options[name]} is not a number") from error
    if not at_least <= value < float("inf"):
        raise InputError(f"{name}={options[name]} is out of range; expected at least {at_least}")
    return value


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as they are given: a range where they are one.

    Examples:
        >>> seeds_text([0, 1, 2, 3]), seeds_text([2, 0, 5])
        ('0..3', '2,0,5')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}..{seeds[-1]}"
    return ",".join(map(str, seeds))
