# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The jobs of a sweep: what is run by itself, what its folder says of it, and the running of it in whatever process."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deflow_torchrl.errors import InputError, LockHeldError, MissingExtraError
from deflow_torchrl.paths import hold_lock
from deflow_torchrl.processes import available_cores
from deflow_torchrl.reports.records import RECORD_FILE, load_record
from deflow_torchrl.runs.folder import CONFIG_FILE, GROUP_FILE, read_settings, seed_folder
from deflow_torchrl.runs.overrides import override_value
from deflow_torchrl.runs.run import resume, train
from deflow_torchrl.runs.settings import config_from_dict, config_to_dict
from deflow_torchrl.sources.base import get_source, public_name
from deflow_torchrl.sweep.plan import LOGS, Cell, SweepPlan, can_stack, is_gpu, uses_gpu
from deflow_torchrl.tasks import get_task
from deflow_torchrl.trainers.resume import NEUTRAL_SETTINGS, changed_settings

_log = logging.getLogger(__name__)
_PATIENCE = 600.0  # seconds in which whoever holds a job's lock shows no sign of life
_LOOK = 2.0
_MESSAGE = 2000  # characters


@dataclass(frozen=True)
class Job:
    """A run, or a cell's runs stacked: what one process works on.

    Attributes:
        name: ``TASK/ALGO/seedN``, or ``TASK/ALGO`` of seeds that train together.
        task: the task's name.
        algo: the variant's label.
        seeds: its seeds, in their order.
        stacked: whether they train together.
        out: its folder: a run's or a group's.
        config: its settings, complete, as :func:`deflow_torchrl.runs.settings.config_to_dict` gives them.
        command: the sweep's command line, for the records.
    """

    name: str
    task: str
    algo: str
    seeds: tuple[int, ...]
    stacked: bool
    out: str
    config: dict[str, Any]
    command: str

    @property
    def steps(self) -> int:
        """Steps of each seed, offline and online."""
        return int(self.config["offline_steps"]) + int(self.config["online_steps"])

    @property
    def folders(self) -> list[Path]:
        """Its run folders, in the order of its seeds."""
        out = Path(self.out)
        return [out / f"seed{seed}" for seed in self.seeds] if self.stacked else [out]

    @property
    def lock(self) -> Path:
        """The file that whoever works on it holds locked, and in which he says who he is."""
        out = Path(self.out)
        return out.parent / f".{out.name}.lock"

    def log(self, sweep: Path) -> Path:
        """What it prints (``local``)."""
        return sweep / LOGS / f"{self.name.replace('/', '--')}.log"


@dataclass(frozen=True)
class Outcome:
    """How a job's process ended.

    Attributes:
        kind: ``done``; ``failed``, worth trying again; ``refused``, on input that trying again does not mend; ``lost``, with
            its machine or process, through no fault of its own; ``interrupted``.
        message: why, in a line; empty where done.
        host: where it ran; None where nobody knows.
    """

    kind: Literal["done", "failed", "refused", "lost", "interrupted"]
    message: str = ""
    host: str | None = None


def jobs_at_once(plan: SweepPlan) -> int:
    """How many jobs a plan runs at once on this machine: one a core, or one where they use a GPU."""
    if plan.jobs is not None:
        return plan.jobs
    return 1 if uses_gpu(plan) else max(1, min(available_cores(), len(plan.trained) * len(plan.seeds)))


def plan_jobs(plan: SweepPlan) -> list[Job]:
    """The jobs of a plan, each as what is in the folder leaves it: seeds that were begun together go on together.

    Raises:
        InputError: if a folder holds a run or a group of other settings, or is damaged.
    """
    return [job for cell in plan.trained for job in _jobs_of(plan, cell)]


def is_done(job: Job) -> bool:
    """Whether every seed has its record, of these settings.

    Raises:
        InputError: if a folder holds a run or a group of other settings, or is damaged.
    """
    check_folder(job)
    if job.stacked:
        return _group_finished(Path(job.out)) and all(map(_record_of, job.folders))
    return _record_of(Path(job.out)) is not None


def have_data(plan: SweepPlan, jobs: Sequence[Job], *, show_progress: bool = True) -> None:
    """See that the data of these jobs can be had, and fetch what is missing, once for all jobs of a set.

    Where jobs run on other machines, what lies in folders of each of them is theirs to look after.

    Raises:
        InputError: where a set cannot be found or fetched.
        MissingExtraError: where the extra that reads it is not installed.
    """
    elsewhere = plan.engine == "ray" and plan.ray_address is not None
    known, missing = set(), []
    for job in jobs:
        config = config_from_dict(job.config)
        task = get_task(config.task, environment=config.env)
        data, source = task.data_name, get_source(task.source)
        shared = source.location(task.dataset, root=config.data_root) is not None
        if data in known or (elsewhere and not shared):
            continue
        known.add(data)
        if not elsewhere:
            source.check_installed()
        try:
            source.ensure(task.dataset, root=config.data_root, download=config.download, show_progress=show_progress)
        except MissingExtraError:
            raise
        except InputError as error:
            missing.append((data, error))
            if config.download:
                break  # where one host does not answer, to ask it for each set takes minutes
    if missing:
        (data, reason), *others = missing
        more = f"; {len(others)} more are missing: {', '.join(name for name, _ in others)}" if others else ""
        raise InputError(f"no data for {data}, nothing was started: {reason}{more}") from reason


def check_devices(plan: SweepPlan) -> None:
    """Raise InputError where this machine lacks a device that runs are to train on; no device is touched."""
    for name in sorted({cell.config.device for cell in plan.trained if cell.config is not None}):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device={name} cannot be used here: {torch.cuda.device_count()} CUDA devices are found")


def check_folder(job: Job) -> None:
    """Raise InputError if the job's folder holds something of other settings."""
    wanted = {Path(job.out) / (GROUP_FILE if job.stacked else CONFIG_FILE): job.config}
    if job.stacked:  # a finished group's runs may have gone on by themselves since
        for seed, folder in zip(job.seeds, job.folders, strict=True):
            wanted[folder / CONFIG_FILE] = {**job.config, "seed": seed, "seeds": None}
    for path, config in wanted.items():
        if path.is_file():
            # What earlier versions left open is filled in by reading it.
            saved = config_to_dict(config_from_dict(read_settings(path)["config"]))
            _check_same(path, saved, config)


def run_job(job: Job, *, show_progress: bool = False) -> Outcome:
    """Run a job here and now, from where it is: from its start, from its checkpoints, or not at all where it is done.

    Its folder is locked meanwhile. Where somebody else has the lock, perhaps a process that its sweep has given up for lost,
    he is waited for as long as he shows signs of life.
    """
    host = socket.gethostname()
    try:
        _patiently(job, lambda: _run_locked(job, show_progress=show_progress))
    except KeyboardInterrupt as error:
        return Outcome("interrupted", str(error), host)
    except InputError as error:
        return Outcome("refused", str(error), host)
    except Exception as error:
        _log.exception("%s failed", job.name)
        return Outcome("failed", one_line(error), host)
    return Outcome("done", host=host)


def one_line(error: BaseException) -> str:
    """An error in a line: those of this package by their message alone."""
    text = " ".join(str(error).split())[:_MESSAGE]  # one that fills the pipe to the sweep would block the job
    ours = type(error).__module__.startswith("deflow_torchrl")
    return text if ours and text else f"{type(error).__name__}: {text}" if text else type(error).__name__


def _run_locked(job: Job, *, show_progress: bool) -> None:
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(job.lock, busy=f"somebody else works on {job.name}", note=f"{socket.gethostname()} {os.getpid()}"):
        if is_done(job):
            return
        config = config_from_dict(job.config)
        options: dict[str, Any] = {"command": job.command, "show_progress": show_progress}
        begun = out / (GROUP_FILE if job.stacked else CONFIG_FILE)
        if begun.is_file():
            resume(out, overrides=_neutral_changes(read_settings(begun)["config"], job.config), **options)
        else:
            train(config, **options)


def _patiently(job: Job, run: Callable[[], None]) -> None:
    """Run as soon as nobody else holds the job's lock, or that of its data's preparation."""
    since, seen = time.monotonic(), _signs_of_life(job)
    while True:
        try:
            return run()
        except LockHeldError:
            signs = _signs_of_life(job)
            if signs != seen:
                since, seen = time.monotonic(), signs
            if time.monotonic() - since > _PATIENCE:
                raise
            time.sleep(_LOOK)


def _signs_of_life(job: Job) -> list[tuple[str, int, int]]:
    files = sorted(path for folder in job.folders for path in folder.rglob("*"))
    signs = []
    for path in files:
        try:
            about = path.stat()
        except OSError:
            continue  # gone meanwhile, as checkpoints are
        signs.append((str(path), about.st_mtime_ns, about.st_size))
    return signs


def _jobs_of(plan: SweepPlan, cell: Cell) -> list[Job]:

    assert cell.config is not None
    out = (plan.out / cell.name).absolute()
    seeds, together = list(plan.seeds), []
    if (out / GROUP_FILE).is_file():
        settings = read_settings(out / GROUP_FILE)
        of_group = [int(seed) for seed in settings["config"]["seeds"] or ()]
        if not settings["finished"] or all(_record_of(seed_folder(out, seed)) for seed in of_group):
            together = of_group
    elif not any((seed_folder(out, seed) / CONFIG_FILE).is_file() for seed in seeds):
        stack = plan.stacked == "true" or (
            plan.stacked == "auto" and can_stack(cell.config) and (plan.engine == "ray" or is_gpu(cell.config))
        )
        together = seeds if stack and len(seeds) > 1 else []
    jobs = [_job(plan, cell, together, out, stacked=True)] if together else []
    jobs += [_job(plan, cell, [seed], seed_folder(out, seed), stacked=False) for seed in seeds if seed not in together]
    for job in jobs:
        check_folder(job)
    return jobs


def _job(plan: SweepPlan, cell: Cell, seeds: Sequence[int], out: Path, *, stacked: bool) -> Job:
    assert cell.config is not None
    own: dict[str, Any] = {"seed": 0, "seeds": list(seeds)} if stacked else {"seed": seeds[0], "seeds": None}
    if cell.config.eval_workers is None:  # all cores to each of several jobs would be too many
        cores = int(plan.num_cpus) if plan.engine == "ray" else available_cores() // jobs_at_once(plan)
        own["eval_workers"] = max(1, cores)
    return Job(
        name=cell.name if stacked else f"{cell.name}/{out.name}",
        task=cell.task,
        algo=cell.variant.label,
        seeds=tuple(seeds),
        stacked=stacked,
        out=str(out),
        config=config_to_dict(replace(cell.config, out=str(out), **own)),
        command=plan.command,
    )


def _check_same(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changes = changed_settings({"settings": saved}, {"settings": wanted})
    if changes:
        raise InputError(
            f"{path.parent} was begun with other settings ({'; '.join(changes)}); give the sweep those, or another out="
        )


def _group_finished(out: Path) -> bool:

    return (out / GROUP_FILE).is_file() and bool(read_settings(out / GROUP_FILE)["finished"])


def _record_of(folder: Path) -> dict[str, Any] | None:
    """A run's record, where it is whole and of the settings that its folder has."""
    if not (folder / RECORD_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return None
    try:
        record = load_record(folder)
    except MissingExtraError:
        raise
    except InputError:
        return None  # damaged or of an earlier version: the run goes on from its last checkpoint and writes it anew
    saved = read_settings(folder / CONFIG_FILE)["config"]
    recorded = record["config"]
    saved, recorded = ({**it, "task": public_name(it["task"])} for it in (saved, recorded))  # of a place the name alone
    return None if changed_settings({"settings": saved}, {"settings": recorded}) else record


def _neutral_changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Overrides for what may change and has changed since a run was begun."""
    names = sorted(NEUTRAL_SETTINGS - {"out"})
    return [f"{name}={override_value(wanted[name])}" for name in names if saved.get(name) != wanted.get(name)]
