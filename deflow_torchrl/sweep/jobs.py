# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Jobs of a sweep: the runs that one process trains, the state of their folder, and how a job is run."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deflow_torchrl.errors import InputError, LockHeldError, MissingExtraError, one_line
from deflow_torchrl.processes import available_cores
from deflow_torchrl.reports.records import METRICS, RECORD_FILE, load_record
from deflow_torchrl.runs.folder import CONFIG_FILE, GROUP_FILE, LOCK_FILE, hold_folders, read_settings, seed_folder
from deflow_torchrl.runs.overrides import override_value
from deflow_torchrl.runs.run import resume, train
from deflow_torchrl.runs.settings import config_from_dict, config_to_dict
from deflow_torchrl.sources.base import get_source, public_name
from deflow_torchrl.sweep.plan import LOGS, Cell, SweepPlan, can_stack, is_gpu, uses_gpu
from deflow_torchrl.tasks import get_task
from deflow_torchrl.trainers.resume import NEUTRAL_SETTINGS, changed_settings

_log = logging.getLogger(__name__)
_PATIENCE = 600.0  # seconds without a change in the run's files, after which a held lock is an error
_LOOK = 2.0
_MESSAGE = 2000  # characters
_TAIL = 1 << 16  # bytes of metrics that are read


@dataclass(frozen=True)
class Job:
    """The work of one process: a run, or the runs of those seeds of a cell that train together.

    Attributes:
        name: ``TASK/ALGO/seedN``; ``TASK/ALGO`` if several seeds train together.
        cell: name of the cell.
        task: the task's name.
        algo: the variant's label.
        seeds: its seeds, in their order.
        stacked: whether they train together.
        out: its folder: a run's or a group's.
        config: its settings, complete, as :func:`deflow_torchrl.runs.settings.config_to_dict` gives them.
        command: the sweep's command line, for the records.
    """

    name: str
    cell: str
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
        return [seed_folder(out, seed) for seed in self.seeds] if self.stacked else [out]

    @property
    def settings_file(self) -> Path:
        """File of settings in its folder; exists once the job was started."""
        return Path(self.out) / (GROUP_FILE if self.stacked else CONFIG_FILE)

    @property
    def lock(self) -> Path:
        """Lock file of the process that works on it."""
        return Path(self.out) / LOCK_FILE

    def log(self, sweep: Path) -> Path:
        """File that the engine ``local`` writes its output to."""
        return sweep / LOGS / f"{self.name.replace('/', '--')}.log"


@dataclass(frozen=True)
class Outcome:
    """How a job's process ended.

    Attributes:
        kind: ``done``; ``failed``: may succeed if tried again; ``refused``: bad input, trying again does not help; ``lost``:
            its machine or process ended for another reason than the job; ``interrupted``.
        message: the reason in one line; empty if done.
        host: where it ran; None where unknown.
    """

    kind: Literal["done", "failed", "refused", "lost", "interrupted"]
    message: str = ""
    host: str | None = None


@dataclass
class JobProgress:
    """The state of a job while its sweep runs.

    Attributes:
        job: the job.
        state: ``waiting``, ``running``, ``done``, ``failed`` or ``interrupted``.
        attempts: how often it was started.
        losses: how often it was lost with its machine or process.
        started: when it was last started, in seconds since the epoch.
        host: where it runs; None where unknown.
        message: why it failed.
        step: steps of each seed whose rows are written.
        score: mean over its seeds of the last evaluation of the acting policy; None before the first.
    """

    job: Job
    state: str = "waiting"
    attempts: int = 0
    losses: int = 0
    started: float = 0.0
    host: str | None = None
    message: str = ""
    step: int = 0
    score: float | None = None

    def look(self) -> None:
        """Update ``step`` and ``score`` from the last rows of its runs' metrics."""
        rows = [_last_row(folder / "metrics.jsonl") for folder in self.job.folders]
        self.step = self.job.steps if self.state == "done" else min(int(row.get("step", 0)) for row in rows)
        for name in METRICS:
            if values := [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row]:
                self.score = sum(values) / len(values)
                break

    def describe(self) -> str:
        """Describe its state in words."""
        text = self.state
        if self.state == "running" and self.host is not None:
            text += f" on {self.host}"
        if self.attempts > 1:
            text += f" (attempt {self.attempts})"
        return f"{text}: {self.message}" if self.message and self.state in ("failed", "waiting") else text


def _last_row(path: Path) -> dict[str, Any]:
    """The latest value under each name in a ``metrics.jsonl`` that is being written."""
    row: dict[str, Any] = {}
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        for line in file.read().split(b"\n")[:-1]:  # a half-written row is the last
            with contextlib.suppress(ValueError):  # the first may be cut
                row |= json.loads(line)
    return row


def jobs_at_once(plan: SweepPlan) -> int:
    """Number of jobs that run at once on this machine: one per core, or one if they use a GPU."""
    if plan.jobs is not None:
        return plan.jobs
    return 1 if uses_gpu(plan) else max(1, min(available_cores(), len(plan.trained) * len(plan.seeds)))


def plan_jobs(plan: SweepPlan) -> list[Job]:
    """The jobs of a plan. Seeds that were started together in its folder stay one job.

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
    if job.stacked and not (job.settings_file.is_file() and read_settings(job.settings_file)["finished"]):
        return False
    return all(map(_has_record, job.folders))


def have_data(plan: SweepPlan, jobs: Sequence[Job], *, show_progress: bool = True) -> None:
    """Check that the data of these jobs are available, and fetch missing sets, each once.

    If jobs run on other machines, data in folders of those machines are not checked.

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
        if data in known or (elsewhere and source.location(task.dataset, root=config.data_root) is None):
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
                break  # a host that does not answer would cost minutes for each further set
    if missing:
        (data, reason), *others = missing
        more = f"; {len(others)} more are missing: {', '.join(name for name, _ in others)}" if others else ""
        raise InputError(f"no data for {data}, nothing was started: {reason}{more}") from reason


def check_devices(plan: SweepPlan) -> None:
    """Raise InputError where this machine lacks a device that runs are to train on; no device is touched."""
    for name in sorted({cell.settled.device for cell in plan.trained}):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device={name} cannot be used here: {torch.cuda.device_count()} CUDA devices are found")


def check_folder(job: Job) -> None:
    """Raise InputError if the job's folder holds a run of other settings."""
    wanted = {job.settings_file: job.config}
    if job.stacked:  # runs of a finished group may have been resumed one by one
        for seed, folder in zip(job.seeds, job.folders, strict=True):
            wanted[folder / CONFIG_FILE] = {**job.config, "seed": seed, "seeds": None}
    for path, config in wanted.items():
        if path.is_file():
            # Reading fills in settings that earlier versions did not write.
            saved = config_to_dict(config_from_dict(read_settings(path)["config"]))
            if changes := changed_settings({"settings": saved}, {"settings": config}):
                raise InputError(
                    f"{path.parent} was begun with other settings ({'; '.join(changes)}); give the sweep those, or another "
                    "out="
                )


def run_job(job: Job, *, show_progress: bool = False) -> Outcome:
    """Run a job in this process: from its start or its last checkpoints, or not at all where it is done.

    Its folder is locked while it runs. If another process holds the lock (perhaps one that its sweep counts as lost), this
    process waits as long as the run's files change.
    """
    host = socket.gethostname()
    folders = list(dict.fromkeys([Path(job.out), *job.folders]))
    try:
        since, seen = time.monotonic(), _signs_of_life(job)
        while True:
            try:
                # A lost host's lock file is no obstacle: the folder's file system has working locks (docs/sweeps.md).
                with hold_folders(folders, distrust_hosts=False):
                    _train(job, show_progress=show_progress)
                return Outcome("done", host=host)
            except LockHeldError as error:  # of the job, or of the preparation of its data
                signs = _signs_of_life(job)
                if signs != seen:
                    since, seen = time.monotonic(), signs
                if time.monotonic() - since > _PATIENCE:
                    raise InputError(f"somebody else works on {job.name}") from error
                time.sleep(_LOOK)
    except KeyboardInterrupt as error:
        return Outcome("interrupted", str(error), host)
    except InputError as error:
        return Outcome("refused", str(error), host)
    except Exception as error:
        _log.exception("%s failed", job.name)
        return Outcome("failed", describe_error(error), host)


def describe_error(error: BaseException) -> str:
    """An error in one line; an error of another package with its type."""
    text, kind = (
        one_line(error)[:_MESSAGE],
        type(error),
    )  # a message that fills the pipe to the sweep would block the job
    return text if kind.__module__.startswith("deflow_torchrl") or text == kind.__name__ else f"{kind.__name__}: {text}"


def _train(job: Job, *, show_progress: bool) -> None:
    if is_done(job):
        return
    options: dict[str, Any] = {"command": job.command, "show_progress": show_progress}
    if job.settings_file.is_file():
        saved = read_settings(job.settings_file)["config"]
        # Settings that may change, and differ from those the run was started with.
        changed = [name for name in sorted(NEUTRAL_SETTINGS - {"out"}) if saved.get(name) != job.config.get(name)]
        overrides = [f"{name}={override_value(job.config[name])}" for name in changed]
        resume(Path(job.out), overrides=overrides, **options)
    else:
        train(config_from_dict(job.config), **options)


def _signs_of_life(job: Job) -> list[tuple[str, int, int]]:
    signs = []
    for path in sorted(path for folder in job.folders for path in folder.rglob("*")):
        with contextlib.suppress(OSError):  # removed in the meantime, as old checkpoints are
            about = path.stat()
            signs.append((str(path), about.st_mtime_ns, about.st_size))
    return signs


def _jobs_of(plan: SweepPlan, cell: Cell) -> list[Job]:
    out = (plan.out / cell.name).absolute()
    seeds, together = list(plan.seeds), []
    if (out / GROUP_FILE).is_file():
        settings = read_settings(out / GROUP_FILE)
        of_group = [int(seed) for seed in settings["config"]["seeds"] or ()]
        if not settings["finished"] or all(_has_record(seed_folder(out, seed)) for seed in of_group):
            together = of_group
    elif len(seeds) > 1 and not any((seed_folder(out, seed) / CONFIG_FILE).is_file() for seed in seeds):
        wanted = plan.engine == "ray" or is_gpu(cell.settled)
        if plan.stacked == "true" or (plan.stacked == "auto" and wanted and can_stack(cell.settled)):
            together = seeds
    jobs = [_job(plan, cell, together, out, stacked=True)] if together else []
    jobs += [_job(plan, cell, [seed], seed_folder(out, seed), stacked=False) for seed in seeds if seed not in together]
    for job in jobs:
        check_folder(job)
    return jobs


def _job(plan: SweepPlan, cell: Cell, seeds: Sequence[int], out: Path, *, stacked: bool) -> Job:
    own: dict[str, Any] = {"seed": 0, "seeds": list(seeds)} if stacked else {"seed": seeds[0], "seeds": None}
    if cell.settled.eval_workers is None:  # all cores to each of several jobs would be too many
        cores = int(plan.num_cpus) if plan.engine == "ray" else available_cores() // jobs_at_once(plan)
        own["eval_workers"] = max(1, cores)
    return Job(
        name=cell.name if stacked else f"{cell.name}/{out.name}",
        cell=cell.name,
        task=cell.task,
        algo=cell.variant.label,
        seeds=tuple(seeds),
        stacked=stacked,
        out=str(out),
        config=config_to_dict(replace(cell.settled, out=str(out), **own)),
        command=plan.command,
    )


def _has_record(folder: Path) -> bool:
    """Whether a run has a record that is whole and of the settings that its folder has."""
    if not (folder / RECORD_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return False
    try:
        record = load_record(folder)
    except MissingExtraError:
        raise
    except InputError:
        return False  # damaged or of an earlier version: the run goes on from its last checkpoint and writes it anew
    saved, recorded = (
        {
            "settings": {**config, "task": public_name(config["task"])}
        }  # a record keeps the name of a folder, not its place
        for config in (read_settings(folder / CONFIG_FILE)["config"], record["config"])
    )
    return not changed_settings(saved, recorded)
