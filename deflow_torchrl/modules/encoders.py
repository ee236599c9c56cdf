# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Encoders of pictures: FQL's IMPALA network (https://arxiv.org/abs/2502.02538, https://arxiv.org/abs/1802.01561)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Composite, TensorSpec

from deflow_torchrl.modules.networks import _XavierLinear

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "impala_small": {},
    "impala": {"num_blocks": 2},
    "impala_large": {"num_blocks": 2, "stack_sizes": (64, 128, 128), "mlp_hidden_dims": (1024,)},
    "impala_debug": {"stack_sizes": (4, 4)},
}
"""Arguments of :class:`ImpalaEncoder` by the name of the encoder."""


class ImpalaEncoder(nn.Module):
    """Encode pictures, channels last, by stacks of convolution, max pooling and residual blocks.

    Each stack is ``conv 3x3 -> max pool 3x3, stride 2 -> num_blocks x (x + conv(relu(conv(relu(x)))))``. Behind the last one
    follow ``relu``, the numbers in the order height, width, channel, and ``Linear -> tanh-GELU`` for each of
    ``mlp_hidden_dims``. The pool pads as "SAME" does: of an even size nothing before and one after, of an odd size one on either
    side. Weights are Xavier-uniform, biases zero. ``parameters()`` gives the convolution, then the two of each block, of every
    stack, then the linear layers, each its weight and its bias.

    Weights have torch's layout. A convolution of the reference, ``[3, 3, C_in, C_out]``, is ``kernel.permute(3, 2, 0, 1)``
    here, and a dense layer ``kernel.T``.

    Args:
        in_channels: channels C of a picture, those of stacked frames together.

    Keyword Args:
        stack_sizes: channels of each stack.
        num_blocks: residual blocks of a stack.
        mlp_hidden_dims: widths of the linear layers; the last one is the width of the encoding.
        image_size: height and width of a picture, one number where they are equal.

    Raises:
        ValueError: if a size is not positive or there is no stack or linear layer; by calls, on pictures of another shape.
        TypeError: by calls, on pictures that are neither uint8 nor of the network's type.

    Examples:
        >>> import torch
        >>> encoder = ImpalaEncoder(3, image_size=32)
        >>> encoder(torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)).shape
        torch.Size([5, 512])
    """

    def __init__(
        self,
        in_channels: int = 9,
        *,
        stack_sizes: Sequence[int] = (16, 32, 32),
        num_blocks: int = 1,
        mlp_hidden_dims: Sequence[int] = (512,),
        image_size: int | Sequence[int] = 64,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        sizes = [in_channels, *stack_sizes, num_blocks, *mlp_hidden_dims, height, width]
        if not stack_sizes or not mlp_hidden_dims or min(sizes) < 1:
            raise ValueError(
                "an encoder needs positive sizes, a stack and a linear layer, got "
                f"in_channels={in_channels}, stack_sizes={stack_sizes}, num_blocks={num_blocks}, "
                f"mlp_hidden_dims={mlp_hidden_dims}, image_size={image_size}"
            )
        self.image_shape = (height, width, in_channels)
        self.stacks = nn.ModuleList(
            _Stack(before, after, num_blocks)
            for before, after in zip((in_channels, *stack_sizes), stack_sizes, strict=False)
        )
        for _ in stack_sizes:
            height, width = (height + 1) // 2, (width + 1) // 2
        widths = [height * width * stack_sizes[-1], *mlp_hidden_dims]
        self.linears = nn.ModuleList(
            _XavierLinear(before, after) for before, after in zip(widths, mlp_hidden_dims, strict=False)
        )
        self.out_features = widths[-1]

    def forward(self, pictures: Tensor) -> Tensor:
        """Map ``pictures [..., H, W, C]``, uint8 or numbers from 0 to 255, to encodings ``[..., out_features]``."""
        dtype = cast("Tensor", self.linears[0].weight).dtype
        if pictures.shape[-3:] != self.image_shape:
            raise ValueError(_wrong_shape(pictures.shape, self.image_shape))
        if pictures.dtype not in (torch.uint8, dtype):
            raise TypeError(f"pictures must be uint8, or {dtype} from 0 to 255, got {pictures.dtype}")
        rows = pictures.reshape(-1, *self.image_shape)
        # Channels last in memory is what the convolutions are fastest in, and what pictures have.
        x = (rows.to(dtype) / 255).permute(0, 3, 1, 2)
        for stack in self.stacks:
            x = stack(x)
        x = F.relu(x).permute(0, 2, 3, 1).flatten(1)
        for linear in self.linears:
            x = F.gelu(linear(x), approximate="tanh")
        return x.reshape(*pictures.shape[:-3], self.out_features)


class _Stack(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.conv = _XavierConv(in_channels, out_channels)
        self.blocks = nn.ModuleList(_Block(out_channels) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        # "SAME" with window 3 and stride 2: with ceil_mode the last window may reach one beyond an even size.
        x = F.max_pool2d(x, 3, 2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _XavierConv(channels, channels)
        self.conv2 = _XavierConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class _XavierConv(nn.Conv2d):
    """A 3x3 convolution that keeps the size, whose ``reset_parameters`` is the reference's initialisation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class JoinedEncoder(nn.Module):
    """Encode several observations and concatenate the results with the vectors among them.

    Args:
        encoders: one for each observation, in the order of the call; None for a vector, which stays as it is.
        widths: numbers that each of them gives.
    """

    def __init__(self, encoders: Sequence[ImpalaEncoder | None], widths: Sequence[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Identity() if encoder is None else encoder for encoder in encoders)
        self.out_features = sum(widths)

    def forward(self, *observations: Tensor) -> Tensor:
        """Map observations ``[..., H, W, C]`` and ``[..., n]`` to ``[..., out_features]``."""
        encoded = [encoder(value) for encoder, value in zip(self.encoders, observations, strict=True)]
        return torch.cat(encoded, -1)


def make_encoder(name: str, observation_spec: TensorSpec) -> ImpalaEncoder | JoinedEncoder:
    """Build an encoder for observations that are pictures, or pictures and vectors.

    Args:
        name: ``impala_small`` (the paper's), ``impala``, ``impala_large`` or ``impala_debug``.
        observation_spec: of one picture ``[H, W, C]``, channels last, or a composite of pictures and vectors ``[n]``.

    Returns:
        A module called with one tensor for each entry of the spec, in the order of ``observation_spec.keys(True, True)``. Every
        picture has an encoder of its own. Its attribute ``out_features`` is the width of the result.

    Raises:
        ValueError: on an unknown name, on shapes that are neither pictures nor vectors, or without a picture.

    Examples:
        >>> from torchrl.data import Composite, Unbounded
        >>> import torch
        >>> spec = Composite(front=Unbounded((32, 32, 3), dtype=torch.uint8), joints=Unbounded((7,)))
        >>> make_encoder("impala_small", spec).out_features
        519
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
    leaves = (
        dict(observation_spec.items(True, True)) if isinstance(observation_spec, Composite) else {"": observation_spec}
    )
    encoders = [_encoder_of(key, tuple(leaf.shape), ENCODERS[name]) for key, leaf in leaves.items()]
    if not any(encoders):
        raise ValueError(f"encoder {name!r}: none of the observations {list(leaves)} is a picture [H, W, C]")
    if len(encoders) == 1:
        return cast("ImpalaEncoder", encoders[0])
    widths = [
        leaf.shape[0] if encoder is None else encoder.out_features
        for encoder, leaf in zip(encoders, leaves.values(), strict=True)
    ]
    return JoinedEncoder(encoders, widths)


def _encoder_of(key: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> ImpalaEncoder | None:
    if len(shape) == 1:
        return None
    observation = f"observation {key!r}" if key else "the observation"
    if len(shape) != 3:
        raise ValueError(f"{observation} has shape {list(shape)}; a picture has [H, W, C] and a vector [n]")
    first, height, last = shape
    if first < last and (height == last or last > 4 * first):
        raise ValueError(
            f"{observation} has shape {list(shape)}, which is channels first; pictures are [H, W, C], here "
            f"{[height, last, first]}"
        )
    return ImpalaEncoder(last, image_size=shape[:2], **arguments)


def _wrong_shape(given: Sequence[int], expected: tuple[int, int, int]) -> str:
    height, width, channels = expected
    message = f"pictures of shape [..., {height}, {width}, {channels}], channels last, are needed, got {list(given)}"
    first = tuple(given[-3:]) == (channels, height, width)
    return message + (": channels first; move them with pictures.movedim(-3, -1)" if first else "")
