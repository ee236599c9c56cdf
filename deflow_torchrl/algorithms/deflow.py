# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow, assembled: the paper's networks, DeFlowLoss, one Adam, soft targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from deflow_torchrl.algorithms.alarms import DEFLOW_ALARMS
from deflow_torchrl.algorithms.settings import PRECISIONS, Algorithm, FlowCriticConfig, Need, check_positive, given

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec
    from deflow_torchrl.modules.flow import Precision


@dataclass
class DeFlowConfig(FlowCriticConfig):
    """Settings of DeFlow, ``algo.<name>=...``; the defaults are the paper's.

    Attributes:
        flow_steps: Euler steps M of the prior.
        target_divergence: delta, mean-square shift per action dimension; the task's where None.
        normalize_q_loss: scale the actor's Q term by 1 / mean|Q|.
        divergence_reduction: ``mean`` (the authors' code, and how the paper chooses delta) or ``sum`` (Eq. 10 as printed) over
            action dimensions; the preset's where None, ``mean`` without one.
        log_alpha_init: start of log alpha.
        min_alpha: lower bound of alpha, none where None.
        max_alpha: upper bound of alpha, none where None.
        fixed_alpha: constant multiplier, none where None.
        square_fixed_alpha: multiply by it twice, as the authors' code does; the preset's where None, no without one.
        sampler_precision: of the matrix products that sample the prior's actions for the losses: ``highest``; ``high`` or
            ``medium`` as in ``torch.set_float32_matmul_precision`` (TF32 on a GPU; ``medium`` is bfloat16 on a CPU that has
            it); or ``bfloat16``. What has a gradient, acting and evaluation are always computed in full.
    """

    prior_settings: ClassVar[tuple[str, ...]] = ("flow_steps",)
    choices: ClassVar[Mapping[str, Mapping[str | None, Any]]] = {
        "divergence_reduction": {None: "mean", "paper": "sum", "released": "mean"},
        "square_fixed_alpha": {None: False, "paper": False, "released": True},
    }

    name: str = "deflow"
    flow_steps: int = 10
    target_divergence: float | None = None
    normalize_q_loss: bool = True
    divergence_reduction: str | None = None
    log_alpha_init: float = 1.0
    min_alpha: float | None = None
    max_alpha: float | None = None
    fixed_alpha: float | None = None
    square_fixed_alpha: bool | None = None
    sampler_precision: str = "highest"

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.flow_steps >= 1, "algo.flow_steps", self.flow_steps, "at least 1")
        need(
            self.divergence_reduction in (None, "mean", "sum"),
            "algo.divergence_reduction",
            self.divergence_reduction,
            "mean or sum",
        )
        check_positive(need, self, "target_divergence", "min_alpha", "max_alpha")
        if self.min_alpha is not None and self.max_alpha is not None:
            need(
                self.min_alpha <= self.max_alpha,
                "algo.min_alpha",
                self.min_alpha,
                f"at most algo.max_alpha={self.max_alpha}",
            )
        fixed = self.fixed_alpha
        need(fixed is None or fixed >= 0, "algo.fixed_alpha", fixed, "a number >= 0")
        bounded = self.min_alpha is not None or self.max_alpha is not None
        need(fixed is None or not bounded, "algo.fixed_alpha", fixed, "no bounds beside a fixed alpha")
        precision = self.sampler_precision
        need(precision in PRECISIONS, "algo.sampler_precision", precision, f"one of {', '.join(PRECISIONS)}")


def build_deflow(config: DeFlowConfig, problem: ProblemSpec) -> Learner:
    """Build DeFlow for a problem; settings that are None are the task's.

    Raises:
        ValueError: on a setting out of range.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics
    from deflow_torchrl.algorithms.diagnostics import DeFlowDiagnostics
    from deflow_torchrl.modules import DeFlowActor, RefinementPolicy, make_refinement_network
    from deflow_torchrl.objectives import DeFlowLoss

    fixed_alpha = config.fixed_alpha
    if fixed_alpha is not None and given(config.square_fixed_alpha, False):
        fixed_alpha = fixed_alpha**2
    flow = problem.flow_policy(config.flow_steps, out_keys=("base_action",))
    network = make_refinement_network(*problem.sizes)
    keys = (problem.state_key, "base_action")
    actor = DeFlowActor(
        flow, problem.encoded(RefinementPolicy(network, problem.sizes[1], in_keys=keys, **problem.bounds))
    )
    loss = DeFlowLoss(
        actor,
        problem.critics_of(config),
        target_divergence=given(config.target_divergence, problem.target_divergence),
        q_aggregation=given(config.q_aggregation, problem.q_aggregation),
        normalize_q_loss=config.normalize_q_loss,
        divergence_reduction=cast("Any", given(config.divergence_reduction, "mean")),
        log_alpha_init=config.log_alpha_init,
        min_alpha=config.min_alpha,
        max_alpha=config.max_alpha,
        fixed_alpha=fixed_alpha,
        sampler_precision=cast("Precision", config.sampler_precision),
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        actor,
        evaluated_policies={"prior": actor.prior_policy(), config.name: actor},
        prior=flow,
        diagnostics=DeFlowDiagnostics(loss),
    )


ALGORITHM = Algorithm(name="deflow", title="DeFlow", config=DeFlowConfig, build=build_deflow, alarms=DEFLOW_ALARMS)
