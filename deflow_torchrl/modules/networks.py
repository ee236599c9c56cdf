# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The paper's networks: one MLP shape for the velocity, the refinement and the critics.

Each hidden layer is ``Linear -> tanh-GELU`` (critics add ``LayerNorm`` with eps 1e-6 *after* the activation), the output is
a plain ``Linear``; weights are Xavier-uniform and biases zero. Width and depth are 4 x 512 in every experiment of the paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

PAPER_HIDDEN_DIMS = (512, 512, 512, 512)


def make_mlp(in_features: int, out_features: int, hidden_dims: Sequence[int], *, layer_norm: bool) -> nn.Sequential:
    """Build the MLP shared by all parts.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        hidden_dims: widths of the hidden layers; at least one, all positive.

    Keyword Args:
        layer_norm: put a ``LayerNorm(eps=1e-6)`` behind every activation (critics) or none (actors).

    Raises:
        ValueError: if a width is not positive or ``hidden_dims`` is empty.
    """
    widths = [in_features, *hidden_dims, out_features]
    if not hidden_dims or min(widths) < 1:
        raise ValueError(f"an MLP needs positive widths and at least one hidden layer, got {widths}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers += [_linear(fan_in, fan_out), nn.GELU(approximate="tanh")]
        if layer_norm:
            layers.append(nn.LayerNorm(fan_out, eps=1e-6))
    layers.append(_linear(widths[-2], widths[-1]))
    return nn.Sequential(*layers)


class _XavierLinear(nn.Linear):
    """``nn.Linear`` whose ``reset_parameters`` is the paper's initialisation, so that resetting a loss restores it."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    return _XavierLinear(fan_in, fan_out)


class StateActionValue(nn.Module):
    """Q(s, a) of one tensor pair: ``cat([observation, action], -1)`` through an MLP to one value.

    Args:
        mlp: maps ``[..., observation_dim + action_dim]`` to ``[..., 1]``.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the value ``[..., 1]`` of ``observation [..., O]`` and ``action [..., A]``."""
        return self.mlp(torch.cat([observation, action], -1))


def make_velocity_network(
    observation_dim: int, action_dim: int, hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS
) -> nn.Sequential:
    """Velocity field v_psi: ``cat([s, x, t], -1)`` of width ``O + A + 1`` to a velocity ``[..., A]``; t enters raw.

    Examples:
        >>> import torch
        >>> make_velocity_network(3, 2, (8, 8))(torch.zeros(5, 3 + 2 + 1)).shape
        torch.Size([5, 2])
    """
    return make_mlp(observation_dim + action_dim + 1, action_dim, hidden_dims, layer_norm=False)


def make_refinement_network(
    observation_dim: int, action_dim: int, hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS
) -> nn.Sequential:
    """Refinement f_phi: ``cat([s, base_action], -1)`` to an unbounded shift ``[..., A]`` (no tanh, no small last layer)."""
    return make_mlp(observation_dim + action_dim, action_dim, hidden_dims, layer_norm=False)


def make_qvalue_networks(
    observation_dim: int,
    action_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    num_qvalue_nets: int = 2,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> list[TensorDictModule]:
    """Independent critics, as the list the losses take (a list keeps each critic's own initialisation).

    Returns:
        ``num_qvalue_nets`` modules reading (``observation_key``, ``action_key``) and writing ``state_action_value [..., 1]``.
    """
    return [
        TensorDictModule(
            StateActionValue(make_mlp(observation_dim + action_dim, 1, hidden_dims, layer_norm=True)),
            in_keys=[observation_key, action_key],
            out_keys=["state_action_value"],
        )
        for _ in range(num_qvalue_nets)
    ]
