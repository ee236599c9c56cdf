# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Several observations of one step in a row of bytes, read again: the same of data sets, environments and evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict

Entries = Mapping[str, Sequence[int]]
"""Name -> shape of an observation: ``[H, W, C]`` of a uint8 picture, ``[O]`` of a float32 vector; by name, as the bytes are."""


def unpack(packed: torch.Tensor, entries: Entries, frame_stack: int = 1) -> TensorDict:
    """Read bytes ``[*B, k * P]`` of k stacked steps; ``[*B]``.

    Pictures are joined along their channels, the oldest first; a vector is the newest step's.
    """
    steps = packed.unflatten(-1, (frame_stack, -1))
    found, begin = {}, 0
    for name, shape in entries.items():
        width = _bytes(shape)
        part = steps[..., begin : begin + width]
        begin += width
        if len(shape) == 3:
            found[name] = part.unflatten(-1, tuple(shape)).movedim(packed.ndim - 1, -2).flatten(-2)
        else:
            found[name] = part[..., -1, :].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return TensorDict(found, batch_size=packed.shape[:-1])


def _bytes(shape: Sequence[int]) -> int:
    return math.prod(shape) * (1 if len(shape) == 3 else 4)
