# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Refinement and multiplier alone (DeFlow Eq. 10-12), for those who bring a prior and critics of their own.

The terms are those of :mod:`deflow`, whose file lists where the authors' released code and the paper differ.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.objectives import terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, term
from deflow_torchrl.objectives.refined_actor import RefinedActorLoss


class RefinementLoss(RefinedActorLoss):
    """Move sampled actions towards higher Q inside the trust region E|da|^2 <= delta (DeFlow Eq. 10-12).

    ``loss_actor`` and ``loss_alpha`` of :class:`DeFlowLoss`, whose arguments mean the same here.

    Args:
        actor_network (DeFlowActor): the acting policy. Only its refinement receives gradient from this loss.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`. To follow critics that are trained
            elsewhere give the :class:`TDCriticLoss` that trains them, whose parameters are then shared.

    Keyword Args:
        target_divergence (float): delta, the mean-square shift per action dimension, in squared action units.
        normalize_q_loss, divergence_reduction, log_alpha_init, min_alpha, max_alpha, fixed_alpha, freeze_prior: see
            :class:`DeFlowLoss`.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        ValueError: on a non-positive delta or alpha, crossed bounds or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import (
        ...     DeFlowActor, FlowMatchingPolicy, RefinementPolicy,
        ...     make_qvalue_networks, make_refinement_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> loss = RefinementLoss(actor, make_qvalue_networks(3, 2, (16,)), target_divergence=1e-3)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> sorted(loss(data).keys())
        ['alpha', 'divergence', 'loss_actor', 'loss_alpha']

    Without tensordict: ``loss_actor, loss_alpha, alpha, divergence = loss(observation=..., action=...)``.
    """

    out_keys = ["loss_actor", "loss_alpha", "alpha", "divergence"]

    def __init__(
        self,
        actor_network: DeFlowActor,
        qvalue_network: Critics | OffPolicyLoss,
        *,
        target_divergence: float,
        normalize_q_loss: bool = True,
        divergence_reduction: str = "mean",
        log_alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        fixed_alpha: float | None = None,
        freeze_prior: bool = False,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(actor_network, freeze_prior=freeze_prior, reduction=reduction)
        # The actor climbs the online critics: this loss alone needs no targets.
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=False,
        )
        self._add_trust_region(
            target_divergence=target_divergence,
            divergence_reduction=divergence_reduction,
            log_alpha_init=log_alpha_init,
            min_alpha=min_alpha,
            max_alpha=max_alpha,
            fixed_alpha=fixed_alpha,
        )
        self.normalize_q_loss = normalize_q_loss

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        keys = [*self._actor_keys(tensordict), *self.critics.state_keys]
        # The data's action only gives the noise its shape and type.
        return keys if self._given_base_action(tensordict) is not None else [*keys, self.tensor_keys.action]

    def _optional_keys(self) -> list[NestedKey]:
        return [*self._draw_keys(), *self.critics.draw_keys]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        shift, action = self._refine(tensordict, self._base_action(tensordict))
        divergence = terms.divergence(shift, self.divergence_reduction)
        # sg: the base action, the critics, lambda and alpha.
        qvalue = self.critics.values(self._with_action(tensordict, action), frozen=True).mean(0)
        loss = terms.trust_region(qvalue, divergence, alpha=self.alpha, scale=self._q_scale(qvalue, tensordict))
        if self.fixed_alpha is None:
            alpha_loss = terms.multiplier(self._project_log_alpha(), divergence - self.target_divergence)
        else:
            alpha_loss = torch.zeros_like(divergence.detach())
        return {
            "loss_actor": self._reduce(loss, tensordict),
            "loss_alpha": self._reduce(alpha_loss, tensordict),
            "alpha": self.alpha,
            "divergence": self._statistic(divergence, tensordict),
        }

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``; see :meth:`DeFlowLoss.actor_loss`."""
        out = self._compute(tensordict)
        return out["loss_actor"], {"alpha": out["alpha"], "divergence": out["divergence"]}

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; inputs and metadata as in :meth:`actor_loss`."""
        out = self._compute(tensordict)
        return out["loss_alpha"], {"alpha": out["alpha"], "divergence": out["divergence"]}
