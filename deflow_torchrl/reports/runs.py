# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Finished runs found below folders, and the score of each: what tables and figures are computed from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.records import RECORD_FILE, load_record
from deflow_torchrl.reports.statistics import success_standard_error

_NEUTRAL = frozenset(
    ("task", "algo", "seed", "seeds", "download", "storage", "device", "compile", "kernels", "cuda_graph", "self_check",
     "updates_per_replay", "threads", "eval_workers", "eval_interval", "eval_episodes", "log_interval", "save_interval",
     "logger", "protocol")
)  # fmt: skip
"""Settings that make no other policy of a run (some move its last digits)."""

KEYS = {"success": "success_rate", "score": "mean_score", "return": "mean_return"}
"""Metric -> its mean in an evaluation's outcome."""
_EPISODES = {"success": "success", "score": "score", "return": "episode_return"}
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
            raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Score:
    """What a run is worth.

    Attributes:
        value: in the metric's unit; a success rate in [0, 1].
        episodes: each episode's outcome.
    """

    value: float
    episodes: tuple[float, ...]


def find_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Every run that has a record below the folders, with the column of the table it belongs to.

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
    telling = _telling_settings(records.values())
    runs = [FinishedRun(path.parent, record, _column(record, telling)) for path, record in records.items()]
    cells: dict[tuple[Any, ...], FinishedRun] = {}
    for run in runs:
        cell = (run.online, run.task, run.column, run.seed)
        if cell in cells:
            raise InputError(
                f"{cells[cell].folder} and {run.folder} are both {run.column} on {run.task} with seed {run.seed}; leave one out"
            )
        cells[cell] = run
    return runs


def score_of(record: Mapping[str, Any], *, at: str = "end", last: int = 1) -> Score:
    """A run's score: of its acting policy, in the task's metric.

    Args:
        record: the run's record, with evaluations.

    Keyword Args:
        at: ``end`` of the run, end of its ``offline`` phase, or its ``best`` online evaluation (the first of equals).
        last: evaluations that are averaged, this one and those before it (the paper: 3 on OGBench, 1 on D4RL and offline to
            online).

    Raises:
        InputError: if the run has too few evaluations.
    """
    name, metric = record["acting"], record["metric"]
    if at not in AT:
        raise InputError(f"at={at} is no point of a run; there are {', '.join(AT)}")
    notes = sorted((note for note in record["history"] if name in note["policies"]), key=lambda note: note["step"])
    if at == "end" and last == 1:
        outcomes = [record["evaluations"][name]] if name in record["evaluations"] else []
    elif at == "best":
        online = [note["policies"][name] for note in notes if note["phase"] == "online"]
        outcomes = [max(online, key=lambda outcome: outcome[KEYS[metric]])] if online else []
    else:
        outcomes = [note["policies"][name] for note in notes if at == "end" or note["phase"] == "offline"][-last:]
    if not outcomes or (at != "best" and len(outcomes) < last):
        where = f"{record['task']}, {record['algo']}, seed {record['seeds']['training']}"
        raise InputError(f"{where}: {last} evaluation(s) asked for (at={at}), there are {len(outcomes)}")
    values = [outcome[KEYS[metric]] for outcome in outcomes]
    return Score(sum(values) / len(values), tuple(float(it) for one in outcomes for it in one[_EPISODES[metric]]))


def standard_error(metric: str, episodes: Sequence[float]) -> float:
    """Standard error of a mean over episodes; of a success rate the binomial's, of others the sample's.

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
    settings = {name: value for name, value in record["config"].items() if name != "algo"}
    return {**settings, **{f"algo.{name}": value for name, value in record["config"]["algo"].items() if name != "name"}}


def as_setting(value: Any) -> str:
    """A value as it is written on the command line."""
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
    """What makes two runs of one method and task other runs, beside the seed."""
    settings = {name: value for name, value in record["config"].items() if name not in _NEUTRAL}
    data = record["data"]["sha256"]
    return {**record["variant"], **settings, **({} if data is None else {"data": data[:8]})}


def _telling_settings(records: Iterable[Mapping[str, Any]]) -> dict[tuple[bool, str], set[str]]:
    """Phase and method -> the settings in which its runs on some one task differ."""
    groups: dict[tuple[bool, str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["config"]["online_steps"] > 0, record["algo"], record["task"])
        groups.setdefault(key, []).append(_identity(record))
    telling: dict[tuple[bool, str], set[str]] = {}
    for (online, algo, _), identities in groups.items():
        names = {name for identity in identities for name in identity}
        differing = {name for name in names if len({as_setting(it.get(name)) for it in identities}) > 1}
        telling.setdefault((online, algo), set()).update(differing)
    return telling


def _column(record: Mapping[str, Any], telling: Mapping[tuple[bool, str], set[str]]) -> str:
    identity = _identity(record)
    names = sorted(telling[record["config"]["online_steps"] > 0, record["algo"]] & set(identity))
    settings = ", ".join(f"{name}={as_setting(identity[name])}" for name in names)
    return f"{record['algo']} ({settings})" if settings else record["algo"]


def natural(text: str) -> list[Any]:
    """Sort key by which 2 comes before 10."""
    return [(0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in re.split(r"(\d+)", text) if part]
