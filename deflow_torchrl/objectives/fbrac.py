# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FBRAC, flow behaviour-regularised actor-critic: the flow itself is the policy and climbs the critics through its own sampler.

A baseline of FQL's paper (https://arxiv.org/abs/2502.02538, appendix on baselines), a relative of Diffusion-QL. Its authors
published no code; later code of the same lineage agrees with what is computed here: the Q term is not normalised by default,
the gradient goes through every Euler step and stops where the final clip holds the action at a bound.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.critics import check_aggregation
from deflow_torchrl.modules.policies import encode
from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term


class FBRACLoss(OffPolicyLoss):
    """The losses of FBRAC. ``loss_flow`` and ``loss_actor`` train the same flow, ``loss_qvalue`` the critics.

    * ``loss_flow = alpha mean |v(s, x_t, t) - (a - z)|^2``: :class:`FlowMatchingLoss` times alpha;
    * ``loss_actor = -lambda mean_{j,batch} Q_j(s, flow(s, z))``, critics fixed, with gradient through all M Euler steps and the
      final clip; ``lambda = sg(1 / mean|mean_j Q_j|)`` if ``normalize_q_loss``, else 1;
    * ``loss_qvalue`` as :class:`TDCriticLoss`, with a' = flow(s', z').

    Their sum is FBRAC's objective; each is also a method: ``flow_loss``, ``actor_loss``, ``qvalue_loss``. Metadata
    ``flow_matching`` and ``q`` are the two parts before their coefficients.

    Args:
        actor_network (FlowMatchingPolicy): the acting policy; encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        alpha (float, optional): weight of the behaviour cloning. Defaults to ``10.0``.
        normalize_q_loss (bool, optional): scale the Q term by lambda. Defaults to ``False``.
        q_aggregation, delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if the policy is of another kind.
        ValueError: on a negative alpha or an unknown option.

    Random draws may be given in the input, else they are drawn in the order of :class:`FQLLoss`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_qvalue_networks, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> loss = FBRACLoss(flow, make_qvalue_networks(3, 2, (16,)), alpha=30.0)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss_actor, metadata = loss.actor_loss(data)
        >>> bool(loss_actor == -metadata["q"])
        True
    """

    out_keys = ["loss_flow", "loss_actor", "loss_qvalue", "flow_matching", "q"]
    _schedulable_buffers = frozenset({"alpha"})

    alpha: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        alpha: float = 10.0,
        q_aggregation: str | float = "mean",
        normalize_q_loss: bool = False,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_flow_policy(actor_network)
        check_aggregation(q_aggregation)
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_coefficient("alpha", alpha, exact=False)
        self.q_aggregation = q_aggregation
        self.normalize_q_loss = normalize_q_loss

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = [*acting.state_keys(self.actor_network), *self.critics.state_keys]
        return [*states, self.tensor_keys.action, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        return self._sampling_keys()

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks are taken from one generator.
        noise = self._draw(tensordict, self.tensor_keys.noise)
        next_noise = self._draw(tensordict, next_key(self.tensor_keys.noise))
        of_flow, of_critics = encode(self.actor_network, tensordict), self.critics.encode(tensordict)
        loss_flow, flow_metadata = self._flow_term(of_flow)
        loss_actor, actor_metadata = self._actor_term(of_flow, noise, of_critics)
        following = self._next(tensordict)
        critic_terms = self._td_terms(
            of_critics, lambda: self._with_action(following, acting.act(self.actor_network, following, next_noise))
        )
        return {"loss_flow": loss_flow, "loss_actor": loss_actor, **flow_metadata, **actor_metadata, **critic_terms}

    def _flow_term(self, tensordict: TensorDictBase) -> Terms:
        error = self._flow_error(self.actor_network, tensordict)
        return self._reduce(self.alpha * error, tensordict), {"flow_matching": self._statistic(error, tensordict)}

    def _actor_term(self, tensordict: TensorDictBase, noise: Tensor, of_critics: TensorDictBase) -> Terms:
        # The gradient goes through every Euler step. sg: the critics and lambda.
        action = acting.act(self.actor_network, tensordict, noise)
        qvalue = self.critics.values(self._with_action(of_critics, action), frozen=True).mean(0)
        loss = -self._q_scale(qvalue, tensordict) * qvalue
        return self._reduce(loss, tensordict), {"q": self._statistic(qvalue, tensordict)}

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``, weighted by alpha; inputs as in :meth:`FlowMatchingLoss.flow_loss`.

        Returns:
            The loss and metadata ``flow_matching``, detached.
        """
        return self._flow_term(tensordict)

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``q``, detached.
        """
        return self._actor_term(tensordict, self._draw(tensordict, self.tensor_keys.noise), tensordict)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; inputs and metadata as in :meth:`DeFlowLoss.qvalue_loss`."""
        following = self._next(tensordict)
        noise = self._draw(tensordict, next_key(self.tensor_keys.noise))
        out = self._td_terms(
            tensordict, lambda: self._with_action(following, acting.act(self.actor_network, following, noise))
        )
        return out.pop("loss_qvalue"), out
