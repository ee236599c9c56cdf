"""TorchRL's own offline-to-online trainer and replay buffer with ``DeFlowLoss`` where they would have a SAC loss.

Data of a noisy swing-up controller on the pendulum are trained on first; then ``OfflineToOnlineTrainer`` collects with the actor
that learns, and each batch of ``OfflineToOnlineReplayBuffer`` moves from the data to the actor's own experience.

    python examples/torchrl_trainer.py
"""

import argparse
import inspect
import warnings

import torch
import torchrl
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, OfflineToOnlineReplayBuffer, ReplayBuffer
from torchrl.envs import GymEnv
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.trainers.algorithms import OfflineToOnlineTrainer

from deflow_torchrl import (
    DeFlowActor,
    DeFlowLoss,
    FlowMatchingPolicy,
    RefinementPolicy,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)

OBSERVATION, ACTION, LIMIT, HIDDEN = 3, 1, 2.0, (128, 128)  # the pendulum's sizes and torque limit
BATCH = 256


def swing_up(observation: torch.Tensor) -> torch.Tensor:
    """Pump energy while low, hold while high, with noise of half the torque range."""
    cos, sin, velocity = observation.unbind(-1)
    hold = -8.0 * torch.atan2(sin, cos) - 2.0 * velocity
    pump = LIMIT * torch.where(velocity == 0, torch.ones_like(velocity), velocity.sign())
    action = torch.where(cos > 0.8, hold, pump) + 0.5 * LIMIT * torch.randn_like(cos)
    return action.clamp(-LIMIT, LIMIT).unsqueeze(-1)


def main() -> OfflineToOnlineTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10, help="logged episodes")
    parser.add_argument("--offline-steps", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=1000, help="of the online phase")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    env.set_seed(0)
    behaviour = TensorDictModule(swing_up, in_keys=["observation"], out_keys=["action"])
    data = torch.cat([env.rollout(200, behaviour) for _ in range(arguments.episodes)])
    offline = ReplayBuffer(storage=LazyTensorStorage(len(data)))
    offline.extend(data)

    flow = FlowMatchingPolicy(
        make_velocity_network(OBSERVATION, ACTION, HIDDEN), ACTION, low=-LIMIT, high=LIMIT, out_keys=["base_action"]
    )
    refinement = make_refinement_network(OBSERVATION, ACTION, HIDDEN)
    actor = DeFlowActor(flow, RefinementPolicy(refinement, ACTION, low=-LIMIT, high=LIMIT))
    loss = DeFlowLoss(actor, make_qvalue_networks(OBSERVATION, ACTION, HIDDEN), target_divergence=0.25)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.98)
    target_updater = SoftUpdate(loss, tau=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    if "offline_steps" not in inspect.signature(OfflineToOnlineTrainer).parameters:
        print(f"torchrl {torchrl.__version__} has no offline phase in OfflineToOnlineTrainer: a loop stands for it")
    can_log = hasattr(OfflineToOnlineReplayBuffer, "write_count")
    if not can_log:
        print(
            f"torchrl {torchrl.__version__} cannot log with OfflineToOnlineReplayBuffer, which does not count its writes"
        )
    for _ in range(arguments.offline_steps):
        losses = loss(offline.sample(BATCH))
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        target_updater.step()
        optimizer.step()
    with torch.no_grad():
        before = env.rollout(200, actor)["next", "reward"].sum().item()

    # The policy draws its noise from its input: the collector adds what fills it in.
    collector = Collector(
        GymEnv("Pendulum-v1"),
        actor,
        frames_per_batch=100,
        total_frames=arguments.frames,
        auto_register_policy_transforms=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchRL calls the trainer experimental
        trainer = OfflineToOnlineTrainer(
            collector=collector,
            total_frames=arguments.frames,
            frame_skip=1,
            optim_steps_per_batch=50,
            loss_module=loss,
            optimizer=optimizer,
            target_net_updater=target_updater,
            replay_buffer=OfflineToOnlineReplayBuffer(
                offline, online_capacity=arguments.frames, offline_fraction=0.5, batch_size=BATCH
            ),
            clip_grad_norm=False,
            enable_logging=can_log,
            log_rewards=False,  # needs the transform RewardSum
            progress_bar=False,
        )
        trainer.train()
    collector.shutdown()
    with torch.no_grad():
        after = env.rollout(200, actor)["next", "reward"].sum().item()
    fraction = trainer.replay_buffer.offline_fraction
    print(
        f"return of one episode after {arguments.offline_steps} offline updates {before:.0f}, after {trainer.collected_frames} "
        f"frames online {after:.0f}; {fraction:.0%} of the last batches were offline data"
    )
    return trainer


if __name__ == "__main__":
    main()
