# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The tanh-Gaussian policy of SAC and its kin (RLPD, Cal-QL), and of FEdit's bounded edit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F

from deflow_torchrl.modules.networks import PAPER_HIDDEN_DIMS, CheckedModule, make_mlp
from deflow_torchrl.modules.policies import BoundedModel

_LOG_ROOT_TAU = math.log(2 * math.pi) / 2


def make_tanh_gaussian_network(
    in_features: int,
    action_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    head_gain: float = 1.0,
) -> nn.Sequential:
    """``[..., in_features]`` to means, then log standard deviations ``[..., 2A]``; GELU behind every hidden layer, no LayerNorm.

    Means and log standard deviations are two heads, each initialised by its own number of outputs A.

    Args:
        in_features: width of the input.
        action_dim: A.
        hidden_dims: widths of the hidden layers.

    Keyword Args:
        head_gain: factor of the heads' initial bound: 0.1 in FQL's SAC, 1 in FEdit.

    Examples:
        >>> import torch
        >>> make_tanh_gaussian_network(3, 2, (8, 8))(torch.zeros(5, 3)).shape
        torch.Size([5, 4])
    """
    own_fan_out = math.sqrt((hidden_dims[-1] + 2 * action_dim) / (hidden_dims[-1] + action_dim)) if hidden_dims else 1.0
    return make_mlp(in_features, 2 * action_dim, hidden_dims, layer_norm=False, head_gain=head_gain * own_fan_out)


class TanhGaussianModel(BoundedModel):
    """Tensor-only core of :class:`TanhGaussianPolicy`; arguments as there."""

    log_std_scale: nn.Parameter | None
    log_std_offset: nn.Parameter | None

    def __init__(
        self,
        network: nn.Module,
        *,
        explore: bool = False,
        log_std_min: float = -5.0,
        log_std_max: float = 2.0,
        log_std_affine: tuple[float, float] | None = None,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__(low, high)
        if not log_std_min < log_std_max:
            raise ValueError(f"log_std_min must be less than log_std_max, got {log_std_min} and {log_std_max}")
        self.network = network
        self.explore = explore
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        for name, number in zip(("log_std_scale", "log_std_offset"), log_std_affine or (None, None), strict=True):
            self.register_parameter(name, None if number is None else nn.Parameter(torch.tensor(float(number))))

    def mean_and_log_std(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clipped log standard deviation ``[..., A]`` of u, of inputs that are concatenated."""
        mean, log_std = self.network(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)).chunk(2, -1)
        if self.log_std_scale is not None and self.log_std_offset is not None:
            log_std = self.log_std_scale * log_std + self.log_std_offset
        return mean, log_std.clamp(self.log_std_min, self.log_std_max)

    def sample_and_log_prob(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action of ``noise [..., A]`` ~ N(0, I) and its log density ``[...]``, both with gradient (reparametrised).

        The density is that of tanh u, before it is scaled to the bounds, from the u that was drawn: no inverse of tanh.
        """
        mean, log_std = self.mean_and_log_std(observation)
        u = mean + log_std.exp() * noise
        normal = -noise.square() / 2 - log_std - _LOG_ROOT_TAU
        # log(1 - tanh^2 u), without the cancellation that makes it -inf where tanh u rounds to 1
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return self._scaled(u), (normal - log_slope).sum(-1)

    def forward(self, *inputs: Any) -> Tensor:
        """tanh(mean); with ``explore`` a sample by the last input, noise ``[..., A]``, which is drawn if None."""
        if not self.explore:
            return self._scaled(self.mean_and_log_std(*inputs)[0])
        *observations, noise = inputs
        mean, log_std = self.mean_and_log_std(*observations)
        return self._scaled(mean + log_std.exp() * (torch.randn_like(mean) if noise is None else noise))

    def _scaled(self, u: Tensor) -> Tensor:
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * u.tanh()


class TanhGaussianPolicy(CheckedModule):
    """``a = tanh(u)``, u ~ N(mean(s), std(s)), scaled to the bounds; it acts by tanh(mean), :meth:`exploring` samples.

    TorchRL's exploration modes do not change it. The log density is that of tanh u:
    ``sum_d [-z^2 / 2 - log std - log(2 pi) / 2 - 2 (log 2 - u - softplus(-2 u))]`` for u = mean + std z.

    Args:
        network: any ``nn.Module`` called with ONE tensor, the entries of ``in_keys`` concatenated, returning ``[..., 2A]``:
            means, then log standard deviations (:func:`make_tanh_gaussian_network`).

    Keyword Args:
        explore: sample instead of taking the mean. Defaults to ``False``.
        log_std_min: lower bound of the log standard deviation. Defaults to ``-5.0`` (FQL's SAC; FEdit -20).
        log_std_max: upper bound. Defaults to ``2.0``.
        log_std_affine: ``(scale, offset)``: start values of two learned numbers, the parameters ``log_std_scale`` and
            ``log_std_offset``; log std is then clip(scale x + offset) (Cal-QL: 1 and -1). Defaults to none.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: what the network reads, ``("observation",)`` by default; an edit policy reads
            ``("observation", "base_action")``. With ``explore`` the noise z ~ N(0, I) comes last, and is drawn where the
            input lacks it.
        out_keys: the action key.

    Raises:
        ValueError: on crossed bounds or wrong numbers of keys.
        TypeError: by calls, if an input's dtype does not fit the network's.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = TanhGaussianPolicy(make_tanh_gaussian_network(3, 2, (16,)))
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
        >>> action, log_prob = policy.module.sample_and_log_prob(torch.zeros(4, 3), torch.randn(4, 2))
        >>> action.shape, log_prob.shape
        (torch.Size([4, 2]), torch.Size([4]))
        >>> policy.exploring().in_keys
        ['observation', 'noise']
    """

    module: TanhGaussianModel

    def __init__(
        self,
        network: nn.Module,
        *,
        explore: bool = False,
        log_std_min: float = -5.0,
        log_std_max: float = 2.0,
        log_std_affine: tuple[float, float] | None = None,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        keys = list((("observation", "noise") if explore else ("observation",)) if in_keys is None else in_keys)
        if len(keys) < 1 + explore or len(out_keys) != 1:
            raise ValueError(
                f"in_keys must name what the network reads and out_keys the action, got {keys} and {out_keys}"
            )
        model = TanhGaussianModel(
            network,
            explore=explore,
            log_std_min=log_std_min,
            log_std_max=log_std_max,
            log_std_affine=log_std_affine,
            low=low,
            high=high,
        )
        super().__init__(model, in_keys=keys, out_keys=list(out_keys))

    @property
    def observation_key(self) -> NestedKey:
        """Key of the observation."""
        return self.in_keys[0]

    def exploring(self, noise_key: NestedKey = "noise") -> TanhGaussianPolicy:
        """Return the policy that samples, with the same network and parameters."""
        model = self.module
        policy = TanhGaussianPolicy(
            model.network,
            explore=True,
            log_std_min=model.log_std_min,
            log_std_max=model.log_std_max,
            low=model.low,
            high=model.high,
            in_keys=(*self.in_keys, noise_key),
            out_keys=self.out_keys,
        )
        policy.module.log_std_scale, policy.module.log_std_offset = model.log_std_scale, model.log_std_offset
        return policy
