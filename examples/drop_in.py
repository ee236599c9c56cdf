"""An ordinary TorchRL offline script in which ``DeFlowLoss`` stands where ``TD3BCLoss`` would.

Networks, replay buffer, optimiser and target updater are TorchRL's and this script's own; only the loss and the acting
policy come from deflow_torchrl. The data are transitions of a swing-up controller with heavy noise on the pendulum.

    python examples/drop_in.py
"""

import argparse

import torch
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl import DeFlowActor, DeFlowLoss, FlowMatchingPolicy, RefinementPolicy

OBSERVATION, ACTION, LIMIT = 3, 1, 2.0  # the pendulum's sizes and torque limit


def swing_up(observation: torch.Tensor) -> torch.Tensor:
    """Pump energy while low, hold while high, with noise of half the torque range."""
    cos, sin, velocity = observation.unbind(-1)
    hold = -8.0 * torch.atan2(sin, cos) - 2.0 * velocity
    pump = LIMIT * torch.where(velocity == 0, torch.ones_like(velocity), velocity.sign())
    action = torch.where(cos > 0.8, hold, pump) + 0.5 * LIMIT * torch.randn_like(cos)
    return action.clamp(-LIMIT, LIMIT).unsqueeze(-1)


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--episodes", type=int, default=25, help="logged episodes, and five times as few to evaluate")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    env.set_seed(0)

    behaviour = TensorDictModule(swing_up, in_keys=["observation"], out_keys=["action"])
    data = torch.cat([env.rollout(200, behaviour) for _ in range(arguments.episodes)])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=256)
    buffer.extend(data)

    velocity = MLP(in_features=OBSERVATION + ACTION + 1, out_features=ACTION, num_cells=[128, 128])
    refinement = MLP(in_features=OBSERVATION + ACTION, out_features=ACTION, num_cells=[128, 128])
    actor = DeFlowActor(
        FlowMatchingPolicy(velocity, ACTION, low=-LIMIT, high=LIMIT, out_keys=["base_action"]),
        RefinementPolicy(refinement, ACTION, low=-LIMIT, high=LIMIT),
    )
    critics = [
        ValueOperator(MLP(in_features=OBSERVATION + ACTION, out_features=1, num_cells=[128, 128]),
                      in_keys=["observation", "action"])
        for _ in range(2)
    ]  # fmt: skip

    # With TD3+BC this would read: loss = TD3BCLoss(actor, critics[0], bounds=(-LIMIT, LIMIT))
    loss = DeFlowLoss(actor, critics, target_divergence=0.25)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.98)
    target_updater = SoftUpdate(loss, tau=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    for step in range(1, arguments.steps + 1):
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        target_updater.step()  # before the optimiser: the authors' order
        optimizer.step()
        if step % max(arguments.steps // 5, 1) == 0:
            print(step, {name: round(value.item(), 4) for name, value in losses.detach().items()})

    with torch.no_grad():
        returns = [
            env.rollout(200, actor)["next", "reward"].sum().item() for _ in range(max(arguments.episodes // 5, 1))
        ]
    logged = data["next", "reward"].sum().item() / arguments.episodes
    learned = sum(returns) / len(returns)
    print(f"mean return: logged controller {logged:.0f}, DeFlow {learned:.0f}")
    return learned


if __name__ == "__main__":
    main()
