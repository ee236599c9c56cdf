"""From a Minari set to an evaluated policy: record one with minari's own DataCollector, train DeFlow on it, evaluate.

The recorded controller swings a pendulum up with heavy noise. A Minari set that exists already (your own, or one from
Minari's remote such as D4RL/door/human-v2) needs the part from MinariExperienceReplay on.

    python examples/minari_offline.py          (needs: pip install 'deflow-torchrl[minari]' 'minari[create]')
"""

import argparse
import warnings

import gymnasium
import minari
import numpy as np
import torch
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl import DeFlowActor, DeFlowLoss, FlowMatchingPolicy, RefinementPolicy
from deflow_torchrl.data import MinariExperienceReplay
from deflow_torchrl.modules import make_qvalue_networks, make_refinement_network, make_velocity_network
from deflow_torchrl.trainers import Evaluator

DATASET = "pendulum/noisy-swing-up-v0"


def swing_up(observation: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Pump energy while low, hold while high, with noise of half the torque range."""
    cos, sin, velocity = observation
    torque = -8 * np.arctan2(sin, cos) - 2 * velocity if cos > 0.8 else 2.0 * (1 if velocity >= 0 else -1)
    return np.clip([torque + generator.normal()], -2, 2).astype(np.float32)


def record(episodes: int) -> None:
    env = minari.DataCollector(gymnasium.make("Pendulum-v1"))
    generator = np.random.default_rng(0)
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            observation, _, _, truncated, _ = env.step(swing_up(observation, generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari asks for an author, an e-mail address, ...
        env.create_dataset(DATASET, algorithm_name="noisy swing-up controller")
    env.close()


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=25, help="recorded episodes, and five times as few to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    if DATASET not in minari.list_local_datasets():
        record(arguments.episodes)

    # The torques of +-2 become actions in [-1, 1], in the data and in the environment that evaluates.
    buffer = MinariExperienceReplay(DATASET, batch_size=256, download=False, rescale_actions=True)
    sizes = (buffer[0]["observation"].shape[-1], buffer[0]["action"].shape[-1], [128, 128])

    flow = FlowMatchingPolicy(make_velocity_network(*sizes), sizes[1], out_keys=["base_action"])
    actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(*sizes), sizes[1], low=-1.0, high=1.0))
    # The paper's alpha starts at e; a run this short would be over before alpha lets the refinement use its delta.
    loss = DeFlowLoss(actor, make_qvalue_networks(*sizes), target_divergence=0.06, log_alpha_init=-3.0)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.98)
    target_updater = SoftUpdate(loss, tau=0.02)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    for step in range(1, arguments.steps + 1):
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        target_updater.step()  # before the optimiser: the authors' order
        optimizer.step()
        if step % max(arguments.steps // 5, 1) == 0:
            print(step, {name: round(value.item(), 4) for name, value in losses.detach().items()})

    recorded = buffer[:]["next", "reward"].sum().item() / buffer[:]["next", "done"].sum().item()
    with Evaluator(f"minari:{DATASET}", num_envs=5) as evaluator:  # in the set's own environment
        result = evaluator.run(actor, episodes=max(arguments.episodes // 5, 1))
    learned = float(result.episode_return.mean())
    print(f"mean return: recorded controller {recorded:.0f}, DeFlow {learned:.0f}")
    return learned


if __name__ == "__main__":
    main()
