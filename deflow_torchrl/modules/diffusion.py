# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Policies that denoise actions: a diffusion policy, step by step, and a consistency policy, which needs two steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F

from deflow_torchrl.modules.policies import NoiseModel, Policy, in_evaluation_mode

Schedule = Literal["ddpm", "vp"]
Variance = Literal["beta", "posterior"]
Clip = Literal["sample", "denoised"]

_BETA_MIN = 0.1
_BETA_MAX = {"ddpm": 10.0, "vp": 20.0}


class StepwiseModel(NoiseModel):
    """Base of the models whose samples take a row of noise for each of their steps.

    Args:
        action_dim: number of action dimensions A.
        num_steps: rows K of a sample's noise.
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.

    Raises:
        ValueError: if a number is not positive or the bounds are not ordered.
    """

    def __init__(self, action_dim: int, num_steps: int, low: float | Tensor, high: float | Tensor) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be positive, got {num_steps}")
        super().__init__(action_dim, low, high)
        self.num_steps = num_steps

    def draw_noise(self, observation: Tensor) -> Tensor:
        """Draw the noise of a sample, ``[..., K, A]``, from torch's global generator."""
        shape = (*observation.shape[:-1], self.num_steps, self.action_dim)
        return torch.randn(shape, device=self.low.device, dtype=self.low.dtype)


class StepwisePolicy(Policy):
    """Base of the policies over a :class:`StepwiseModel`."""

    module: Any

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of a state's noise, (K, A)."""
        return self.module.num_steps, self.module.action_dim


class NoiseNetwork(nn.Module):
    """``cat([s, x_t, t]) [..., O + A + 1]`` to noise ``[..., A]``: Fourier features of t and residual blocks (IDQL).

    The time t is a raw step. Its features [cos f, sin f], f = 2 pi t w, go through Linear, swish, Linear; [x, s, e] then through
    a Linear and the blocks h + Linear(swish(Linear(LN(dropout(h))))), of four times the width inside; the output is
    Linear(swish(h)). The first and last layers and those of the time are Xavier-uniform, blocks LeCun-normal, biases 0; w is
    learned and starts at N(0, 0.2^2).

    Args:
        observation_dim: O.
        action_dim: A.

    Keyword Args:
        width: of the blocks and of the time's embedding.
        num_blocks: residual blocks.
        num_frequencies: of the Fourier features, half as many as features.
        dropout: before each block's LayerNorm, in training mode.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        width: int = 256,
        num_blocks: int = 3,
        num_frequencies: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        self.frequencies: Tensor = nn.Parameter(0.2 * torch.randn(num_frequencies))
        self.time = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(action_dim + observation_dim + width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Dropout(dropout),
                nn.LayerNorm(width, eps=1e-6),
                nn.Linear(width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(num_blocks)
        )
        self.last = nn.Linear(width, action_dim)
        for layer in (self.time[0], self.time[2], self.first, self.last):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        for block in self.blocks:
            for layer in (block[2], block[4]):  # type: ignore[index]
                # LeCun-normal: truncated at two deviations, of variance 1 / fan_in after the truncation
                deviation = 1 / math.sqrt(layer.in_features) / 0.87962566103423978
                nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """Noise ``[..., A]`` of ``cat([s, x_t, t], -1)``."""
        observation, x, time = inputs.tensor_split((self.observation_dim, inputs.shape[-1] - 1), -1)
        phase = 2 * math.pi * time * self.frequencies
        embedded = self.time(torch.cat([phase.cos(), phase.sin()], -1))
        hidden = self.first(torch.cat([x, observation, embedded], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(F.silu(hidden))


class ContinuousNoiseNetwork(nn.Module):
    """As :class:`NoiseNetwork` for a time in [0, 1], of SRPO's authors: fixed frequencies, mish, torch's own initialisation.

    Features [sin f, cos f], f = 2 pi t w with 32 fixed w ~ N(0, 30^2), go through Linear, mish, Linear, 128 wide.

    Args:
        observation_dim: O.
        action_dim: A.

    Keyword Args:
        width: of the blocks.
        dropout: before each block's LayerNorm, in training mode.
    """

    frequencies: Tensor

    def __init__(self, observation_dim: int, action_dim: int, *, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        self.register_buffer("frequencies", 30 * torch.randn(32))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.first = nn.Linear(action_dim + observation_dim + 128, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Dropout(dropout),
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.Mish(),
                nn.Linear(4 * width, width),
            )
            for _ in range(3)
        )
        self.last = nn.Linear(width, action_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """Noise ``[..., A]`` of ``cat([s, x_t, t], -1)``."""
        observation, x, time = inputs.tensor_split((self.observation_dim, inputs.shape[-1] - 1), -1)
        phase = 2 * math.pi * time * self.frequencies
        embedded = self.time(torch.cat([phase.sin(), phase.cos()], -1))
        hidden = self.first(torch.cat([x, observation, embedded], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(F.mish(hidden))


class DiffusionModel(StepwiseModel):
    """Tensor-only core of :class:`DiffusionPolicy`; arguments as there."""

    alphas: Tensor
    alpha_bars: Tensor

    def __init__(
        self,
        noise_network: nn.Module,
        action_dim: int,
        num_steps: int = 5,
        *,
        schedule: Schedule = "ddpm",
        variance: Variance = "beta",
        clip: Clip = "sample",
        temperature: float = 1.0,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        for name, value, known in (
            ("schedule", schedule, Schedule),
            ("variance", variance, Variance),
            ("clip", clip, Clip),
        ):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        super().__init__(action_dim, num_steps, low, high)
        self.noise_network = noise_network
        self.schedule = schedule
        self.variance = variance
        self.clip_mode = clip
        self.temperature = temperature
        step = torch.arange(1, num_steps + 1, dtype=torch.float64)
        slope = _BETA_MAX["ddpm"] - _BETA_MIN
        alphas = torch.exp(-_BETA_MIN / num_steps - slope * (2 * step - 1) / (2 * num_steps**2))
        default = torch.get_default_dtype()
        self.register_buffer("alphas", alphas.to(default), persistent=False)
        self.register_buffer("alpha_bars", alphas.cumprod(0).to(default), persistent=False)

    def predicted_noise(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """eps(s, x_t, t) ``[..., A]``; ``time [..., 1]`` is a step 0..T-1, or with ``schedule="vp"`` in [0, 1]."""
        return self.noise_network(torch.cat([observation, x, time.to(x.dtype)], -1))

    def signal_and_noise(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Scales ``[..., 1]`` of action and noise in x_t: their squares add up to 1."""
        if self.schedule == "ddpm":
            alpha_bar = self.alpha_bars[time.long()]
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        log_alpha = -(time**2) * (_BETA_MAX["vp"] - _BETA_MIN) / 4 - time * _BETA_MIN / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Denoise ``noise [..., T, A]`` (drawn if None) to actions ``[..., A]``; differentiable, and without dropout."""
        if self.schedule == "vp":
            raise RuntimeError("schedule='vp' is a density of the data for a policy to climb; it is not sampled")
        noise = self.draw_noise(observation) if noise is None else noise
        with in_evaluation_mode(self):
            return self._denoise(observation, noise)

    def _denoise(self, observation: Tensor, noise: Tensor) -> Tensor:
        x = noise[..., 0, :]
        for taken, k in enumerate(range(self.num_steps - 1, -1, -1), start=1):
            time = x.new_full((*x.shape[:-1], 1), float(k))
            predicted = self.predicted_noise(observation, x, time)
            x = self._denoised(x, predicted, k) if self.clip_mode == "denoised" else self._mean(x, predicted, k)
            if k > 0:
                x = x + self.temperature * self._deviation(k) * noise[..., taken, :]
            if self.clip_mode == "sample":
                x = self.clip(x)
        return self.clip(x)

    def _mean(self, x: Tensor, predicted: Tensor, k: int) -> Tensor:
        alpha, alpha_bar = self.alphas[k], self.alpha_bars[k]
        return (x - (1 - alpha) / (1 - alpha_bar).sqrt() * predicted) / alpha.sqrt()

    def _denoised(self, x: Tensor, predicted: Tensor, k: int) -> Tensor:
        """Mean of the posterior of x_{k-1} by the clipped prediction of x_0."""
        alpha, alpha_bar = self.alphas[k], self.alpha_bars[k]
        before = self.alpha_bars[k - 1] if k > 0 else torch.ones_like(alpha_bar)
        action = self.clip((x - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt())
        return (before.sqrt() * (1 - alpha) * action + alpha.sqrt() * (1 - before) * x) / (1 - alpha_bar)

    def _deviation(self, k: int) -> Tensor:
        beta = 1 - self.alphas[k]
        if self.variance == "beta":
            return beta.sqrt()
        return (beta * (1 - self.alpha_bars[k - 1]) / (1 - self.alpha_bars[k])).sqrt()


class DiffusionPolicy(StepwisePolicy):
    """Actions denoised in T steps (DDPM): the behaviour model of IDQL and SRPO.

    With steps k = T-1..0 of the variance-preserving schedule a_i = exp(-b0/T - (b1 - b0)(2i - 1)/(2 T^2)), i = k + 1, b0 = 0.1
    and b1 = 10: x <- (x - (1 - a_k)/sqrt(1 - abar_k) eps(s, x, k))/sqrt(a_k), then noise if k > 0.

    Args:
        noise_network: any ``nn.Module`` called with ONE tensor ``cat([observation, x_t, t], -1)`` of width ``O + A + 1``,
            returning the noise in x_t ``[..., A]``; t is the raw step 0..T-1, or with ``schedule="vp"`` the time in [0, 1].
        action_dim: number of action dimensions A.
        num_steps: T.

    Keyword Args:
        schedule: ``"ddpm"`` (default), or ``"vp"``: continuous time with betas from 0.1 to 20 (SRPO), which is never sampled.
        variance: of the added noise: ``"beta"`` (default), 1 - a_k, or the ``"posterior"``'s.
        clip: ``"sample"`` (default) clips x after every step, ``"denoised"`` the predicted action inside every step; both clip
            the result.
        temperature: factor of the added noise. Defaults to ``1.0``.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key and, optionally, noise key. The noise of a sample is ``[..., T, A]``: row 0 is where it starts,
            row k is added after the k-th step, and nothing after the last. It is drawn where the input lacks it.
        out_keys: the action key.

    Raises:
        ValueError: on an option out of range.
        RuntimeError: by calls, with ``schedule="vp"``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = DiffusionPolicy(torch.nn.Linear(3 + 2 + 1, 2), action_dim=2)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
        >>> policy.noise_shape
        (5, 2)
    """

    module: DiffusionModel

    def __init__(
        self,
        noise_network: nn.Module,
        action_dim: int,
        num_steps: int = 5,
        *,
        schedule: Schedule = "ddpm",
        variance: Variance = "beta",
        clip: Clip = "sample",
        temperature: float = 1.0,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        model = DiffusionModel(
            noise_network,
            action_dim,
            num_steps,
            schedule=schedule,
            variance=variance,
            clip=clip,
            temperature=temperature,
            low=low,
            high=high,
        )
        super().__init__(model, in_keys, out_keys)


class ConsistencyNetwork(nn.Module):
    """``cat([s, x, sigma]) [..., O + A + 1]`` to ``[..., A]``: a sinusoidal embedding of sigma and an MLP with mish (CAC).

    sigma, raw, is embedded as [sin(sigma w), cos(sigma w)], w_i = 10000^(-i/7) for i = 0..7, then Linear, mish, Linear to 16
    numbers e; [x, e, s] goes through three hidden layers. Layers are initialised as torch does.

    Args:
        observation_dim: O.
        action_dim: A.

    Keyword Args:
        hidden_dims: widths of the hidden layers.
    """

    frequencies: Tensor

    def __init__(self, observation_dim: int, action_dim: int, *, hidden_dims: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        half = 8
        self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(half) / (half - 1)), persistent=False)
        self.sigma = nn.Sequential(nn.Linear(2 * half, 32), nn.Mish(), nn.Linear(32, 16))
        widths = [action_dim + 16 + observation_dim, *hidden_dims]
        hidden = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Mish())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], action_dim))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., A]`` of ``cat([s, x, sigma], -1)``."""
        observation, x, sigma = inputs.tensor_split((self.observation_dim, inputs.shape[-1] - 1), -1)
        phase = sigma * self.frequencies
        embedded = self.sigma(torch.cat([phase.sin(), phase.cos()], -1))
        return self.layers(torch.cat([x, embedded, observation], -1))


class ConsistencyModel(StepwiseModel):
    """Tensor-only core of :class:`ConsistencyPolicy`; arguments as there."""

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        num_steps: int = 2,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed, got {sigma_min} and {sigma_max}")
        super().__init__(action_dim, num_steps, low, high)
        self.network = network
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def consistency(self, observation: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """f(s, x, sigma) = c_skip x + c_out F(s, x, sigma) ``[..., A]``, sigma ``[..., 1]``; f(s, x, sigma_min) = x."""
        data = self.sigma_data**2
        above = sigma - self.sigma_min
        skip = data / (above.square() + data)
        out = above * self.sigma_data / (sigma.square() + data).sqrt()  # no sigma_min in the root: as the authors' code
        return skip * x + out * self.network(torch.cat([observation, x, sigma], -1))

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map ``noise [..., K, A]`` (drawn if None) to clipped actions ``[..., A]``; differentiable end to end."""
        noise = self.draw_noise(observation) if noise is None else noise
        levels = torch.linspace(self.sigma_max, 2.0, self.num_steps).tolist()
        x = self.sigma_max * noise[..., 0, :]
        for step, level in enumerate(levels):
            if step > 0:
                x = x + math.sqrt(level**2 - self.sigma_min**2) * noise[..., step, :]
            x = self.consistency(observation, x, x.new_full((*x.shape[:-1], 1), level))
        return self.clip(x)


class ConsistencyPolicy(StepwisePolicy):
    """Actions in K evaluations of a consistency function (CAC, https://arxiv.org/abs/2309.16984).

    x = f(s, sigma_max z_0, sigma_max); then for the levels of linspace(2, sigma_max, K) below, from the top,
    x = f(s, x + sqrt(sigma^2 - sigma_min^2) z_k, sigma); the result is clipped.

    Args:
        network: any ``nn.Module`` called with ONE tensor ``cat([observation, x, sigma], -1)`` of width ``O + A + 1``,
            returning F ``[..., A]``.
        action_dim: number of action dimensions A.
        num_steps: K.

    Keyword Args:
        sigma_min: level at which f is the identity. Defaults to ``0.002``.
        sigma_max: level of the starting noise. Defaults to ``80.0``.
        sigma_data: standard deviation of the data. Defaults to ``0.5``.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key and, optionally, noise key. The noise of a sample is ``[..., K, A]``: row 0 is where it starts,
            row k is added before the k-th later evaluation. It is drawn where the input lacks it.
        out_keys: the action key.

    Raises:
        ValueError: on an option out of range.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = ConsistencyPolicy(ConsistencyNetwork(3, 2), action_dim=2)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    module: ConsistencyModel

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        num_steps: int = 2,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        model = ConsistencyModel(
            network,
            action_dim,
            num_steps,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            low=low,
            high=high,
        )
        super().__init__(model, in_keys, out_keys)
