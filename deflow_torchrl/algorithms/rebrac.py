# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""ReBRAC, assembled as FQL's comparison runs it: a tanh policy, twin critics, targets of both, all but the critics delayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, BootstrapConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class ReBRACConfig(BootstrapConfig):
    """Settings of ReBRAC, ``algo.<name>=...``.

    Attributes:
        actor_bc_coef: weight of the actor's distance to the data (alpha_1); the task's where None.
        critic_bc_coef: weight of the target action's distance to the data (alpha_2); the task's where None.
        policy_noise: standard deviation of the noise that smooths targets and explores online, in action units.
        noise_clip: bound of that noise.
        period: the policy and all targets move at every so many updates.
    """

    name: str = "rebrac"
    actor_bc_coef: float | None = None
    critic_bc_coef: float | None = None
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    period: int = 2

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        for name in ("actor_bc_coef", "critic_bc_coef", "policy_noise", "noise_clip"):
            value = getattr(self, name)
            need(value is None or value >= 0, f"algo.{name}", value, "a number >= 0")
        need(self.period >= 1, "algo.period", self.period, "at least 1")


def build_rebrac(config: ReBRACConfig, problem: ProblemSpec) -> Learner:
    """Build ReBRAC for a problem; settings that are None are the task's. Online it acts with the targets' noise.

    Raises:
        InputError: where neither the settings nor the task have a penalty's weight.
    """
    from deflow_torchrl.algorithms.base import exploring, learner_with_critics
    from deflow_torchrl.modules import DeterministicPolicy, make_policy_network
    from deflow_torchrl.objectives import ReBRACLoss

    actor_bc_coef = needed(config.actor_bc_coef, "actor_bc_coef")
    critic_bc_coef = needed(config.critic_bc_coef, "critic_bc_coef")
    policy = problem.encoded(
        DeterministicPolicy(make_policy_network(*problem.sizes), in_keys=(problem.state_key,), **problem.bounds)
    )
    loss = ReBRACLoss(
        policy,
        problem.critics(),
        actor_bc_coef=actor_bc_coef,
        critic_bc_coef=critic_bc_coef,
        policy_noise=config.policy_noise,
        noise_clip=config.noise_clip,
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        policy,
        exploration_policy=exploring(policy, config.policy_noise, config.noise_clip),
        term_periods={"loss_actor": config.period},
        target_period=config.period,
        next_action=True,
    )


ALGORITHM = Algorithm(name="rebrac", title="ReBRAC", config=ReBRACConfig, build=build_rebrac)
