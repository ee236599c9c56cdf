# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FAWAC, assembled: a flow cloned by weight, twin critics, FAWACLoss, one Adam, soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, CriticConfig, Need, check_positive, given, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FAWACConfig(CriticConfig):
    """Settings of FAWAC, ``algo.<name>=...``.

    Attributes:
        temperature: inverse temperature of the weights; the task's where None.
        max_weight: upper bound of the weights.
        flow_steps: Euler steps M of the policy.
    """

    name: str = "fawac"
    temperature: float | None = None
    max_weight: float = 100.0
    flow_steps: int = 10

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.temperature is None or self.temperature >= 0, "algo.temperature", self.temperature, "a number >= 0")
        check_positive(need, self, "max_weight", optional=False)
        need(self.flow_steps >= 1, "algo.flow_steps", self.flow_steps, "at least 1")


def build_fawac(config: FAWACConfig, problem: ProblemSpec) -> Learner:
    """Build FAWAC for a problem; settings that are None are the task's.

    Raises:
        InputError: if the temperature is given neither by the task nor by the settings.
        ValueError: on a setting out of range.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics
    from deflow_torchrl.objectives import FAWACLoss

    temperature = needed(config.temperature, "temperature")
    policy = problem.flow_policy(config.flow_steps)
    loss = FAWACLoss(
        policy,
        problem.critics(),
        temperature=temperature,
        max_weight=config.max_weight,
        q_aggregation=given(config.q_aggregation, problem.q_aggregation),
    )
    return learner_with_critics(config, problem, loss, policy)


ALGORITHM = Algorithm(name="fawac", title="FAWAC", config=FAWACConfig, build=build_fawac)
