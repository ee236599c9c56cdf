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

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.critics import check_aggregation
from deflow_torchrl.modules.policies import encode, last_policy
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term


class FAWACLoss(OffPolicyLoss):
    """The two losses of FAWAC, each with gradients to its own part only.

    * ``loss_flow = mean over batch and dims of w |v(s, x_t, t) - (a - z)|^2`` with
      ``w = sg(min(exp(temperature (Q - V)), max_weight))``, ``Q = mean_j Q_j(s, a)`` and ``V = mean_j Q_j(s, flow(s, z))`` for
      one draw of z, both of the online critics;
    * ``loss_qvalue`` as :class:`TDCriticLoss`, with a' = flow(s', z').

    Each is also a method: ``flow_loss``, ``qvalue_loss``. Metadata ``weight`` is the mean of w.

    Args:
        actor_network (FlowMatchingPolicy): the acting policy; encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        temperature (float, optional): inverse temperature of the weights; 0 is behaviour cloning. Defaults to ``1.0``.
        max_weight (float, optional): upper bound of the weights. Defaults to ``100.0``.
        q_aggregation, delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

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
    _schedulable_buffers = frozenset({"temperature", "max_weight"})

    temperature: Tensor
    max_weight: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        temperature: float = 1.0,
        max_weight: float = 100.0,
        q_aggregation: str | float = "mean",
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_flow_policy(actor_network)
        check_aggregation(q_aggregation)
        if not max_weight > 0:
            raise ValueError(f"max_weight must be positive, got {max_weight}")
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_coefficient("temperature", temperature, exact=False)
        self._add_coefficient("max_weight", max_weight)
        self.q_aggregation = q_aggregation

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = [*acting.state_keys(self.actor_network), *self.critics.state_keys]
        return [*states, self.tensor_keys.action, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        return self._sampling_keys()

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        following = self._next(tensordict)
        of_flow, of_critics = encode(self.actor_network, tensordict), self.critics.encode(tensordict)
        action, next_action = self._actions(of_flow, following)
        loss_flow, metadata = self._flow_term(of_flow, action, of_critics)
        critic_terms = self._td_terms(of_critics, lambda: self._with_action(following, next_action))
        return {"loss_flow": loss_flow, **metadata, **critic_terms}

    @torch.no_grad()
    def _actions(self, tensordict: TensorDictBase, following: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Actions of the policy at s and s': one integration of [s; s'], the largest cost of an update."""
        noise_key = self.tensor_keys.noise
        noise = [self._draw(tensordict, key) for key in (noise_key, next_key(noise_key))]
        policy = self.actor_network
        keys = acting.state_keys(last_policy(policy))
        both = torch.stack([encode(policy, state).select(*keys) for state in (tensordict, following)])
        return acting.act(policy, both, torch.stack(noise)).unbind(0)  # type: ignore[return-value]

    def _flow_term(self, tensordict: TensorDictBase, action: Tensor, of_critics: TensorDictBase) -> Terms:
        """``action`` is the policy's, at which V is taken."""
        with torch.no_grad():  # sg: the weights
            qvalue = self.critics.values(of_critics).mean(0)
            value = self.critics.values(self._with_action(of_critics, action)).mean(0)
        weight = terms.advantage_weight(qvalue - value, self.temperature, self.max_weight)
        loss = self._reduce(weight * self._flow_error(self.actor_network, tensordict), tensordict)
        return loss, {"weight": self._statistic(weight, tensordict)}

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``, weighted.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]``; optionally ``noise [..., A]`` (of V),
                ``flow_noise [..., A]`` and ``flow_time [..., 1]``, drawn in this order where absent.

        Returns:
            The loss and metadata ``weight``, detached.
        """
        with torch.no_grad():
            action = acting.act(self.actor_network, tensordict, self._draw(tensordict, self.tensor_keys.noise))
        return self._flow_term(tensordict, action, tensordict)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; inputs and metadata as in :meth:`DeFlowLoss.qvalue_loss`."""
        following = self._next(tensordict)
        noise = self._draw(tensordict, next_key(self.tensor_keys.noise))
        out = self._td_terms(
            tensordict, lambda: self._with_action(following, acting.act(self.actor_network, following, noise))
        )
        return out.pop("loss_qvalue"), out
