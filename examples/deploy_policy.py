"""Run an exported policy in its OGBench environment with numpy, onnxruntime, gymnasium and ogbench: no torch, no torchrl.

    python examples/deploy_policy.py runs/cube/deflow.onnx          (needs: pip install 'deflow-torchrl[export,ogbench]')

Without a file it first trains a small policy in a maze, as `deflow train` does, and exports it, as `deflow export` does.
"""

import argparse
import statistics
import time
from pathlib import Path

from deflow_torchrl.deploy import Policy, load_policy
from deflow_torchrl.envs.factory import make_gym_env
from deflow_torchrl.paths import cache_home

DATASET, TASK = "pointmaze-medium-navigate-v0", "pointmaze-medium-navigate-singletask-task1-v0"


def train_and_export(steps: int, episodes: int) -> Path:
    """The part with torch: it would run on another machine."""
    from deflow_torchrl.algorithms import DeFlowConfig
    from deflow_torchrl.export import export_run
    from deflow_torchrl.runs.run import train
    from deflow_torchrl.runs.settings import TrainConfig
    from deflow_torchrl.sources.generation import generate_ogbench_dataset, generated_root

    root = generated_root(DATASET, episodes=episodes, val_episodes=1, seed=0)
    generate_ogbench_dataset(DATASET, root, episodes=episodes, val_episodes=1)  # found again by a second run
    out = cache_home() / "examples" / f"deploy-{time.strftime('%Y%m%d-%H%M%S')}"
    config = TrainConfig(
        task=TASK, algo=DeFlowConfig(), data_root=str(root), out=str(out), hidden_dims=[256, 256],
        offline_steps=steps, eval_interval=0, eval_episodes=1, eval_workers=1,
    )  # fmt: skip
    train(config, command="examples/deploy_policy.py")
    return Path(export_run(out, format="onnx")["file"])


def act(policy: Policy, environment: str, episodes: int) -> tuple[float, list[float]]:
    """Share of successful episodes, and the milliseconds of each action."""
    env = make_gym_env(environment)  # gymnasium.make, with actions in [-1, 1] as in training
    successes, milliseconds = 0.0, []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        over = False
        while not over:
            began = time.perf_counter()
            action = policy(observation)
            milliseconds.append((time.perf_counter() - began) * 1e3)
            observation, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        successes += info["success"]
    env.close()
    return successes / episodes, milliseconds


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="what deflow export wrote, of a run on an OGBench task")
    parser.add_argument("--episodes", type=int, default=20, help="to act in, and as many to train on")
    parser.add_argument("--steps", type=int, default=2_000, help="gradient steps, where no file is given")
    arguments = parser.parse_args()
    policy = load_policy(arguments.file or train_and_export(arguments.steps, arguments.episodes), seed=0)
    about = policy.manifest
    print(
        f"{about['policy']} of {about['task']}, step {about['step']}: {policy.observation_dim} -> {policy.action_dim}"
    )
    success, milliseconds = act(policy, about["environment"], arguments.episodes)
    median = statistics.median(milliseconds)
    print(f"success {success:.2f} over {arguments.episodes} episodes, {median:.2f} ms an action")
    return {"success": success, "milliseconds": median}


if __name__ == "__main__":
    main()
