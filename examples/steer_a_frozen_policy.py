"""Steer a policy that is not ours and does not learn any more: DSRL chooses the noise that a diffusion policy starts from.

The diffusion policy clones a noisy controller of the pendulum by TorchRL's ``DiffusionBCLoss``. Frozen, it is read as a function
of its starting noise; a second policy learns which noise leads to good actions. ``refine_a_frozen_policy.py`` shifts actions.

    python examples/steer_a_frozen_policy.py
"""

import argparse

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymEnv, SerialEnv
from torchrl.modules import DiffusionActor
from torchrl.objectives import DiffusionBCLoss, SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    SteeredFlowPolicy,
    TanhGaussianPolicy,
    make_qvalue_networks,
    make_tanh_gaussian_network,
)
from deflow_torchrl.objectives import DSRLLoss

OBSERVATION, ACTION, LIMIT, HIDDEN, SCALE = 3, 1, 2.0, (128, 128), 1.5


def swing_up(observation: Tensor) -> Tensor:
    """Pump energy while low, hold while high, with noise of half the torque range."""
    cos, sin, velocity = observation.unbind(-1)
    hold = -8.0 * torch.atan2(sin, cos) - 2.0 * velocity
    action = torch.where(cos > 0.8, hold, LIMIT * torch.where(velocity == 0, 1.0, velocity.sign()))
    return (action + 0.5 * LIMIT * torch.randn_like(cos)).clamp(-LIMIT, LIMIT).unsqueeze(-1)


class FromNoise(nn.Module):
    """A diffusion policy's chain without noise between its steps (DDIM): starting noise ``[..., A]`` to action ``[..., A]``."""

    action_dim = ACTION  # what DSRL asks of a frozen policy

    def __init__(self, diffusion: nn.Module) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        x, signals = noise, [1.0, *self.diffusion.alphas_cumprod.tolist()]
        for step in reversed(range(self.diffusion.num_steps)):
            time = torch.full_like(x[..., :1], step)
            error = self.diffusion.score_network(torch.cat([x, observation, time], -1))
            clean = (x - (1 - signals[step + 1]) ** 0.5 * error) / signals[step + 1] ** 0.5
            x = signals[step] ** 0.5 * clean + (1 - signals[step]) ** 0.5 * error
        return x.clamp(-LIMIT, LIMIT)


def mean_return(env: EnvBase, policy: TensorDictModule, rounds: int) -> float:
    """Average over ``rounds`` episodes in each environment, from the same starts for every policy."""
    env.set_seed(1)
    with torch.no_grad():
        returns = [env.rollout(200, policy)["next", "reward"].sum(-2).mean().item() for _ in range(rounds)]
    return sum(returns) / rounds


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="logged episodes in each of ten environments")
    parser.add_argument("--cloning-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000, help="updates of the steering policy and its critics")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    env = SerialEnv(10, lambda: GymEnv("Pendulum-v1"))
    env.set_seed(0)
    behaviour = TensorDictModule(swing_up, in_keys=["observation"], out_keys=["action"])
    data = torch.cat([env.rollout(200, behaviour).reshape(-1) for _ in range(arguments.rounds)])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=256)
    buffer.extend(data)

    # Twenty steps whose noise reaches N(0, I), for which the default schedule takes a thousand.
    cloned = DiffusionActor(ACTION, OBSERVATION, num_steps=20, beta_end=0.4)
    cloning = DiffusionBCLoss(cloned)
    optimizer = torch.optim.Adam(cloning.parameters(), lr=1e-3)
    for _ in range(arguments.cloning_steps):
        optimizer.zero_grad()
        cloning(buffer.sample())["loss_diffusion_bc"].backward()
        optimizer.step()

    frozen = TensorDictModule(FromNoise(cloned.module), in_keys=["observation", "noise"], out_keys=["action"])
    latent = TanhGaussianPolicy(make_tanh_gaussian_network(OBSERVATION, ACTION, HIDDEN), log_std_min=-20.0)
    critics, latent_critics = (make_qvalue_networks(OBSERVATION, ACTION, HIDDEN) for _ in range(2))
    loss = DSRLLoss(frozen, latent, critics, latent_critics, noise_scale=SCALE, freeze_prior=True, alpha_init=0.1)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.98)
    target_updater = SoftUpdate(loss, tau=0.01)
    optimizer = torch.optim.Adam([parameter for parameter in loss.parameters() if parameter.requires_grad], lr=1e-3)
    for _ in range(arguments.steps):
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        target_updater.step()
        optimizer.step()

    draw = TensorDictModule(lambda observation: torch.randn_like(observation[..., :ACTION]), ["observation"], ["noise"])
    steered = SteeredFlowPolicy(frozen, latent, noise_scale=SCALE, noise_key=None)
    policies = {
        "logged controller": behaviour,
        "diffusion policy": TensorDictSequential(draw, frozen),
        "steered": steered,
    }
    rounds = max(arguments.rounds // 2, 1)
    results = {name: mean_return(env, policy, rounds) for name, policy in policies.items()}
    env.close()
    print("mean return: " + ", ".join(f"{name} {value:.0f}" for name, value in results.items()))
    return results


if __name__ == "__main__":
    main()
