# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Flow Q-learning (https://arxiv.org/abs/2502.02538): a one-step policy climbs the critics, distilled from a cloned flow.

Where the authors' released code and the paper differ:
  1. The paper writes each squared error as a norm, a sum over action dimensions; the code averages over them, and the
     published alphas belong to that. Default here: the average.
  2. The loss of the critics is averaged over them, and their targets lag by one step: see :mod:`td_critic`.
  3. The paper aggregates the target critics by their mean and takes their minimum on the hardest tasks; that is a setting of
     the task, ``q_aggregation``. The policy climbs the mean in both.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.critics import check_aggregation
from deflow_torchrl.modules.policies import encode
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, term


class FQLLoss(OffPolicyLoss):
    """The three losses of flow Q-learning (https://arxiv.org/abs/2502.02538), each with gradients to its own part only.

    With mu the one-step policy's unclipped output and b = clip(flow(s, z)) of the same noise z:

    * ``loss_flow`` trains the flow on the data's actions: :class:`FlowMatchingLoss`;
    * ``loss_actor = alpha mean |mu(s, z) - sg(b(s, z))|^2 - lambda mean_{j,batch} Q_j(s, clip(mu(s, z)))`` trains the one-step
      policy, flow and critics fixed; the mean of the distillation is over batch and action dimensions,
      ``lambda = sg(1 / mean|mean_j Q_j|)`` if ``normalize_q_loss``, else 1;
    * ``loss_qvalue`` trains the critics as :class:`TDCriticLoss` does, with a' = clip(mu(s', z')).

    Each is also a method: ``flow_loss``, ``actor_loss``, ``qvalue_loss``. Metadata ``distillation`` (squared action units) and
    ``q`` are the two parts of ``loss_actor`` before their coefficients.

    Arguments, terms and their values are those of the class of this name on TorchRL's main branch, whose policies and key names
    are taken too. Differences: the priority is |TD error|, not its square; all draws can be given; other names of metadata.

    Args:
        flow_policy (FlowMatchingPolicy): the behaviour-cloning flow.
        actor_network (OneStepPolicy): the acting policy. Encoders may stand before either in a ``TensorDictSequential``.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        alpha (float, optional): weight of the distillation. Defaults to ``10.0``.
        normalize_q_loss (bool, optional): scale the Q term by lambda. Defaults to ``False``, as in the published runs.
        q_aggregation, delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on a negative alpha or an unknown option.

    .. note:: gamma belongs to the value estimator: ``loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order: ``noise``,
    ``("next", "noise")``, ``flow_noise`` (all N(0, I), ``[..., A]``), ``flow_time`` (U[0, 1), ``[..., 1]``). Those of a
    :class:`~deflow_torchrl.modules.FlowCriticEnsemble` come first, ``noise`` then comes last.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import (
        ...     FlowMatchingPolicy, OneStepPolicy, make_one_step_network, make_qvalue_networks, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> actor = OneStepPolicy(make_one_step_network(3, 2, (16,)), 2)
        >>> loss = FQLLoss(flow, actor, make_qvalue_networks(3, 2, (16,)), alpha=300.0)
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['distillation', 'loss_actor', 'loss_flow', 'loss_qvalue', 'q']
    """

    out_keys = ["loss_flow", "loss_actor", "loss_qvalue", "distillation", "q"]
    _schedulable_buffers = frozenset({"alpha"})
    _gives_samples = True

    alpha: Tensor

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
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
        acting.check_flow_policy(flow_policy)
        acting.check_one_step_policy(actor_network)
        check_aggregation(q_aggregation)
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_policy(flow_policy, "flow_policy")
        self._add_coefficient("alpha", alpha, exact=False)
        self.q_aggregation = q_aggregation
        self.normalize_q_loss = normalize_q_loss

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        actor, critic = acting.state_keys(self.actor_network), self.critics.state_keys
        states = [*actor, *acting.state_keys(self.flow_policy), *critic]
        return [*states, self.tensor_keys.action, *self._next_keys(*actor, *critic)]

    def _optional_keys(self) -> list[NestedKey]:
        return self._sampling_keys()

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks are taken from one generator.
        of_flow, of_critics = encode(self.flow_policy, tensordict), self.critics.encode(tensordict)
        if self.critics.next_samples is not None:
            critic_terms = self._critic_terms(of_critics, self._draw_next(tensordict))
            loss_flow = self._flow_term(of_flow)
            noise = self._draw(tensordict, self.tensor_keys.noise)
            loss_actor, metadata = self._actor_term(tensordict, noise, of_flow, of_critics)
        else:
            noise = self._draw(tensordict, self.tensor_keys.noise)
            next_noise = self._draw_next(tensordict)
            loss_flow = self._flow_term(of_flow)
            loss_actor, metadata = self._actor_term(tensordict, noise, of_flow, of_critics)
            critic_terms = self._critic_terms(of_critics, next_noise)
        return {"loss_flow": loss_flow, "loss_actor": loss_actor, **metadata, **critic_terms}

    def _flow_term(self, tensordict: TensorDictBase) -> Tensor:
        return self._reduce(self._flow_error(self.flow_policy, tensordict), tensordict)

    def _actor_term(
        self, tensordict: TensorDictBase, noise: Tensor, of_flow: TensorDictBase, of_critics: TensorDictBase
    ) -> Terms:
        with torch.no_grad():  # sg: the flow teaches and does not learn here
            taught = acting.act(self.flow_policy, of_flow, noise)
        output = acting.unclipped(self.actor_network, tensordict, noise)
        # Unclipped: a policy beyond the bounds is drawn back by the distillation, where the Q term's gradient is zero.
        distillation = terms.distillation(output, taught)
        action = acting.clip(self.actor_network, output)
        # sg: the critics and lambda.
        qvalue = self.critics.values(self._with_action(of_critics, action), frozen=True).mean(0)
        loss = self.alpha * distillation - self._q_scale(qvalue, tensordict) * qvalue
        parts = {"distillation": distillation, "q": qvalue}
        metadata = {name: self._statistic(part, tensordict) for name, part in parts.items()}
        return self._reduce(loss, tensordict), metadata

    def _critic_terms(self, tensordict: TensorDictBase, next_noise: Tensor) -> dict[str, Tensor]:
        """Targets at a' = clip(mu(s', z')), without gradient."""
        following = self._next(tensordict)
        return self._td_terms(
            tensordict,
            lambda: self._with_action(following, acting.act(self.actor_network, following, next_noise)),
        )

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``; inputs as in :meth:`FlowMatchingLoss.flow_loss`."""
        return self._flow_term(tensordict), {}

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policies' and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``distillation`` and ``q``, detached.
        """
        return self._actor_term(tensordict, self._draw(tensordict, self.tensor_keys.noise), tensordict, tensordict)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; inputs and metadata as in :meth:`DeFlowLoss.qvalue_loss`."""
        return self._one_term("loss_qvalue", self._critic_terms(tensordict, self._draw_next(tensordict)))

    @term
    def flow_critic_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow_critic``; inputs and metadata as in :meth:`DeFlowLoss.flow_critic_loss`."""
        return self._one_term("loss_flow_critic", self._critic_terms(tensordict, self._draw_next(tensordict)))
