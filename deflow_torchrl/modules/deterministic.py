# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A deterministic tanh policy and its exploring form with clipped Gaussian noise: ReBRAC's (TD3's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.flow import register_bounds
from deflow_torchrl.modules.gaussian import acting_keys


class DeterministicModel(nn.Module):
    """Tensor-only core of :class:`DeterministicPolicy`.

    Args:
        network: called with ``observation [..., O]``, returns ``[..., A]`` before tanh.

    Keyword Args:
        noise_scale: standard deviation of the noise; none where it does not explore.
        noise_clip: bound of the scaled noise.
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        noise_scale: float | None = None,
        noise_clip: float = 0.5,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if (noise_scale is not None and not noise_scale >= 0) or not noise_clip >= 0:
            raise ValueError(f"noise_scale and noise_clip must not be negative, got {noise_scale} and {noise_clip}")
        self.network = network
        self.noise_scale = noise_scale
        self.noise_clip = noise_clip
        register_bounds(self, low, high)

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """pi(s) = tanh in the bounds; where it explores :meth:`perturb` of it, ``noise`` drawn if None."""
        action = (self.low + self.high) / 2 + (self.high - self.low) / 2 * self.network(observation).tanh()
        if self.noise_scale is None:
            return action
        noise = torch.randn_like(action) if noise is None else noise
        return self.perturb(action, noise, self.noise_scale, self.noise_clip)

    def perturb(self, action: Tensor, noise: Tensor, scale: float, clip: float) -> Tensor:
        """clip(a + clip(scale z, +-clip)) of ``a [..., A]`` and ``z [..., A]`` ~ N(0, I)."""
        return (action + (scale * noise).clamp(-clip, clip)).clamp(self.low, self.high)


class DeterministicPolicy(TensorDictModule):
    """pi(s) = tanh(network(s)), scaled to the bounds; :meth:`exploring` adds clipped Gaussian noise to it.

    TorchRL's exploration modes do not change it.

    Args:
        network: any ``nn.Module`` called with the observation ``[..., O]``, returning ``[..., A]``.

    Keyword Args:
        noise_scale: standard deviation of exploring noise in action units; ``None`` (default) does not explore.
        noise_clip: bound of that noise. Defaults to ``0.5``.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key; where it explores also the key of z ~ N(0, I), which is drawn if the input lacks it.
        out_keys: the action key.

    Raises:
        ValueError: on wrong bounds, negative noise or wrong numbers of keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = DeterministicPolicy(torch.nn.Linear(3, 2))
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    module: DeterministicModel

    def __init__(
        self,
        network: nn.Module,
        *,
        noise_scale: float | None = None,
        noise_clip: float = 0.5,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        model = DeterministicModel(network, noise_scale=noise_scale, noise_clip=noise_clip, low=low, high=high)
        keys = acting_keys(in_keys, out_keys, explore=noise_scale is not None)
        super().__init__(model, in_keys=keys, out_keys=list(out_keys))

    @property
    def observation_key(self) -> NestedKey:
        """Key of the observation."""
        return self.in_keys[0]

    def exploring(
        self, noise_scale: float = 0.2, noise_clip: float = 0.5, noise_key: NestedKey = "noise"
    ) -> DeterministicPolicy:
        """clip(pi(s) + clip(noise_scale z, +-noise_clip)) on the same network."""
        model = self.module
        return DeterministicPolicy(
            model.network,
            noise_scale=noise_scale,
            noise_clip=noise_clip,
            low=model.low,
            high=model.high,
            in_keys=(self.observation_key, noise_key),
            out_keys=self.out_keys,
        )
