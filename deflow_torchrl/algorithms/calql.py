# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Cal-QL, assembled: a tanh-Gaussian, twin critics, one Adam, targets that move after its step, half of online batches data."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, check_positive, one_of

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class CalQLConfig(FootedConfig):
    """Settings of Cal-QL, ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: the target takes the minimum over critics.
        alpha: weight of the conservative gap; the task's where None. Either this or ``target_gap``.
        target_gap: gap that a learned weight aims at; the task's where None.
        num_actions: actions in each set of samples.
        reward_scale: factor of rewards and returns; ``alpha`` and ``target_gap`` are tied to it.
        policy_lr: learning rate of the policy and its temperature; ``lr`` where None, in the original 1e-4.
        mc_tail: how the return of a trajectory goes on that was cut: ``last_reward`` for ever, or ``cut``, the authors' rule.
    """

    alternatives: ClassVar[tuple[str, ...]] = ("alpha", "target_gap")

    name: str = "calql"
    alpha: float | None = None
    target_gap: float | None = None
    num_actions: int = 10
    reward_scale: float = 10.0
    policy_lr: float | None = None
    mc_tail: str = "last_reward"

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.alpha is None or self.alpha >= 0, "algo.alpha", self.alpha, "a number >= 0")
        check_positive(need, self, "policy_lr")
        need(self.num_actions >= 1, "algo.num_actions", self.num_actions, "at least 1")
        need(self.reward_scale > 0, "algo.reward_scale", self.reward_scale, "a positive number")
        need(self.mc_tail in ("last_reward", "cut"), "algo.mc_tail", self.mc_tail, "last_reward or cut")


def build_calql(config: CalQLConfig, problem: ProblemSpec) -> Learner:
    """Build Cal-QL for a problem. It acts by tanh of the mean, online by samples.

    Raises:
        InputError: where alpha and target_gap both have a value, or neither.
    """
    from deflow_torchrl.algorithms.base import SoftTarget, Stage, exploring, learner_with_critics
    from deflow_torchrl.modules import TanhGaussianPolicy, make_tanh_gaussian_network
    from deflow_torchrl.modules.networks import make_plain_mlp
    from deflow_torchrl.objectives import CalQLLoss

    options: dict[str, Any] = (
        {"cql_alpha": config.alpha} if one_of(config) == "alpha" else {"target_gap": config.target_gap}
    )
    network, mlp = make_tanh_gaussian_network(*problem.sizes, head_gain=0.1), None
    how: dict[str, Any] = {}
    if config.is_original:
        mlp = functools.partial(make_plain_mlp, init="orthogonal")
        network = mlp(problem.sizes[0], 2 * problem.sizes[1], problem.hidden_dims)
        how = {"log_std_min": -20.0, "log_std_affine": (1.0, -1.0)}
    lr = config.policy_lr
    groups = {} if lr is None else {name: {"lr": lr} for name in ("actor_network_params", "log_alpha")}
    policy = problem.encoded(TanhGaussianPolicy(network, in_keys=(problem.state_key,), **how, **problem.bounds))
    loss = CalQLLoss(
        policy,
        problem.critics(mlp=mlp),
        num_cql_samples=config.num_actions,
        reward_scale=config.reward_scale,
        **options,
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        policy,
        exploration_policy=exploring(policy),
        optimizer_groups=groups,
        stages=(Stage(targets=(SoftTarget("qvalue_network", config.tau),)),),
        returns=cast("Any", config.mc_tail),
        whole_episodes=config.is_original,
    )


ALGORITHM = Algorithm(
    name="calql", title="Cal-QL", config=CalQLConfig, build=build_calql, run_settings={"mixing": "balanced"}
)
