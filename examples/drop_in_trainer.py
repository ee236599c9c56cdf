"""The same loss driven by ``torchrl.trainers.Trainer``, with a collector that acts with the actor being trained.

python examples/drop_in_trainer.py
"""

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.trainers import DefaultOptimizationStepper, ReplayBufferTrainer, TargetNetUpdaterHook, Trainer

from deflow_torchrl import (
    DeFlowActor,
    DeFlowLoss,
    FlowMatchingPolicy,
    RefinementPolicy,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)

OBSERVATION, ACTION, LIMIT, HIDDEN = 3, 1, 2.0, (64, 64)


def main() -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2000)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    flow = FlowMatchingPolicy(
        make_velocity_network(OBSERVATION, ACTION, HIDDEN), ACTION, low=-LIMIT, high=LIMIT, out_keys=["base_action"]
    )
    refinement = make_refinement_network(OBSERVATION, ACTION, HIDDEN)
    actor = DeFlowActor(flow, RefinementPolicy(refinement, ACTION, low=-LIMIT, high=LIMIT))
    loss = DeFlowLoss(actor, make_qvalue_networks(OBSERVATION, ACTION, HIDDEN), target_divergence=0.25)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.98)

    collector = Collector(
        GymEnv("Pendulum-v1"),
        actor,
        frames_per_batch=100,
        total_frames=arguments.frames,
        auto_register_policy_transforms=True,
    )
    trainer = Trainer(
        collector=collector,
        total_frames=arguments.frames,
        frame_skip=1,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4),
        optimization_stepper=DefaultOptimizationStepper(),
        optim_steps_per_batch=20,
        progress_bar=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(arguments.frames), batch_size=64)
    ReplayBufferTrainer(buffer, batch_size=64, flatten_tensordicts=True).register(trainer)
    TargetNetUpdaterHook(SoftUpdate(loss, tau=0.005)).register(trainer, "target_net_updater")
    trainer.train()
    collector.shutdown()
    print(f"trained on {trainer.collected_frames} frames; alpha is now {loss.alpha.item():.3f}")
    return trainer


if __name__ == "__main__":
    main()
