# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IFQL, assembled: IQL's values, a flow that clones the data, and the best of N samples to act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, BootstrapConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class IFQLConfig(BootstrapConfig):
    """Settings of IFQL, ``algo.<name>=...``.

    Attributes:
        num_samples: candidates N of an action, at evaluation and online; the task's where None.
        expectile: of the value regression.
        flow_steps: Euler steps M of the flow.
    """

    name: str = "ifql"
    num_samples: int | None = None
    expectile: float = 0.9
    flow_steps: int = 10

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.num_samples is None or self.num_samples >= 1, "algo.num_samples", self.num_samples, "at least 1")
        need(0 < self.expectile < 1, "algo.expectile", self.expectile, "a number between 0 and 1")
        need(self.flow_steps >= 1, "algo.flow_steps", self.flow_steps, "at least 1")


def build_ifql(config: IFQLConfig, problem: ProblemSpec) -> Learner:
    """Build IFQL for a problem; settings that are None are the task's.

    Raises:
        InputError: where neither the settings nor the task have a number of samples.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics
    from deflow_torchrl.modules import BestOfNPolicy
    from deflow_torchrl.objectives import IFQLLoss

    num_samples = needed(config.num_samples, "num_samples")
    flow = problem.flow_policy(config.flow_steps)
    loss = IFQLLoss(
        flow,
        problem.critics(),
        problem.value_network(),
        expectile=config.expectile,
        num_samples=num_samples,
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        loss.actor_network,
        # The collector's noise is one row a state: this form draws its N rows itself, from a seed made of that row.
        exploration_policy=BestOfNPolicy(
            flow, loss.qvalue_network, loss.qvalue_network_params, num_samples, in_keys=flow.in_keys[:-1]
        ),
    )


ALGORITHM = Algorithm(name="ifql", title="IFQL", config=IFQLConfig, build=build_ifql)
