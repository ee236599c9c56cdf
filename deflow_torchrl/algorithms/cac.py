# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""CAC, assembled: a consistency policy and an average of it, twin critics, and a softmax over candidates where it acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, needed

if TYPE_CHECKING:
    from torch import Tensor

    from deflow_torchrl.algorithms.base import Learner, ProblemSpec

_AVERAGE_RATE, _AVERAGE_PERIOD, _AVERAGE_FIRST = 0.005, 5, 1_000


@dataclass
class CACConfig(FootedConfig):
    """Settings of CAC (Consistency-AC), ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: the target takes the minimum over critics.
        eta: weight of the Q term; the task's where None.
        sampling_steps: evaluations K of the consistency function in a sample.
        max_q_backup: next actions of the target; 1 for a target of one action.
        scale_consistency: weight noise levels by 100 over their distance.
        normalize_target: divide targets by their standard deviation over the batch.
        max_grad_norm: bound of the 2-norm of the actor's gradients.
        num_candidates: actions of which one is drawn by a softmax of their values, where the policy acts.
        schedule_steps: updates in which the number of noise levels grows from 2 to 150; it starts anew after them.
    """

    name: str = "cac"
    eta: float | None = None
    sampling_steps: int = 2
    max_q_backup: int = 10
    scale_consistency: bool = True
    normalize_target: bool = False
    max_grad_norm: float = 5.0
    num_candidates: int = 50
    schedule_steps: int = 1_000_000

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.eta is None or self.eta >= 0, "algo.eta", self.eta, "a number >= 0")
        need(self.max_grad_norm > 0, "algo.max_grad_norm", self.max_grad_norm, "a positive number")
        for name in ("sampling_steps", "max_q_backup", "num_candidates", "schedule_steps"):
            need(getattr(self, name) >= 1, f"algo.{name}", getattr(self, name), "at least 1")


def build_cac(config: CACConfig, problem: ProblemSpec) -> Learner:
    """Build CAC for a problem: critics step first, then the actor against the new critics.

    Raises:
        InputError: where neither the settings nor the task have an eta.
    """
    from torchrl.objectives import SoftUpdate

    from deflow_torchrl.algorithms.base import SoftTarget, Stage, learner_with_critics
    from deflow_torchrl.modules import ConsistencyNetwork, ConsistencyPolicy
    from deflow_torchrl.modules.chosen import ValueChosenPolicy
    from deflow_torchrl.objectives import ConsistencyACLoss
    from deflow_torchrl.objectives.consistency_ac import number_of_scales

    eta = needed(config.eta, "eta")
    observation_dim, action_dim, _ = problem.sizes
    policy = problem.encoded(
        ConsistencyPolicy(
            ConsistencyNetwork(observation_dim, action_dim),
            action_dim,
            config.sampling_steps,
            in_keys=(problem.state_key, "noise"),
            **problem.bounds,
        )
    )
    loss = ConsistencyACLoss(
        policy,
        problem.critics(),
        eta=eta,
        scale_consistency=config.scale_consistency,
        num_target_samples=config.max_q_backup,
        normalize_target=config.normalize_target,
    )

    def set_scales(update: Tensor) -> None:
        done = (update - 1) % config.schedule_steps
        loss.num_scales.copy_(number_of_scales(done.float() / config.schedule_steps))

    SoftUpdate(loss, tau=config.tau)  # the stages move the targets; without it the loss warns that nothing does
    acting, exploring = (
        ValueChosenPolicy(
            policy,
            loss.qvalue_network,
            loss.target_qvalue_network_params,
            config.num_candidates,
            softmax=True,
            reads_noise=reads_noise,
        )
        for reads_noise in (True, False)  # the collector's noise is one row a state
    )
    average = SoftTarget("actor_network", _AVERAGE_RATE, _AVERAGE_PERIOD, _AVERAGE_FIRST)
    return learner_with_critics(
        config,
        problem,
        loss,
        acting,
        exploration_policy=exploring,
        stages=(
            Stage(("loss_qvalue",)),
            Stage(
                ("loss_consistency", "loss_actor"),
                (average, SoftTarget("qvalue_network", config.tau)),
                max_grad_norm=config.max_grad_norm,
            ),
        ),
        before_update=set_scales,
    )


ALGORITHM = Algorithm(name="cac", title="CAC", config=CACConfig, build=build_cac)
