# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The flow prior: actions sampled by Euler integration of a learned velocity field (DeFlow Eq. 4-6, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules import kernels
from deflow_torchrl.modules.networks import MLP, is_wrapped
from deflow_torchrl.modules.policies import NoiseModel, Policy

Precision = Literal["highest", "high", "medium", "bfloat16"]


class FlowMatchingModel(NoiseModel):
    """Tensor-only Euler sampler behind :class:`FlowMatchingPolicy`; arguments as there."""

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be positive, got {num_steps}")
        super().__init__(action_dim, low, high)
        self.velocity_network = velocity_network
        self.num_steps = num_steps

    def velocity(self, observation: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v(s, x, t): ``observation [..., O]``, ``x [..., A]``, ``t [..., 1]`` in [0, 1] to ``[..., A]``."""
        return self.velocity_network(torch.cat([observation, x, t], -1))

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Integrate from ``noise [..., A]`` (drawn if None) to actions ``[..., A]``: x <- x + v(s, x, i/M)/M, i = 0..M-1."""
        x = self.draw_noise(observation) if noise is None else noise
        parameters = self._kernel_parameters(observation, x)
        if parameters is not None:
            return self.clip(kernels.sample_flow(observation, x, parameters, num_steps=self.num_steps))
        for step in range(self.num_steps):
            t = x.new_full((*x.shape[:-1], 1), step / self.num_steps)
            x = x + self.velocity(observation, x, t) / self.num_steps
        # Clipping inside the loop would bend the flow's paths; the reference also clips after the last step only.
        return self.clip(x)

    def _kernel_parameters(self, observation: Tensor, x: Tensor) -> list[Tensor] | None:
        """Return the velocity network's parameters for the fused sampler, or None where the network must be called."""
        network = self.velocity_network
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or not isinstance(network, MLP)
            or network.layer_norm
            or is_wrapped(network)
            or type(self).velocity is not _VELOCITY
            or "velocity" in vars(self)
            or observation.shape[:-1] != x.shape[:-1]
        ):
            return None
        parameters = network.kernel_parameters(observation, x)
        if parameters is None:
            return None
        widths = parameters[0].shape[-1], parameters[-1].shape[-1]
        return parameters if widths == (observation.shape[-1] + x.shape[-1] + 1, x.shape[-1]) else None


_VELOCITY = FlowMatchingModel.velocity


class FlowMatchingPolicy(Policy):
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
        TypeError: by calls, if an input's dtype does not fit the network's.

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


def check_precision(name: str) -> None:
    """Raise ValueError unless it is a :data:`Precision`."""
    if name not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {name!r}")


@contextmanager
def matmul_precision(name: Precision, device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products of the block with fewer digits; their inputs and results stay float32.

    Args:
        name: ``highest`` leaves everything as it is; ``high`` and ``medium`` are those of
            :func:`torch.set_float32_matmul_precision` (TF32 on a GPU; on a CPU, where it has the instructions, ``medium`` is
            bfloat16); ``bfloat16`` runs the networks under autocast.
        device: where they are computed.
    """
    if name == "highest":
        yield
    elif name == "bfloat16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
