# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FAWAC, flow advantage-weighted actor-critic: behaviour cloning of a flow, weighted by what the critics think of the action.

A baseline of FQL's paper (https://arxiv.org/abs/2502.02538, Eq. 10, where the sign of the objective slipped). Its authors
published no code. What the paper leaves open, and what is chosen here:
  1. V is not specified. Here it is the mean of the critics at one action of the policy, V = mean_j Q_j(s, flow(s, z)); an
     unofficial implementation regresses a network of its own on that.
  2. Q is that of the online critics, their mean, as in every actor of that code base but ReBRAC's; only the target of the
     critics uses target networks and the task's aggregation.
  3. Weights are clipped at 100, as in the IQL of the same code base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from deflow_torchrl.modules.flow import FlowMatchingPolicy
from deflow_torchrl.objectives.common import Reduction
from deflow_torchrl.objectives.noise_policy import FlowPolicyLoss


class FAWACLoss(FlowPolicyLoss):
    """The two losses of FAWAC, each with gradients to its own part only.

    * ``loss_flow = mean over batch and dims of w |v(s, x_t, t) - (a - z)|^2`` with
      ``w = sg(min(exp(temperature (Q - V)), max_weight))``, ``Q = mean_j Q_j(s, a)`` and ``V = mean_j Q_j(s, flow(s, z))`` for
      one draw of z, both of the online critics;
    * ``loss_qvalue`` as :class:`TDCriticLoss`, with a' = flow(s', z').

    Each is also a method: ``flow_loss``, ``qvalue_loss``. Metadata ``weight`` is the mean of w.

    Args:
        actor_network (FlowMatchingPolicy): the acting policy.
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.

    Keyword Args:
        temperature (float, optional): inverse temperature of the weights; 0 is behaviour cloning. Defaults to ``1.0``.
        max_weight (float, optional): upper bound of the weights. Defaults to ``100.0``.
        q_aggregation (str, optional): ``"mean"`` (default) or ``"min"`` over the target critics.
        delay_qvalue (bool, optional): bootstrap from target critics, moved by ``SoftUpdate``. Defaults to ``True``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Raises:
        TypeError: if the policy is of another kind.
        ValueError: on a negative temperature, a bound that is not positive or an unknown option.

    Random draws may be given in the input, else they are drawn in the order of :class:`FQLLoss`; ``noise`` is that of V.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_qvalue_networks, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> loss = FAWACLoss(flow, make_qvalue_networks(3, 2, (16,)), temperature=0.0)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> float(loss.flow_loss(data)[1]["weight"])
        1.0
    """

    out_keys = ["loss_flow", "loss_qvalue", "weight"]
    _schedulable_buffers = frozenset({"temperature"})

    temperature: Tensor

    def __init__(
        self,
        actor_network: FlowMatchingPolicy,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        temperature: float = 1.0,
        max_weight: float = 100.0,
        q_aggregation: str = "mean",
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        if not max_weight > 0:
            raise ValueError(f"max_weight must be positive, got {max_weight}")
        super().__init__(
            actor_network,
            qvalue_network,
            q_aggregation=q_aggregation,
            delay_qvalue=delay_qvalue,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
        )
        self._set_coefficient("temperature", temperature)
        self.max_weight = max_weight

    def _actions(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Actions of the policy at s and s', without gradient: one integration of [s; s'], the largest cost of an update."""
        key = self.actor_network.observation_key
        noise = torch.stack([self._current_noise(tensordict), self._next_noise(tensordict)])
        observation = torch.stack([tensordict[key], tensordict["next"][key]])
        with torch.no_grad():
            action, next_action = self.actor_network.module(observation, noise).unbind(0)
        return action, next_action

    @torch.no_grad()
    def _weights(self, tensordict: TensorDictBase, action: Tensor) -> Tensor:
        """Weight w of each sample, sg(.); ``action`` is the policy's."""
        params = self.qvalue_network_params
        qvalue = self._qvalues(tensordict, tensordict[self.tensor_keys.action], params, frozen=True).mean(0)
        value = self._qvalues(tensordict, action, params, frozen=True).mean(0)
        return (self.temperature * (qvalue - value)).exp().clamp_max(self.max_weight)

    def _weighted_flow_loss(self, tensordict: TensorDictBase, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self._weights(tensordict, action)
        loss = self._reduce_term(weights * self._flow_error(tensordict), tensordict)
        return loss, {"weight": self._statistic(weights, tensordict)}

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        action, next_action = self._actions(tensordict)
        loss_flow, metadata = self._weighted_flow_loss(tensordict, action)
        return {"loss_flow": loss_flow, **metadata, **self._critic_terms(tensordict, next_action)}

    def flow_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_flow``, weighted.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]``; optionally ``noise [..., A]`` (of V),
                ``flow_noise [..., A]`` and ``flow_time [..., 1]``, drawn in this order where absent.

        Returns:
            The loss and metadata ``weight``, detached.
        """
        tensordict = self._blank_masked_rows(tensordict)
        with self._acting():
            with torch.no_grad():
                action = self._act(tensordict, self._current_noise(tensordict))
            return self._weighted_flow_loss(tensordict, action)
