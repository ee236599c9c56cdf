# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Fast CPU versions of the paper's MLP and its Euler sampler, with as few passes over memory as torch's operations allow.

They give the layers' numbers, up to rounding (the tests compare both in double precision):

* ``GELU(x) = x sigmoid(w)``, ``w = 2 sqrt(2/pi) (x + 0.044715 x^3)``. This is the tanh form with one exponential. It is computed
  in place by fused multiply-adds, in a third of the time of ``torch.nn.functional.gelu(approximate="tanh")``. Its derivative
  is computed with it, while x is in the cache, and replaces x.
* Forward and backward of a whole MLP are one node of autograd. Gradients have the layout of the parameters, and no gradient
  is computed for inputs or parameters that need none.
* Networks stacked by ``torch.vmap`` (an ensemble of critics, several seeds) are one batched product per layer.
* The sampler computes the observation's share of the first layer once for all steps, and works in two buffers.

:class:`~deflow_torchrl.modules.networks.MLP` and the sampler of the flow call them where :func:`usable` allows it.
:func:`use_kernels` and the setting ``kernels=false`` of a run turn them off. docs/performance.md says how much time they save.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    get_interpreter_stack,
    is_batchedtensor,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import has_torch_function

LAYER_NORM_EPS = 1e-6
_SLOPE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

_CACHED = 1 << 19  # numbers in one buffer of the sampler, beyond which networks are sampled from one by one
_SWITCH = "DEFLOW_KERNELS"  # an environment variable, so that the processes that a run starts inherit it


def enable_kernels(enabled: bool) -> None:
    """Use the kernels of this module, or the plain layers, in this process and those it starts from now on."""
    os.environ[_SWITCH] = "1" if enabled else "0"


@contextlib.contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """As :func:`enable_kernels`, inside the context."""
    before = os.environ.get(_SWITCH, "1")
    enable_kernels(enabled)
    try:
        yield
    finally:
        os.environ[_SWITCH] = before


def usable(*tensors: Tensor) -> bool:
    """Whether inputs and parameters can go through the kernels.

    They can in eager mode on a CPU, in single or double precision, where nothing else takes part in the computation: no
    autocast, trace, forward-mode derivative, saved-tensor hook, tensor subclass or mode, and of the transforms of
    ``torch.func`` none but a ``vmap`` over some of them. Everything else goes through the plain layers.
    """
    if torch.compiler.is_compiling():
        return False
    transforms = get_interpreter_stack() or ()
    return (
        os.environ.get(_SWITCH) != "0"
        and not has_torch_function(tensors)
        and not torch._C._len_torch_dispatch_stack()
        and _top_saved_tensors_default_hooks(True) is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and all(transform.key() == TransformType.Vmap for transform in transforms)
        and (not transforms or any(is_batchedtensor(tensor) for tensor in tensors))
        and all(_is_plain(tensor, tensors[0].dtype) for tensor in tensors)
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        isinstance(tensor, Tensor)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.dtype == dtype
        and dtype in (torch.float32, torch.float64)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not (tensor.is_inference() and torch.is_grad_enabled())
    )


def mlp(x: Tensor, parameters: Sequence[Tensor], *, layer_norm: bool) -> Tensor:
    """Apply an MLP.

    Args:
        x: input ``[..., in]``.
        parameters: per hidden layer weight ``[width, in]``, bias ``[width]`` and, with ``layer_norm``, its weight and bias
            ``[width]``; then weight and bias of the output. All may be batched by ``torch.vmap``, or be those of an ensemble
            with a dimension N in front.

    Keyword Args:
        layer_norm: a LayerNorm follows every activation.

    Returns:
        Output ``[..., out]``, of an ensemble ``[N, ..., out]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    ensemble = parameters[0].shape[:-2]
    out = _call(functools.partial(_mlp, layer_norm), rows.expand(*ensemble, *rows.shape), *parameters, rows=1)
    return out.reshape(*ensemble, *x.shape[:-1], out.shape[-1])


def sample_flow(observation: Tensor, noise: Tensor, parameters: Sequence[Tensor], *, num_steps: int) -> Tensor:
    """Integrate ``x <- x + v(observation, x, i / M) / M`` from ``noise``, without gradient; shapes as in :func:`mlp`."""
    flat = [part.reshape(-1, part.shape[-1]) for part in (observation, noise)]
    with torch.no_grad():
        return _call(functools.partial(_flow, num_steps), *flat, *parameters, rows=2).reshape(noise.shape)


def integrate_returns(
    condition: Tensor,
    starts: Tensor,
    parameters: Sequence[Tensor],
    *,
    num_steps: int,
    embed: Callable[[Tensor], Tensor],
    embed_time: Callable[[Tensor], Tensor],
) -> Tensor:
    """Integrate ``z <- z + v(cat([condition, embed(z), embed_time(i / M)])) / M`` by N networks, without gradient.

    Args:
        condition: rows ``[R, D]`` of states and actions, whose share of the first layer is computed once.
        starts: z of each row ``[R, n]``.
        parameters: as in :func:`mlp` with ``layer_norm``, of N networks ``[N, ...]``.

    Keyword Args:
        num_steps: M.
        embed: ``[..., 1]`` to the features of z.
        embed_time: ``[1]`` to those of the time.

    Returns:
        z after M steps ``[N, R, n]``.
    """
    count = parameters[0].shape[0]
    integrate = functools.partial(_integrate_returns, num_steps=num_steps, embed=embed, embed_time=embed_time)
    with torch.no_grad():
        rows = [part.expand(count, *part.shape) for part in (condition, starts)]
        return _call(functools.partial(_returns, integrate), *rows, *parameters, rows=2)


_Function = Callable[..., Tensor]
"""Takes rows ``[R, in]`` and parameters as in :func:`mlp`, or all of them with one more dimension ``[N, ...]`` in front."""


def _mlp(layer_norm: bool, x: Tensor, *parameters: Tensor) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters)):
        return _MLP.apply(layer_norm, x, *parameters)
    return _run(x, parameters, layer_norm=layer_norm)[0]


def _hidden(parameters: Sequence[Tensor], layer_norm: bool) -> list[Sequence[Tensor]]:
    size = 4 if layer_norm else 2
    return [parameters[first : first + size] for first in range(0, len(parameters) - 2, size)]


def _run(
    x: Tensor, parameters: Sequence[Tensor], *, layer_norm: bool, keep: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and, if ``keep``, the tensors of each hidden layer that the gradient needs.

    They are the derivative of the activation, the layer's output and, with a LayerNorm, its input, mean, 1 / deviation and
    result.
    """
    kept: list[Tensor] = []
    for weight, bias, *norm in _hidden(parameters, layer_norm):
        pre = _affine(x, weight, bias)
        gate = _gate(pre)
        activation = x = pre * gate if keep else pre.mul_(gate)
        statistics: tuple[Tensor, ...] = ()
        if norm:
            # A weight of ones: torch's kernel without one takes two to three times as long.
            normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], _row(1.0, x), None, LAYER_NORM_EPS)
            gain, shift = (part.unsqueeze(-2) for part in norm)
            x = torch.addcmul(shift, normal, gain)
            statistics = (activation, mean, rstd, normal)
        if keep:
            kept += [_derivative(pre, gate, activation), x, *statistics]
    weight, bias = parameters[-2:]
    return _affine(x, weight, bias), kept


class _MLP(torch.autograd.Function):
    """Forward and backward of a network, or of several stacked ones, as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, layer_norm: bool, *inputs: Tensor) -> Tensor:
        x, *parameters = inputs
        out, kept = _run(x, parameters, layer_norm=layer_norm, keep=True)
        needs = ctx.needs_input_grad[1:]
        # As with the layers, a tensor that the gradient does not need may be changed between forward and backward: x if the
        # first weight needs no gradient; biases and shifts; weights and gains (even places) if nothing below them needs one.
        weights = [
            parameter if number % 2 == 0 and any(needs[: 1 + number]) else None
            for number, parameter in enumerate(parameters)
        ]
        ctx.save_for_backward(x if needs[1] else None, *weights, *kept)
        ctx.layer_norm, ctx.inputs, ctx.versions = layer_norm, inputs, [tensor._version for tensor in inputs]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        x, *parameters = ctx.saved_tensors[: len(needs)]
        kept = ctx.saved_tensors[len(needs) :]
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(ctx, needs, grad)
        per_layer, per_kept = (4, 6) if ctx.layer_norm else (2, 2)
        grads: list[Tensor | None] = [None] * len(parameters)
        for layer in reversed(range((len(parameters) - 2) // per_layer + 1)):
            first = layer * per_layer
            below = kept[(layer - 1) * per_kept : layer * per_kept] if layer else ()
            if needs[1 + first]:
                grads[first] = grad.mT @ (below[1] if below else x)
            if needs[2 + first]:
                grads[first + 1] = grad.sum(-2)
            if not any(needs[: 1 + first]):
                return (None, None, *grads)
            weight = parameters[first]
            # The product of a column with a row is no matrix product to torch, but the slowest of all.
            grad = grad * weight if weight.shape[-2] == 1 else grad @ weight
            if not below:
                return (None, grad, *grads)
            if ctx.layer_norm:
                activation, mean, rstd, normal = below[2:]
                gain, shift = first - 2, first - 1
                if needs[1 + gain]:
                    grads[gain] = (grad * normal).sum(-2)
                if needs[1 + shift]:
                    grads[shift] = grad.sum(-2)
                if not any(needs[: 1 + gain]):
                    return (None, None, *grads)
                grad = torch.ops.aten.native_layer_norm_backward(
                    grad.mul_(parameters[gain].unsqueeze(-2)),
                    activation,
                    activation.shape[-1:],
                    mean,
                    rstd,
                    _row(1.0, activation),
                    None,
                    [True, False, False],
                )[0]
            grad = grad.mul_(below[0])
        raise AssertionError("the first layer returns")


def _differentiable_gradients(ctx: Any, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Return gradients that can be differentiated again (``create_graph=True``), computed by the plain layers."""
    if [tensor._version for tensor in ctx.inputs] != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: an input or a "
            "parameter of an MLP was changed between its call and the gradient"
        )
    # Each alias has a gradient of its own, although one tensor may stand in several places.
    x, *parameters = aliases = [tensor.view_as(tensor) for tensor in ctx.inputs]
    for weight, bias, *norm in _hidden(parameters, ctx.layer_norm):
        x = F.gelu(_affine(x, weight, bias), approximate="tanh")
        if norm and weight.ndim == 2:
            x = F.layer_norm(x, x.shape[-1:], norm[0], norm[1], LAYER_NORM_EPS)
        elif norm:  # as torch.vmap does it
            gain, shift = (part.unsqueeze(-2) for part in norm)
            x = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * gain + shift
    out = _affine(x, *parameters[-2:])
    asked = [alias for alias, need in zip(aliases, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, asked, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _flow(num_steps: int, observation: Tensor, noise: Tensor, *parameters: Tensor) -> Tensor:
    tensors = (observation, noise, *parameters)
    if noise.ndim == 3 and noise[..., 0].numel() * parameters[0].shape[-2] > _CACHED:
        # The buffers of several networks together may not fit into the cache; those of one network do.
        return torch.stack([_integrate(num_steps, *one) for one in zip(*tensors, strict=True)])
    return _integrate(num_steps, *tensors)


def _integrate(num_steps: int, observation: Tensor, noise: Tensor, *parameters: Tensor) -> Tensor:
    (first, first_bias), *hidden = _hidden(parameters, layer_norm=False)
    observation_dim, action_dim = observation.shape[-1], noise.shape[-1]
    share = _affine(observation, first[..., :observation_dim], first_bias)
    moving = first[..., observation_dim:].mT
    point = torch.cat([noise, torch.empty_like(noise[..., :1])], -1)
    x, time = point.split([action_dim, 1], -1)
    # The layers write to two buffers in turn, their gates to a third: all three fit into the cache.
    rows = noise.shape[:-1]
    widths = [first.shape[-2], *(weight.shape[-2] for weight, _ in hidden)]
    buffers = noise.new_empty(3, math.prod(rows) * max(widths))
    *outs, gates = zip(*([_start(buffer, (*rows, width)) for buffer in buffers] for width in widths), strict=True)
    layers = [
        (_term(bias, weight), weight.mT, outs[number % 2][number], gates[number])
        for number, (weight, bias) in enumerate(hidden, start=1)
    ]
    last, last_bias = parameters[-2].mT, _term(parameters[-1], parameters[-2])
    velocity = torch.empty_like(noise)
    affine = _fused_product(first)
    for step in range(num_steps):
        time.fill_(step / num_steps)
        h = affine(share, point, moving, out=outs[0][0])
        h.mul_(_gate(h, out=gates[0]))
        for bias, weight, out, gate in layers:
            h = affine(bias, h, weight, out=out)
            h.mul_(_gate(h, out=gate))
        x.add_(affine(last_bias, h, last, out=velocity), alpha=1 / num_steps)
    return x.contiguous()


def _returns(integrate: _Function, condition: Tensor, starts: Tensor, *parameters: Tensor) -> Tensor:
    # One network after the other, and as many rows at once as keep a buffer in the cache.
    rows = max(_CACHED // 2 // (starts.shape[-1] * parameters[0].shape[-2]), 1)
    return torch.stack(
        [
            torch.cat([integrate(*block, own) for block in zip(states.split(rows), z.split(rows), strict=True)])
            for states, z, *own in zip(condition, starts, *parameters, strict=True)
        ]
    )


def _integrate_returns(
    condition: Tensor,
    z: Tensor,
    parameters: Sequence[Tensor],
    *,
    num_steps: int,
    embed: Callable[[Tensor], Tensor],
    embed_time: Callable[[Tensor], Tensor],
) -> Tensor:
    (first, first_bias, *norm), *hidden = _hidden(parameters, layer_norm=True)
    layers = []
    for weight, bias, *own_norm in (*hidden, parameters[-2:]):
        # The LayerNorm before a layer has no gain and shift of its own: they are put into the layer.
        gain, shift = norm
        layers.append(((weight * gain).mT, torch.addmv(bias, weight, shift)))
        norm = own_norm
    times = torch.arange(num_steps, dtype=z.dtype, device=z.device).unsqueeze(-1) / num_steps
    features = embed_time(times)
    of_time = features.shape[-1]
    of_condition = condition.shape[-1]
    shares = first.mT.split([of_condition, first.shape[-1] - of_condition - of_time, of_time])
    fixed = torch.addmm(first_bias, condition, shares[0]).unsqueeze(1)
    moving = features @ shares[2]
    buffer, gates = (z.new_empty(z.numel(), first.shape[-2]) for _ in range(2))
    for step in range(num_steps):
        h = torch.mm(embed(z.reshape(-1, 1)), shares[1], out=buffer)
        h.view(*z.shape, -1).add_(fixed + moving[step])
        for weight, bias in layers:
            h.mul_(_gate(h, out=gates if h.shape == gates.shape else None))
            normal = torch.native_layer_norm(h, h.shape[-1:], _row(1.0, h), None, LAYER_NORM_EPS)[0]
            h = torch.addmm(bias, normal, weight, out=buffer if len(bias) == buffer.shape[-1] else None)
        z = torch.add(z, h.view(z.shape), alpha=1 / num_steps)
    return z


def _start(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _fused_product(weight: Tensor) -> Any:
    """Return ``f(term, left, right) = term + left right``, for matrices or, if the weights are stacked, for batches of them."""
    return torch.addmm if weight.ndim == 2 else torch.baddbmm


def _term(bias: Tensor, weight: Tensor) -> Tensor:
    return bias if weight.ndim == 2 else bias.unsqueeze(-2)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W^T + b``."""
    return _fused_product(weight)(_term(bias, weight), x, weight.mT)


def _gate(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the factor of x in GELU: sigmoid(w), w = 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    return torch.addcmul(_row(_SLOPE, x), x, x, value=_SLOPE * _CUBIC, out=out).mul_(x).sigmoid_()


def _derivative(x: Tensor, gate: Tensor, activation: Tensor) -> Tensor:
    """Return d(x g(w))/dx = g + (x g - x g g) w', written over ``gate``; ``x`` is overwritten too."""
    # In this order: x w' may overflow where the bracket is zero.
    bracket = torch.addcmul(activation, activation, gate, value=-1)
    return gate.addcmul_(bracket, torch.addcmul(_row(_SLOPE, x), x, x, value=3 * _SLOPE * _CUBIC, out=x))


def _row(value: float, like: Tensor) -> Tensor:
    """Return a constant for each column: torch's fused multiply-add is three times as fast with it as with a scalar."""
    # Not cached: a tensor made under a FakeTensorMode or in inference mode must not be used outside of it.
    return torch.full(like.shape[-1:], value, dtype=like.dtype, device=like.device)


def _call(function: _Function, *tensors: Tensor, rows: int) -> Tensor:
    """Call the function once, also under ``torch.vmap``, whose dimension becomes more rows or more networks."""
    if not any(is_batchedtensor(tensor) for tensor in tensors):
        return function(*tensors)
    vmap: Any = retrieve_current_functorch_interpreter()  # of torch.vmap: usable() allows no other
    unwrapped, dims = zip(*(_unwrap_batched(tensor, vmap.level()) for tensor in tensors), strict=True)
    with vmap.lower():
        if all(dim is None for dim in dims):
            return _call(function, *tensors, rows=rows)
        flat, shape = _flatten(vmap.batch_size(), dims, unwrapped, rows=rows)
        out = _call(function, *flat, rows=rows)
        out = out.reshape(*shape, *out.shape[1:])
    return _add_batch_dim(out, 0, vmap.level())


def _flatten(
    batch: int, dims: Sequence[int | None], tensors: Sequence[Tensor], *, rows: int
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return tensors batched by vmap in the shapes that the functions take, and the leading shape of their result.

    The first ``rows`` of the tensors hold rows, the others are parameters. Where no parameter is batched, the batch is more
    rows. Otherwise it is put in front of every tensor, and merged with the dimension that an inner vmap put there.
    """
    stacked = tensors[rows].ndim - (dims[rows] is not None) == 3
    front = [
        tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    if all(dim is None for dim in dims[rows:]) and not stacked:
        return [tensor.flatten(0, 1) for tensor in front[:rows]] + list(tensors[rows:]), front[0].shape[:2]
    if stacked:
        return [tensor.flatten(0, 1) for tensor in front], front[0].shape[:2]
    return front, (batch,)
