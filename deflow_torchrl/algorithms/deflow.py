# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow, assembled: the paper's networks, DeFlowLoss, one Adam, soft targets."""

from __future__ import annotations

from typing import TypeVar, cast

from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.algorithms.base import Algorithm, Learner, ProblemSpec, trainable
from deflow_torchrl.algorithms.diagnostics import DeFlowDiagnostics
from deflow_torchrl.algorithms.settings import DeFlowConfig
from deflow_torchrl.modules import (
    DeFlowActor,
    FlowMatchingPolicy,
    RefinementPolicy,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)
from deflow_torchrl.modules.precision import Precision
from deflow_torchrl.objectives import DeFlowLoss

_T = TypeVar("_T")


def build_deflow(config: DeFlowConfig, problem: ProblemSpec) -> Learner:
    """Build DeFlow for a problem; settings that are None are the task's.

    Raises:
        ValueError: on a setting out of range.
    """
    sizes = (problem.observation_dim, problem.action_dim, problem.hidden_dims)
    flow = FlowMatchingPolicy(
        make_velocity_network(*sizes), problem.action_dim, config.flow_steps, out_keys=("base_action",)
    )
    actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(*sizes), problem.action_dim, low=-1.0, high=1.0))
    critics = [critic.to(problem.device) for critic in make_qvalue_networks(*sizes)]
    loss = DeFlowLoss(
        actor.to(problem.device),
        critics,
        target_divergence=_given(config.target_divergence, problem.target_divergence),
        q_aggregation=_given(config.q_aggregation, problem.q_aggregation),
        normalize_q_loss=config.normalize_q_loss,
        divergence_reduction=config.divergence_reduction,
        log_alpha_init=config.log_alpha_init,
        min_alpha=config.min_alpha,
        max_alpha=config.max_alpha,
        fixed_alpha=config.fixed_alpha,
        sampler_precision=cast("Precision", config.sampler_precision),
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=_given(config.gamma, problem.gamma), device=problem.device)
    return Learner(
        loss=loss,
        policy=actor,
        evaluated_policies={"prior": actor.prior_policy(), "deflow": actor},
        param_groups=[{"params": trainable(loss), "lr": config.lr}],
        target_updater=SoftUpdate(loss, tau=config.tau),
        prior=flow,
        diagnostics=DeFlowDiagnostics(loss),
    )


def _given(setting: _T | None, task_value: _T) -> _T:
    return task_value if setting is None else setting


DEFLOW = Algorithm(name="deflow", config=DeFlowConfig, build=build_deflow)
