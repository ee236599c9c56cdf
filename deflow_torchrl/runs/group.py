# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Runs of several seeds that were trained together: where they go on from, and their summary."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.records import summarize
from deflow_torchrl.runs.evaluate import final_numbers
from deflow_torchrl.runs.folder import CHECKPOINTS, CONFIG_FILE, read_run_settings, seed_folder
from deflow_torchrl.runs.settings import TrainConfig, config_to_dict
from deflow_torchrl.trainers.checkpoint import is_whole, list_checkpoints, step_of
from deflow_torchrl.trainers.resume import changed_settings, find_checkpoint


def common_checkpoints(folders: Sequence[Path], *, out: Path, step: int | None = None) -> list[Path | None]:
    """Each run's checkpoint of the newest step (or of ``step``) of which all have one; None of each where there is none.

    Raises:
        InputError: if a run has none of ``step``, or a checkpoint that was chosen is damaged: with the newest step of which
            all are whole.
    """
    kept = [list_checkpoints(folder / CHECKPOINTS) for folder in folders]
    steps = sorted(set.intersection(*({step_of(path) for path in paths} for paths in kept)))
    if step is None and not steps:
        # A kill within the very first save may cost that save; more is not thrown away.
        if max(map(len, kept)) > 1:
            missing = [str(folder) for folder, paths in zip(folders, kept, strict=True) if not paths]
            raise InputError(
                f"{out}: the seeds have no step in common of which all have a checkpoint "
                f"({', '.join(missing or ['each of them'])} lacks it); put the missing folders back, or resume the others' one "
                "by one after moving group.yaml away"
            )
        return [None] * len(folders)
    chosen = [find_checkpoint(folder / CHECKPOINTS, steps[-1] if step is None else step) for folder in folders]
    damaged = [path for path in chosen if path is not None and not is_whole(path)]
    if damaged:
        whole = [
            other
            for other in steps
            if all(is_whole(path) for paths in kept for path in paths if step_of(path) == other)
        ]
        advice = ""
        if whole:
            go_on = f"deflow resume {shlex.quote(str(out))} --step {whole[-1]}"
            advice = f"; the newest whole ones are of step {whole[-1]}: {go_on}"
        raise InputError(f"{damaged[0]} is damaged or altered; it was not loaded{advice}")
    return chosen


def check_not_gone_on(config: TrainConfig) -> None:
    """Raise InputError if a run of a finished group has other settings than the group gave it, or is gone."""
    folder = Path(config.out or "")
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is missing; its group cannot go on without it")
    own = read_run_settings(folder)["config"]
    changes = changed_settings({"settings": config_to_dict(config)}, {"settings": own})
    if changes:
        raise InputError(
            f"{folder} has gone on by itself since the seeds were trained together ({'; '.join(changes)}); resume the seeds' "
            "folders one by one"
        )


def summarize_group(out: Path, seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of several seeds' records, in the order of the seeds; see :func:`~deflow_torchrl.runs.train`."""
    first = records[0]
    finals = [final_numbers(record["evaluations"], first["metric"]) for record in records]
    by_policy = {name: [final[name] for final in finals] for name in finals[0]}
    return {
        "out": str(out),
        "metric": first["metric"],
        "seeds": {
            str(seed): {"out": str(seed_folder(out, seed)), **summarize(record)}
            for seed, record in zip(seeds, records, strict=True)
        },
        "mean": {name: statistics.mean(values) for name, values in by_policy.items()},
        "std": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in by_policy.items()},
        "transitions": first["data"]["transitions"],
        "time": first["time"],
    }
