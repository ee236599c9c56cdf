# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Estimate the cost of a sweep from the updates per second of runs in its folder or, without such runs, of updates timed here."""

from __future__ import annotations

import heapq
import math
import re
import statistics
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.envs.d4rl import d4rl_task
from deflow_torchrl.envs.factory import check_renderer
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.modules.kernels import enable_kernels
from deflow_torchrl.processes import available_cores
from deflow_torchrl.progress import clock, progress_bar
from deflow_torchrl.reports.records import RECORD_FILE, hardware, load_record
from deflow_torchrl.runs.build import build_learner, find_task
from deflow_torchrl.runs.settings import SettledConfig
from deflow_torchrl.sources.base import get_source
from deflow_torchrl.sweep.jobs import Job, JobProgress, check_devices, is_done, jobs_at_once, plan_jobs
from deflow_torchrl.sweep.plan import Cell, SweepPlan, is_gpu, seeds_text
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.trainers import StackedUpdate, UpdateStep

_BUDGET_SECONDS = 30.0  # of timed updates in all
_KIND_SECONDS = 1.5  # of them for a kind of update
_LEAST_UPDATES = 2
_TASKS_NAMED = 4
_REWARDS = (-1.0, 0.0)  # the range of rewards, which some critics are built for, changes no time
_WIDTHS = (64, 16)  # observations and actions are counted in so many


class _Kind(NamedTuple):
    """Key of updates that take the same time."""

    method: str
    observation_dim: int | tuple[int, ...]  # of pictures their shape
    action_dim: int
    key: Hashable


def estimate_costs(plan: SweepPlan, *, show_progress: bool = True) -> dict[str, Any]:
    """Estimate what the updates of a sweep's unfinished jobs cost on this machine.

    Each kind of update (method, networks, batch size, widths of observations and actions rounded up) is timed on random batches
    for a second or two, with the threads of a job, or taken from records in the sweep's folder that were made on this machine's
    processor. Evaluations, environment steps and the loading of data come on top.

    Args:
        plan: the sweep.

    Keyword Args:
        show_progress: show a progress bar on standard error.

    Returns:
        ``cells`` (task, algo, seeds, number of finished seeds, steps of each, folder, updates per second, remaining hours),
        ``jobs`` (their number), ``left_out`` (cell -> reason), ``speeds``, ``at_once`` (jobs that run at once), ``threads`` (of a
        job), ``core_hours`` and ``wall_hours`` (of all jobs on this machine, ``at_once`` at a time).

    Raises:
        InputError: if a folder holds runs of other settings, or a device, or an environment or data set that gives the widths,
            is not available.
    """
    check_devices(plan)
    jobs = plan_jobs(plan)
    at_once = jobs_at_once(plan) if plan.engine == "local" else max(1, int(available_cores() // max(plan.num_cpus, 1)))
    threads = max(1, available_cores() // at_once)
    for cell in plan.trained:
        if find_task(cell.settled).images:  # first of all: the choice of a GL driver holds from the import of mujoco on
            check_renderer(cell.task)
            break
    sizes: dict[str, _Sizes] = {}
    kinds = {cell.name: _kind_of(cell, sizes) for cell in plan.trained}
    stacks = {job.cell: len(job.seeds) for job in jobs if job.stacked}
    speeds = {kind: (rate, "records") for kind, rate in _recorded_speeds(plan, kinds, threads).items()}
    missing = {kinds[cell.name]: cell for cell in plan.trained if kinds[cell.name] not in speeds}
    seconds = min(_KIND_SECONDS, _BUDGET_SECONDS / max(len(missing), 1))
    bar = progress_bar(
        missing.items(), desc="measure", unit="kind", leave=False, disable=not (show_progress and missing)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind, cell in bar:
            stack = stacks.get(cell.name, 1) if is_gpu(cell.settled) else 1
            speeds[kind] = _measure(cell.settled, kind, stack, seconds), "measured"
    finally:
        torch.set_num_threads(before)
    rows, seconds_of_jobs = [], []
    for cell in plan.trained:
        speed = speeds[kinds[cell.name]][0]
        row, seconds_of_cell = _row(cell, [job for job in jobs if job.cell == cell.name], speed)
        rows.append(row)
        seconds_of_jobs += seconds_of_cell
    return {
        "out": str(plan.out),
        "cells": rows,
        "jobs": len(jobs),
        "left_out": plan.left_out,
        "speeds": [
            {
                "method": kind.method,
                "observation_dim": kind.observation_dim,
                "action_dim": kind.action_dim,
                "updates_per_second": round(speed, 2),
                "source": source,
            }
            for kind, (speed, source) in speeds.items()
        ],
        "at_once": at_once,
        "threads": threads,
        "core_hours": round(sum(seconds_of_jobs) * threads / 3600, 3),
        "wall_hours": round(_wall(seconds_of_jobs, at_once) / 3600, 3),
    }


def describe_costs(estimate: Mapping[str, Any]) -> str:
    """Format an estimate as text: a line for each cell, then the sums."""
    line = "{:<48} {:<24} {:>8} {:>10} {:>10}  {}"
    lines = [line.format("task", "method", "seeds", "steps", "hours", "folder")]
    for row in estimate["cells"]:
        done = f" ({row['seeds_done']} of {len(row['seeds'])} seeds done)" if row["seeds_done"] else ""
        steps, hours, folder = f"{row['steps']:,}", f"{row['hours']:.2f}", f"{row['folder']}{done}"
        lines.append(line.format(row["task"], row["algo"], seeds_text(row["seeds"]), steps, hours, folder))
    sources = [speed["source"] for speed in estimate["speeds"]]
    measured, records = sources.count("measured"), sources.count("records")
    wall, threads = clock(3600 * estimate["wall_hours"]), estimate["threads"]
    lines += [
        *describe_left_out(estimate["left_out"]),
        f"{len(estimate['cells'])} cells, {estimate['jobs']} jobs; {len(estimate['left_out'])} cells left out",
        f"updates a second: of {measured} kinds of update measured here just now, of {records} from records in {estimate['out']}",
        f"{estimate['core_hours']:,.1f} core hours; {wall} on this machine, {estimate['at_once']} jobs at once, threads of each: "
        f"{threads}",
        "hours are of one job's threads, and of updates alone: evaluations and environment steps come on top",
    ]
    return "\n".join(lines)


def describe_left_out(left_out: Mapping[str, str]) -> list[str]:
    """Give a line for each reason: the number of cells, their methods and tasks.

    Examples:
        >>> describe_left_out({"a-task1-v0/iql": "no value", "a-task2-v0/iql": "no value"})
        ['left out, no value: 2 cells (iql on a-task#-v0)']
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in left_out.items():
        task, _, method = name.partition("/")
        groups.setdefault(reason, []).append((re.sub(r"-task\d+-", "-task#-", task), method))
    lines = []
    for reason, cells in groups.items():
        tasks, methods = list(dict.fromkeys(task for task, _ in cells)), sorted({method for _, method in cells})
        named = ", ".join(tasks[:_TASKS_NAMED]) + ("..." if len(tasks) > _TASKS_NAMED else "")
        number = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
        lines.append(f"left out, {reason}: {number} ({', '.join(methods)} on {named})")
    return lines


def _row(cell: Cell, jobs: Sequence[Job], speed: float) -> tuple[dict[str, Any], list[float]]:
    """A cell's row of the estimate, and the seconds that each of its unfinished jobs needs."""
    config, seconds, finished = cell.settled, [], 0
    for job in jobs:
        if is_done(job):
            finished += len(job.seeds)
            continue
        progress = JobProgress(job)
        progress.look()
        offline = max(config.offline_steps - progress.step, 0)
        updates = offline + (job.steps - progress.step - offline) * config.utd
        seconds.append(updates * len(job.seeds) / speed)
    row = {
        "task": cell.task,
        "algo": cell.variant.label,
        "seeds": [seed for job in jobs for seed in job.seeds],
        "seeds_done": finished,
        "steps": jobs[0].steps,
        "stacked": any(job.stacked for job in jobs),
        "folder": str(Path(jobs[0].out) if jobs[0].stacked else Path(jobs[0].out).parent),
        "updates_per_second": round(speed, 2),
        "hours": round(sum(seconds) / 3600, 4),
    }
    return row, seconds


def _wall(seconds: Sequence[float], at_once: int) -> float:
    """Seconds until all jobs are done if the longest are started first."""
    ends = [0.0] * at_once
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _kind_of(cell: Cell, sizes: dict[str, _Sizes]) -> _Kind:
    config = cell.settled
    # Counts of steps or samples, widths and precisions change the time of an update; a learning rate does not. num_samples is
    # used for acting only.
    neutral = ("q_aggregation", "num_samples")
    counts = {
        name: value
        for name, value in vars(config.algo).items()
        if isinstance(value, (int, str)) and name not in neutral
    }
    key = (
        tuple(config.hidden_dims),
        config.encoder,
        config.batch_size,
        config.device,
        config.kernels,
        config.precision,
        tuple(sorted(counts.items())),
    )
    observations, actions = _sizes(config, sizes)
    actions = math.ceil(actions * config.chunk / _WIDTHS[1]) * _WIDTHS[1]
    if isinstance(observations, tuple):
        observations = *observations[:-1], observations[-1] * config.frame_stack
    else:
        observations = math.ceil(observations * config.frame_stack / _WIDTHS[0]) * _WIDTHS[0]
    return _Kind(cell.variant.method, observations, actions, key)


_Sizes = tuple[int | tuple[int, ...], int]


def _sizes(config: SettledConfig, known: dict[str, _Sizes]) -> _Sizes:
    """Widths of a task's observations (pictures: their shape) and actions, from D4RL's table, the environment or the data."""
    task = find_task(config)
    # Tasks that share a data set have the same widths, and making an environment takes a second.
    if task.data_name in known:
        return known[task.data_name]
    facts = d4rl_task(task.dataset)
    widths: _Sizes
    if facts is not None:
        widths = facts.observation_dim, facts.action_dim
    elif task.environment is None or get_source(task.source).location(task.dataset) is not None:
        data = load_task_data(task, root=config.data_root, download=config.download)
        assert data is not None
        widths = _width(data.observation.shape[1:]), data.action.shape[-1]
    else:
        env = make_gym_env(task.environment)
        spaces = env.observation_space.shape, env.action_space.shape
        env.close()
        if spaces[0] is None or spaces[1] is None:
            raise InputError(f"{config.task}: {task.environment} has observations or actions that are no arrays")
        widths = _width(spaces[0]), spaces[1][-1]
    known[task.data_name] = widths
    return widths


def _width(shape: Sequence[int]) -> int | tuple[int, ...]:
    return shape[-1] if len(shape) == 1 else tuple(shape)


def _measure(config: SettledConfig, kind: _Kind, stack: int, seconds: float) -> float:
    """Time updates of ``stack`` seeds trained together; returns updates per second, summed over the seeds."""
    device = torch.device(config.device)
    enable_kernels(config.kernels)
    with generators_set_aside():
        updates = [
            UpdateStep(
                build_learner(config, kind.observation_dim, kind.action_dim, device, reward_range=_REWARDS),
                precision=config.precision,
            )
            for _ in range(stack)
        ]
        for own in updates:  # of a run of phases the last is measured
            own.step = max((stage.begin for stage in own.learner.stages), default=0)
        update = StackedUpdate(updates) if stack > 1 else updates[0]
        batch = _random_batch((stack, config.batch_size) if stack > 1 else (config.batch_size,), kind).to(device)
        update(batch.clone())  # the first update allocates
        _finish(device)
        count, began = 0, time.perf_counter()
        while count < _LEAST_UPDATES or time.perf_counter() - began < seconds:
            update(batch.clone(recurse=False))
            count += 1
            _finish(device)
        return count * stack / (time.perf_counter() - began)


def _random_batch(shape: tuple[int, ...], kind: _Kind) -> TensorDict:
    def state() -> dict[str, torch.Tensor]:
        width = kind.observation_dim
        if isinstance(width, tuple):
            observation = torch.randint(256, (*shape, *width), dtype=torch.uint8)
        else:
            observation = torch.randn(*shape, width)
        return {"observation": observation, "action": torch.rand(*shape, kind.action_dim) * 2 - 1}

    ends = dict.fromkeys(("terminated", "truncated", "done"), torch.zeros(*shape, 1, dtype=torch.bool))
    following = TensorDict({**state(), **ends, "reward": torch.zeros(*shape, 1)}, shape)  # some methods read its action
    return TensorDict({**state(), "mc_return": torch.zeros(*shape, 1), "next": following}, shape)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _recorded_speeds(plan: SweepPlan, kinds: Mapping[str, _Kind], threads: int) -> dict[_Kind, float]:
    """Updates per second of records in the sweep's folder that were made on this processor with the same number of threads."""
    here = {**hardware(), "torch_threads": threads}
    found: dict[_Kind, list[float]] = {}
    for cell in plan.trained:
        for record in _records(plan.out / cell.name):
            config, taken = record["config"], record["time"].get("updates", 0.0)
            same = all(record["hardware"].get(name) == here[name] for name in ("cpu", "accelerator", "torch_threads"))
            if same and taken > 0:
                updates = config["offline_steps"] + config["online_steps"] * config["utd"]
                found.setdefault(kinds[cell.name], []).append(updates * len(record["stacked"] or [None]) / taken)
    return {kind: statistics.median(rates) for kind, rates in found.items()}


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """The readable records of a cell."""
    for path in sorted(folder.glob(f"seed*/{RECORD_FILE}")):
        try:
            yield load_record(path)
        except MissingExtraError:
            raise
        except InputError:
            continue  # damaged or of an earlier version
