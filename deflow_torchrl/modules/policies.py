# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Bounds, noise and keys that all policies share, and the policies of one network pass.

FQL's one-step policy, the Gaussian of BC and IQL, and ReBRAC's deterministic policy, each as in FQL's re-implementation
(https://arxiv.org/abs/2502.02538).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from deflow_torchrl.modules.networks import CheckedModule


class BoundedModel(nn.Module):
    """Base of the policies' tensor-only models: keeps the action bounds.

    The bounds are the buffers ``low`` and ``high``: they move with the module and are saved with it.

    Args:
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.

    Raises:
        ValueError: if ``low`` is not strictly less than ``high`` everywhere, or a bound is NaN.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__()
        low, high = (torch.as_tensor(bound, dtype=torch.get_default_dtype()) for bound in (low, high))
        if not bool((low < high).all()):
            raise ValueError(f"low must be strictly less than high, got low={low.tolist()} and high={high.tolist()}")
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def clip(self, action: Tensor) -> Tensor:
        """Clip ``action [..., A]`` to the bounds."""
        return action.clamp(self.low, self.high)


def check_bounds(action_dim: int, **bounds: Any) -> None:
    """Refuse bounds that are neither one number nor one for each action dimension.

    Raises:
        ValueError: naming the bound.
    """
    for name, bound in bounds.items():
        shape = list(torch.as_tensor(bound).shape)
        if shape not in ([], [1], [action_dim]):
            raise ValueError(
                f"{name} has the shape {shape}; it is one number, or one for each of {action_dim} dimensions"
            )


class NoiseModel(BoundedModel):
    """Base of the models that map noise to an action.

    Args:
        action_dim: number of action dimensions A.
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.

    Raises:
        ValueError: if ``action_dim`` is not positive or the bounds are not ordered or of another width.
    """

    def __init__(self, action_dim: int, low: float | Tensor, high: float | Tensor) -> None:
        if action_dim < 1:
            raise ValueError(f"action_dim must be positive, got {action_dim}")
        check_bounds(action_dim, low=low, high=high)
        super().__init__(low, high)
        self.action_dim = action_dim

    def draw_noise(self, observation: Tensor) -> Tensor:
        """Draw z ~ N(0, I) of shape ``[..., A]`` from torch's global generator, under every exploration mode."""
        shape = (*observation.shape[:-1], self.action_dim)
        return torch.randn(shape, device=self.low.device, dtype=self.low.dtype)


class Policy(CheckedModule):
    """Base of the policies that map an observation and, optionally, noise to an action.

    Args:
        model: called with the tensors of ``in_keys``.
        in_keys: the observation key and, optionally, the noise key.
        out_keys: the action key.

    Keyword Args:
        noise: whether ``in_keys`` must name the noise; ``None`` allows both.

    Raises:
        ValueError: on other numbers of keys.
    """

    def __init__(
        self,
        model: nn.Module,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        *,
        noise: bool | None = None,
    ) -> None:
        forms = {False: "(observation,)", True: "(observation, noise)"}
        if noise is not None:
            forms = {noise: forms[noise]}
        if len(in_keys) - 1 not in forms or len(out_keys) != 1:
            raise ValueError(
                f"in_keys must be {' or '.join(forms.values())} and out_keys (action,), got {in_keys} and {out_keys}"
            )
        super().__init__(model, in_keys=list(in_keys), out_keys=list(out_keys))

    @property
    def observation_key(self) -> NestedKey:
        """Key of the observation."""
        return self.in_keys[0]

    @property
    def noise_key(self) -> NestedKey | None:
        """Key of the optional noise, None where the policy reads none."""
        return self.in_keys[1] if len(self.in_keys) == 2 else None


@contextlib.contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Context in which the module's layers drop nothing out."""
    training = [layer for layer in module.modules() if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def parts(policy: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """Return the encoders that stand before a policy, in order, and the policy; without encoders the policy alone."""
    if not isinstance(policy, TensorDictSequential):
        return [policy]
    return [part for module in policy.module._modules.values() for part in parts(module)]


def last_policy(policy: TensorDictModuleBase) -> TensorDictModuleBase:
    """Return the policy without the encoders that stand before it: the last module of a ``TensorDictSequential``."""
    return parts(policy)[-1]


def encode(policy: TensorDictModuleBase, tensordict: TensorDictBase) -> TensorDictBase:
    """Run a policy's encoders, once, and return ``tensordict`` with their output in the place of their input.

    The input is left as it is. A result of this function can be given in its place: it is not encoded once more.
    """
    *encoders, policy = parts(policy)
    return run_encoders(encoders, policy.in_keys, tensordict)


def run_encoders(
    encoders: Sequence[TensorDictModuleBase], read: Sequence[NestedKey], tensordict: TensorDictBase
) -> TensorDictBase:
    """As :func:`encode`, of encoders before a module that reads ``read``."""
    kept = {unravel_key(key) for key in read}
    inputs = [key for encoder in encoders for key in encoder.in_keys if unravel_key(key) not in kept]
    written = [key for encoder in encoders for key in encoder.out_keys if unravel_key(key) in kept]
    if not encoders or (inputs and not _has_any(tensordict, inputs) and _has_any(tensordict, written)):
        return tensordict
    encoded = tensordict.copy()
    for encoder in encoders:
        encoded = encoder(encoded)
    return encoded.exclude(*inputs)


def _has_any(tensordict: TensorDictBase, keys: Sequence[NestedKey]) -> bool:
    return any(tensordict.get(key, None) is not None for key in keys)


def is_flow(policy: TensorDictModuleBase) -> bool:
    """Whether a policy, behind its encoders, is a flow: its model has a ``velocity_network``, as that of TorchRL's own has."""
    return hasattr(getattr(last_policy(policy), "module", None), "velocity_network")


def check_encoders(policy: TensorDictModuleBase) -> None:
    """Raise ValueError if no module behind an encoder of the policy reads the encoder's output."""
    modules = parts(policy)
    for number, encoder in enumerate(modules[:-1], start=1):
        read = list(dict.fromkeys(key for module in modules[number:] for key in module.in_keys))
        if not {unravel_key(key) for key in encoder.out_keys} & {unravel_key(key) for key in read}:
            raise ValueError(
                f"the encoder writes {encoder.out_keys}, but the policy behind it reads {read}: "
                "build the policy with in_keys that name the encoder's output"
            )


class OneStepModel(NoiseModel):
    """Tensor-only core of :class:`OneStepPolicy`; arguments as there."""

    def __init__(
        self, network: nn.Module, action_dim: int, *, low: float | Tensor = -1.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__(action_dim, low, high)
        self.network = network

    def forward(self, observation: Tensor, noise: Tensor | None = None, *, clamp: bool = True) -> Tensor:
        """Map ``observation [..., O]`` and ``noise [..., A]`` (drawn if None) to actions ``[..., A]``.

        With ``clamp=False`` the network's own output, which distillation compares: outside the bounds it has a gradient that
        leads back inside, while the clipped action has none.
        """
        noise = self.draw_noise(observation) if noise is None else noise
        action = self.network(torch.cat([observation, noise], -1))
        return self.clip(action) if clamp else action


class OneStepPolicy(Policy):
    """FQL's policy mu(s, z): noise to action in one network pass, distilled by :class:`~deflow_torchrl.objectives.FQLLoss`.

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
        TypeError: by calls, if an input's dtype does not fit the network's.

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


class GaussianModel(BoundedModel):
    """Tensor-only core of :class:`GaussianPolicy`; arguments as there."""

    def __init__(
        self, mean_network: nn.Module, *, explore: bool = False, low: float | Tensor = -1.0, high: float | Tensor = 1.0
    ) -> None:
        super().__init__(low, high)
        self.mean_network = mean_network
        self.explore = explore

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """clip(m(s)), or clip(m(s) + noise) if ``explore``; ``noise [..., A]`` ~ N(0, I) is drawn if None."""
        action = self.mean_network(observation)
        if self.explore:
            action = action + (torch.randn_like(action) if noise is None else noise)
        return self.clip(action)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log N(a; m(s), I) ``[...]``, of the Gaussian before it is clipped."""
        return unit_log_prob(action, self.mean_network(observation))


def unit_log_prob(action: Tensor, mean: Tensor) -> Tensor:
    """Log N(action; mean, I) ``[...]`` of two ``[..., A]``."""
    return -0.5 * ((action - mean).square().sum(-1) + action.shape[-1] * math.log(2 * math.pi))


class GaussianPolicy(Policy):
    """A policy N(m(s), I) of unit standard deviation that acts by its mean or, if ``explore``, by samples.

    The action is clipped to the bounds. TorchRL's exploration modes do not change it: :meth:`exploring` gives the form that
    samples, on the same network. With unit standard deviation in a box of +-1 that is close to uniform noise, and it is what
    IQL explores with (FQL's re-implementation).

    Args:
        mean_network: any ``nn.Module`` called with the observation ``[..., O]``, returning the unbounded mean ``[..., A]``.

    Keyword Args:
        explore: sample instead of taking the mean. Defaults to ``False``.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key; if ``explore`` also the key of the noise z ~ N(0, I), which is drawn if the input lacks
            it. Defaults to ``("observation",)``, or ``("observation", "noise")``.
        out_keys: the action key.

    Raises:
        ValueError: on wrong bounds or numbers of keys.
        TypeError: by calls, if an input's dtype does not fit the network's.

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
        super().__init__(model, _acting_keys(in_keys, explore), out_keys, noise=explore)

    def exploring(self, noise_key: NestedKey = "noise") -> GaussianPolicy:
        """Return the policy that samples, with the same network."""
        model = self.module
        return GaussianPolicy(
            model.mean_network,
            explore=True,
            low=model.low,
            high=model.high,
            in_keys=(self.observation_key, noise_key),
            out_keys=self.out_keys,
        )


class DeterministicModel(BoundedModel):
    """Tensor-only core of :class:`DeterministicPolicy`; arguments as there."""

    def __init__(
        self,
        network: nn.Module,
        *,
        noise_scale: float | None = None,
        noise_clip: float = 0.5,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__(low, high)
        if (noise_scale is not None and not noise_scale >= 0) or not noise_clip >= 0:
            raise ValueError(f"noise_scale and noise_clip must not be negative, got {noise_scale} and {noise_clip}")
        self.network = network
        self.noise_scale = noise_scale
        self.noise_clip = noise_clip

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """pi(s) = tanh in the bounds; with a ``noise_scale`` :meth:`perturb` of it, ``noise`` drawn if None."""
        action = (self.low + self.high) / 2 + (self.high - self.low) / 2 * self.network(observation).tanh()
        if self.noise_scale is None:
            return action
        noise = torch.randn_like(action) if noise is None else noise
        return self.perturb(action, noise, self.noise_scale, self.noise_clip)

    def perturb(self, action: Tensor, noise: Tensor, scale: float, clip: float) -> Tensor:
        """clip(a + clip(scale z, +-clip)) of ``a [..., A]`` and ``z [..., A]`` ~ N(0, I)."""
        return self.clip(action + (scale * noise).clamp(-clip, clip))


class DeterministicPolicy(Policy):
    """pi(s) = tanh(network(s)), scaled to the bounds; :meth:`exploring` adds clipped Gaussian noise to it (TD3, ReBRAC).

    TorchRL's exploration modes do not change it.

    Args:
        network: any ``nn.Module`` called with the observation ``[..., O]``, returning ``[..., A]`` before tanh.

    Keyword Args:
        noise_scale: standard deviation of exploring noise in action units; ``None`` (default) does not explore.
        noise_clip: bound of that noise. Defaults to ``0.5``.
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key; with a ``noise_scale`` also the key of z ~ N(0, I), which is drawn if the input lacks it.
        out_keys: the action key.

    Raises:
        ValueError: on wrong bounds, negative noise or wrong numbers of keys.
        TypeError: by calls, if an input's dtype does not fit the network's.

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
        explore = noise_scale is not None
        model = DeterministicModel(network, noise_scale=noise_scale, noise_clip=noise_clip, low=low, high=high)
        super().__init__(model, _acting_keys(in_keys, explore), out_keys, noise=explore)

    def exploring(
        self, noise_scale: float = 0.2, noise_clip: float = 0.5, noise_key: NestedKey = "noise"
    ) -> DeterministicPolicy:
        """Return the policy clip(pi(s) + clip(noise_scale z, +-noise_clip)), with the same network."""
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


def _acting_keys(in_keys: Sequence[NestedKey] | None, explore: bool) -> Sequence[NestedKey]:
    return ("observation", "noise")[: 1 + explore] if in_keys is None else in_keys
