# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IQL, assembled as FQL's comparison runs it: a value net, twin critics, a Gaussian of unit standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, BootstrapConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class IQLConfig(BootstrapConfig):
    """Settings of IQL, ``algo.<name>=...``.

    Attributes:
        temperature: inverse temperature of advantage-weighted regression; the task's where None.
        expectile: of the value regression.
    """

    name: str = "iql"
    temperature: float | None = None
    expectile: float = 0.9

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.temperature is None or self.temperature >= 0, "algo.temperature", self.temperature, "a number >= 0")
        need(0 < self.expectile < 1, "algo.expectile", self.expectile, "a number between 0 and 1")


def build_iql(config: IQLConfig, problem: ProblemSpec) -> Learner:
    """Build IQL for a problem; settings that are None are the task's. Online it acts by the samples of its Gaussian.

    Raises:
        InputError: where neither the settings nor the task have a temperature.
    """
    from deflow_torchrl.algorithms.base import exploring, learner_with_critics
    from deflow_torchrl.modules import GaussianPolicy, make_policy_network
    from deflow_torchrl.objectives import IQLLoss

    temperature = needed(config.temperature, "temperature")
    policy = problem.encoded(
        GaussianPolicy(make_policy_network(*problem.sizes), in_keys=(problem.state_key,), **problem.bounds)
    )
    loss = IQLLoss(
        policy,
        problem.critics(),
        problem.value_network(),
        temperature=temperature,
        expectile=config.expectile,
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        policy,
        exploration_policy=exploring(policy),
    )


ALGORITHM = Algorithm(name="iql", title="IQL", config=IQLConfig, build=build_iql)
