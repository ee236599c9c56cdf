"""Refine a policy that is not ours and does not learn any more: a ``torchrl.modules.DiffusionActor``.

The diffusion policy clones a noisy controller of the pendulum by TorchRL's ``DiffusionBCLoss``. Frozen, it is only a source of
base actions: a bank of them is drawn once, and the updates of refinement and critics never call it.

    python examples/refine_a_frozen_policy.py
"""

import argparse
import time

import torch
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import DiffusionActor
from torchrl.objectives import DiffusionBCLoss, SoftUpdate, ValueEstimators

from deflow_torchrl import DeFlowActor, DeFlowLoss, RefinementPolicy, make_qvalue_networks, make_refinement_network
from deflow_torchrl.data import BaseActionBank

OBSERVATION, ACTION, LIMIT, HIDDEN = 3, 1, 2.0, (128, 128)


def swing_up(observation: torch.Tensor) -> torch.Tensor:
    """Pump energy while low, hold while high, with noise of half the torque range."""
    cos, sin, velocity = observation.unbind(-1)
    hold = -8.0 * torch.atan2(sin, cos) - 2.0 * velocity
    action = torch.where(cos > 0.8, hold, LIMIT * torch.where(velocity == 0, 1.0, velocity.sign()))
    return (action + 0.5 * LIMIT * torch.randn_like(cos)).clamp(-LIMIT, LIMIT).unsqueeze(-1)


def mean_return(env: EnvBase, policy: TensorDictModule, rounds: int) -> float:
    """Average over ``rounds`` episodes in each environment, from the same starts for every policy."""
    env.set_seed(1)
    # A diffusion policy is itself only under random exploration: under deterministic it starts from zeros.
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        returns = [env.rollout(200, policy)["next", "reward"].sum(-2).mean().item() for _ in range(rounds)]
    return sum(returns) / rounds


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=4, help="logged episodes in each of ten environments, half as many to evaluate"
    )
    parser.add_argument("--cloning-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000, help="updates of refinement and critics")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    env = SerialEnv(10, lambda: GymEnv("Pendulum-v1"))
    env.set_seed(0)
    behaviour = TensorDictModule(swing_up, in_keys=["observation"], out_keys=["action"])
    data = torch.cat([env.rollout(200, behaviour).reshape(-1) for _ in range(arguments.rounds)])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=256)
    buffer.extend(data)

    # Twenty steps whose noise reaches N(0, I), for which the default schedule takes a thousand.
    prior = DiffusionActor(ACTION, OBSERVATION, num_steps=20, beta_end=0.4, out_keys=["base_action"])
    cloning = DiffusionBCLoss(prior)
    optimizer = torch.optim.Adam(cloning.parameters(), lr=1e-3)
    for _ in range(arguments.cloning_steps):
        optimizer.zero_grad()
        cloning(buffer.sample())["loss_diffusion_bc"].backward()
        optimizer.step()

    refinement = make_refinement_network(OBSERVATION, ACTION, HIDDEN)
    actor = DeFlowActor(prior, RefinementPolicy(refinement, ACTION, low=-LIMIT, high=LIMIT))
    critics = make_qvalue_networks(OBSERVATION, ACTION, HIDDEN)
    # Shifts of half the torque range; the multiplier starts low, as a few thousand updates would not bring it down.
    loss = DeFlowLoss(actor, critics, target_divergence=1.0, log_alpha_init=-4.0, freeze_prior=True)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.98)
    target_updater = SoftUpdate(loss, tau=0.01)
    optimizer = torch.optim.Adam([parameter for parameter in loss.parameters() if parameter.requires_grad], lr=1e-3)
    bank = BaseActionBank(prior, buffer, num_actions=8)
    bank.fill()
    calls: list[int] = []
    prior.register_forward_hook(lambda *_: calls.append(1))
    began = time.perf_counter()
    for _ in range(arguments.steps):
        losses = loss(bank(buffer.sample()))
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_alpha"] + losses["loss_qvalue"]).backward()
        target_updater.step()
        optimizer.step()
    called, seconds = len(calls), time.perf_counter() - began
    print(f"{arguments.steps} updates in {seconds:.0f} s, {called} calls of the diffusion policy")

    rounds = max(arguments.rounds // 2, 1)
    policies = {"logged controller": behaviour, "diffusion policy": actor.prior_policy(), "refined": actor}
    results = {name: mean_return(env, policy, rounds) for name, policy in policies.items()}
    env.close()
    print("mean return: " + ", ".join(f"{name} {value:.0f}" for name, value in results.items()))
    return {**results, "calls": called}


if __name__ == "__main__":
    main()
