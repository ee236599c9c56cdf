# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FQL, assembled: a cloned flow, a one-step policy, twin critics, FQLLoss, one Adam, soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deflow_torchrl.algorithms.settings import Algorithm, FlowCriticConfig, Need, given, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FQLConfig(FlowCriticConfig):
    """Settings of flow Q-learning, ``algo.<name>=...``; the defaults are those of its published runs.

    Attributes:
        alpha: weight of the distillation; the task's where None.
        flow_steps: Euler steps M of the flow.
        normalize_q_loss: scale the actor's Q term by 1 / mean|Q|.
    """

    needs: ClassVar[tuple[str, ...]] = ("alpha",)

    name: str = "fql"
    alpha: float | None = None
    flow_steps: int = 10
    normalize_q_loss: bool = False

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.alpha is None or self.alpha >= 0, "algo.alpha", self.alpha, "a number >= 0")
        need(self.flow_steps >= 1, "algo.flow_steps", self.flow_steps, "at least 1")


def build_fql(config: FQLConfig, problem: ProblemSpec) -> Learner:
    """Build FQL for a problem; settings that are None are the task's.

    Raises:
        InputError: if alpha is given neither by the task nor by the settings.
        ValueError: on a setting out of range.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics, one_step_policy
    from deflow_torchrl.objectives import FQLLoss

    alpha = needed(config.alpha, "alpha")
    flow = problem.flow_policy(config.flow_steps)
    actor = one_step_policy(problem)
    loss = FQLLoss(
        flow,
        actor,
        problem.critics_of(config),
        alpha=alpha,
        q_aggregation=given(config.q_aggregation, problem.q_aggregation),
        normalize_q_loss=config.normalize_q_loss,
    )
    return learner_with_critics(config, problem, loss, actor)


ALGORITHM = Algorithm(name="fql", title="FQL", config=FQLConfig, build=build_fql)
