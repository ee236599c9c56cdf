# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The paper's networks: one MLP shape for the velocity, the refinement, policies and the critics.

Each hidden layer is ``Linear -> tanh-GELU`` (critics add ``LayerNorm`` with eps 1e-6 *after* the activation), the output is
a plain ``Linear``; weights are Xavier-uniform and biases zero. Width and depth are 4 x 512 in every experiment of the paper.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from deflow_torchrl.modules import kernels

PAPER_HIDDEN_DIMS = (512, 512, 512, 512)


class MLP(nn.Sequential):
    """The MLP of :func:`make_mlp`: calls its layers in a row, or :mod:`.kernels` in eager mode on a CPU.

    Layers that were replaced, parametrised, hooked or wrapped are always called.
    """

    __jit_unused_properties__ = ["layer_norm"]  # for torch.jit.script, which compiles the loop over the layers alone

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        if not torch.jit.is_scripting():
            parameters = self.kernel_parameters(x)
            if parameters is not None and x.shape[-1:] == parameters[0].shape[-1:]:
                return kernels.mlp(x, parameters, layer_norm=self.layer_norm)
        for layer in self:
            x = layer(x)
        return x

    @property
    def layer_norm(self) -> bool:
        """Whether a LayerNorm follows every activation."""
        return any(isinstance(layer, nn.LayerNorm) for layer in self._modules.values())

    def kernel_parameters(self, *inputs: Tensor) -> list[Tensor] | None:
        """Return the parameters in the order of :func:`.kernels.mlp`, or None where the inputs must go through the layers."""
        if torch.compiler.is_compiling() or not self.is_as_built():
            return None
        layers = [layer for layer in self._modules.values() if not isinstance(layer, nn.GELU)]
        # By attribute: plain tensors that a loss swaps in are no registered parameters.
        parameters = [getattr(layer, kind) for layer in layers for kind in ("weight", "bias")]
        return parameters if kernels.usable(*inputs, *parameters) else None

    def is_as_built(self) -> bool:
        """Whether a call of this network does nothing but call the layers of :func:`make_mlp` one after another."""
        layers = tuple(self._modules.values())
        kinds = 3 if self.layer_norm else 2
        return (
            type(self) is MLP
            and len(layers) > kinds
            and len(layers) % kinds == 1
            and not _has_any_global_hook()
            and _calls() == _ORIGINAL_CALLS
            and all(_LAYERS[number % kinds](layer) and not is_wrapped(layer) for number, layer in enumerate(layers))
        )


def is_wrapped(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's ``forward``: it has hooks or a replaced or compiled forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or "forward" in vars(module)
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
        layers += [_XavierLinear(fan_in, fan_out), nn.GELU(approximate="tanh")]
        if layer_norm:
            layers.append(nn.LayerNorm(fan_out, eps=kernels.LAYER_NORM_EPS))
    layers.append(_XavierLinear(widths[-2], widths[-1], head_gain))
    return MLP(*layers)


class _XavierLinear(nn.Linear):
    """``nn.Linear`` whose ``reset_parameters`` is the paper's initialisation, so that resetting a loss restores it."""

    def __init__(self, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
        self.gain = gain  # first: nn.Linear's constructor initialises
        super().__init__(fan_in, fan_out)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=self.gain)
        nn.init.zeros_(self.bias)


class _InitialisedLinear(nn.Linear):
    """``nn.Linear`` with weights by a given function and zero biases."""

    def __init__(self, fan_in: int, fan_out: int, initialise: Callable[[Tensor], Any]) -> None:
        self.initialise = initialise
        super().__init__(fan_in, fan_out)

    def reset_parameters(self) -> None:
        self.initialise(self.weight)
        nn.init.zeros_(self.bias)


def make_plain_mlp(
    in_features: int,
    out_features: int,
    hidden_dims: Sequence[int],
    *,
    activation: type[nn.Module] = nn.ReLU,
    init: Literal["xavier", "orthogonal", "torch"] = "xavier",
    input_norm: bool = False,
) -> nn.Sequential:
    """Build an MLP as methods that this package compares with have it in their own code: no LayerNorm between layers.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        hidden_dims: widths of the hidden layers.

    Keyword Args:
        activation: behind every hidden layer.
        init: Xavier-uniform; orthogonal of gain sqrt(2), of the last layer 0.01; or torch's own, also of biases, else zero.
        input_norm: put a ``LayerNorm(eps=1e-6)`` before the first layer.

    Examples:
        >>> make_plain_mlp(3, 1, (8, 8), input_norm=True)(torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """

    def linear(fan_in: int, fan_out: int, gain: float) -> nn.Module:
        if init == "torch":
            return nn.Linear(fan_in, fan_out)
        if init == "xavier":
            return _InitialisedLinear(fan_in, fan_out, nn.init.xavier_uniform_)
        return _InitialisedLinear(fan_in, fan_out, functools.partial(nn.init.orthogonal_, gain=gain))

    layers: list[nn.Module] = [nn.LayerNorm(in_features, eps=kernels.LAYER_NORM_EPS)] if input_norm else []
    widths = [in_features, *hidden_dims]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [linear(fan_in, fan_out, math.sqrt(2)), activation()]
    return nn.Sequential(*layers, linear(widths[-1], out_features, 0.01))


MakeMLP = Callable[[int, int, Sequence[int]], nn.Module]
"""Makes a network from its widths: input, output, hidden layers."""


def _calls() -> tuple[object, ...]:
    """Return the functions that a call of an :class:`MLP` runs; other libraries may replace them for a whole class."""
    return (
        nn.Module.__call__,
        MLP.forward,
        _XavierLinear.forward,
        nn.GELU.forward,
        nn.LayerNorm.forward,
        F.linear,
        F.gelu,
        F.layer_norm,
    )


_ORIGINAL_CALLS = _calls()


class CheckedModule(TensorDictModule):
    """A TensorDictModule whose error names the entries whose dtype does not fit the network.

    Raises:
        TypeError: by calls, naming the entries, their dtypes and the network's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As :class:`tensordict.nn.TensorDictModule`."""
        try:
            return super().forward(*args, **kwargs)
        except RuntimeError as error:
            raise_dtype_error(error, args[0] if args else kwargs, self)


def raise_dtype_error(error: RuntimeError, inputs: Any, module: TensorDictModule) -> NoReturn:
    """Raise TypeError if ``error`` comes from entries whose dtype is not that of the module's tensors, else ``error``.

    Args:
        error: what a call of the module raised.
        inputs: the TensorDict or the keyword arguments that it was called with.
        module: the module.
    """
    held = (tensor for part in module.modules() for tensor in (*part._parameters.values(), *vars(part).values()))
    own = next((t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()), None)
    known = own is not None and "type" in str(error) and isinstance(inputs, TensorDictBase | Mapping)
    entries = {key: inputs.get(key, None) for key in module.in_keys} if known else {}
    wrong = [f"{key!r} is {entry.dtype}" for key, entry in entries.items() if entry is not None and entry.dtype != own]
    if not wrong:
        raise error
    raise TypeError(
        f"{' and '.join(wrong)}, but the network computes in {own}: convert the input, "
        "for example with torchrl.envs.DoubleToFloat"
    ) from error


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

    def stacked(self, observation: Tensor, action: Tensor, params: TensorDictBase) -> Tensor | None:
        """Return values ``[J, ..., 1]`` of J networks of this layout, whose parameters ``params`` stacks, in one pass.

        None where each network has to be called by itself: without kernels, or where calls are replaced or hooked.
        """
        mlp = self.mlp
        if torch.compiler.is_compiling() or type(self) is not StateActionValue or not isinstance(mlp, MLP):
            return None
        x, layers = torch.cat([observation, action], -1), params.get("mlp")
        names = [name for name, layer in mlp._modules.items() if not isinstance(layer, nn.GELU)]
        parameters = [layers.get((name, kind)) for name in names for kind in ("weight", "bias")]
        if is_wrapped(self) or is_wrapped(mlp) or not mlp.is_as_built() or not kernels.usable(x, *parameters):
            return None
        return kernels.mlp(x, parameters, layer_norm=mlp.layer_norm)


def make_velocity_network(
    observation_dim: int,
    action_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    layer_norm: bool = False,
) -> nn.Sequential:
    """Velocity field v_psi: ``cat([s, x, t], -1)`` of width ``O + A + 1`` to a velocity ``[..., A]``; t enters raw.

    With ``layer_norm`` as the critics' network.

    Examples:
        >>> import torch
        >>> make_velocity_network(3, 2, (8, 8))(torch.zeros(5, 3 + 2 + 1)).shape
        torch.Size([5, 2])
    """
    return make_mlp(observation_dim + action_dim + 1, action_dim, hidden_dims, layer_norm=layer_norm)


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


_with_norm = functools.partial(make_mlp, layer_norm=True)


def make_value_network(
    observation_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    observation_key: NestedKey = "observation",
    mlp: MakeMLP | None = None,
) -> TensorDictModule:
    """V(s), the critics' MLP, or another, without an action: reads ``observation_key``, writes ``state_value [..., 1]``."""
    return CheckedModule(
        (mlp or _with_norm)(observation_dim, 1, hidden_dims),
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
    mlp: MakeMLP | None = None,
) -> list[TensorDictModule]:
    """Independent critics, as the list the losses take (a list keeps each critic's own initialisation); ``mlp`` is another net.

    Returns:
        ``num_qvalue_nets`` modules reading (``observation_key``, ``action_key``) and writing ``state_action_value [..., 1]``.
    """
    return [
        CheckedModule(
            StateActionValue((mlp or _with_norm)(observation_dim + action_dim, 1, hidden_dims)),
            in_keys=[observation_key, action_key],
            out_keys=["state_action_value"],
        )
        for _ in range(num_qvalue_nets)
    ]


class _NoisyValue(nn.Module):
    """Q(s, a, n): ``cat([observation, action, noise], -1)`` through an MLP to one value."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.mlp(torch.cat(inputs, -1))


def make_noisy_qvalue_networks(
    observation_dim: int,
    action_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    num_qvalue_nets: int = 2,
    observation_key: NestedKey = "observation",
) -> list[TensorDictModule]:
    """FAN's critics, as :func:`make_qvalue_networks`, which also read ``critic_noise [..., A]``."""
    return [
        CheckedModule(
            _NoisyValue(make_mlp(observation_dim + 2 * action_dim, 1, hidden_dims, layer_norm=True)),
            in_keys=[observation_key, "action", "critic_noise"],
            out_keys=["state_action_value"],
        )
        for _ in range(num_qvalue_nets)
    ]
