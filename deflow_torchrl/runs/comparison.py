# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Two runs compared on common starts and noise: their difference, with an interval."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.envs.d4rl import normalized_score
from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.figures import check_report_extra
from deflow_torchrl.reports.statistics import paired_difference, sign_test
from deflow_torchrl.runs.evaluate import ACTING, evaluate_run
from deflow_torchrl.runs.folder import read_run_settings
from deflow_torchrl.runs.settings import config_from_dict
from deflow_torchrl.tasks import Task, get_task
from deflow_torchrl.tasks.data import reference_returns
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED


def compare_runs(
    first: Path,
    second: Path,
    *,
    episodes: int | None = None,
    policy: str | None = None,
    workers: int | None = None,
    seed: int = DEFAULT_EVALUATION_SEED,
    device: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate one policy of each of two runs on the same starts and noise and compare them episode by episode.

    Args:
        first: run folder A.
        second: run folder B.

    Keyword Args:
        episodes: episodes of each; the larger of the runs' own numbers by default.
        policy: name of the policy; each run's acting policy by default.
        workers: processes that step environments; the runs' own setting by default. The outcome does not depend on it.
        seed: of the starts and the noise.
        device: device of the policies; the runs' own by default.
        show_progress: show progress bars on standard error.

    Returns:
        ``metric``, ``seed``, ``runs`` (A, B: folder, step, policy, outcome), ``difference`` (B - A of the metric: ``mean``,
        ``low``, ``high``, ``confidence``, ``pairs``); where the metric is success also ``counts`` (``both``, ``only_a``,
        ``only_b``, ``neither``) and ``p_value`` (exact, two-sided).

    Raises:
        InputError: if a folder is no run or has no checkpoint or policy, or the two are of different tasks.
    """
    check_report_extra("scipy")
    settings = [read_run_settings(run) for run in (first, second)]
    task = _common_task(first, second, settings)
    if episodes is None:
        episodes = max(it["final_episodes"] or it["config"]["eval_episodes"] for it in settings)
    results = [
        evaluate_run(
            run,
            episodes=episodes,
            device=device,
            policy=policy or ACTING,
            workers=workers,
            seed=seed,
            show_progress=show_progress,
        )
        for run in (first, second)
    ]
    runs = {}
    for label, run, result in zip("AB", (first, second), results, strict=True):
        ((name, outcome),) = result["evaluations"].items()
        runs[label] = {"run": str(run), "step": result["step"], "policy": name, "outcome": outcome}
    of_a, of_b = (values_of(run["outcome"], task) for run in runs.values())
    compared: dict[str, Any] = {
        "metric": task.metric,
        "seed": seed,
        "runs": runs,
        "difference": asdict(paired_difference(of_a, of_b)),
    }
    if task.metric == "success":
        a, b = of_a.astype(bool), of_b.astype(bool)
        counts = {"both": a & b, "only_a": a & ~b, "only_b": b & ~a, "neither": ~a & ~b}
        compared["counts"] = {name: int(which.sum()) for name, which in counts.items()}
        compared["p_value"] = sign_test(compared["counts"]["only_b"], compared["counts"]["only_a"])
    return compared


def _common_task(first: Path, second: Path, settings: list[dict[str, Any]]) -> Task:
    configs = [config_from_dict(it["config"]) for it in settings]
    tasks = [get_task(config.task, environment=config.env) for config in configs]
    if (tasks[0].environment, tasks[0].metric) != (tasks[1].environment, tasks[1].metric):
        names = [task.environment or f"{task.name} (without an environment)" for task in tasks]
        raise InputError(
            f"{first} is evaluated in {names[0]}, {second} in {names[1]}: only runs of one task can be compared in pairs"
        )
    return tasks[0]


def values_of(outcome: dict[str, Any], task: Task) -> np.ndarray:
    """The task's metric of each episode."""
    if task.metric == "success":
        return np.asarray(outcome["success"], np.float64)
    returns = np.asarray(outcome["episode_return"], np.float64)
    references = reference_returns(task)
    return (
        returns if task.metric == "return" or references is None else np.asarray(normalized_score(returns, *references))
    )
