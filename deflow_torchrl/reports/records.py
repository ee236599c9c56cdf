# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run's record: the JSON file behind every number that is quoted from it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deflow_torchrl.versions import package_versions

SCHEMA = 3


def build_record(
    *,
    commands: Sequence[str],
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    metric: str,
    evaluations: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    online: Mapping[str, int] | None = None,
    alarms: Sequence[Mapping[str, Any]] | None = None,
    stacked: Sequence[int] | None = None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Collect what a reader needs to trust and repeat a run.

    Keyword Args:
        commands: the command lines that worked on it: the first began it, the others resumed it.
        config: all settings.
        data: description of the data (file, transitions, checksum, provenance).
        metric: what the task is judged by: ``success``, ``score`` or ``return``.
        evaluations: policy name -> outcome with per-episode results, at the end.
        history: every evaluation of the run: ``step``, ``phase`` and, by policy, the outcome.
        online: counters of the online phase; None without one.
        alarms: every alarm raised: ``name``, ``step``, ``message``, ``cleared``; None for a method that has no diagnostics.
        stacked: the seeds of all runs it was trained with in one process, whose time its own then is; None for a run that
            was trained by itself.
        seconds: wall time by phase.
    """
    settings = dict(config)
    return {
        "schema": SCHEMA,
        "command": commands[0],
        "commands": list(commands),
        "config": settings,
        "config_sha256": config_digest(settings),
        "data": dict(data),
        "metric": metric,
        "evaluations": dict(evaluations),
        "history": [dict(evaluation) for evaluation in history],
        "online": None if online is None else dict(online),
        "alarms": None if alarms is None else [dict(alarm) for alarm in alarms],
        "stacked": None if stacked is None else list(stacked),
        "time": dict(seconds),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "hardware": hardware(),
    }


def summarize(result: Mapping[str, Any]) -> dict[str, Any]:
    """The ``metric`` of a record or evaluation; by policy ``success``, ``score`` and ``return``, each where the task has it."""
    kinds = {"success": "success_rate", "score": "mean_score", "return": "mean_return"}
    if result["metric"] == "return":
        del kinds["success"]  # the environment knows none
    outcomes = result["evaluations"]
    values = {
        kind: {name: outcome[key] for name, outcome in outcomes.items() if key in outcome}
        for kind, key in kinds.items()
    }
    return {"metric": result["metric"], **{kind: found for kind, found in values.items() if found}}


def config_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of a run's settings: equal for equal runs, wherever their folders lie."""
    placeless = {name: value for name, value in settings.items() if name not in ("out", "data_root")}
    return hashlib.sha256(json.dumps(placeless, sort_keys=True).encode()).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``+changes`` where it has any; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores and, where torch sees one, the accelerator."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
