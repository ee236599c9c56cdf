"""Add a method of one's own: a loss, its settings and how to build it; the trainer, checkpoints and records are the package's.

The method is weighted behaviour cloning: a deterministic policy regresses on the logged actions, those with a high reward
counting more. Its data are random actions in gymnasium's pendulum.

    python examples/extending_method.py

Inside the package the same two pieces would be `objectives/reward_bc.py` and `algorithms/reward_bc.py`, whose ALGORITHM is
found by its file. Outside, `register_algorithm` makes the method known to this process, and an entry point in the group
`deflow_torchrl.algorithms` to every process on a machine where your package is installed.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey

from deflow_torchrl.algorithms import Algorithm, Learner, MethodConfig, ProblemSpec, register_algorithm
from deflow_torchrl.algorithms.settings import Need
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.modules import DeterministicPolicy, make_policy_network
from deflow_torchrl.objectives.base import OffPolicyLoss
from deflow_torchrl.runs import TrainConfig, train


class RewardBCLoss(OffPolicyLoss):
    """``loss_actor = mean of w (pi(s) - a)^2``, w = exp(temperature (r - mean r)) of the batch; metadata ``weight``."""

    out_keys = ["loss_actor", "weight"]

    def __init__(self, actor_network: TensorDictModule, *, temperature: float = 1.0) -> None:
        super().__init__()
        self._add_policy(actor_network, "actor_network")
        self._add_coefficient("temperature", temperature)

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return ["observation", "action", ("next", "reward")]

    def _optional_keys(self) -> list[NestedKey]:
        return []  # this loss draws nothing

    def _compute(self, tensordict: TensorDictBase) -> dict[str, torch.Tensor]:
        reward = tensordict["next", "reward"].squeeze(-1)
        weight = (self.temperature * (reward - self._batch_mean(reward, tensordict))).exp().clamp_max(100.0)
        action = self.actor_network(tensordict.select("observation"))["action"]
        error = (action - tensordict["action"]).square().mean(-1)
        return {"loss_actor": self._reduce(weight * error, tensordict), "weight": self._statistic(weight, tensordict)}


@dataclass
class RewardBCConfig(MethodConfig):
    """Settings, `algo.<name>=...`."""

    name: str = "reward_bc"
    temperature: float = 1.0

    def check(self, need: Need) -> None:
        super().check(need)
        need(self.temperature >= 0, "algo.temperature", self.temperature, "a number >= 0")


def build(config: RewardBCConfig, problem: ProblemSpec) -> Learner:
    policy = DeterministicPolicy(make_policy_network(*problem.sizes)).to(problem.device)
    loss = RewardBCLoss(policy, temperature=config.temperature)
    groups = [{"params": list(loss.parameters()), "lr": config.lr}]
    return Learner(loss, policy, evaluated_policies={config.name: policy}, param_groups=groups, target_updater=None)


def log_pendulum(folder: Path, episodes: int) -> str:
    """Transitions of random torques, as a set in a folder; the task's name."""
    env, rng, rows = gymnasium.make("Pendulum-v1"), np.random.default_rng(0), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        end = False
        while not end:
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            after, reward, _, end, _ = env.step(2 * action)
            rows.append((observation, action, reward, False, end, after))
            observation = after
    *columns, after = map(np.stack, zip(*rows, strict=True))
    TransitionDataset.from_arrays(*columns, next_observations=after, source="random torques").save(folder / "pendulum")
    return f"file:{folder / 'pendulum'}"


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=20, help="logged episodes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    register_algorithm(Algorithm("reward_bc", "Reward-weighted BC", RewardBCConfig, build))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            task=log_pendulum(Path(folder), arguments.episodes), env="Pendulum-v1", offline_steps=arguments.steps,
            hidden_dims=[64], eval_interval=0, eval_episodes=5, eval_workers=1, out=f"{folder}/run",
            log_interval=max(arguments.steps // 5, 1), algo=RewardBCConfig(temperature=1.0, lr=1e-3),
        )  # fmt: skip
        record = train(config, command="examples/extending_method.py", show_progress=False)
    learned = record["evaluations"]["reward_bc"]["mean_return"]
    print(f"reward_bc: mean return {learned:.0f} after {arguments.steps} steps")
    return learned


if __name__ == "__main__":
    main()
