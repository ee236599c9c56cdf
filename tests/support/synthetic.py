"""Run folders with records of chosen outcomes, made by the package's own ``build_record``."""

import functools
import json
from pathlib import Path
from unittest import mock

import numpy as np

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.reports import build_record, records
from deflow_torchrl.runs.settings import TrainConfig, config_to_dict

CUBE = "cube-single-play-singletask-task{}-v0"
CUBE2 = CUBE.format(2)
EPISODES = 20
_COMMIT = functools.cache(records.git_commit)  # two processes a call


def outcome(wins, *, episodes=EPISODES, seed=1_000_000, **more):
    success = [int(episode < wins) for episode in range(episodes)]
    return {
        "success_rate": wins / episodes, "mean_return": -10.0 * (episodes - wins) / episodes, **more, "episodes": episodes,
        "success": success, "episode_return": [10.0 * (value - 1) for value in success], "length": [5] * episodes,
        "seeds": [seed + episode for episode in range(episodes)],
    }  # fmt: skip


def record_of(wins, *, task=CUBE2, algo="deflow", seed=0, before=(), online=(), variant=None, **more):
    """A record of a run that ends with ``wins`` successes of 20.

    ``before`` are the wins of its evaluations before the last (of the offline phase); ``online`` those of an online phase.
    """
    config = TrainConfig(
        task=task, seed=seed, offline_steps=100, online_steps=100 * len(online), out=f"/somewhere/{algo}",
        data_root="/data", hidden_dims=[8], eval_episodes=EPISODES, algo=DeFlowConfig(),
    )  # fmt: skip
    settings = config_to_dict(config)
    settings["algo"] = {**settings["algo"], "name": algo, **(variant or {})}
    settings |= more.pop("settings", {})
    offline = [*before, wins] if not online else [*before]
    steps = np.linspace(0, 100, len(offline) + 1)[1:] if offline else []
    history = [
        {"step": int(step), "phase": "offline", "policies": {algo: outcome(value)}}
        for step, value in zip(steps, offline, strict=True)
    ]
    ending = [*online[:-1], wins] if online else []
    history += [
        {"step": 100 * (2 + number), "phase": "online", "policies": {algo: outcome(value)}}
        for number, value in enumerate(ending)
    ]
    given = {
        "commands": [f"deflow train task={task} algo={algo} seed={seed}"], "config": settings,
        "data": {"name": task, "sha256": "ab" * 32, "transitions": 1000, "provenance": "official"}, "metric": "success",
        "acting": algo, "variant": variant or {}, "success_timing": "pre", "evaluation_seed": 1_000_000,
        "evaluations": {algo: outcome(wins)}, "history": history, "seconds": {"updates": 1.5, "load_data": 0.5},
    }  # fmt: skip
    with mock.patch.object(records, "git_commit", _COMMIT):
        return build_record(**(given | more))


def write_run(folder: Path, record, rows=()):
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def metrics_rows(alpha=1.0, rate=0.5):
    """Rows as a DeFlow run writes them, with two evaluations."""
    rows = []
    for step in (25, 50, 75, 100):
        row = {"step": step, "phase": "offline", "train/loss_flow": 1.0 / step, "train/loss_qvalue": 0.1}
        row |= {"train/alpha": alpha * step / 100, "train/divergence_ratio": step / 100, "train/action_distance": 0.1}
        row |= {"train/action_distance_base": 0.08, "time/trained_seconds": float(step)}
        rows.append(row | ({"eval/success": rate * step / 100} if step % 50 == 0 else {}))
    return rows
