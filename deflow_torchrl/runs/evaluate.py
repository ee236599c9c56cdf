# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Evaluations of a run's policies: while it trains, and of its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tensordict.nn import TensorDictModuleBase

from deflow_torchrl.algorithms import Learner
from deflow_torchrl.envs.factory import check_renderer
from deflow_torchrl.errors import InputError
from deflow_torchrl.modules.best_of_n import BestOfNPolicy, RefinedPolicy
from deflow_torchrl.processes import available_cores
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.runs.build import build_learner, find_task, use_device
from deflow_torchrl.runs.folder import CHECKPOINTS, read_run_settings
from deflow_torchrl.runs.settings import SettledConfig, config_from_dict, config_to_dict
from deflow_torchrl.tasks import Task
from deflow_torchrl.tasks.data import reference_returns
from deflow_torchrl.trainers import EvaluationResult, Evaluator, UpdateStep
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED, OnStep
from deflow_torchrl.trainers.resume import run_identity
from deflow_torchrl.trainers.update import restore_learner

ACTING = "acting"
_NUM_ENVS = 10
_FINAL = {"success": "success_rate", "score": "mean_score", "return": "mean_return"}


@dataclass(frozen=True)
class TestTime:
    """More computation where a trained policy acts; nothing is trained for it.

    Attributes:
        candidates: actions that are drawn, of which the best by the mean of the online critics is executed.
        selection: by the value of the ``final`` action, or of the ``base`` action it was made of.
        iterations: how often DeFlow's refinement is applied.
    """

    __test__ = False  # to pytest

    candidates: int | None = None
    selection: str = "final"
    iterations: int | None = None

    def apply(self, learner: Learner) -> dict[str, TensorDictModuleBase]:
        """The evaluated policies, each under a name that says what is done to it.

        Raises:
            InputError: if a policy cannot be refined again, draws no noise or has no critics to be chosen by.
        """
        found = {}
        for name, policy in learner.evaluated_policies.items():
            said = [] if self.iterations is None else [f"{self.iterations} refinements"]
            said += [] if self.candidates is None else [f"best of {self.candidates} by {self.selection} Q"]
            try:
                found[", ".join([name, *said])] = self._scaled(policy, learner)
            except AttributeError as error:
                raise InputError(f"{name} cannot be chosen among candidates: its method has no critics") from error
            except (TypeError, ValueError) as error:
                raise InputError(f"{name}: {error}") from error
        return found

    def _scaled(self, policy: TensorDictModuleBase, learner: Learner) -> TensorDictModuleBase:
        if self.iterations is not None:
            policy = RefinedPolicy(policy, iterations=self.iterations)
        if self.candidates is None:
            return policy
        loss = learner.loss
        return BestOfNPolicy(
            policy,
            loss.qvalue_network,
            loss.qvalue_network_params,
            self.candidates,
            selection=cast("Any", self.selection),
            q_aggregation="mean",
        )


@dataclass(frozen=True)
class LoadedRun:
    """A run's last checkpoint in the networks it belongs to.

    Attributes:
        config: the run's settings.
        final_episodes: episodes of its last evaluation; None where the settings do not say.
        task: its task.
        checkpoint: the file.
        state: the checkpoint's state.
        learner: the method with its weights.
        device: where they are.
    """

    config: SettledConfig
    final_episodes: int | None
    task: Task
    checkpoint: Path
    state: Mapping[str, Any]
    learner: Learner
    device: torch.device


def load_run(
    out: Path,
    *,
    policy: str | Sequence[str] | None = None,
    device: str | None = None,
    test_time: TestTime | None = None,
) -> LoadedRun:
    """Load a run's last checkpoint, and from then on use kernels and threads as the run does.

    Args:
        out: run folder.

    Keyword Args:
        policy: keep these alone among the evaluated policies, ``acting`` being the run's acting policy.
        device: where to; the run's own by default.
        test_time: what is done to the evaluated policies, whose names then say so.

    Raises:
        InputError: if ``out`` is no run folder, holds no checkpoint or has no such policy.
    """
    settings = read_run_settings(out)
    config = config_from_dict(settings["config"])
    checkpoints = list_checkpoints(out / CHECKPOINTS)
    if not checkpoints:
        raise InputError(f"{out} has no checkpoint yet; train it with `deflow resume {out}`")
    state = load_checkpoint(checkpoints[-1], identity=run_identity(config_to_dict(config), data_sha256=None))
    where = use_device(config, device)
    sizes: dict[str, Any] = {name: state.get(name) for name in ("observation_dim", "action_dim", "reward_range")}
    learner = build_learner(config, **sizes, device=where)
    restore_learner(UpdateStep(learner), state, checkpoints[-1])
    policies = learner.evaluated_policies
    if policy is not None:
        wanted = [policy] if isinstance(policy, str) else policy
        names = [learner.acting_policy if name == ACTING else name for name in wanted]
        for name in names:
            if name not in policies:
                raise InputError(f"{out} has no policy {name!r}; there are {', '.join(policies)}")
        learner = replace(learner, evaluated_policies={name: policies[name] for name in names})
    if test_time is not None:
        learner = replace(learner, evaluated_policies=test_time.apply(learner))
    return LoadedRun(config, settings["final_episodes"], find_task(config), checkpoints[-1], state, learner, where)


def evaluate_run(
    out: Path,
    *,
    episodes: int | None = None,
    device: str | None = None,
    policy: str | None = None,
    workers: int | None = None,
    seed: int = DEFAULT_EVALUATION_SEED,
    test_time: TestTime | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate the policies of a run's last checkpoint, each on the same starts.

    Args:
        out: run folder.

    Keyword Args:
        episodes: episodes of each policy; the run's own number by default.
        device: device of the policies; the run's own by default.
        policy: evaluate this one alone, ``acting`` being the run's acting policy; all by default.
        workers: processes that step environments; the run's own setting by default.
        seed: of the starts and the noise.
        test_time: more computation where the policies act, as in :func:`load_run`.
        show_progress: show progress bars on standard error.

    Returns:
        Step, seed, metric, and policy name -> outcome.

    Raises:
        InputError: if ``out`` is no run folder, holds no checkpoint or has no such policy.
    """
    loaded = load_run(out, policy=policy, device=device, test_time=test_time)
    config, task = loaded.config, loaded.task
    if workers is not None:
        config = replace(config, eval_workers=workers)
    with open_evaluator(task, config, loaded.device) as evaluator:
        if evaluator is None:
            raise InputError(f"{out} was trained without an environment (env=); there is nothing to evaluate it in")
        results = evaluate_policies(
            evaluator,
            loaded.learner.evaluated_policies,
            episodes or loaded.final_episodes or config.eval_episodes,
            seed=seed,
            show_progress=show_progress,
        )
    return {
        "step": loaded.state["step"],
        "seed": seed,
        "metric": task.metric,
        "evaluations": outcomes(results, reference_returns(task)),
    }


@contextmanager
def open_evaluator(task: Task, config: SettledConfig, device: torch.device) -> Iterator[Evaluator | None]:
    """The evaluator of a task; None where it has no environment."""
    if task.environment is None:
        yield None
        return
    if task.images:
        check_renderer(task.name)
    with Evaluator(
        task.environment,
        num_envs=_NUM_ENVS,
        workers=config.eval_workers or available_cores(),
        device=device,
        chunk=config.chunk,
        frame_stack=config.frame_stack or 1,
        max_steps=config.eval_max_steps,
    ) as evaluator:
        yield evaluator


def evaluate_policies(
    evaluator: Evaluator,
    policies: Mapping[str, TensorDictModuleBase],
    episodes: int,
    *,
    seed: int = DEFAULT_EVALUATION_SEED,
    show_progress: bool = True,
    on_step: Mapping[str, OnStep] | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate policies by name, each on the same starts, with a progress bar for each; ``on_step`` has one for some of them."""
    results = {}
    for name, policy in policies.items():
        with progress_bar(
            total=episodes, desc=f"evaluate {name}", unit="episode", leave=False, disable=not show_progress
        ) as bar:
            results[name] = evaluator.run(
                policy, episodes=episodes, seed=seed, on_episode=bar.update, on_step=(on_step or {}).get(name)
            )
    return results


def outcomes(
    results: Mapping[str, EvaluationResult], references: tuple[float, float] | None
) -> dict[str, dict[str, Any]]:
    """Policy name -> plain outcome, with normalised scores where the task has references."""
    return {name: result.as_dict(references) for name, result in results.items()}


def final_numbers(evaluations: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Policy name -> the number the task is judged by."""
    return {name: outcome[_FINAL[metric]] for name, outcome in evaluations.items()}


def metrics_row(
    prefix: str, result: EvaluationResult, task: Task, references: tuple[float, float] | None
) -> dict[str, float]:
    """An evaluation as entries of a row of metrics, each name below ``prefix``."""
    row = {
        f"{prefix}/success": result.success_rate,
        f"{prefix}/return": float(result.episode_return.mean()),
        f"{prefix}/length": float(result.length.mean()),
        f"{prefix}/episodes": len(result.success),
    }
    if task.metric == "return":
        del row[f"{prefix}/success"]  # the environment reports none
    if references is not None:
        row[f"{prefix}/score"] = float(result.score(references).mean())
    return row
