# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The paper's networks: one MLP shape for the velocity, the refinement, policies and the critics.

Each hidden layer is ``Linear -> tanh-GELU`` (critics add ``LayerNorm`` with eps 1e-6 *after* the activation), the output is
a plain ``Linear``; weights are Xavier-uniform and biases zero. Width and depth are 4 x 512 in every experiment of the paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules import kernels

PAPER_HIDDEN_DIMS = (512, 512, 512, 512)


class MLP(nn.Sequential):
    """What :func:`make_mlp` builds: its layers in a row, or in eager mode on a CPU the same function by :mod:`.kernels`.

    Layers that were replaced, parametrised or hooked are called, always.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        parameters = self.kernel_parameters(x)
        if parameters is None:
            return super().forward(x)
        return kernels.mlp(x, parameters, layer_norm=self.layer_norm)

    @property
    def layer_norm(self) -> bool:
        """Whether a LayerNorm follows every activation."""
        return any(isinstance(layer, nn.LayerNorm) for layer in self._modules.values())

    def kernel_parameters(self, x: Tensor, stacked: TensorDictBase | None = None) -> list[Tensor] | None:
        """The parameters in the order of :func:`.kernels.mlp`, or None where ``x`` has to go through the layers.

        Args:
            x: the input.
            stacked: parameters of an ensemble of such MLPs, each with a dimension N in front, in the place of this one's.
        """
        if not kernels.usable(x) or not self._is_as_built():
            return None
        weighted = [(name, kind) for name in self._modules for kind in ("weight", "bias") if not self._is_gelu(name)]
        if stacked is not None:
            return [stacked.get(entry) for entry in weighted]
        # By attribute: a loss that swaps in plain tensors puts them beside the registered parameters.
        return [getattr(self._modules[name], kind) for name, kind in weighted]

    def _is_gelu(self, name: str) -> bool:
        return isinstance(self._modules[name], nn.GELU)

    def _is_as_built(self) -> bool:
        layers = tuple(self._modules.values())
        kinds = 3 if self.layer_norm else 2
        return (
            type(self) is MLP
            and len(layers) > kinds
            and len(layers) % kinds == 1
            and all(_LAYERS[number % kinds](layer) and not has_hooks(layer) for number, layer in enumerate(layers))
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see the module's own calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is _XavierLinear and layer.bias is not None


def _is_tanh_gelu(layer: nn.Module) -> bool:
    return type(layer) is nn.GELU and layer.approximate == "tanh"


def _is_norm(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.LayerNorm
        and layer.eps == kernels.LAYER_NORM_EPS
        and len(layer.normalized_shape) == 1
        and layer.weight is not None
        and layer.bias is not None
    )


_LAYERS = (_is_linear, _is_tanh_gelu, _is_norm)


def make_mlp(
    in_features: int, out_features: int, hidden_dims: Sequence[int], *, layer_norm: bool, head_gain: float = 1.0
) -> nn.Sequential:
    """Build the MLP shared by all parts.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        hidden_dims: widths of the hidden layers; at least one, all positive.

    Keyword Args:
        layer_norm: put a ``LayerNorm(eps=1e-6)`` behind every activation (critics) or none (actors).
        head_gain: factor of the last layer's initial bound.

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
            layers.append(nn.LayerNorm(fan_out, eps=kernels.LAYER_NORM_EPS))
    layers.append(_linear(widths[-2], widths[-1], head_gain))
    return MLP(*layers)


class _XavierLinear(nn.Linear):
    """``nn.Linear`` whose ``reset_parameters`` is the paper's initialisation, so that resetting a loss restores it."""

    def __init__(self, fan_in: int, fan_out: int, gain: float) -> None:
        self.gain = gain  # first: nn.Linear's constructor initialises
        super().__init__(fan_in, fan_out)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=self.gain)
        nn.init.zeros_(self.bias)


def _linear(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    return _XavierLinear(fan_in, fan_out, gain)


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

    def ensemble(
        self, observation: Tensor, action: Tensor, params: TensorDictBase, *, frozen: bool = False
    ) -> Tensor | None:
        """Values ``[N, ..., 1]`` of N critics whose parameters ``params`` stacks; None where there is no kernel for them."""
        if (
            type(self) is not StateActionValue
            or not isinstance(self.mlp, MLP)
            or has_hooks(self)
            or has_hooks(self.mlp)
        ):
            return None
        x = torch.cat([observation, action], -1)
        parameters = self.mlp.kernel_parameters(x, params.get("mlp"))
        if parameters is None:
            return None
        if frozen:
            parameters = [parameter.detach() for parameter in parameters]
        return kernels.mlp(x, parameters, layer_norm=self.mlp.layer_norm)


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


def make_policy_network(
    observation_dim: int, action_dim: int, hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS
) -> nn.Sequential:
    """Head of a Gaussian or deterministic policy: s to ``[..., A]``, its last layer a tenth of the others' size at first.

    FQL's actors: variance scaling 0.01 in the last layer, which is a bound 0.1 times Xavier's; no LayerNorm.

    Examples:
        >>> import torch
        >>> make_policy_network(3, 2, (8, 8))(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    return make_mlp(observation_dim, action_dim, hidden_dims, layer_norm=False, head_gain=0.1)


def make_value_network(
    observation_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    observation_key: NestedKey = "observation",
) -> TensorDictModule:
    """V(s), the critics' MLP without an action: reads ``observation_key`` and writes ``state_value [..., 1]``."""
    return TensorDictModule(
        make_mlp(observation_dim, 1, hidden_dims, layer_norm=True),
        in_keys=[observation_key],
        out_keys=["state_value"],
    )


def make_one_step_network(
    observation_dim: int, action_dim: int, hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS
) -> nn.Sequential:
    """FQL's one-step policy mu: ``cat([s, z], -1)`` to an unbounded action ``[..., A]`` (no tanh, no small last layer)."""
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
