# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Observations in units of their own spread, by a map that is saved and exported with the networks behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of a column's largest size: a spread below it is the rounding of float32, not a signal."""


class ObservationNormalizer(nn.Module):
    """Map observations ``[..., O]`` to (observation - loc) / scale.

    ``loc`` and ``scale`` are buffers: they move with the module and are saved with it, and nothing trains them.

    Args:
        loc: centre of each column, ``[O]``.
        scale: spread of each column, ``[O]``, positive.

    Examples:
        >>> import torch
        >>> normalizer = ObservationNormalizer.fit([torch.tensor([[0.0, 5.0], [4.0, 5.0]])])
        >>> normalizer(torch.tensor([4.0, 6.0]))
        tensor([1., 1.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the observation in units of its spread."""
        return (observation - self.loc) / self.scale

    @classmethod
    def fit(cls, batches: Iterable[Tensor]) -> Self:
        """Take mean and standard deviation (divisor N) of each column, in double precision.

        A column that does not vary is centred and keeps its unit (scale 1): where it varies later, it does so in that unit.

        Args:
            batches: the observations in parts, each ``[n, O]``.
        """
        count, shift, largest = 0, torch.zeros(1), torch.zeros(1)
        total = squares = torch.zeros(1, dtype=torch.float64)
        for batch in batches:
            if count == 0:
                shift = batch.double().mean(0)  # sums of what is far from zero lose digits
            centred = batch.double() - shift
            count += len(batch)
            total, squares = total + centred.sum(0), squares + centred.square().sum(0)
            largest = torch.maximum(largest, batch.abs().amax(0))
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        scale = torch.where(spread > _ROUNDING * largest, spread, 1.0)
        return cls((mean + shift).float(), scale.float())
