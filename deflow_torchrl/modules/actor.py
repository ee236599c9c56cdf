# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The acting policy of DeFlow: prior, then refinement (Algorithm 1, SAMPLE_ACTION)."""

from __future__ import annotations

from typing import Any, cast

from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from deflow_torchrl.modules.policies import BoundedModel, check_encoders, is_flow, last_policy, parts
from deflow_torchrl.modules.refinement import RefinementPolicy


class DeFlowActor(TensorDictSequential):
    """``observation -> base_action -> (refinement, action)``, usable as is by any TorchRL collector or environment.

    Only the noise of the prior makes the policy stochastic. Exploration modes do not change it, unless they change a prior of
    another kind: a :class:`torchrl.modules.DiffusionActor` starts from zeros under the deterministic mode.

    An encoder may stand before each part. The part is then ``TensorDictSequential(encoder, policy)`` and includes the encoder.

    Args:
        flow_policy: the prior. A :class:`FlowMatchingPolicy` if it is to learn; any TensorDictModule that writes the
            refinement's base action key if it is frozen (``freeze_prior=True`` of the losses) or only acts.
        refinement_policy: the refinement.
        **kwargs: forwarded to :class:`tensordict.nn.TensorDictSequential`.

    Raises:
        TypeError: if the refinement is no :class:`RefinementPolicy`.
        ValueError: if the prior does not write the key that the refinement reads as its base action, or if no module reads
            the output of an encoder.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, RefinementPolicy
        >>> from deflow_torchrl.modules import make_refinement_network, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> sorted(actor(TensorDict(observation=torch.zeros(4, 3), batch_size=[4])).keys())
        ['action', 'base_action', 'observation', 'refinement']
    """

    def __init__(
        self, flow_policy: TensorDictModuleBase, refinement_policy: TensorDictModuleBase, **kwargs: Any
    ) -> None:
        refinement = last_policy(refinement_policy)
        if not hasattr(refinement, "base_action_key"):
            raise TypeError(f"the refinement must be a RefinementPolicy, got a {type(refinement).__name__}")
        if unravel_key(refinement.base_action_key) not in [unravel_key(key) for key in flow_policy.out_keys]:
            raise ValueError(
                f"the prior writes {flow_policy.out_keys} but the refinement reads {refinement.base_action_key!r}: "
                "build the prior with out_keys=(that key,)"
            )
        check_encoders(refinement_policy)
        if is_flow(flow_policy):
            check_encoders(flow_policy)
        super().__init__(flow_policy, refinement_policy, **kwargs)

    @property
    def flow_policy(self) -> TensorDictModuleBase:
        """The prior as it was given, writing the base action."""
        return self.module[0]

    @property
    def refinement_policy(self) -> TensorDictModuleBase:
        """The refinement as it was given, writing the shift and the action."""
        return self.module[1]

    @property
    def base_action_key(self) -> NestedKey:
        """Key of the prior's action."""
        return self._refinement.base_action_key

    @property
    def action_key(self) -> NestedKey:
        """Key of the action to execute."""
        return self._refinement.action_key

    @property
    def _refinement(self) -> RefinementPolicy:
        return cast("RefinementPolicy", last_policy(self.refinement_policy))

    def prior_policy(self) -> TensorDictModuleBase:
        """Return the prior alone as an acting policy, which shares this actor's weights and writes ``action_key``.

        If the prior is no flow, its actions are clipped to the refinement's bounds.
        """
        prior = self.flow_policy
        if is_flow(prior):
            *encoders, flow = parts(prior)
            acting = TensorDictModule(flow.module, in_keys=list(flow.in_keys), out_keys=[self.action_key])
            return TensorDictSequential(*encoders, acting) if encoders else acting
        bounds = self._refinement.module
        clip = TensorDictModule(
            _Clip(bounds.low, bounds.high), in_keys=[self.base_action_key], out_keys=[self.action_key]
        )
        return TensorDictSequential(prior, clip)


class _Clip(BoundedModel):
    def forward(self, action: Tensor) -> Tensor:
        return self.clip(action)
