# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What the losses of FQL, FBRAC and FAWAC share: a flow, twin critics, and a policy that maps (observation, noise) to an action.

The critics are those of :mod:`td_critic`, the flow is trained by :mod:`flow_matching`; a' of the target is the policy's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.flow import FlowMatchingPolicy
from deflow_torchrl.modules.policies import OneStepPolicy
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction
from deflow_torchrl.objectives.flow_matching import FlowMatchingLoss, check_flow_policy
from deflow_torchrl.objectives.td_critic import TDCriticLoss


class NoisePolicyLoss(FlowMatchingLoss, TDCriticLoss):
    """Base of the losses whose acting policy, ``actor_network``, is a :class:`OneStepPolicy` or a :class:`FlowMatchingPolicy`."""

    actor_network: OneStepPolicy | FlowMatchingPolicy

    def __init__(
        self,
        actor_network: OneStepPolicy | FlowMatchingPolicy,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        q_aggregation: str,
        delay_qvalue: bool,
        num_qvalue_nets: int,
        reduction: Reduction | None,
        deactivate_vmap: bool,
    ) -> None:
        # The parents' constructors would each convert the networks again: the parts are set once, here.
        OffPolicyLoss.__init__(self, reduction=reduction)
        self.convert_to_functional(actor_network, "actor_network")
        self._set_critic(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            create_target_params=delay_qvalue,
            deactivate_vmap=deactivate_vmap,
        )
        self._set_aggregation(q_aggregation)

    def _set_coefficient(self, name: str, value: float) -> None:
        """Keep a non-negative coefficient as a buffer: it can be changed in mid-training, also inside a captured graph."""
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        example = next(iter(self.actor_network_params.values(True, True)))
        self.register_coeff_buffer(name, float(value), device=example.device, dtype=example.dtype)

    def freeze_prior_(self) -> NoisePolicyLoss:
        """Refused: there is no prior below the policy that could stay as it is.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{type(self).__name__} has no prior to freeze")

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [
            *self._actor_keys(),
            *FlowMatchingLoss._required_keys(self, tensordict),
            *TDCriticLoss._required_keys(self, tensordict),
        ]

    def _optional_keys(self) -> list[NestedKey]:
        return [
            self.tensor_keys.noise,
            *TDCriticLoss._optional_keys(self),
            *FlowMatchingLoss._optional_keys(self),
        ]

    def _actor_keys(self, observations: TensorDictBase | None = None) -> list[NestedKey]:
        return [self.actor_network.observation_key]

    def _current_noise(self, tensordict: TensorDictBase) -> Tensor:
        return self._noise(tensordict, self.tensor_keys.noise)

    def _act(self, observations: TensorDictBase, noise: Tensor) -> Tensor:
        """Clipped action of the policy, with gradient to it."""
        return self.actor_network.module(observations[self.actor_network.observation_key], noise)

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        with torch.no_grad():
            return self._act(tensordict["next"], self._next_noise(tensordict))


class FlowPolicyLoss(NoisePolicyLoss):
    """Base of the losses whose acting policy is the flow itself (FBRAC, FAWAC).

    Raises:
        TypeError: if ``actor_network`` is no :class:`FlowMatchingPolicy`.
    """

    actor_network: FlowMatchingPolicy

    def __init__(
        self,
        actor_network: FlowMatchingPolicy,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        **options: Any,
    ) -> None:
        check_flow_policy(actor_network)
        super().__init__(actor_network, qvalue_network, **options)

    @property
    def _flow_policy(self) -> FlowMatchingPolicy:
        return self.actor_network

    def _acting(self) -> AbstractContextManager[Any]:
        return OffPolicyLoss._acting(self)
