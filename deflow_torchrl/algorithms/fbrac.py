# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FBRAC, assembled: a flow that is the policy, twin critics, FBRACLoss, one Adam, soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, CriticConfig, Need, given, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FBRACConfig(CriticConfig):
    """Settings of FBRAC, ``algo.<name>=...``.

    Attributes:
        alpha: weight of the behaviour cloning; the task's where None.
        flow_steps: Euler steps M of the policy, which the Q term is differentiated through.
        normalize_q_loss: scale the Q term by 1 / mean|Q|.
    """

    name: str = "fbrac"
    alpha: float | None = None
    flow_steps: int = 10
    normalize_q_loss: bool = False

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.alpha is None or self.alpha >= 0, "algo.alpha", self.alpha, "a number >= 0")
        need(self.flow_steps >= 1, "algo.flow_steps", self.flow_steps, "at least 1")


def build_fbrac(config: FBRACConfig, problem: ProblemSpec) -> Learner:
    """Build FBRAC for a problem; settings that are None are the task's.

    Raises:
        InputError: if alpha is given neither by the task nor by the settings.
        ValueError: on a setting out of range.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics
    from deflow_torchrl.objectives import FBRACLoss

    alpha = needed(config.alpha, "alpha")
    policy = problem.flow_policy(config.flow_steps)
    loss = FBRACLoss(
        policy,
        problem.critics(),
        alpha=alpha,
        q_aggregation=given(config.q_aggregation, problem.q_aggregation),
        normalize_q_loss=config.normalize_q_loss,
    )
    return learner_with_critics(config, problem, loss, policy)


ALGORITHM = Algorithm(name="fbrac", title="FBRAC", config=FBRACConfig, build=build_fbrac)
