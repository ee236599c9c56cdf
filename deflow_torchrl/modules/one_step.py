# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The one-step policy mu(s, z) of FQL: noise to action in one pass of a network (https://arxiv.org/abs/2502.02538)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.flow import NoisePolicy, register_bounds


class OneStepModel(nn.Module):
    """Tensor-only core of :class:`OneStepPolicy`.

    Args:
        network: called with ONE tensor ``cat([observation, noise], -1)`` of width ``O + A``, returns ``[..., A]``.
        action_dim: number of action dimensions A.

    Keyword Args:
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.

    Raises:
        ValueError: if ``action_dim`` is not positive or the bounds are not ordered.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, network: nn.Module, action_dim: int, *, low: float | Tensor = -1.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__()
        if action_dim < 1:
            raise ValueError(f"action_dim must be positive, got {action_dim}")
        self.network = network
        self.action_dim = action_dim
        register_bounds(self, low, high)

    def draw_noise(self, observation: Tensor) -> Tensor:
        """Draw z ~ N(0, I) of shape ``[..., A]`` from torch's global generator, whatever the exploration mode."""
        shape = (*observation.shape[:-1], self.action_dim)
        return torch.randn(shape, device=self.low.device, dtype=self.low.dtype)

    def forward(self, observation: Tensor, noise: Tensor | None = None, *, clamp: bool = True) -> Tensor:
        """Map ``observation [..., O]`` and ``noise [..., A]`` (drawn if None) to actions ``[..., A]``.

        With ``clamp=False`` the network's own output, which distillation compares: behind the bounds it has a gradient that
        leads back inside, the clipped action has none.
        """
        noise = self.draw_noise(observation) if noise is None else noise
        action = self.network(torch.cat([observation, noise], -1))
        return action.clamp(self.low, self.high) if clamp else action


class OneStepPolicy(NoisePolicy):
    """Noise-conditioned policy of one network pass, distilled from a flow by :class:`~deflow_torchrl.objectives.FQLLoss`.

    Same constructor and meaning as the class of this name on TorchRL's main branch.

    Args:
        network: any ``nn.Module`` called with ONE tensor ``cat([observation, noise], -1)`` of width ``O + A``, returning
            ``[..., A]``, without an output activation.
        action_dim: number of action dimensions A.

    Keyword Args:
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key and, optionally, noise key. Noise missing from the input is drawn from N(0, I), also
            under deterministic exploration: pass it to repeat an action.
        out_keys: the action key.

    Raises:
        ValueError: on wrong sizes, bounds or numbers of keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = OneStepPolicy(torch.nn.Linear(3 + 2, 2), action_dim=2)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    module: OneStepModel

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        super().__init__(OneStepModel(network, action_dim, low=low, high=high), in_keys, out_keys)
