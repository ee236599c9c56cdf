# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FEdit, assembled: a cloned flow, a bounded random edit, critics with pessimism, FEditLoss, one Adam, soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deflow_torchrl.algorithms.settings import Algorithm, CandidatesConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FEditConfig(CandidatesConfig):
    """Settings of FEdit, ``algo.<name>=...``.

    Attributes:
        edit_scale: c, the largest edit of an action dimension; the task's where None.
        target_entropy: of the edit before it is scaled; -A / 2 where None.
    """

    needs: ClassVar[tuple[str, ...]] = ("edit_scale",)

    name: str = "fedit"
    edit_scale: float | None = None
    target_entropy: float | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.edit_scale is None or self.edit_scale >= 0, "algo.edit_scale", self.edit_scale, "a number >= 0")


def build_fedit(config: FEditConfig, problem: ProblemSpec) -> Learner:
    """Build FEdit for a problem; settings that are None are the task's.

    Raises:
        InputError: where neither the settings nor the task have an edit's scale.
    """
    from deflow_torchrl.algorithms.base import best_of_n_learner
    from deflow_torchrl.modules import EditedFlowPolicy
    from deflow_torchrl.objectives import FEditLoss

    edit_scale = needed(config.edit_scale, "edit_scale")
    flow, edit = problem.flow_policy(config.flow_steps), problem.edit_policy()
    loss = FEditLoss(
        flow,
        edit,
        problem.critics(config.settled("num_critics")),
        edit_scale=edit_scale,
        best_of_n=config.best_of_n,
        pessimism=config.settled("pessimism"),
        target_entropy=config.target_entropy,
    )
    policy = EditedFlowPolicy(flow, edit, edit_scale=edit_scale)
    return best_of_n_learner(config, problem, loss, policy, drawing=policy.drawing())


ALGORITHM = Algorithm(name="fedit", title="FEdit", config=FEditConfig, build=build_fedit, pictures=False)
