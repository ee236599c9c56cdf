# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IDQL, assembled: a diffusion model of the data, IQL's values, and the best of N by the target critics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class IDQLConfig(FootedConfig):
    """Settings of IDQL, ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: candidates are ranked by the minimum over critics.
        num_samples: candidates N; the task's where None.
        expectile: of the value regression.
        diffusion_steps: denoising steps T.
        dropout: in the noise network.
        average_rate: share of the noise network that moves into the average that acts, at each update.
    """

    name: str = "idql"
    num_samples: int | None = None
    expectile: float = 0.9
    diffusion_steps: int = 5
    dropout: float = 0.1
    average_rate: float = 0.001

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.num_samples is None or self.num_samples >= 1, "algo.num_samples", self.num_samples, "at least 1")
        need(0 < self.expectile < 1, "algo.expectile", self.expectile, "a number between 0 and 1")
        need(self.diffusion_steps >= 1, "algo.diffusion_steps", self.diffusion_steps, "at least 1")
        need(0 <= self.dropout < 1, "algo.dropout", self.dropout, "a share in [0, 1)")
        need(0 < self.average_rate <= 1, "algo.average_rate", self.average_rate, "a number in (0, 1]")


def build_idql(config: IDQLConfig, problem: ProblemSpec) -> Learner:
    """Build IDQL for a problem: the noise network steps first, then V, then Q with the new V.

    Raises:
        InputError: where neither the settings nor the task have a number of samples.
    """
    from torchrl.objectives import SoftUpdate

    from deflow_torchrl.algorithms.base import SoftTarget, Stage, learner_with_critics
    from deflow_torchrl.modules.chosen import ValueChosenPolicy
    from deflow_torchrl.objectives import IDQLLoss

    num_samples = needed(config.num_samples, "num_samples")
    policy = problem.diffusion_policy(config.diffusion_steps, dropout=config.dropout)
    loss = IDQLLoss(policy, problem.critics(), problem.value_network(), expectile=config.expectile)
    SoftUpdate(loss, tau=config.tau)  # the stages move the targets; without it the loss warns that nothing does
    acting, exploring = (
        ValueChosenPolicy(
            policy,
            loss.qvalue_network,
            loss.target_qvalue_network_params,
            num_samples,
            policy_params=loss.target_diffusion_policy_params,
            reads_noise=reads_noise,
        )
        for reads_noise in (True, False)  # the collector's noise is one row a state
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        acting,
        exploration_policy=exploring,
        stages=(
            Stage(("loss_score",), (SoftTarget("diffusion_policy", config.average_rate),)),
            Stage(("loss_value",)),
            Stage(("loss_qvalue",), (SoftTarget("qvalue_network", config.tau),)),
        ),
    )


ALGORITHM = Algorithm(name="idql", title="IDQL", config=IDQLConfig, build=build_idql)
