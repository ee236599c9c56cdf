# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The demo: generate simulator data, train DeFlow on it, compare it with its own prior, write a report."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.envs.drawing import check_drawing
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import cache_home, dataset_path
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports import check_report_extra
from deflow_torchrl.runs.folder import CONFIG_FILE, check_free
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.sources.generation import generate_ogbench_dataset

_LOG = logging.getLogger(__name__)
TASK = "cube-single-noisy-singletask-task2-v0"


@dataclass(frozen=True)
class DemoScale:
    """The size of the demo.

    Attributes:
        episodes: training episodes to generate, 1000 transitions each.
        val_episodes: validation episodes.
        steps: gradient steps.
        log_interval: steps between rows of metrics.
        eval_interval: steps between evaluations for the curve.
        eval_episodes: episodes of those.
        final_episodes: episodes of the evaluation of prior and DeFlow at the end.
        hidden_dims: widths of the networks.
    """

    episodes: int = 100
    val_episodes: int = 2
    steps: int = 6_000
    log_interval: int = 100
    eval_interval: int = 1_500
    eval_episodes: int = 10
    final_episodes: int = 50
    hidden_dims: tuple[int, ...] = (256, 256, 256)


FULL = DemoScale()
QUICK = DemoScale(
    episodes=8, val_episodes=1, steps=300, log_interval=50, eval_interval=150, eval_episodes=5, final_episodes=10
)


def run_demo(
    scale: DemoScale,
    *,
    seed: int,
    command: str,
    out: Path | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Run the demo and return the object it prints last.

    The data is kept in ``$DEFLOW_HOME/demo`` under a name of its own, so that it is never taken for the published set. It is
    made once: a second run, also with another seed, uses it again.

    Args:
        scale: its size.

    Keyword Args:
        seed: seed of training; the data's seed is always 0.
        command: the command line, for the record.
        out: run folder; ``runs/demo-seedN`` (with a number behind it, if taken) where None.
        show_progress: show progress bars on standard error.

    Returns:
        ``prior_success``, ``deflow_success`` (fractions of the final episodes), ``episodes``, ``transitions``, ``steps``,
        ``seed``, ``seconds`` and the path of the ``report``.

    Raises:
        InputError: on a folder that cannot be used.
        MissingExtraError: without the extras ``ogbench``, ``cli`` and ``reports``.
    """
    began = time.perf_counter()
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be at least 0 and below 2**63, got {seed}")
    check_report_extra()
    out = _free_folder(Path("runs") / f"demo-seed{seed}") if out is None else out
    check_free(out)
    dataset = parse_ogbench_name(TASK).dataset
    root = cache_home() / "demo" / f"{dataset}-{scale.episodes}-episodes"
    needed = [root / f"{dataset}.json", *(dataset_path(dataset, root, split) for split in ("train", "val"))]
    if not all(path.is_file() for path in needed):
        generate_ogbench_dataset(
            dataset,
            root,
            episodes=scale.episodes,
            val_episodes=scale.val_episodes,
            seed=0,
            progress=lambda finished, total: progress_bar(
                finished, total=total, desc="generate", unit="episode", disable=not show_progress
            ),
        )
    generated = time.perf_counter() - began
    record = train(
        demo_config(scale, seed=seed, root=root, out=out, video=_can_be_drawn()),
        command=command,
        final_episodes=scale.final_episodes,
        extra_seconds={"generate_data": generated},
        show_progress=show_progress,
    )
    evaluations = record["evaluations"]
    return {
        "prior_success": evaluations["prior"]["success_rate"],
        "deflow_success": evaluations["deflow"]["success_rate"],
        "episodes": evaluations["deflow"]["episodes"],
        "transitions": record["data"]["transitions"],
        "steps": scale.steps,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "report": str(out / "report.html"),
    }


def demo_config(scale: DemoScale, *, seed: int, root: Path, out: Path, video: bool = False) -> TrainConfig:
    """The demo's settings: plain DeFlow, sized and tuned for minutes on two CPU cores instead of the paper's 1M steps.

    Against the paper: smaller networks, a larger learning rate and faster targets (values must travel back some 80 steps
    in a few thousand updates), a shorter horizon, bfloat16 products where the processor has them, and delta 0.005, since the
    noisy data's actions vary more than play data's.
    """
    return TrainConfig(
        task=TASK,
        seed=seed,
        offline_steps=scale.steps,
        hidden_dims=list(scale.hidden_dims),
        precision="medium",
        log_interval=scale.log_interval,
        eval_interval=scale.eval_interval,
        eval_episodes=scale.eval_episodes,
        save_interval=scale.eval_interval,
        video="final" if video else False,
        data_root=str(root),
        download=False,
        out=str(out),
        algo=DeFlowConfig(lr=1e-3, tau=0.02, gamma=0.98, target_divergence=0.005),
    )


def _can_be_drawn() -> bool:
    try:
        check_drawing(TASK)
    except InputError as error:
        _LOG.warning("the report will have no clip: %s", error)
        return False
    return True


def _free_folder(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``... if earlier runs have those folders."""
    others = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([wanted], others) if not (folder / CONFIG_FILE).exists())


def describe(result: dict[str, Any]) -> str:
    """Describe the result in a sentence."""
    error = np.sqrt(result["deflow_success"] * (1 - result["deflow_success"]) / result["episodes"])
    return (
        f"On {result['episodes']} common starts the flow prior alone succeeds in {result['prior_success']:.0%}, DeFlow in "
        f"{result['deflow_success']:.0%} (standard error {error:.0%}), after {result['steps']} steps on "
        f"{result['transitions']} regenerated transitions. Report: {result['report']}"
    )
