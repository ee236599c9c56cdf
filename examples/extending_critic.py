"""Give DeFlow a critic of one's own: an ensemble that learns quantiles of the return instead of its mean.

A critic is one class: `forward` evaluates its networks, `values` says what the actor climbs, `td_terms` says how it is trained.
The loss keeps its parameters and targets; best of N, diagnostics and priorities ask the same class. One call makes the method
known to this process: `algo=deflow_quantile` trains it on any task.

    python examples/extending_critic.py

The data are of one-step episodes whose reward is noisy, and noisier in some states than in others: a critic of means cannot see
the difference, quantiles can.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from deflow_torchrl.algorithms import Algorithm, DeFlowConfig, Learner, ProblemSpec, get_algorithm, register_algorithm
from deflow_torchrl.algorithms.base import learner_with_critics
from deflow_torchrl.modules import CriticEnsemble, DeFlowActor, RefinementPolicy, make_refinement_network
from deflow_torchrl.objectives import DeFlowLoss
from deflow_torchrl.trainers import UpdateStep


class QuantileCritics(CriticEnsemble):
    """J networks of N quantiles each, trained by quantile regression (QR-DQN, https://arxiv.org/abs/1710.10044)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int, *, num_quantiles: int) -> None:
        super().__init__()
        self.in_keys = ["observation", "action"]
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(observation_dim + action_dim, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim),
                nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, num_quantiles),
            )
            for _ in range(2)
        )  # fmt: skip
        self.register_buffer("levels", (torch.arange(num_quantiles) + 0.5) / num_quantiles)

    def forward(self, tensordict: TensorDictBase) -> Tensor:
        """Quantiles `[J, *B, N]`, by the parameters that the networks hold now."""
        inputs = torch.cat([tensordict["observation"], tensordict["action"]], -1)
        return torch.stack([network(inputs) for network in self.networks])

    def quantiles(self, tensordict: TensorDictBase, **which: bool) -> Tensor:
        """Quantiles `[J, *B, N]`, by the loss's parameters: `target=True`, `frozen=True`."""
        return super().values(tensordict, **which)

    def values(self, tensordict: TensorDictBase, **which: bool) -> Tensor:
        """Q_j(s, a) `[J, *B]`: the mean of the quantiles."""
        return self.quantiles(tensordict, **which).mean(-1)

    def td_terms(
        self, tensordict: TensorDictBase, next_state: Callable, bootstrap: Callable, reduce_critics: Callable
    ) -> dict[str, Tensor]:
        """`loss_qvalue` and `td_error` of every sample: each quantile regresses on every quantile of the target."""
        with torch.no_grad():
            following = reduce_critics(self.quantiles(next_state(), target=True))
            targets = torch.stack([bootstrap(quantile) for quantile in following.unbind(-1)], -1)
        quantiles = self.quantiles(tensordict)
        error = targets.unsqueeze(-2) - quantiles.unsqueeze(-1)  # [J, *B, N, N]: of every quantile to every target
        huber = nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=0.02)
        weight = (self.levels.unsqueeze(-1) - (error < 0).float()).abs()
        td_error = (targets.mean(-1) - quantiles.mean(-1)).detach().abs().amax(0)
        return {"loss_qvalue": (weight * huber).mean((-2, -1)).mean(0), "td_error": td_error}


@dataclass
class QuantileConfig(DeFlowConfig):
    """DeFlow's settings and one more, `algo.num_quantiles=...`."""

    name: str = "deflow_quantile"
    num_quantiles: int = 16


def build(config: QuantileConfig, problem: ProblemSpec) -> Learner:
    flow = problem.flow_policy(config.flow_steps, out_keys=("base_action",))
    refinement = RefinementPolicy(make_refinement_network(*problem.sizes), problem.action_dim, **problem.bounds)
    actor = DeFlowActor(flow, refinement).to(problem.device)
    sizes = (problem.observation_dim, problem.action_dim, problem.hidden_dims[0])
    critics = QuantileCritics(*sizes, num_quantiles=config.num_quantiles).to(problem.device)
    loss = DeFlowLoss(actor, critics, target_divergence=config.target_divergence or problem.target_divergence)
    policies = {"prior": actor.prior_policy(), config.name: actor}
    return learner_with_critics(config, problem, loss, actor, evaluated_policies=policies, prior=flow)


def make_batch(rows: int) -> TensorDict:
    """One-step episodes: r = 1 - (a - s_0)^2 + noise whose standard deviation is 0.05 where s_1 < 0 and 0.5 elsewhere."""
    state, action = torch.rand(rows, 2) * 2 - 1, torch.rand(rows, 1) * 2 - 1
    noise = torch.where(state[:, 1:] < 0, 0.05, 0.5) * torch.randn(rows, 1)
    end = torch.ones(rows, 1, dtype=torch.bool)
    following = TensorDict(
        observation=state, reward=1 - (action - state[:, :1]).square() + noise, terminated=end, done=end, batch_size=[rows]
    )  # fmt: skip
    return TensorDict(observation=state, action=action, next=following, batch_size=[rows])


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    register_algorithm(Algorithm("deflow_quantile", "DeFlow, quantile critic", QuantileConfig, build))
    problem = ProblemSpec(observation_dim=2, action_dim=1, hidden_dims=(64, 64), target_divergence=0.1)
    learner = get_algorithm("deflow_quantile").build(QuantileConfig(lr=1e-3), problem)
    update = UpdateStep(learner)
    for _ in range(steps):
        out = update(make_batch(256))
    states = TensorDict(
        observation=torch.tensor([[0.5, -0.5], [0.5, 0.5]]), action=torch.full((2, 1), 0.5), batch_size=[2]
    )
    with torch.no_grad():
        quantiles = learner.loss.critics.quantiles(states).mean(0).sort(-1).values
    spread = (quantiles[:, -3] - quantiles[:, 2]).tolist()
    found = {"calm": spread[0], "noisy": spread[1], "loss_qvalue": out["loss_qvalue"].item()}
    print(f"{steps} updates; at the best action the return's 16% to 84% are {spread[0]:.2f} apart in a calm state")
    print(f"(0.10 in truth) and {spread[1]:.2f} in a noisy one (1.00 in truth)")
    return found


if __name__ == "__main__":
    main()
