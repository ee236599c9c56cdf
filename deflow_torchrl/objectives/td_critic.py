# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TD(0) loss of the twin critics, evaluated on refined actions (DeFlow Eq. 2, Algorithm 1).

Where the released code and the paper differ:
  1. The loss is averaged over the critics (and the batch), where TorchRL and others sum it over the critics.
     Default here: the average.
  2. The code moves the targets towards the critics of *before* the optimiser step, TorchRL's scripts towards those of
     after it. The choice is the caller's: SoftUpdate.step() before optimizer.step() is the code's order, and the one of
     deflow_torchrl.trainers.UpdateStep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction, next_key


class TDCriticLoss(OffPolicyLoss):
    """Regress the critics on r + gamma (1 - terminated) agg_j Qbar_j(s', a') with a' from the actor (DeFlow Eq. 2).

    ``loss_qvalue`` is the mean over critics and batch of (Q_j(s, a) - y)^2. Truncated transitions bootstrap.

    Args:
        actor_network (DeFlowActor): the acting policy, used with its online parameters and without gradient.
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.

    Keyword Args:
        q_aggregation (str, optional): ``"mean"`` (default) or ``"min"`` over the target critics.
        delay_qvalue (bool, optional): bootstrap from target critics, moved by ``SoftUpdate``. Defaults to ``True``.
        freeze_prior (bool, optional): see :meth:`freeze_prior_`. Base actions of s' are then read from the input where it
            has them. Defaults to ``False``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Raises:
        ValueError: on an unknown option.

    .. note:: gamma belongs to the value estimator: ``loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.

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
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

    def __init__(
        self,
        actor_network: DeFlowActor,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        q_aggregation: str = "mean",
        delay_qvalue: bool = True,
        freeze_prior: bool = False,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(reduction=reduction)
        self._set_actor(actor_network, freeze_prior=freeze_prior)
        self._set_critic(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            create_target_params=delay_qvalue,
            deactivate_vmap=deactivate_vmap,
        )
        self._set_aggregation(q_aggregation)

    def _set_aggregation(self, q_aggregation: str) -> None:
        if q_aggregation not in ("mean", "min"):
            raise ValueError(f"q_aggregation must be 'mean' or 'min', got {q_aggregation!r}")
        self.q_aggregation = q_aggregation

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        following = None if tensordict is None else tensordict.get("next", None)
        observations = [*self._actor_keys(following), *self._critic_keys()]
        keys = self.tensor_keys
        return [
            *self._critic_keys(),
            keys.action,
            *(next_key(key) for key in (*observations, keys.reward, keys.done, keys.terminated)),
        ]

    def _optional_keys(self) -> list[NestedKey]:
        return [next_key(key) for key in self._draw_keys()]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        if self._value_estimator is not None:
            keys = self.tensor_keys
            self._value_estimator.set_keys(reward=keys.reward, done=keys.done, terminated=keys.terminated)

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> TDCriticLoss:
        """Set gamma: ``make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.

        Raises:
            NotImplementedError: for any estimator of the enumeration but TD0.
        """
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            dispatch_value_estimator(
                self, value_type, supported=self.SUPPORTED_VALUE_ESTIMATORS, value_network=None, **hyperparams
            )
        self._forward_value_estimator_keys()
        return self

    def _qvalue_loss(self, tensordict: TensorDictBase, next_action: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss_qvalue, |TD error| of each sample, the largest of the ensemble); ``next_action`` has no gradient."""
        with torch.no_grad():
            following = tensordict["next"]
            next_qvalues = self._qvalues(following, next_action, self.target_qvalue_network_params)
            next_qvalue = next_qvalues.mean(0) if self.q_aggregation == "mean" else next_qvalues.amin(0)
            target = self.value_estimator.value_estimate(tensordict, next_value=next_qvalue.unsqueeze(-1)).squeeze(-1)
        qvalues = self._qvalues(tensordict, tensordict[self.tensor_keys.action], self.qvalue_network_params)
        error = qvalues - target
        loss = self._reduce_term(error.square().mean(0), tensordict)
        td_error = error.detach().abs().amax(0)
        mask = self._mask(tensordict)
        # A masked row has no error: a prioritised sampler must not come back for padding.
        return loss, td_error if mask is None else torch.where(mask, td_error, 0.0)

    def _critic_terms(self, tensordict: TensorDictBase, next_action: Tensor) -> dict[str, Tensor]:
        loss, td_error = self._qvalue_loss(tensordict, next_action)
        return {"loss_qvalue": loss, self.tensor_keys.priority: td_error}

    def _next_noise(self, tensordict: TensorDictBase) -> Tensor:
        return self._noise(tensordict, next_key(self.tensor_keys.noise))

    def _next_base_action(self, tensordict: TensorDictBase) -> Tensor:
        """Base action of s', given or drawn."""
        given = self._given_base_action(tensordict["next"])
        return self._base_action(tensordict["next"], self._next_noise(tensordict)) if given is None else given

    def _refined_next_action(self, tensordict: TensorDictBase, next_base_action: Tensor) -> Tensor:
        with torch.no_grad():
            return self._refine(tensordict["next"], next_base_action)[1]

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        """Action a' of s' that the target is evaluated at, without gradient: a loss with another policy says its own."""
        return self._refined_next_action(tensordict, self._next_base_action(tensordict))

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return self._critic_terms(tensordict, self._next_action(tensordict))

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: observation, ``action [..., A]`` and, under ``"next"``, observation, reward, done and terminated
                ``[..., 1]``; optionally ``("next", "noise") [..., A]``.

        Returns:
            The loss and metadata ``td_error [...]``, detached.
        """
        tensordict = self._blank_masked_rows(tensordict)
        with self._acting():
            loss, td_error = self._qvalue_loss(tensordict, self._next_action(tensordict))
        return loss, {"td_error": td_error}
