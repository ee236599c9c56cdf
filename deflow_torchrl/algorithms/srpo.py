# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""SRPO, assembled: a diffusion model of the data, IQL's values, and a deterministic policy that the score holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class SRPOConfig(FootedConfig):
    """Settings of SRPO, ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: the policy climbs the mean of the target critics.
        beta: coefficient of Q's gradient; the task's where None.
        expectile: of the value regression.
        weighting: of the score: ``sigma2``, ``constant`` or ``score``.
        normalize_q_gradient: divide Q's gradient by the root of its mean square over action dimensions.
        diffusion_steps: denoising steps T.
        dropout: in the noise network.
    """

    name: str = "srpo"
    beta: float | None = None
    expectile: float = 0.9
    weighting: str = "sigma2"
    normalize_q_gradient: bool = False
    diffusion_steps: int = 5
    dropout: float = 0.1

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.beta is None or self.beta >= 0, "algo.beta", self.beta, "a number >= 0")
        need(0 < self.expectile < 1, "algo.expectile", self.expectile, "a number between 0 and 1")
        kinds = ("sigma2", "constant", "score")
        need(self.weighting in kinds, "algo.weighting", self.weighting, "one of " + ", ".join(kinds))
        need(self.diffusion_steps >= 1, "algo.diffusion_steps", self.diffusion_steps, "at least 1")
        need(0 <= self.dropout < 1, "algo.dropout", self.dropout, "a share in [0, 1)")


def build_srpo(config: SRPOConfig, problem: ProblemSpec) -> Learner:
    """Build SRPO for a problem: the noise network steps first, then V and Q, then the policy with all of that.

    Raises:
        InputError: where neither the settings nor the task have a beta.
    """
    from deflow_torchrl.algorithms.base import SoftTarget, Stage, learner_with_critics
    from deflow_torchrl.modules import DeterministicPolicy, make_policy_network
    from deflow_torchrl.objectives import SRPOLoss

    beta = needed(config.beta, "beta")
    network = make_policy_network(*problem.sizes)
    actor = problem.encoded(DeterministicPolicy(network, in_keys=(problem.state_key,), **problem.bounds))
    loss = SRPOLoss(
        actor,
        problem.diffusion_policy(config.diffusion_steps, dropout=config.dropout),
        problem.critics(),
        problem.value_network(),
        beta=beta,
        expectile=config.expectile,
        weighting=cast("Any", config.weighting),
        normalize_q_gradient=config.normalize_q_gradient,
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        actor,
        stages=(
            Stage(("loss_score",)),
            Stage(("loss_value", "loss_qvalue"), (SoftTarget("qvalue_network", config.tau),)),
            Stage(("loss_actor",)),
        ),
    )


ALGORITHM = Algorithm(name="srpo", title="SRPO", config=SRPOConfig, build=build_srpo)
