# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Find finished runs below folders and score each of them."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.reports.paper import averaged_evaluations
from deflow_torchrl.reports.records import METRICS, RECORD_FILE, load_record
from deflow_torchrl.reports.statistics import success_standard_error

# Settings that do not change the policy of a run (some change its last digits).
_NEUTRAL = frozenset(
    ("task", "algo", "seed", "seeds", "download", "storage", "device", "compile", "kernels", "cuda_graph", "self_check",
     "updates_per_replay", "threads", "eval_workers", "eval_interval", "eval_episodes", "log_interval", "save_interval",
     "logger", "protocol", "video")
)  # fmt: skip
# Settings that older records lack: they had these.
_USUAL = {"reward": "task", "chunk_ends": "whole"}
# Settings by which a run is never the usual one of its method: every table says so.
_ALWAYS_SHOWN = frozenset(("footing", "reward"))
AT = ("end", "offline", "best")


@dataclass(frozen=True)
class FinishedRun:
    """A run that has a record.

    Attributes:
        folder: its run folder.
        record: see ``record.schema.json``.
        column: the method, with the settings that tell its runs from other runs of it on the same task.
    """

    folder: Path
    record: Mapping[str, Any]
    column: str

    @property
    def task(self) -> str:
        """The task's name."""
        return self.record["task"]

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.record["seeds"]["training"]

    @property
    def online(self) -> bool:
        """Whether it has an online phase."""
        return self.record["config"]["online_steps"] > 0

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of metrics; none where ``metrics.jsonl`` was not kept beside the record.

        Raises:
            InputError: if the file is damaged.
        """
        path = self.folder / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged: {one_line(error)}") from error


@dataclass(frozen=True)
class Score:
    """The score of a run.

    Attributes:
        value: in the metric's unit; a success rate in [0, 1].
        episodes: outcome of each episode.
        steps: of the evaluations that it is the mean of.
        starts: seed of a start -> mean outcome of its episodes in these evaluations; empty where they began differently.
    """

    value: float
    episodes: tuple[float, ...]
    steps: tuple[int, ...]
    starts: Mapping[int, float]


def find_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Find every run that has a record below the folders, and name its column of the table.

    Args:
        folders: run folders, or folders of them at any depth; a run found twice counts once.

    Raises:
        InputError: if a folder is missing, cannot be read or holds no record; if a record cannot be read; or if two runs are
            of the same task, method, settings and seed.
    """
    records: dict[Path, Mapping[str, Any]] = {}
    for folder in folders:
        found = _record_files(folder)
        if not found:
            raise InputError(f"{folder} holds no {RECORD_FILE}; a run writes it when it is finished")
        for path in found:
            records.setdefault(path.resolve(), load_record(path))
    cells: dict[tuple[Any, ...], FinishedRun] = {}
    for (path, record), column in zip(records.items(), _columns(list(records.values())), strict=True):
        run = FinishedRun(path.parent, record, column)
        other = cells.setdefault((run.online, run.task, run.column, run.seed), run)
        if other is not run:
            raise InputError(
                f"{other.folder} and {run.folder} are both {run.column} on {run.task} with seed {run.seed}; leave one out"
            )
    return list(cells.values())


def score_of(record: Mapping[str, Any], *, at: str = "end", last: int | None = None) -> Score:
    """Score a run by its acting policy, in the task's metric.

    Args:
        record: the run's record, with evaluations.

    Keyword Args:
        at: ``end`` of the run (of its online phase, if it has one), end of its ``offline`` phase, or its ``best`` online
            evaluation (the first of equals).
        last: evaluations that are averaged, this one and those before it. None: those that the paper averages where the run is
            an offline one of the paper's length (3 on OGBench), else 1.

    Raises:
        InputError: if the run has too few evaluations, or none at a step that the paper averages.
    """
    if at not in AT:
        raise InputError(f"at={at} is no point of a run; there are {', '.join(AT)}")
    name, metric, config, count = record["acting"], METRICS[record["metric"]], record["config"], last or 1
    where = f"{record['task']}, {record['algo']}, seed {record['seeds']['training']}"
    notes = sorted((note for note in record["history"] if name in note["policies"]), key=lambda note: note["step"])
    phase = {"end": "online" if config["online_steps"] else "offline", "offline": "offline", "best": "online"}[at]
    found = {note["step"]: note["policies"][name] for note in notes if note["phase"] == phase}
    averaged = averaged_evaluations(record["task"]) if last is None and not config["online_steps"] else ()
    if at == "end" and averaged and config["offline_steps"] == averaged[-1]:
        if missing := [step for step in averaged if step not in found]:
            raise InputError(
                f"{where}: the paper's cell is the mean of the evaluations at {', '.join(map(str, averaged))}, the run has none "
                f"at {', '.join(map(str, missing))}; with last=1 its last evaluation alone is the score"
            )
        chosen = [(step, found[step]) for step in averaged]
    elif at == "best":
        count = 1
        chosen = [max(found.items(), key=lambda it: it[1][metric.key])] if found else []
    elif at == "end" and count == 1:
        end = config["offline_steps"] + config["online_steps"]
        chosen = [(end, record["evaluations"][name])] if name in record["evaluations"] else []
    else:
        chosen = list(found.items())[-count:]
    if len(chosen) < count:
        raise InputError(f"{where}: {count} evaluation(s) asked for (at={at}), there are {len(chosen)}")
    values = [outcome[metric.key] for _, outcome in chosen]
    each = [[float(it) for it in outcome[metric.episodes]] for _, outcome in chosen]
    begun = {tuple(outcome["seeds"]) for _, outcome in chosen}
    starts = dict(zip(begun.pop(), np.mean(each, 0).tolist(), strict=True)) if len(begun) == 1 else {}
    episodes = tuple(itertools.chain.from_iterable(each))
    return Score(sum(values) / len(values), episodes, tuple(step for step, _ in chosen), starts)


def standard_error(metric: str, episodes: Sequence[float]) -> float:
    """Standard error of a mean over episodes: the binomial's of a success rate, the sample's of other metrics.

    Args:
        metric: ``success``, ``score`` or ``return``.
        episodes: each episode's outcome, ``[E]``.
    """
    values = np.asarray(episodes)
    if metric == "success":
        return success_standard_error(float(values.mean()), values.size)
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0


def flat_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run by their names on the command line."""
    settings = dict(record["config"])
    algo = settings.pop("algo")
    return settings | {f"algo.{name}": value for name, value in algo.items()}


def as_setting(value: Any) -> str:
    """Write a value as on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_setting, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _record_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename} ({error.strerror})") from error

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of runs" if folder.exists() else f"{folder} is missing")
    found = []
    for place, subfolders, files in os.walk(folder, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if name != "checkpoints")
        if RECORD_FILE in files:
            found.append(Path(place) / RECORD_FILE)
    return found


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and data, beside the seed, by which runs of one method and task differ."""
    settings = {
        name: value
        for name, value in record["config"].items()
        if name not in _NEUTRAL and (name not in _USUAL or value not in (None, _USUAL[name]))
    }
    data = record["data"]["sha256"]
    return {**record["variant"], **settings, **({} if data is None else {"data": data[:8]})}


def _columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each run's method, with the settings that tell it from the method's other runs of the same phases on some task."""
    identities = [_identity(record) for record in records]
    groups: dict[tuple[bool, str, str], list[dict[str, Any]]] = {}
    for record, identity in zip(records, identities, strict=True):
        key = (record["config"]["online_steps"] > 0, record["algo"], record["task"])
        groups.setdefault(key, []).append(identity)
    telling: dict[tuple[bool, str], set[str]] = {}
    for (online, algo, _), alike in groups.items():
        names = {name for identity in alike for name in identity}
        differing = {name for name in names if len({as_setting(it.get(name)) for it in alike}) > 1}
        telling.setdefault((online, algo), set()).update(differing)
    columns = []
    for record, identity in zip(records, identities, strict=True):
        algo = record["algo"]
        names = (telling[record["config"]["online_steps"] > 0, algo] | _ALWAYS_SHOWN) & identity.keys()
        settings = ", ".join(f"{name}={as_setting(identity[name])}" for name in sorted(names))
        columns.append(f"{algo} ({settings})" if settings else algo)
    return columns


def natural(text: str) -> list[Any]:
    """Sort key that orders numbers in a text by value: 2 before 10, and 0.03 before 0.1.

    Examples:
        >>> sorted(["alpha=1e-05", "alpha=0.1", "alpha=10", "alpha=0.03", "alpha=3"], key=natural)
        ['alpha=1e-05', 'alpha=0.03', 'alpha=0.1', 'alpha=3', 'alpha=10']
    """
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]\d+)?)", text)
    # The pattern's matches stand at the odd places.
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts) if part]
