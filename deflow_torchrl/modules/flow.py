# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The flow prior: actions sampled by Euler integration of a learned velocity field (DeFlow Eq. 4-6, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules import kernels
from deflow_torchrl.modules.networks import MLP, has_hooks


def register_bounds(module: nn.Module, low: float | Tensor, high: float | Tensor) -> None:
    """Keep the action bounds as buffers ``low`` and ``high``: they move with the module and are saved with it.

    Raises:
        ValueError: if ``low`` is not strictly less than ``high`` everywhere, or a bound is NaN.
    """
    low, high = (torch.as_tensor(bound, dtype=torch.get_default_dtype()) for bound in (low, high))
    if not bool((low < high).all()):
        raise ValueError(f"low must be strictly less than high, got low={low.tolist()} and high={high.tolist()}")
    module.register_buffer("low", low.clone())
    module.register_buffer("high", high.clone())


class FlowMatchingModel(nn.Module):
    """Tensor-only Euler sampler behind :class:`FlowMatchingPolicy`.

    Args:
        velocity_network: called with ONE tensor ``cat([observation, x, t], -1)`` of width ``O + A + 1``, returns ``[..., A]``.
        action_dim: number of action dimensions A.
        num_steps: Euler steps M.

    Keyword Args:
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.

    Raises:
        ValueError: if ``action_dim`` or ``num_steps`` is not positive, or the bounds are not ordered.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if action_dim < 1 or num_steps < 1:
            raise ValueError(f"action_dim and num_steps must be positive, got {action_dim} and {num_steps}")
        self.velocity_network = velocity_network
        self.action_dim = action_dim
        self.num_steps = num_steps
        register_bounds(self, low, high)

    def draw_noise(self, observation: Tensor) -> Tensor:
        """Draw z ~ N(0, I) of shape ``[..., A]`` from torch's global generator, whatever the exploration mode."""
        shape = (*observation.shape[:-1], self.action_dim)
        return torch.randn(shape, device=self.low.device, dtype=self.low.dtype)

    def velocity(self, observation: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v(s, x, t): ``observation [..., O]``, ``x [..., A]``, ``t [..., 1]`` in [0, 1] to ``[..., A]``."""
        return self.velocity_network(torch.cat([observation, x, t], -1))

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Integrate from ``noise [..., A]`` (drawn if None) to actions ``[..., A]``: x <- x + v(s, x, i/M)/M, i = 0..M-1."""
        x = self.draw_noise(observation) if noise is None else noise
        parameters = self._kernel_parameters(observation, x)
        if parameters is not None:
            return kernels.sample_flow(observation, x, parameters, num_steps=self.num_steps).clamp(self.low, self.high)
        for step in range(self.num_steps):
            t = x.new_full((*x.shape[:-1], 1), step / self.num_steps)
            x = x + self.velocity(observation, x, t) / self.num_steps
        # Clipping inside the loop would bend the flow's paths: the reference clips after the last step only.
        return x.clamp(self.low, self.high)

    def _kernel_parameters(self, observation: Tensor, x: Tensor) -> list[Tensor] | None:
        network = self.velocity_network
        if (
            torch.is_grad_enabled()
            or type(self).velocity is not FlowMatchingModel.velocity
            or not isinstance(network, MLP)
            or network.layer_norm
            or has_hooks(network)
            or observation.shape[:-1] != x.shape[:-1]
            or observation.dtype != x.dtype
        ):
            return None
        return network.kernel_parameters(x)


class NoisePolicy(TensorDictModule):
    """Base of the policies that map an observation and, optionally, noise to an action.

    Raises:
        ValueError: on other numbers of keys.
    """

    def __init__(self, model: nn.Module, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> None:
        if len(in_keys) not in (1, 2) or len(out_keys) != 1:
            raise ValueError(
                f"in_keys must be (observation,) or (observation, noise) and out_keys (action,), got {in_keys} and {out_keys}"
            )
        super().__init__(model, in_keys=list(in_keys), out_keys=list(out_keys))

    @property
    def observation_key(self) -> NestedKey:
        """Key of the observation."""
        return self.in_keys[0]

    @property
    def noise_key(self) -> NestedKey | None:
        """Key of the optional noise, None where the policy always draws its own."""
        return self.in_keys[1] if len(self.in_keys) == 2 else None


class FlowMatchingPolicy(NoisePolicy):
    """M-step flow-matching policy: the prior of DeFlow, or a behaviour-cloning policy of its own.

    Same constructor and meaning as the class of this name on TorchRL's main branch.

    Args:
        velocity_network: any ``nn.Module`` called with ONE tensor ``cat([observation, x, t], -1)`` of width ``O + A + 1``,
            returning a velocity ``[..., A]``.
        action_dim: number of action dimensions A.
        num_steps: Euler steps M (10 in the paper).

    Keyword Args:
        low: lower action bound, broadcast over the action dimensions. Defaults to ``-1.0``.
        high: upper action bound. Defaults to ``1.0``.
        in_keys: observation key and, optionally, noise key. Noise missing from the input is drawn from N(0, I), also
            under deterministic exploration: pass it to repeat an action.
        out_keys: the action key. Inside a :class:`DeFlowActor` use ``("base_action",)``.

    Raises:
        ValueError: on wrong sizes, bounds or numbers of keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = FlowMatchingPolicy(torch.nn.Linear(3 + 2 + 1, 2), action_dim=2)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    module: FlowMatchingModel

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        model = FlowMatchingModel(velocity_network, action_dim, num_steps, low=low, high=high)
        super().__init__(model, in_keys, out_keys)
