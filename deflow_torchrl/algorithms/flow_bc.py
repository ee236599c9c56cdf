# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Flow behaviour cloning, assembled: DeFlow's prior alone, by FlowMatchingLoss and one Adam. No critic, no targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, MethodConfig, Need

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FlowBCConfig(MethodConfig):
    """Settings of flow behaviour cloning, ``algo.<name>=...``.

    Attributes:
        flow_steps: Euler steps M of the policy.
    """

    name: str = "flow_bc"
    flow_steps: int = 10

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.flow_steps >= 1, "algo.flow_steps", self.flow_steps, "at least 1")


def build_flow_bc(config: FlowBCConfig, problem: ProblemSpec) -> Learner:
    """Build flow behaviour cloning for a problem.

    Raises:
        ValueError: on a setting out of range.
    """
    from deflow_torchrl.algorithms.base import Learner, trainable
    from deflow_torchrl.objectives import FlowMatchingLoss

    policy = problem.flow_policy(config.flow_steps)
    loss = FlowMatchingLoss(policy)
    return Learner(
        loss=loss,
        policy=policy,
        evaluated_policies={"flow_bc": policy},
        param_groups=[{"params": trainable(loss), "lr": config.lr}],
        target_updater=None,
    )


ALGORITHM = Algorithm(name="flow_bc", title="flow BC", config=FlowBCConfig, build=build_flow_bc)
