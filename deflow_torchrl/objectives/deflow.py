# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow: flow prior, trust-region refinement and twin critic, trained side by side (Algorithm 1).

The three parts are the three losses of :mod:`flow_matching`, :mod:`refinement` and :mod:`td_critic`, whose files list where
the authors' released code and the paper differ. Differences of the whole:
  1. The paper says Q-normalisation as in FQL; FQL's runs do not normalise, DeFlow's released commands do. Default: do.
  2. The released "frozen" prior stays in the optimiser, whose momentum moves it. Here a part is frozen by leaving its
     parameters out of the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.flow import FlowMatchingPolicy, Precision, check_precision
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction
from deflow_torchrl.objectives.flow_matching import FlowMatchingLoss, check_flow_policy
from deflow_torchrl.objectives.refinement import RefinementLoss
from deflow_torchrl.objectives.td_critic import TDCriticLoss


class DeFlowLoss(FlowMatchingLoss, RefinementLoss, TDCriticLoss):
    """The four losses of DeFlow (https://muzhancun.github.io/preprints/deflow), each with gradients to its own part only.

    ``loss_flow`` trains the prior (:class:`FlowMatchingLoss`), ``loss_actor`` the refinement and ``loss_alpha`` the
    multiplier (:class:`RefinementLoss`), ``loss_qvalue`` the critics (:class:`TDCriticLoss`). Each is also a method:
    ``flow_loss``, ``actor_loss``, ``alpha_loss``, ``qvalue_loss``. Sum them, go back, step ``SoftUpdate`` and one optimiser
    (in this order, if the numbers are to be those of the authors' code to the last digits).

    Args:
        actor_network (DeFlowActor): the acting policy, prior and refinement.
        qvalue_network (list of TensorDictModule, or TensorDictModule): critics reading the observation and ``action`` and
            writing ``state_action_value [..., 1]``. A list keeps its initialisation; one module is copied
            ``num_qvalue_nets`` times, all but the first copy re-initialised by their own layers.

    Keyword Args:
        target_divergence (float, optional): delta, the mean-square shift per action dimension. Defaults to ``1e-3``
            (the paper's value for cube and scene).
        q_aggregation (str, optional): ``"mean"`` (default) or ``"min"`` over the target critics.
        normalize_q_loss (bool, optional): scale the Q term by 1 / mean|Q|. Defaults to ``True``.
        divergence_reduction (str, optional): ``"mean"`` (default) or ``"sum"`` over action dimensions.
        log_alpha_init (float, optional): start of log alpha. Defaults to ``1.0``.
        min_alpha (float, optional): lower bound of alpha. Defaults to none.
        max_alpha (float, optional): upper bound of alpha. Defaults to none.
        fixed_alpha (float, optional): a constant multiplier. Defaults to none.
        freeze_prior (bool, optional): the prior does not learn and there is no ``loss_flow``: see :meth:`freeze_prior_`,
            which does the same in mid-training. The prior may then be any TensorDictModule that writes the refinement's base
            action, and it is not called where the input holds base actions of s and s' already
            (:class:`~deflow_torchrl.data.BaseActionBank`). Defaults to ``False``.
        delay_qvalue (bool, optional): bootstrap from target critics, moved by ``SoftUpdate``. Defaults to ``True``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.
        sampler_precision (str, optional): of the matrix products that sample base actions, without gradient:
            ``"highest"`` (default), ``"high"``, ``"medium"`` or ``"bfloat16"``, see
            :func:`~deflow_torchrl.modules.flow.matmul_precision`.

    Raises:
        TypeError: if the actor's prior is to learn and is not a :class:`~deflow_torchrl.modules.FlowMatchingPolicy`.
        ValueError: on a non-positive delta or alpha, crossed bounds or an unknown option.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order: ``noise``,
    ``("next", "noise")``, ``flow_noise`` (all N(0, I), ``[..., A]``), ``flow_time`` (U[0, 1), ``[..., 1]``). With a frozen
    prior ``base_action`` and ``("next", "base_action")`` may be given, each in the place of its noise.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import (
        ...     DeFlowActor, FlowMatchingPolicy, RefinementPolicy,
        ...     make_qvalue_networks, make_refinement_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> loss = DeFlowLoss(actor, make_qvalue_networks(3, 2, (16,)), target_divergence=1e-3)
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['alpha', 'divergence', 'loss_actor', 'loss_alpha', 'loss_flow', 'loss_qvalue']

    This class is compatible with non-tensordict based modules too and can be used without recurring to any
    tensordict-related primitive; select the outputs you want:

        >>> _ = loss.select_out_keys("loss_flow", "loss_qvalue")
        >>> loss_flow, loss_qvalue = loss(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2), next_observation=torch.randn(4, 3),
        ...     next_reward=torch.randn(4, 1), next_done=torch.zeros(4, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(4, 1, dtype=torch.bool))
        >>> loss_flow.shape
        torch.Size([])
    """

    out_keys = ["loss_flow", "loss_actor", "loss_alpha", "loss_qvalue", "alpha", "divergence"]

    def __init__(
        self,
        actor_network: DeFlowActor,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        target_divergence: float = 1e-3,
        q_aggregation: str = "mean",
        normalize_q_loss: bool = True,
        divergence_reduction: str = "mean",
        log_alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        fixed_alpha: float | None = None,
        freeze_prior: bool = False,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
        sampler_precision: Precision = "highest",
    ) -> None:
        check_precision(sampler_precision)
        # The parents' constructors would each convert the networks again: the parts are set once, here.
        OffPolicyLoss.__init__(self, reduction=reduction)
        if not freeze_prior:
            check_flow_policy(actor_network.flow_policy)
        self._set_actor(actor_network, freeze_prior=freeze_prior)
        self._set_critic(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            create_target_params=delay_qvalue,
            deactivate_vmap=deactivate_vmap,
        )
        self._set_aggregation(q_aggregation)
        self.sampler_precision = sampler_precision
        self._set_trust_region(
            target_divergence=target_divergence,
            normalize_q_loss=normalize_q_loss,
            divergence_reduction=divergence_reduction,
            log_alpha_init=log_alpha_init,
            min_alpha=min_alpha,
            max_alpha=max_alpha,
            fixed_alpha=fixed_alpha,
        )

    def freeze_prior_(self) -> Self:
        """Fix the prior for good and drop ``loss_flow`` from the outputs; see :meth:`RefinementLoss.freeze_prior_`."""
        self.out_keys = [key for key in self.out_keys if key != "loss_flow"]
        return super().freeze_prior_()

    def flow_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_flow``: see :meth:`FlowMatchingLoss.flow_loss`.

        Raises:
            RuntimeError: if the prior is frozen.
        """
        if self.prior_frozen:
            raise RuntimeError("the prior is frozen: it has no flow loss")
        return super().flow_loss(tensordict)

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*RefinementLoss._required_keys(self, tensordict), *TDCriticLoss._required_keys(self, tensordict)]

    def _optional_keys(self) -> list[NestedKey]:
        parts = (RefinementLoss, TDCriticLoss, *(() if self.prior_frozen else (FlowMatchingLoss,)))
        return [key for part in parts for key in part._optional_keys(self)]

    @property
    def _flow_policy(self) -> FlowMatchingPolicy:
        return self.actor_network.flow_policy

    def _acting(self) -> AbstractContextManager[Any]:
        return OffPolicyLoss._acting(self)

    def _base_actions(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """(b, b') of s and s', independent of each other."""
        states = (tensordict, tensordict["next"])
        if tensordict.ndim == 0 or any(self._given_base_action(state) is not None for state in states):
            return self._current_base_action(tensordict), self._next_base_action(tensordict)
        # One integration of [s; s'] in 2B rows instead of two: the largest cost of an update, at half the calls.
        noise = torch.cat([self._noise(tensordict, self.tensor_keys.noise), self._next_noise(tensordict)], 0)
        keys = self._actor_keys()
        base_action, next_base_action = self._base_action(
            torch.cat([state.select(*keys) for state in states], 0), noise
        ).chunk(2, 0)
        return base_action, next_base_action

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        base_action, next_base_action = self._base_actions(tensordict)
        return {
            **({} if self.prior_frozen else {"loss_flow": self._flow_loss(tensordict)}),
            **self._refinement_terms(tensordict, base_action),
            **self._critic_terms(tensordict, self._refined_next_action(tensordict, next_base_action)),
        }
