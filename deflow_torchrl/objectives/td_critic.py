# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TD(0) loss of the critics alone, on refined actions (DeFlow Eq. 2, Algorithm 1).

The term is that of :mod:`deflow`, whose file lists where the authors' released code and the paper differ.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.critics import check_aggregation
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, next_key, term
from deflow_torchrl.objectives.refined_actor import RefinedActorLoss


class TDCriticLoss(RefinedActorLoss):
    """Regress the critics on r + gamma (1 - terminated) agg_j Qbar_j(s', a') with a' from the actor (DeFlow Eq. 2).

    ``loss_qvalue`` is the mean over critics and batch of (Q_j(s, a) - y)^2. Truncated transitions bootstrap.

    Args:
        actor_network (DeFlowActor): the acting policy, used with its online parameters and without gradient.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        freeze_prior (bool, optional): see :meth:`freeze_prior_`. Base actions of s' are then read from the input where it
            has them. Defaults to ``False``.
        q_aggregation, delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        ValueError: on an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import (
        ...     DeFlowActor, FlowMatchingPolicy, RefinementPolicy,
        ...     make_qvalue_networks, make_refinement_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> loss = TDCriticLoss(actor, make_qvalue_networks(3, 2, (16,)), q_aggregation="min")
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> loss(data)["loss_qvalue"].shape
        torch.Size([])
    """

    out_keys = ["loss_qvalue"]

    def __init__(
        self,
        actor_network: DeFlowActor,
        qvalue_network: Critics,
        *,
        q_aggregation: str | float = "mean",
        delay_qvalue: bool = True,
        freeze_prior: bool = False,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        check_aggregation(q_aggregation)
        super().__init__(actor_network, freeze_prior=freeze_prior, reduction=reduction)
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self.q_aggregation = q_aggregation

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        following = None if tensordict is None else tensordict.get("next", None)
        states = self.critics.state_keys
        actor = self._actor_keys(following, self.critics.next_samples)
        return [*states, self.tensor_keys.action, *self._next_keys(*actor, *states)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*map(next_key, self._draw_keys()), *self.critics.draw_keys, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        following = self._next(tensordict)
        base_action = self._next_base_action(tensordict, following)
        return self._td_terms(tensordict, lambda: self._refined(following, base_action))

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; see :meth:`DeFlowLoss.qvalue_loss`."""
        return self._one_term("loss_qvalue", self._compute(tensordict))

    @term
    def flow_critic_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow_critic``; see :meth:`DeFlowLoss.flow_critic_loss`."""
        return self._one_term("loss_flow_critic", self._compute(tensordict))
