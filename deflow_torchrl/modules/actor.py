# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The acting policy of DeFlow: prior, then refinement (Algorithm 1, SAMPLE_ACTION)."""

from __future__ import annotations

from typing import Any

from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.flow import FlowMatchingPolicy, register_bounds
from deflow_torchrl.modules.refinement import RefinementPolicy


class DeFlowActor(TensorDictSequential):
    """``observation -> base_action -> (refinement, action)``, usable as is by any TorchRL collector or environment.

    The policy is stochastic through the prior's noise only; exploration modes do not change it, unless they change a prior of
    another kind (a :class:`torchrl.modules.DiffusionActor` starts from zeros under the deterministic one).

    Args:
        flow_policy: the prior. A :class:`FlowMatchingPolicy` if it is to learn; any TensorDictModule that writes the
            refinement's base action key if it is frozen (``freeze_prior=True`` of the losses) or only acts.
        refinement_policy: the refinement.
        **kwargs: forwarded to :class:`tensordict.nn.TensorDictSequential`.

    Raises:
        ValueError: if the prior does not write the key the refinement reads as its base action.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import make_refinement_network, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> sorted(actor(TensorDict(observation=torch.zeros(4, 3), batch_size=[4])).keys())
        ['action', 'base_action', 'observation', 'refinement']
    """

    def __init__(self, flow_policy: TensorDictModuleBase, refinement_policy: RefinementPolicy, **kwargs: Any) -> None:
        if refinement_policy.base_action_key not in flow_policy.out_keys:
            raise ValueError(
                f"the prior writes {flow_policy.out_keys} but the refinement reads {refinement_policy.base_action_key!r}: "
                "build the prior with out_keys=(that key,)"
            )
        super().__init__(flow_policy, refinement_policy, **kwargs)

    @property
    def flow_policy(self) -> TensorDictModuleBase:
        """The prior, writing the base action."""
        return self.module[0]

    @property
    def refinement_policy(self) -> RefinementPolicy:
        """The refinement, writing the shift and the action."""
        return self.module[1]

    @property
    def action_key(self) -> NestedKey:
        """Key of the action to execute."""
        return self.refinement_policy.action_key

    def prior_policy(self) -> TensorDictModuleBase:
        """The prior alone as an acting policy: shares this actor's weights, writes the base action as ``action_key``.

        The actions of a prior that is no :class:`FlowMatchingPolicy` are clipped to the refinement's bounds.
        """
        prior = self.flow_policy
        if isinstance(prior, FlowMatchingPolicy):
            return TensorDictModule(prior.module, in_keys=list(prior.in_keys), out_keys=[self.action_key])
        bounds = self.refinement_policy.module
        clip = _Clip(bounds.low, bounds.high)
        return TensorDictSequential(
            prior, TensorDictModule(clip, in_keys=[self.refinement_policy.base_action_key], out_keys=[self.action_key])
        )


class _Clip(nn.Module):
    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        register_bounds(self, low, high)

    def forward(self, action: Tensor) -> Tensor:
        return action.clamp(self.low, self.high)
