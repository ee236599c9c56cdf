# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A Gaussian policy N(m(s), I) of fixed unit standard deviation: BC's and IQL's (FQL's re-implementation)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.flow import register_bounds


class GaussianModel(nn.Module):
    """Tensor-only core of :class:`GaussianPolicy`.

    Args:
        mean_network: called with ``observation [..., O]``, returns m(s) ``[..., A]``, unbounded.

    Keyword Args:
        explore: sample N(m, I) instead of taking m.
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, mean_network: nn.Module, *, explore: bool = False, low: float | Tensor = -1.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__()
        self.mean_network = mean_network
        self.explore = explore
        register_bounds(self, low, high)

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """clip(m(s)), or clip(m(s) + noise) where it explores; ``noise [..., A]`` ~ N(0, I) is drawn if None."""
        action = self.mean_network(observation)
        if self.explore:
            action = action + (torch.randn_like(action) if noise is None else noise)
        return action.clamp(self.low, self.high)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log N(a; m(s), I) ``[...]``, of the Gaussian before it is clipped."""
        return unit_log_prob(action, self.mean_network(observation))


def unit_log_prob(action: Tensor, mean: Tensor) -> Tensor:
    """Log N(action; mean, I) ``[...]`` of two ``[..., A]``."""
    return -0.5 * ((action - mean).square().sum(-1) + action.shape[-1] * math.log(2 * math.pi))


class GaussianPolicy(TensorDictModule):
    """A policy N(m(s), I) that acts by its mean or, where it explores, by samples; either is clipped to the bounds.

    TorchRL's exploration modes do not change it: :meth:`exploring` gives the form that samples, on the same network. With unit
    standard deviation in a box of +-1 that is close to uniform noise, and it is what IQL explores with (FQL's
    re-implementation).

    Args:
        mean_network: any ``nn.Module`` called with the observation ``[..., O]``, returning ``[..., A]``.

    Keyword Args:
        explore: sample instead of taking the mean. Defaults to ``False``.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key; where it explores also the key of the noise z ~ N(0, I), which is drawn if the input lacks
            it. Defaults to ``("observation",)``, or ``("observation", "noise")``.
        out_keys: the action key.

    Raises:
        ValueError: on wrong bounds or numbers of keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = GaussianPolicy(torch.nn.Linear(3, 2))
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
        >>> policy.exploring().in_keys
        ['observation', 'noise']
    """

    module: GaussianModel

    def __init__(
        self,
        mean_network: nn.Module,
        *,
        explore: bool = False,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        model = GaussianModel(mean_network, explore=explore, low=low, high=high)
        super().__init__(model, in_keys=acting_keys(in_keys, out_keys, explore=explore), out_keys=list(out_keys))

    @property
    def observation_key(self) -> NestedKey:
        """Key of the observation."""
        return self.in_keys[0]

    def exploring(self, noise_key: NestedKey = "noise") -> GaussianPolicy:
        """The form that samples, on the same network."""
        model = self.module
        return GaussianPolicy(
            model.mean_network,
            explore=True,
            low=model.low,
            high=model.high,
            in_keys=(self.observation_key, noise_key),
            out_keys=self.out_keys,
        )


def acting_keys(
    in_keys: Sequence[NestedKey] | None, out_keys: Sequence[NestedKey], *, explore: bool
) -> list[NestedKey]:
    """The input keys of a policy that reads noise where it explores.

    Raises:
        ValueError: on other numbers of keys.
    """
    needed: tuple[NestedKey, ...] = ("observation", "noise") if explore else ("observation",)
    keys = needed if in_keys is None else tuple(in_keys)
    if len(keys) != len(needed) or len(out_keys) != 1:
        raise ValueError(f"in_keys must be like {needed} and out_keys like ('action',), got {keys} and {out_keys}")
    return list(keys)
