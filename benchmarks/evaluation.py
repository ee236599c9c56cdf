"""Evaluation on a batch of environments in several processes, against a loop over one environment: time, and the same results.

    python benchmarks/evaluation.py --run RUN
    python benchmarks/evaluation.py --task cube-single-play-singletask-task2-v0 --episodes 50 --rounds 3 --json

Without `--run` the policy is an untrained one of the paper's sizes, whose episodes all run to their limit. Both arms meet the
same starts and the same noise, and take turns. Episodes are compared one by one: the batch of the policy call moves the last
digits of its actions, which contacts of a simulation can enlarge, so that lengths may differ in a few episodes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from roofline import ratio

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.errors import InputError
from deflow_torchrl.processes import available_cores
from deflow_torchrl.runs.evaluate import load_run
from deflow_torchrl.trainers import EvaluationResult, Evaluator


def make_policy(arguments: argparse.Namespace) -> tuple[str, object]:
    """Task and policy: a run's acting one, or an untrained one."""
    if arguments.run is not None:
        loaded = load_run(arguments.run, policy="acting", device="cpu")
        if loaded.task.environment is None:
            raise InputError(f"{arguments.run} was trained without an environment")
        return loaded.task.environment, loaded.learner.policy
    env = make_gym_env(arguments.task)
    problem = ProblemSpec(
        observation_dim=env.observation_space.shape[-1],
        action_dim=env.action_space.shape[-1],
        hidden_dims=arguments.hidden_dims,
        gamma=0.99,
        q_aggregation="mean",
        target_divergence=1e-3,
        device=torch.device("cpu"),
    )
    env.close()
    torch.manual_seed(0)
    return arguments.task, get_algorithm("deflow").build(DeFlowConfig(), problem).policy


def same(one: EvaluationResult, other: EvaluationResult) -> dict[str, float]:
    """Shares of episodes with the same outcome, the same length, and the same return to 1e-6."""
    return {
        "success": float((one.success == other.success).mean()),
        "length": float((one.length == other.length).mean()),
        "return": float(np.isclose(one.episode_return, other.episode_return, rtol=1e-6).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder; its acting policy on its task")
    parser.add_argument("--task", default="cube-single-play-singletask-task2-v0")
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[512] * 4)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--num-envs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes; all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    if min(arguments.episodes, arguments.num_envs, arguments.workers, arguments.rounds) < 1:
        parser.error("--episodes, --num-envs, --workers and --rounds must be at least 1")
    try:
        task, policy = make_policy(arguments)
    except InputError as error:
        print(f"evaluation.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    seconds: dict[str, list[float]] = {"loop": [], "batch": []}
    results: dict[str, EvaluationResult] = {}
    with (
        Evaluator(task, num_envs=1) as loop,
        Evaluator(task, num_envs=arguments.num_envs, workers=arguments.workers) as batch,
    ):
        for evaluator in (loop, batch):  # both have made their environments and loaded what they need
            evaluator.run(policy, episodes=arguments.num_envs)
        for _ in range(arguments.rounds):
            for name, evaluator in (("loop", loop), ("batch", batch)):
                began = time.perf_counter()
                results[name] = evaluator.run(policy, episodes=arguments.episodes)
                seconds[name].append(time.perf_counter() - began)
    result = {
        "faster": ratio(seconds["loop"], seconds["batch"]),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "same": same(results["loop"], results["batch"]),
        "success_rate": {name: value.success_rate for name, value in results.items()},
        "episodes": arguments.episodes,
        "num_envs": arguments.num_envs,
        "workers": arguments.workers,
        "threads": torch.get_num_threads(),
    }
    print(
        f"{arguments.episodes} episodes of {task}: {result['seconds']['batch']:.1f} s, one environment "
        f"{result['seconds']['loop']:.1f} s: {result['faster']:.2f} times faster "
        f"({arguments.num_envs} environments, {arguments.workers} processes)"
    )
    print("episodes with the same outcome: " + ", ".join(f"{key} {share:.0%}" for key, share in result["same"].items()))
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
