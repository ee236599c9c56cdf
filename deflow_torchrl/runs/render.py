# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Clips of a run's policies: the same starts side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.envs.drawing import ActedEpisode, EpisodeDrawing, check_drawings
from deflow_torchrl.errors import InputError
from deflow_torchrl.processes import available_cores
from deflow_torchrl.reports.clip import check_clip_file, usual_interval, write_episodes
from deflow_torchrl.runs.evaluate import evaluate_policies, load_run, open_evaluator, outcomes
from deflow_torchrl.tasks import Task
from deflow_torchrl.tasks.data import reference_returns
from deflow_torchrl.trainers import EvaluationResult
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED

SIZE = 256
"""Height of a picture in pixels."""
_SIZE_OF_EVALUATIONS, _PICTURES_OF_EVALUATIONS = 224, 100  # a clip is small and drawn in some ten seconds
_POLICIES = 4


class RecordedActions:
    """Keeps the actions of an evaluation's episodes: an ``on_step`` of :meth:`Evaluator.run`."""

    def __init__(self) -> None:
        self._actions: dict[int, list[np.ndarray]] = {}

    def __call__(self, episodes: np.ndarray, observations: np.ndarray, actions: np.ndarray) -> None:
        """Keep the actions of a step."""
        for episode, action in zip(episodes.tolist(), actions, strict=True):
            self._actions.setdefault(episode, []).append(action.copy())

    def episodes(self, result: EvaluationResult) -> list[ActedEpisode]:
        """The episodes with their outcomes."""
        return [
            ActedEpisode(
                int(result.seeds[episode]),
                np.stack(actions),
                success=bool(result.success[episode]),
                episode_return=float(result.episode_return[episode]),
            )
            for episode, actions in sorted(self._actions.items())
        ]


def render_run(
    run: Path,
    *,
    out: Path,
    policies: Sequence[str] | None = None,
    episodes: int = 3,
    seed: int = DEFAULT_EVALUATION_SEED,
    every: int | None = None,
    size: int = SIZE,
    shadows: bool | None = None,
    device: str | None = None,
    force: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write a clip of policies of a run's last checkpoint on common starts: the first episodes of its evaluation.

    Args:
        run: run folder.

    Keyword Args:
        out: the clip; its suffix (.mp4, .gif, .webp) says in which format.
        policies: their names, ``acting`` being the run's acting policy; all that it evaluates by default.
        episodes: starts.
        seed: of the first start and the noise; that of the run's evaluations by default.
        every: steps from picture to picture; by default so many that an episode has 150 pictures.
        size: height of a picture in pixels.
        shadows: draw shadows, reflections and smoothed edges; where None on a GPU only.
        device: device of the policies; the run's own by default.
        force: overwrite ``out``.
        show_progress: show progress bars on standard error.

    Returns:
        ``file``, ``bytes``, ``step``, ``every``, ``metric``, ``evaluations`` (policy -> outcome), and the ``seeds`` whose
        episodes were not repeated as they had been acted, because the environment depends on more than its seed.

    Raises:
        InputError: on a run, policy or file that cannot be used, and where the environment cannot be drawn here.
        MissingExtraError: if the package that writes the clip is not installed.
    """
    check_clip_file(out, episodes=episodes, force=force)
    loaded = load_run(run, policy=policies, device=device)
    task, found = loaded.task, loaded.learner.evaluated_policies
    if task.environment is None:
        raise InputError(f"{run} was trained without an environment (env=); there is nothing to draw it in")
    if len(found) > _POLICIES:
        raise InputError(f"{len(found)} policies are too many for a clip, {_POLICIES} at most; name some with --policy")
    with ExitStack() as stack:
        drawings = _open_drawings(stack, task, found, chunk=loaded.config.chunk, size=size, shadows=shadows)
        check_drawings(drawings.values())
        recorded = {name: RecordedActions() for name in found}
        evaluator = stack.enter_context(open_evaluator(task, loaded.config, loaded.device))
        assert evaluator is not None
        results = evaluate_policies(
            evaluator, found, episodes, seed=seed, show_progress=show_progress, on_step=recorded
        )
        acted = {name: recorded[name].episodes(result) for name, result in results.items()}
        every = every or usual_interval(acted)
        notes = [f"start {number + 1} of {episodes}" for number in range(episodes)]
        options: dict[str, Any] = {"size": size, "success": task.metric == "success", "notes": notes}
        write_episodes(out, drawings, acted, every=every, show_progress=show_progress, **options)
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "step": loaded.state["step"],
        "every": every,
        "metric": task.metric,
        "evaluations": outcomes(results, reference_returns(task)),
        "not_repeated": sorted({seed for drawing in drawings.values() for seed in drawing.not_repeated}),
    }


def render_evaluation(
    out: Path,
    task: Task,
    acted: Mapping[str, Sequence[ActedEpisode]],
    *,
    chunk: int = 1,
    title: str = "",
    show_progress: bool = True,
) -> str:
    """Write a clip of one start of an evaluation: the first where the policies' outcomes differ, else the first.

    Args:
        out: the clip.
        task: the run's task.
        acted: policy -> the evaluation's episodes.

    Keyword Args:
        chunk: h, steps of a chunk of actions.
        title: what the line below the pictures begins with.
        show_progress: show a progress bar on standard error.

    Returns:
        Which start it shows.

    Raises:
        InputError, RunError: if it cannot be drawn or written.
    """
    starts = list(zip(*acted.values(), strict=True))
    differ = [number for number, start in enumerate(starts) if len({episode.success for episode in start}) > 1]
    number = differ[0] if differ else 0
    note = f"start {number + 1} of {len(starts)}" + (", the first where the outcomes differ" if differ else "")
    chosen = {name: [episodes[number]] for name, episodes in acted.items()}
    with ExitStack() as stack:
        drawings = _open_drawings(stack, task, acted, chunk=chunk, size=_SIZE_OF_EVALUATIONS)
        every = usual_interval(chosen, pictures=_PICTURES_OF_EVALUATIONS)
        options: dict[str, Any] = {
            "size": _SIZE_OF_EVALUATIONS,
            "success": task.metric == "success",
            "notes": [f"{title}{note}"],
        }
        write_episodes(out, drawings, chosen, every=every, show_progress=show_progress, **options)
    return note


def _open_drawings(
    stack: ExitStack, task: Task, policies: Iterable[str], *, chunk: int, size: int, shadows: bool | None = None
) -> dict[str, EpisodeDrawing]:
    names = list(policies)
    threads = max(1, available_cores() // len(names))
    return {
        name: stack.enter_context(
            EpisodeDrawing(task.environment or "", size=size, chunk=chunk, shadows=shadows, threads=threads)
        )
        for name in names
    }
