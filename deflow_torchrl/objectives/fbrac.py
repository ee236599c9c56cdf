# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FBRAC, flow behaviour-regularised actor-critic: the flow itself is the policy and climbs the critics through its own sampler.

A baseline of FQL's paper (https://arxiv.org/abs/2502.02538, appendix on baselines), a relative of Diffusion-QL. Its authors
published no code; later code of the same lineage agrees with what is computed here: the Q term is not normalised by default,
the gradient goes through every Euler step and stops where the final clip holds the action at a bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from deflow_torchrl.modules.flow import FlowMatchingPolicy
from deflow_torchrl.objectives.common import Reduction
from deflow_torchrl.objectives.noise_policy import FlowPolicyLoss


class FBRACLoss(FlowPolicyLoss):
    """The losses of FBRAC. ``loss_flow`` and ``loss_actor`` train the same flow, ``loss_qvalue`` the critics.

    * ``loss_flow = alpha mean |v(s, x_t, t) - (a - z)|^2``: :class:`FlowMatchingLoss` times alpha;
    * ``loss_actor = -lambda mean_{j,batch} Q_j(s, flow(s, z))``, critics fixed, with gradient through all M Euler steps and the
      final clip; ``lambda = sg(1 / mean|mean_j Q_j|)`` if ``normalize_q_loss``, else 1;
    * ``loss_qvalue`` as :class:`TDCriticLoss`, with a' = flow(s', z').

    Their sum is FBRAC's objective; each is also a method: ``flow_loss``, ``actor_loss``, ``qvalue_loss``. Metadata
    ``flow_matching`` and ``q`` are the two parts before their coefficients.

    Args:
        actor_network (FlowMatchingPolicy): the acting policy.
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.

    Keyword Args:
        alpha (float, optional): weight of the behaviour cloning. Defaults to ``10.0``.
        q_aggregation (str, optional): ``"mean"`` (default) or ``"min"`` over the target critics.
        normalize_q_loss (bool, optional): scale the Q term by lambda. Defaults to ``False``.
        delay_qvalue (bool, optional): bootstrap from target critics, moved by ``SoftUpdate``. Defaults to ``True``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

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
        actor_network: FlowMatchingPolicy,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        alpha: float = 10.0,
        q_aggregation: str = "mean",
        normalize_q_loss: bool = False,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(
            actor_network,
            qvalue_network,
            q_aggregation=q_aggregation,
            delay_qvalue=delay_qvalue,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
        )
        self._set_coefficient("alpha", alpha)
        self.normalize_q_loss = normalize_q_loss

    def _weighted_flow_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        error = self._flow_error(tensordict)
        metadata = {"flow_matching": self._statistic(error.detach(), tensordict)}
        return self._reduce_term(self.alpha * error, tensordict), metadata

    def _actor_loss(self, tensordict: TensorDictBase, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        action = self._act(tensordict, noise)
        # Critics fixed: their gradients would be thrown away, so their parameters enter detached.
        qvalue = self._qvalues(tensordict, action, self.qvalue_network_params, frozen=True).mean(0)
        loss = -self._q_scale(qvalue, tensordict) * qvalue
        return self._reduce_term(loss, tensordict), {"q": self._statistic(qvalue.detach(), tensordict)}

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        noise, next_action = self._current_noise(tensordict), self._next_action(tensordict)
        loss_flow, flow_metadata = self._weighted_flow_loss(tensordict)
        loss_actor, actor_metadata = self._actor_loss(tensordict, noise)
        return {
            "loss_flow": loss_flow,
            "loss_actor": loss_actor,
            **flow_metadata,
            **actor_metadata,
            **self._critic_terms(tensordict, next_action),
        }

    def flow_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_flow``, weighted by alpha; inputs as in :meth:`FlowMatchingLoss.flow_loss`.

        Returns:
            The loss and metadata ``flow_matching``, detached.
        """
        with self._acting():
            return self._weighted_flow_loss(self._blank_masked_rows(tensordict))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``q``, detached.
        """
        tensordict = self._blank_masked_rows(tensordict)
        with self._acting():
            return self._actor_loss(tensordict, self._current_noise(tensordict))
