# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run's record: the JSON file behind every number that is quoted from it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import InputError, MissingExtraError, one_line
from deflow_torchrl.versions import package_versions

RECORD_FILE = "record.json"
SCHEMA = 4
# Settings that say where a run lies; a record says what it is.
_PLACES = ("out", "data_root")


@dataclass(frozen=True)
class Metric:
    """A number that tasks are judged by.

    Attributes:
        key: name of its mean in an evaluation's outcome.
        episodes: name of its values by episode there.
        unit: as tables name it.
        scale: from the record's numbers to the tables'.
        title: as figures name it.
        axis: what a figure's vertical axis shows.
    """

    key: str
    episodes: str
    unit: str
    scale: float
    title: str
    axis: str


METRICS = {
    "success": Metric(
        "success_rate", "success", "success in %", 100.0, "success rate", "fraction of evaluation episodes"
    ),
    "score": Metric("mean_score", "score", "normalised score", 1.0, "normalised score", "0: random, 100: expert"),
    "return": Metric("mean_return", "episode_return", "return", 1.0, "return", "sum of rewards of an episode"),
}


def build_record(
    *,
    commands: Sequence[str],
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    metric: str,
    acting: str,
    variant: Mapping[str, Any],
    success_timing: str | None,
    evaluation_seed: int,
    evaluations: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    online: Mapping[str, int] | None = None,
    alarms: Sequence[Mapping[str, Any]] | None = None,
    stacked: Sequence[int] | None = None,
    untuned: Sequence[str] = (),
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Build a run's record: everything a reader needs to judge the run and to repeat it.

    Keyword Args:
        commands: the command lines that worked on it: the first began it, the others resumed it.
        config: all settings; where run and data lie (``out``, ``data_root``, the folder of ``own:FOLDER``) is left out of
            the record.
        data: description of the data (file, transitions, checksum, provenance).
        metric: what the task is judged by: ``success``, ``score`` or ``return``.
        acting: the policy among ``evaluations`` that acts, and that a table shows.
        variant: the method's settings that are neither its own defaults nor the task's.
        success_timing: whether an OGBench environment judges success and reward before (``pre``) or after (``post``) the step;
            None for other environments.
        evaluation_seed: seed of the first evaluation episode.
        evaluations: policy name -> outcome with per-episode results, at the end.
        history: every evaluation of the run: ``step``, ``phase`` and, by policy, the outcome.
        online: counters of the online phase; None without one.
        alarms: every alarm raised: ``name``, ``step``, ``message``, ``cleared``; None for a method that has no diagnostics.
        stacked: the seeds of all runs that were trained with it in one process, whose time the record then has; None for a run
            that was trained by itself.
        untuned: the method's settings that are chosen by task and have no published value for this one.
        seconds: wall time by phase, and ``cpu``, the processor time of the process and of those it waited for.

    Returns:
        The record, which ``record.schema.json`` describes.
    """
    settings = {name: value for name, value in config.items() if name not in _PLACES}
    settings["task"] = _placeless(settings["task"])
    return {
        "schema": SCHEMA,
        "task": settings["task"],
        "algo": settings["algo"]["name"],
        "variant": dict(variant),
        "untuned": list(untuned),
        "protocol": settings.get("protocol"),
        "preset": settings.get("preset"),
        "seeds": {"training": settings["seed"], "evaluation": evaluation_seed},
        "command": commands[0],
        "commands": list(commands),
        "config": settings,
        "config_sha256": config_digest(settings),
        "data": {**data, "name": _placeless(data["name"])},
        "metric": metric,
        "acting": acting,
        "success_timing": success_timing,
        "evaluations": dict(evaluations),
        "history": list(history),
        "online": online,
        "alarms": alarms,
        "stacked": None if stacked is None else list(stacked),
        "time": dict(seconds),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "hardware": hardware(),
    }


def load_record(path: Path) -> dict[str, Any]:
    """Read and check a record.

    Args:
        path: the file, or the run folder that holds it.

    Raises:
        InputError: if there is none, or it is damaged, of another schema version, or contradicts itself.
        MissingExtraError: without the ``reports`` extra.
    """
    if path.is_dir():
        path = path / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; a run writes it when it is finished (deflow resume RUN goes on)"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: it is not JSON ({one_line(error)})") from error
    version = record.get("schema") if isinstance(record, dict) else None
    if version != SCHEMA:
        advice = "make the run again"
        if isinstance(version, int) and version > SCHEMA:
            advice = "update deflow-torchrl"
        elif version == 3:
            advice = "convert it (docs/reports.md, upgrade_record), or make the run again"
        raise InputError(f"{path} is a record of schema {version}, this version reads {SCHEMA}; {advice}")
    wrong = min(_validator().iter_errors(record), key=lambda it: list(map(str, it.path)), default=None)
    if wrong is not None:
        where = ".".join(map(str, wrong.absolute_path)) or "the record"
        message = " ".join(wrong.message.split())
        shown = message if len(message) < 200 else f"{message[:90]} ... {message[-90:]}"
        raise InputError(f"{path} is damaged: {where}: {shown}")
    _check_rates(record, path)
    return record


def _check_rates(record: Mapping[str, Any], path: Path) -> None:
    """Raise InputError where a success rate is not that of its episodes."""
    places = {"evaluations": record["evaluations"]}
    places |= {f"history.{number}.policies": note["policies"] for number, note in enumerate(record["history"])}
    for place, policies in places.items():
        for name, outcome in policies.items():
            rate, number, success = outcome["success_rate"], outcome["episodes"], outcome["success"]
            counted = sum(success) / len(success)
            if len(success) != number or not math.isclose(rate, counted, abs_tol=1e-6):
                raise InputError(
                    f"{path} is damaged: {place}.{name} says success_rate {rate} of {number} episodes, its {len(success)} "
                    f"episodes say {counted:g}"
                )


def upgrade_record(record: Mapping[str, Any], *, variant: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record of schema 3 to schema 4; the added entries are derived from the others.

    Args:
        record: as read from its file.

    Keyword Args:
        variant: the settings in ``config.algo`` that are neither the method's defaults nor the task's, which schema 3 lacks.

    Raises:
        InputError: if it is not of schema 3, or holds no evaluation that would tell the seed and the acting policy.
    """
    if record.get("schema") != 3:
        raise InputError(f"only records of schema 3 can be upgraded, this one has {record.get('schema')}")
    policies = record["history"][0]["policies"] if record["history"] else record["evaluations"]
    # Only the acting policy is evaluated before the end.
    acting = record["config"]["algo"]["name"]
    if acting not in policies:
        raise InputError(f"the record has no evaluation of {acting}, so its seed of evaluation is unknown")
    config = {name: value for name, value in record["config"].items() if name not in _PLACES}
    timing = None
    if "-singletask-" in config["task"] and (ogbench := record["versions"].get("ogbench")):
        timing = "pre" if tuple(map(int, ogbench.split(".")[:2])) >= (1, 2) else "post"
    return {
        **record,
        "schema": SCHEMA,
        "task": config["task"],
        "algo": acting,
        "variant": dict(variant),
        "protocol": None,
        "preset": None,
        "seeds": {"training": config["seed"], "evaluation": policies[acting]["seeds"][0]},
        "config": config,
        "config_sha256": config_digest(config),
        "acting": acting,
        "success_timing": timing,
        "stacked": record.get("stacked"),
    }


def without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten absolute folders in commands (DATA for the data's folder, runs/NAME for a run's) and in names of own data's files.

    For records that are published; records in run folders keep the commands as they were typed.
    """

    def shortened(word: str) -> str:
        key, equals, value = word.partition("=")
        if equals and _placeless(value) != value:
            shown = {"data_root": "DATA", "out": f"runs/{Path(value).name}"}.get(key, _placeless(value))
            return f"{key}={shown}"
        return f"runs/{Path(word).name}" if Path(word).is_absolute() else word

    commands = [shlex.join(map(shortened, shlex.split(command))) for command in record["commands"]]
    data = dict(record["data"])
    if isinstance(data.get("files"), Mapping):
        data["files"] = {_placeless(name): digest for name, digest in data["files"].items()}
    return {**record, "commands": commands, "command": commands[0], "data": data}


def _placeless(name: str) -> str:
    """A task's or data set's name with a folder shortened to its last part."""
    prefix, colon, folder = name.rpartition(":")
    return f"{prefix}{colon}{Path(folder).name}" if Path(folder).is_absolute() else name


@functools.cache
def _validator() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "jsonschema", "reports") from error
    schema = json.loads(resources.files(__package__).joinpath("record.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema)


def summarize(result: Mapping[str, Any]) -> dict[str, Any]:
    """The ``metric`` of a record or evaluation; by policy ``success``, ``score`` and ``return``, each where the task has it."""
    summary: dict[str, Any] = {"metric": result["metric"]}
    for name, metric in METRICS.items():
        values = {policy: it[metric.key] for policy, it in result["evaluations"].items() if metric.key in it}
        if values and (name != "success" or result["metric"] != "return"):  # these environments know no success
            summary[name] = values
    return summary


def config_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of a run's settings: equal for equal runs, wherever their folders lie."""
    placeless = {name: value for name, value in settings.items() if name not in _PLACES}
    return hashlib.sha256(json.dumps(placeless, sort_keys=True).encode()).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``+changes`` where it has any.

    Outside a checkout (a container image, a copied folder) the value of ``$DEFLOW_COMMIT``; None without it.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return os.environ.get("DEFLOW_COMMIT") or None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores and, where torch sees one, the accelerator."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(
        r"^model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "", re.MULTILINE
    )
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
