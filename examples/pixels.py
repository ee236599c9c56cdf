"""A small visual policy from nothing but pictures: draw an environment, store each frame once, train DeFlow, evaluate.

The environment is written here and draws itself: a bright point is to be moved onto a dim one. The data are a noisy controller's.
Every frame is stored once; stacks of three and random crops are made when a batch is drawn. Each part of the method (prior,
refinement, critics) has an encoder of its own.

    python examples/pixels.py          (a minute; needs gymnasium, of the extra ogbench)
"""

import argparse
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.data import Composite, Unbounded

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import RandomCrop, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.trainers import Evaluator, UpdateStep

SIZE, FRAMES = 16, 3


class Reach(gymnasium.Env):
    """Pictures [16, 16, 3]; an action moves the bright point by up to a fifth of the square."""

    observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.point, self.goal = self.np_random.uniform(0, 1, (2, 2))
        return self.draw(), {}

    def step(self, action: np.ndarray) -> Any:
        self.point = np.clip(self.point + 0.2 * np.asarray(action), 0, 1)
        distance = float(np.linalg.norm(self.point - self.goal))
        return self.draw(), -distance, distance < 0.1, False, {"success": distance < 0.1}

    def draw(self) -> np.ndarray:
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        for place, colour in ((self.goal, (0, 120, 0)), (self.point, (255, 255, 0))):
            row, column = np.round(place * (SIZE - 1)).astype(int)
            picture[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = colour
        return picture


gymnasium.register("Reach-v0", Reach, max_episode_steps=20)


def record(episodes: int) -> TransitionDataset:
    env, rng = gymnasium.make("Reach-v0"), np.random.default_rng(0)
    rows = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")}
    for episode in range(episodes):
        frame, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            way = env.unwrapped.goal - env.unwrapped.point
            action = np.clip(2 * way + rng.normal(0, 0.5, 2), -1, 1).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            step = (frame, action, reward, terminated, truncated and not terminated, following)
            for values, value in zip(rows.values(), step, strict=True):
                values.append(value)
            frame = following
    return TransitionDataset.from_arrays(
        **{name: np.array(values) for name, values in rows.items()}, frame_stack=FRAMES
    )


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=200, help="recorded episodes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dataset = record(arguments.episodes)
    buffer = TransitionReplayBuffer(dataset, batch_size=128)
    buffer.append_transform(RandomCrop(padding=1, probability=0.5))
    print(f"{len(dataset)} transitions, {dataset.observation.nbytes / 1e6:.1f} MB of frames")

    problem = ProblemSpec(
        observation_spec=Composite(observation=Unbounded(dataset.observation_shape, dtype=torch.uint8)),
        action_dim=2,
        hidden_dims=(128, 128),
        encoder="impala_debug",
    )
    learner = get_algorithm("deflow").build(DeFlowConfig(lr=1e-3, tau=0.01, target_divergence=0.02), problem)
    update = UpdateStep(learner)
    for step in range(1, arguments.steps + 1):
        losses = update(buffer.sample())
        if step % max(arguments.steps // 5, 1) == 0:
            print(f"{step:5d}  " + "  ".join(f"{name} {losses[name]:.3g}" for name in learner.loss_names))

    rates = {}
    with Evaluator("gym:Reach-v0", frame_stack=FRAMES) as evaluator:
        for name, policy in learner.evaluated_policies.items():
            rates[name] = evaluator.run(policy, episodes=20).success_rate
            print(f"{name}: reaches the point in {rates[name]:.0%} of 20 episodes")
    return rates["deflow"]


if __name__ == "__main__":
    main()
