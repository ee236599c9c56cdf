# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FEdit, assembled: a cloned flow, a bounded random edit, critics with pessimism, FEditLoss, one Adam, soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, BootstrapConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FEditConfig(BootstrapConfig):
    """Settings of FEdit, ``algo.<name>=...``.

    The defaults are DeFlow's footing: two critics without pessimism. The published runs of FEdit have ``num_critics=10``,
    ``pessimism=0.5`` (0 on humanoidmaze) and chunks of 5 actions in manipulation.

    Attributes:
        edit_scale: c, the largest edit of an action dimension; the task's where None.
        num_critics: J.
        pessimism: rho of mean - rho std over the target critics.
        best_of_n: candidates N of an action, in targets, evaluation and online.
        target_entropy: of the edit before it is scaled; -A / 2 where None.
        flow_steps: Euler steps M of the flow.
    """

    name: str = "fedit"
    edit_scale: float | None = None
    num_critics: int = 2
    pessimism: float = 0.0
    best_of_n: int = 1
    target_entropy: float | None = None
    flow_steps: int = 10

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.edit_scale is None or self.edit_scale >= 0, "algo.edit_scale", self.edit_scale, "a number >= 0")
        need(self.pessimism >= 0, "algo.pessimism", self.pessimism, "a number >= 0")
        for name in ("num_critics", "best_of_n", "flow_steps"):
            need(getattr(self, name) >= 1, f"algo.{name}", getattr(self, name), "at least 1")


def build_fedit(config: FEditConfig, problem: ProblemSpec) -> Learner:
    """Build FEdit for a problem; settings that are None are the task's.

    Raises:
        InputError: where neither the settings nor the task have an edit's scale.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics
    from deflow_torchrl.modules import BestOfNPolicy, EditedFlowPolicy, TanhGaussianPolicy, make_tanh_gaussian_network
    from deflow_torchrl.objectives import FEditLoss

    edit_scale = needed(config.edit_scale, "edit_scale")
    flow = problem.flow_policy(config.flow_steps)
    width, action_dim, hidden_dims = problem.sizes
    edit = problem.encoded(
        TanhGaussianPolicy(
            make_tanh_gaussian_network(width + action_dim, action_dim, hidden_dims),
            log_std_min=-20.0,
            in_keys=(problem.state_key, "base_action"),
            out_keys=("edit",),
        )
    )
    loss = FEditLoss(
        flow,
        edit,
        problem.critics(config.num_critics),
        edit_scale=edit_scale,
        best_of_n=config.best_of_n,
        pessimism=config.pessimism,
        target_entropy=config.target_entropy,
    )
    policy = EditedFlowPolicy(flow, edit, edit_scale=edit_scale)
    if config.best_of_n == 1:
        return learner_with_critics(config, problem, loss, policy, exploration_policy=policy.drawing())

    best, drawing = (
        BestOfNPolicy(
            policy,
            loss.qvalue_network,
            loss.qvalue_network_params,
            config.best_of_n,
            q_aggregation="mean",
            in_keys=in_keys,
        )
        for in_keys in (policy.in_keys, policy.in_keys[:-1])
    )
    # The collector's noise is one row a state: this form draws its own, from a seed made of that row.
    return learner_with_critics(config, problem, loss, best, exploration_policy=drawing)


ALGORITHM = Algorithm(name="fedit", title="FEdit", config=FEditConfig, build=build_fedit, pictures=False)
