# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Settings of the methods, free of torch so that the command line can check them at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DeFlowConfig:
    """Settings of DeFlow, ``algo.<name>=...``; the defaults are the paper's.

    Attributes:
        lr: learning rate of the one Adam.
        tau: share of the critics that moves into their targets at each step.
        flow_steps: Euler steps M of the prior.
        gamma: discount; the task's where None.
        q_aggregation: ``mean`` or ``min`` over the target critics; the task's where None.
        target_divergence: delta, mean-square shift per action dimension; the task's where None.
        normalize_q_loss: scale the actor's Q term by 1 / mean|Q|.
        divergence_reduction: ``mean`` or ``sum`` over action dimensions.
        log_alpha_init: start of log alpha.
        min_alpha: lower bound of alpha, none where None.
        max_alpha: upper bound of alpha, none where None.
        fixed_alpha: constant multiplier, none where None.
        sampler_precision: of the matrix products that sample the prior's actions for the losses: ``highest``; ``high`` or
            ``medium`` as in ``torch.set_float32_matmul_precision`` (TF32 on a GPU; ``medium`` is bfloat16 on a CPU that has
            it); or ``bfloat16``. What has a gradient, acting and evaluation are always computed in full.
    """

    name: str = "deflow"
    lr: float = 3e-4
    tau: float = 0.005
    flow_steps: int = 10
    gamma: float | None = None
    q_aggregation: str | None = None
    target_divergence: float | None = None
    normalize_q_loss: bool = True
    divergence_reduction: str = "mean"
    log_alpha_init: float = 1.0
    min_alpha: float | None = None
    max_alpha: float | None = None
    fixed_alpha: float | None = None
    sampler_precision: str = "highest"
