"""Offline, then online, in a plain TorchRL script: generate OGBench data, train on it, keep learning by acting.

What deflow_torchrl brings: the data, the loss, the acting policy and the buffer that holds offline and online transitions;
the collector, the optimiser and the target updater are TorchRL's. ``deflow train ... online_steps=N`` does the same with
checkpoints, evaluations and reports.

    python examples/offline_to_online.py          (needs: pip install 'deflow-torchrl[ogbench]')
"""

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl import DeFlowActor, DeFlowLoss, FlowMatchingPolicy, RefinementPolicy
from deflow_torchrl.data import OfflineOnlineReplayBuffer, OGBenchExperienceReplay
from deflow_torchrl.envs import make_env
from deflow_torchrl.modules import make_qvalue_networks, make_refinement_network, make_velocity_network
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.sources.generation import generate_ogbench_dataset, generated_root
from deflow_torchrl.trainers import Evaluator

DATASET, TASK = "pointmaze-medium-navigate-v0", "pointmaze-medium-navigate-singletask-task1-v0"


def main() -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20, help="generated episodes, and as many evaluated")
    parser.add_argument("--offline-steps", type=int, default=2_000, help="gradient steps on the data")
    parser.add_argument("--online-steps", type=int, default=4_000, help="environment steps, with a gradient step each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    root = generated_root(DATASET, episodes=arguments.episodes, val_episodes=1, seed=0)
    generate_ogbench_dataset(DATASET, root, episodes=arguments.episodes, val_episodes=1)  # found again by a second run
    offline = OGBenchExperienceReplay(TASK, root=root, download=False)
    buffer = OfflineOnlineReplayBuffer(offline, online_capacity=arguments.online_steps, batch_size=256)

    sizes = (buffer[0]["observation"].shape[-1], buffer[0]["action"].shape[-1], [256, 256])
    flow = FlowMatchingPolicy(make_velocity_network(*sizes), sizes[1], out_keys=["base_action"])
    actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(*sizes), sizes[1], low=-1.0, high=1.0))
    # The paper's alpha starts at e; a run this short would be over before alpha lets the refinement use its delta.
    loss = DeFlowLoss(actor, make_qvalue_networks(*sizes), target_divergence=0.05, log_alpha_init=-3.0)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    target_updater = SoftUpdate(loss, tau=0.02)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    def update() -> None:
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        target_updater.step()  # before the optimiser: the authors' order
        optimizer.step()

    def evaluate() -> float:
        return evaluator.run(actor, episodes=arguments.episodes).success_rate

    with Evaluator(TASK) as evaluator:
        for _ in progress_bar(range(arguments.offline_steps), desc="offline", unit="step"):
            update()
        before = evaluate()
        # The same losses, optimiser and alpha go on; the buffer samples uniformly from old and new, as in the paper.
        collector = Collector(
            make_env(TASK),
            actor,
            frames_per_batch=1,
            total_frames=arguments.online_steps,
            auto_register_policy_transforms=False,  # the policy needs none
        )
        collector.set_seed(arguments.seed)
        for transition in progress_bar(collector, total=arguments.online_steps, desc="online", unit="step"):
            buffer.extend(transition)
            update()
        collector.shutdown()
        after = evaluate()
    steps = f"{arguments.offline_steps} offline and {arguments.online_steps} online steps"
    print(f"success before and after going online: {before:.2f}, {after:.2f} ({steps})")
    return before, after


if __name__ == "__main__":
    main()
