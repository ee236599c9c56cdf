# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What a sweep would cost, from steps per second that are measured: of runs in its folder, else of updates made here and now."""

from __future__ import annotations

import heapq
import re
import statistics
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.envs.d4rl import d4rl_task
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.modules.kernels import enable_kernels
from deflow_torchrl.processes import available_cores
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.records import hardware, load_record
from deflow_torchrl.runs.build import build_learner
from deflow_torchrl.runs.settings import TrainConfig, config_from_dict
from deflow_torchrl.sources.base import get_source
from deflow_torchrl.sweep.jobs import Job, check_devices, is_done, jobs_at_once, plan_jobs
from deflow_torchrl.sweep.plan import Cell, SweepPlan, is_gpu
from deflow_torchrl.sweep.table import JobProgress, clock, seeds_text
from deflow_torchrl.tasks import get_task
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.trainers import StackedUpdate, UpdateStep

_BUDGET_SECONDS = 30.0  # of timed updates in all
_KIND_SECONDS = 1.5  # of them for a kind of update
_LEAST_UPDATES = 2
_TASKS_NAMED = 4
_WIDTHS = (64, 16)  # observations and actions are counted in so many


@dataclass(frozen=True)
class _Kind:
    """Updates that take the same time."""

    method: str
    observation_dim: int
    action_dim: int
    key: Hashable


@dataclass
class _Speed:
    """Updates of one seed a second, and where that is from: ``records`` or ``measured``."""

    updates_per_second: float
    source: str


def estimate_costs(plan: SweepPlan, *, show_progress: bool = True) -> dict[str, Any]:
    """The jobs of a sweep that are not finished, and what their updates cost on this machine.

    Each kind of update (method, networks, batch size, widths of observations and actions rounded up) is timed on random batches
    for a second or two, with the threads a job has, or taken from records in the sweep's folder that are of this machine's
    processor. Evaluations, environment steps and the loading of data come on top.

    Args:
        plan: the sweep.

    Keyword Args:
        show_progress: show a progress bar on standard error.

    Returns:
        ``cells`` (task, algo, seeds, how many of them are done, steps of each, folder, updates a second, hours still to go),
        ``jobs``, their number, ``left_out`` (cell -> why it cannot be trained), ``speeds``, ``at_once``, ``threads`` (of a job),
        ``core_hours`` and ``wall_hours`` (as if all ran on this machine, ``at_once`` jobs together).

    Raises:
        InputError: if a folder holds runs of other settings, or a device, or an environment or data set that is needed for its
            sizes, cannot be had.
    """
    check_devices(plan)
    jobs = plan_jobs(plan)
    at_once = jobs_at_once(plan) if plan.engine == "local" else max(1, int(available_cores() // max(plan.num_cpus, 1)))
    threads = max(1, available_cores() // at_once)
    cells = {cell.name: cell for cell in plan.trained}
    sizes: dict[str, tuple[int, int]] = {}
    kinds = {cell.name: _kind_of(cell, sizes) for cell in plan.trained}
    stacks = {_cell_of(job): len(job.seeds) for job in jobs if job.stacked and is_gpu(config_from_dict(job.config))}
    speeds = _speeds_of_records(plan, kinds, threads)
    missing = {kinds[name]: (name, stacks.get(name, 1)) for name in cells if kinds[name] not in speeds}
    seconds = min(_KIND_SECONDS, _BUDGET_SECONDS / max(len(missing), 1))
    bar = progress_bar(
        missing.items(),
        total=len(missing),
        desc="measure",
        unit="kind",
        leave=False,
        disable=not (show_progress and missing),
    )
    with bar, _threads(threads):
        for kind, (name, stack) in bar:
            speeds[kind] = _Speed(_measure(cells[name], kind, stack, seconds), "measured")
    rows = [
        _row(cell, [job for job in jobs if _cell_of(job) == cell.name], speeds[kinds[cell.name]])
        for cell in plan.trained
    ]
    seconds_of_jobs = [one for row in rows for one in row.pop("job_seconds")]
    return {
        "out": str(plan.out),
        "cells": rows,
        "jobs": len(jobs),
        "left_out": {cell.name: cell.left_out for cell in plan.cells if cell.left_out is not None},
        "speeds": [
            {
                "method": kind.method,
                "observation_dim": kind.observation_dim,
                "action_dim": kind.action_dim,
                "updates_per_second": round(speed.updates_per_second, 2),
                "source": speed.source,
            }
            for kind, speed in speeds.items()
        ],
        "at_once": at_once,
        "threads": threads,
        "core_hours": round(sum(seconds_of_jobs) * threads / 3600, 3),
        "wall_hours": round(_wall(seconds_of_jobs, at_once) / 3600, 3),
    }


def describe_costs(estimate: dict[str, Any]) -> str:
    """An estimate for a reader: a line for each job, then the sums."""
    line = "{:<48} {:<24} {:>8} {:>10} {:>10}  {}"
    lines = [line.format("task", "method", "seeds", "steps", "hours", "folder")]
    for row in estimate["cells"]:
        done = f" ({row['seeds_done']} of {len(row['seeds'])} seeds done)" if row["seeds_done"] else ""
        steps, hours, folder = f"{row['steps']:,}", f"{row['hours']:.2f}", f"{row['folder']}{done}"
        lines.append(line.format(row["task"], row["algo"], seeds_text(row["seeds"]), steps, hours, folder))
    lines += describe_left_out(estimate["left_out"])
    sources = [speed["source"] for speed in estimate["speeds"]]
    found = {source: sources.count(source) for source in ("measured", "records")}
    measured, records = found["measured"], found["records"]
    wall, threads = clock(3600 * estimate["wall_hours"]), estimate["threads"]
    lines += [
        f"{len(estimate['cells'])} cells, {estimate['jobs']} jobs; {len(estimate['left_out'])} cells left out",
        f"updates a second: of {measured} kinds of update measured here just now, of {records} from records in {estimate['out']}",
        f"{estimate['core_hours']:,.1f} core hours; {wall} on this machine, {estimate['at_once']} jobs at once, threads of each: "
        f"{threads}",
        "hours are of one job's threads, and of updates alone: evaluations and environment steps come on top",
    ]
    return "\n".join(lines)


def describe_left_out(left_out: Mapping[str, str]) -> list[str]:
    """A line for each reason: how many cells, of which methods and tasks.

    Examples:
        >>> describe_left_out({"a-task1-v0/iql": "no value", "a-task2-v0/iql": "no value"})
        ['left out, no value: 2 cells (iql on a-task#-v0)']
    """
    groups: dict[str, dict[str, set[str]]] = {}
    for name, reason in left_out.items():
        task, _, method = name.partition("/")
        groups.setdefault(reason, {}).setdefault(re.sub(r"-task\d+-", "-task#-", task), set()).add(method)
    lines = []
    for reason, found in groups.items():
        number = sum(one == reason for one in left_out.values())
        methods = sorted(set().union(*found.values()))
        tasks = ", ".join(found) if len(found) <= _TASKS_NAMED else f"{', '.join(list(found)[:_TASKS_NAMED])}..."
        lines.append(f"left out, {reason}: {number} cell{'' if number == 1 else 's'} ({', '.join(methods)} on {tasks})")
    return lines


def _row(cell: Cell, jobs: Sequence[Job], speed: _Speed) -> dict[str, Any]:
    assert cell.config is not None
    seconds, finished = [], 0
    for job in jobs:
        if is_done(job):
            finished += len(job.seeds)
            continue
        progress = JobProgress(job)
        progress.look()
        offline = max(cell.config.offline_steps - progress.step, 0)
        updates = offline + (job.steps - progress.step - offline) * cell.config.utd
        seconds.append(updates * len(job.seeds) / speed.updates_per_second)
    return {
        "task": cell.task,
        "algo": cell.variant.label,
        "seeds": [seed for job in jobs for seed in job.seeds],
        "seeds_done": finished,
        "steps": cell.steps,
        "stacked": any(job.stacked for job in jobs),
        "folder": str(Path(jobs[0].out) if jobs[0].stacked else Path(jobs[0].out).parent),
        "updates_per_second": round(speed.updates_per_second, 2),
        "hours": round(sum(seconds) / 3600, 4),
        "job_seconds": seconds,
    }


def _wall(seconds: Sequence[float], at_once: int) -> float:
    """Until all are done, the longest first, each where there is room first."""
    ends = [0.0] * at_once
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _cell_of(job: Job) -> str:
    return job.name if job.stacked else job.name.rpartition("/")[0]


def _kind_of(cell: Cell, sizes: dict[str, tuple[int, int]]) -> _Kind:
    config = cell.config
    assert config is not None
    observation_dim, action_dim = _sizes(config, sizes)
    # Numbers such as a learning rate take no time; counts of steps or samples, widths and precisions do.
    counts = {name: value for name, value in vars(config.algo).items() if isinstance(value, (int, str))}
    for name in ("q_aggregation", "num_samples"):  # of the latter updates make no use: IFQL acts by them
        counts.pop(name, None)
    key = (tuple(config.hidden_dims), config.batch_size, config.device, config.kernels, tuple(sorted(counts.items())))
    observations, actions = (
        -(-width // unit) * unit for width, unit in zip((observation_dim, action_dim), _WIDTHS, strict=True)
    )
    return _Kind(cell.variant.method, observations, actions, key)


def _sizes(config: TrainConfig, known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Widths of a task's observations and actions: of D4RL's table, of the environment, or of one's own data."""
    task = get_task(config.task, environment=config.env)
    # Tasks of one set have the same sizes, and to make an environment takes a second.
    if task.data_name in known:
        return known[task.data_name]
    facts = d4rl_task(task.dataset)
    if facts is not None:
        widths = facts.observation_dim, facts.action_dim
    elif task.environment is None or get_source(task.source).location(task.dataset) is not None:
        data = load_task_data(task, root=config.data_root, download=config.download)
        assert data is not None
        widths = data.observation.shape[-1], data.action.shape[-1]
    else:
        env = make_gym_env(task.environment)
        spaces = env.observation_space.shape, env.action_space.shape
        env.close()
        if spaces[0] is None or spaces[1] is None:
            raise InputError(f"{config.task}: {task.environment} has no vectors for observations and actions")
        widths = spaces[0][-1], spaces[1][-1]
    known[task.data_name] = widths
    return widths


def _measure(cell: Cell, kind: _Kind, stack: int, seconds: float) -> float:
    """Updates of one seed a second, of ``stack`` seeds together."""
    config = cell.config
    assert config is not None
    device = torch.device(config.device)
    enable_kernels(config.kernels)
    with generators_set_aside():
        updates = [
            UpdateStep(build_learner(config, kind.observation_dim, kind.action_dim, device)) for _ in range(stack)
        ]
        update = StackedUpdate(updates) if stack > 1 else updates[0]
        shape = (stack, config.batch_size) if stack > 1 else (config.batch_size,)
        batch = _random_batch(shape, kind).to(device)
        update(batch.clone())  # what only the first one does
        _finish(device)
        count, began = 0, time.perf_counter()
        while count < _LEAST_UPDATES or time.perf_counter() - began < seconds:
            update(batch.clone(recurse=False))
            count += 1
            _finish(device)
        return count * stack / (time.perf_counter() - began)


def _random_batch(shape: tuple[int, ...], kind: _Kind) -> TensorDict:
    ends = torch.zeros(*shape, 1, dtype=torch.bool)
    following = TensorDict(
        observation=torch.randn(*shape, kind.observation_dim),
        reward=torch.zeros(*shape, 1),
        terminated=ends,
        truncated=ends.clone(),
        done=ends.clone(),
        action=torch.rand(*shape, kind.action_dim) * 2 - 1,  # some methods ask for it
        batch_size=shape,
    )
    return TensorDict(
        observation=torch.randn(*shape, kind.observation_dim),
        action=torch.rand(*shape, kind.action_dim) * 2 - 1,
        next=following,
        batch_size=shape,
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speeds_of_records(plan: SweepPlan, kinds: dict[str, _Kind], threads: int) -> dict[_Kind, _Speed]:
    """What runs of this machine's processor, with so many threads, have recorded in the sweep's folder."""
    here = hardware()
    found: dict[_Kind, list[float]] = {}
    for cell in plan.trained:
        for record in _records(plan, cell):
            there, config, taken = record["hardware"], record["config"], record["time"].get("updates", 0.0)
            same = all(there.get(name) == here.get(name) for name in ("cpu", "accelerator"))
            updates = config["offline_steps"] + config["online_steps"] * config["utd"]
            if same and there.get("torch_threads") == threads and taken > 0:
                stack = len(record["stacked"] or [None])
                found.setdefault(kinds[cell.name], []).append(updates * stack / taken)
    return {kind: _Speed(statistics.median(rates), "records") for kind, rates in found.items()}


def _records(plan: SweepPlan, cell: Cell) -> Iterator[dict[str, Any]]:
    """The records of a cell that can be read."""
    for path in sorted((plan.out / cell.name).glob("seed*/record.json")):
        try:
            yield load_record(path)
        except MissingExtraError:
            raise
        except InputError:
            continue  # damaged or of an earlier version


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
