# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The terms of the losses as functions of tensors, each by its textbook name.

Shapes: ``[*B]`` of samples, A action dimensions. Every function returns one number a sample, ``[*B]``, unless it says another
shape; the losses reduce them. ``sg[.]`` in an equation is the caller's ``detach`` or ``no_grad`` where the function has none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def flow_matching(
    velocity: Callable[[Tensor, Tensor], Tensor],
    action: Tensor,
    noise: Tensor,
    time: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """``|v(x_t, t) - (a - z)|^2``, mean over action dimensions, with ``x_t = (1 - t) z + t a`` (DeFlow Eq. 5).

    Args:
        velocity: v(x, t) of the sample's state: ``[*B, A]`` and ``[*B, 1]`` to ``[*B, A]``.
        action: a ``[*B, A]``.
        noise: z ``[*B, A]``.
        time: t ``[*B, 1]`` in [0, 1].
        valid: of a chunk of h actions: which of its steps count ``[*B, h]``, or whether the row does ``[*B, 1]``.
    """
    x = (1 - time) * noise + time * action
    error = (velocity(x, time) - (action - noise)).square()
    if valid is not None:
        error = error * valid.repeat_interleave(action.shape[-1] // valid.shape[-1], -1)
    return error.mean(-1)


def noise_prediction(predicted: Tensor, noise: Tensor) -> Tensor:
    """``|eps(s, x_t, t) - z|^2``, summed over action dimensions (DDPM; IDQL and SRPO)."""
    return (predicted - noise).square().sum(-1)


def divergence(shift: Tensor, reduction: str) -> Tensor:
    """D = |da|^2 of the unclipped shift ``[*B, A]``, the mean or the sum over action dimensions (DeFlow Eq. 10)."""
    squared = shift.square()
    return squared.mean(-1) if reduction == "mean" else squared.sum(-1)


def trust_region(qvalue: Tensor, divergence: Tensor, *, alpha: Tensor | float, scale: Tensor | float) -> Tensor:
    """``-lambda Q(s, a) + sg[alpha] D`` (DeFlow Eq. 11); ``alpha`` and ``scale``, which is lambda, have no gradient."""
    return -scale * qvalue + alpha * divergence


def multiplier(log_alpha: Tensor, excess: Tensor) -> Tensor:
    """``-log(alpha) sg[excess]`` (DeFlow Eq. 12 in log alpha): alpha rises where a constraint is exceeded."""
    return -log_alpha * excess.detach()


def temperature(alpha: Tensor, log_prob: Tensor, target_entropy: Tensor | float) -> Tensor:
    """``alpha (-sg[log pi] - H)``: alpha = exp(log alpha) rises where the entropy is below H (FQL's SAC)."""
    return alpha * (-log_prob.detach() - target_entropy)


def distillation(output: Tensor, taught: Tensor) -> Tensor:
    """``|mu(s, z) - sg[b(s, z)]|^2``, mean over action dimensions (FQL)."""
    return (output - taught.detach()).square().mean(-1)


def expectile_regression(
    advantage: Tensor, expectile: Tensor | float, *, weight_dtype: torch.dtype | None = None
) -> Tensor:
    """``|expectile - 1(u < 0)| u^2`` of u = sg[Q] - V (IQL Eq. 5); the weight is rounded to u's type, or ``weight_dtype``."""
    weight = torch.where(advantage < 0, 1 - expectile, expectile)
    return weight.to(weight_dtype or advantage.dtype) * advantage.square()


def advantage_weight(advantage: Tensor, temperature: Tensor | float, maximum: Tensor | float) -> Tensor:
    """``sg[min(exp(temperature (Q - V)), maximum)]`` (advantage-weighted regression, IQL Eq. 7)."""
    return (_like(temperature, advantage) * advantage.detach()).exp().clamp(max=_like(maximum, advantage))


def squared_distance(action: Tensor, other: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """``weight |a - a'|^2``, summed over action dimensions (ReBRAC's penalties)."""
    distance = (action - other).square().sum(-1)
    return _like(weight, distance) * distance


def _like(coefficient: Tensor | float, value: Tensor) -> Tensor | float:
    """A coefficient in the type of what it multiplies: a single sample would take the coefficient's double precision."""
    return coefficient.to(value.dtype) if isinstance(coefficient, Tensor) else coefficient
