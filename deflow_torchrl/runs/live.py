# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A page of runs that still train, written again and again until they end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from deflow_torchrl.errors import InputError, RunInterrupted
from deflow_torchrl.paths import lock_holder
from deflow_torchrl.reports.page import (
    FINISHED,
    TRAINS,
    Progress,
    RunState,
    Summary,
    summarize_runs,
    unfinished_summary,
    write_summary_page,
)
from deflow_torchrl.reports.records import RECORD_FILE
from deflow_torchrl.runs.folder import CHECKPOINTS, CONFIG_FILE, LOCK_FILE, SWEEP_LOCK, VIDEOS, read_run_settings
from deflow_torchrl.sources.base import public_name
from deflow_torchrl.trainers.metrics import read_rows

PAGE = "live.html"


def watch_runs(
    folders: Sequence[Path],
    *,
    seconds: float,
    html: Path | None = None,
    title: str,
    label: str | None = None,
    last: int | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> tuple[Path, Progress]:
    """Write a page of runs every few seconds until all have ended; a browser loads it anew as often.

    A run trains while a process holds its folder, and a sweep while one holds the sweep's; a run that was killed has ended.

    Args:
        folders: run folders, or folders of them, as of a sweep.

    Keyword Args:
        seconds: between two pages.
        html: the page; ``live.html`` in the first folder by default.
        title: its heading.
        label: its first note.
        last: as in :func:`deflow_torchrl.reports.page.summarize_runs`.
        announce: is told what is written where.

    Returns:
        The page, and the runs' states.

    Raises:
        InputError: if a folder holds no run, or the page cannot be written.
        RunInterrupted: on Ctrl-C; the page stays, and is not loaded anew any more.
    """
    html = folders[0] / PAGE if html is None else html

    def write(seconds: float | None) -> Progress:
        progress, summary = _state_of_all(folders, seconds, label, last)
        write_summary_page(summary, html, title=title, progress=progress)
        return progress

    found = write(seconds)
    announce(f"{html} is written every {seconds:g} s until the runs end, and loads itself anew; Ctrl-C ends this")
    try:
        while found.seconds is not None:
            time.sleep(seconds)
            found = write(seconds)
    except KeyboardInterrupt as error:
        write(None)
        raise RunInterrupted(f"interrupted; {html} stays as it is, and the runs go on") from error
    return html, found


def _state_of_all(
    folders: Sequence[Path], seconds: float | None, label: str | None, last: int | None
) -> tuple[Progress, Summary]:
    runs = {run: _state(run) for folder in folders for run in _run_folders(folder)}
    if not runs:
        raise InputError(f"{folders[0]} holds no run; deflow train and deflow sweep make them")
    going = any(_is_held(folder / SWEEP_LOCK) for folder in folders)
    going |= any(state.state == TRAINS for state in runs.values())
    finished = [run for run, state in runs.items() if state.state == FINISHED]
    summary = summarize_runs(finished, label=label, last=last) if finished else unfinished_summary(label)
    updated = datetime.now().astimezone().isoformat(" ", "seconds")
    return Progress(seconds if going else None, updated, list(runs.values())), summary


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of runs" if folder.exists() else f"{folder} is missing")
    found = []
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if name not in (CHECKPOINTS, VIDEOS))
        if CONFIG_FILE in files:
            found.append(Path(place))
    return found


def _state(run: Path) -> RunState:
    config = read_run_settings(run)["config"]
    rows = read_rows(run / "metrics.jsonl")
    state = TRAINS if _is_held(run / LOCK_FILE) else FINISHED if (run / RECORD_FILE).is_file() else "stopped"
    return RunState(
        name=run.name,
        task=public_name(config["task"]),
        algo=config["algo"]["name"],
        seed=config["seed"],
        state=state,
        step=rows[-1]["step"] if rows else 0,
        steps=config["offline_steps"] + config["online_steps"],
        rows=rows,
    )


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock; whether one of another host has ended is not known."""
    holder = lock_holder(lock)
    return holder is not None and (holder.alive or not holder.here or holder.pid == os.getpid())
