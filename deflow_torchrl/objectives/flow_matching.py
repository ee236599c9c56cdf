# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Flow-matching loss of the prior (DeFlow Eq. 5, FQL's BC flow).

Where the released code and the paper differ:
  1. Eq. 5 sums the squared error over action dimensions, the code averages it. Default here: the average.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.flow import FlowMatchingPolicy
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction


class FlowMatchingLoss(OffPolicyLoss):
    """Conditional flow matching on the data's actions (https://arxiv.org/abs/2210.02747, DeFlow Eq. 5).

    ``loss_flow = mean over batch and dims of |v(s, x_t, t) - (a - z)|^2`` with ``x_t = (1 - t) z + t a``,
    ``z ~ N(0, I)`` and ``t ~ U[0, 1)``.

    Args:
        flow_policy (FlowMatchingPolicy): the prior to train.

    Keyword Args:
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).

    Raises:
        TypeError: if ``flow_policy`` is not a :class:`~deflow_torchrl.modules.FlowMatchingPolicy`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_velocity_network
        >>> loss = FlowMatchingLoss(FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss(data)["loss_flow"].shape
        torch.Size([])

    Without tensordict: ``loss_flow = loss(observation=..., action=...)``.
    """

    out_keys = ["loss_flow"]

    flow_policy: FlowMatchingPolicy
    flow_policy_params: TensorDictParams
    target_flow_policy_params: TensorDictParams

    def __init__(self, flow_policy: FlowMatchingPolicy, *, reduction: Reduction | None = None) -> None:
        super().__init__(reduction=reduction)
        check_flow_policy(flow_policy)
        self.convert_to_functional(flow_policy, "flow_policy")

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [self._flow_policy.observation_key, self.tensor_keys.action]

    def _optional_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.flow_noise, self.tensor_keys.flow_time]

    @property
    def _flow_policy(self) -> FlowMatchingPolicy:
        return self.flow_policy

    def _acting(self) -> AbstractContextManager[Any]:
        return self.flow_policy_params.to_module(self.flow_policy, preserve_module_state=False)

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return {"loss_flow": self._flow_loss(tensordict)}

    def _flow_error(self, tensordict: TensorDictBase) -> Tensor:
        """Squared error of the velocity of each sample, mean over action dimensions."""
        action = tensordict[self.tensor_keys.action]
        noise = tensordict.get(self.tensor_keys.flow_noise, None)
        if noise is None:
            noise = torch.randn_like(action)
        time = tensordict.get(self.tensor_keys.flow_time, None)
        if time is None:
            time = torch.rand_like(action[..., :1])
        x = (1 - time) * noise + time * action
        velocity = self._flow_policy.module.velocity(tensordict[self._flow_policy.observation_key], x, time)
        return (velocity - (action - noise)).square().mean(-1)

    def _flow_loss(self, tensordict: TensorDictBase) -> Tensor:
        return self._reduce_term(self._flow_error(tensordict), tensordict)

    def flow_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_flow``.

        Args:
            tensordict: observation ``[..., O]`` and action ``[..., A]``; optionally ``flow_noise [..., A]`` and
                ``flow_time [..., 1]``, drawn in this order where absent.

        Returns:
            The loss and an empty metadata dictionary.
        """
        with self._acting():
            return self._flow_loss(self._blank_masked_rows(tensordict)), {}


def check_flow_policy(policy: object) -> None:
    """Raise TypeError unless ``policy`` has the velocity field that flow matching trains."""
    if not isinstance(policy, FlowMatchingPolicy):
        raise TypeError(f"flow matching needs a FlowMatchingPolicy, got {type(policy).__name__}")
