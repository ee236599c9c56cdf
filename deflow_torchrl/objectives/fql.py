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

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor

from deflow_torchrl.modules.flow import FlowMatchingPolicy
from deflow_torchrl.modules.policies import OneStepPolicy
from deflow_torchrl.objectives.common import Reduction
from deflow_torchrl.objectives.flow_matching import check_flow_policy
from deflow_torchrl.objectives.noise_policy import NoisePolicyLoss


class FQLLoss(NoisePolicyLoss):
    """The three losses of flow Q-learning (https://arxiv.org/abs/2502.02538), each with gradients to its own part only.

    With mu the one-step policy's unclipped output and b = clip(flow(s, z)) of the same noise z:

    * ``loss_flow`` trains the flow on the data's actions: :class:`FlowMatchingLoss`;
    * ``loss_actor = alpha mean |mu(s, z) - sg(b(s, z))|^2 - lambda mean_{j,batch} Q_j(s, clip(mu(s, z)))`` trains the one-step
      policy, flow and critics fixed; the mean of the distillation is over batch and action dimensions,
      ``lambda = sg(1 / mean|mean_j Q_j|)`` if ``normalize_q_loss``, else 1;
    * ``loss_qvalue`` trains the critics as :class:`TDCriticLoss` does, with a' = clip(mu(s', z')).

    Each is also a method: ``flow_loss``, ``actor_loss``, ``qvalue_loss``. Metadata ``distillation`` (squared action units) and
    ``q`` are the two parts of ``loss_actor`` before their coefficients.

    Arguments, terms and their values are those of the class of this name on TorchRL's main branch. Differences, which are those
    of every loss here: the priority is |TD error|, not its square; all draws can be given; ``set_keys`` calls the critics'
    entry ``state_action_value``, not ``value``; other names of metadata; policies behind an encoder are not taken.

    Args:
        flow_policy (FlowMatchingPolicy): the behaviour-cloning flow.
        actor_network (OneStepPolicy): the acting policy.
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.

    Keyword Args:
        alpha (float, optional): weight of the distillation. Defaults to ``10.0``.
        q_aggregation (str, optional): ``"mean"`` (default) or ``"min"`` over the target critics.
        normalize_q_loss (bool, optional): scale the Q term by lambda. Defaults to ``False``, as in the published runs.
        delay_qvalue (bool, optional): bootstrap from target critics, moved by ``SoftUpdate``. Defaults to ``True``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on a negative alpha or an unknown option.

    .. note:: gamma belongs to the value estimator: ``loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order: ``noise``,
    ``("next", "noise")``, ``flow_noise`` (all N(0, I), ``[..., A]``), ``flow_time`` (U[0, 1), ``[..., 1]``).

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

    flow_policy: FlowMatchingPolicy
    flow_policy_params: TensorDictParams
    target_flow_policy_params: TensorDictParams
    alpha: Tensor

    def __init__(
        self,
        flow_policy: FlowMatchingPolicy,
        actor_network: OneStepPolicy,
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
        check_flow_policy(flow_policy)
        if not isinstance(actor_network, OneStepPolicy):
            raise TypeError(f"actor_network must be a OneStepPolicy, got {type(actor_network).__name__}")
        super().__init__(
            actor_network,
            qvalue_network,
            q_aggregation=q_aggregation,
            delay_qvalue=delay_qvalue,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
        )
        self.convert_to_functional(flow_policy, "flow_policy")
        self._set_coefficient("alpha", alpha)
        self.normalize_q_loss = normalize_q_loss

    @contextmanager
    def _both_acting(self) -> Iterator[None]:
        with (
            self.flow_policy_params.to_module(self.flow_policy, preserve_module_state=False),
            self.actor_network_params.to_module(self.actor_network, preserve_module_state=False),
        ):
            yield

    def _acting(self) -> AbstractContextManager[Any]:
        return self._both_acting()

    def _actor_loss(self, tensordict: TensorDictBase, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss_actor, detached parts of it)."""
        flow, actor = self.flow_policy, self.actor_network.module
        with torch.no_grad():  # the teacher is fixed: sg(b)
            taught = flow.module(tensordict[flow.observation_key], noise)
        output = actor(tensordict[self.actor_network.observation_key], noise, clamp=False)
        # Unclipped: a policy beyond the bounds is drawn back by the distillation, where the Q term's gradient is zero.
        distillation = (output - taught).square().mean(-1)
        action = output.clamp(actor.low, actor.high)
        # Critics fixed: their gradients would be thrown away, so their parameters enter detached.
        qvalue = self._qvalues(tensordict, action, self.qvalue_network_params, frozen=True).mean(0)
        loss = self.alpha * distillation - self._q_scale(qvalue, tensordict) * qvalue
        parts = {"distillation": distillation, "q": qvalue}
        metadata = {name: self._statistic(part.detach(), tensordict) for name, part in parts.items()}
        return self._reduce_term(loss, tensordict), metadata

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        noise, next_action = self._current_noise(tensordict), self._next_action(tensordict)
        loss_flow = self._flow_loss(tensordict)
        loss_actor, metadata = self._actor_loss(tensordict, noise)
        return {
            "loss_flow": loss_flow,
            "loss_actor": loss_actor,
            **metadata,
            **self._critic_terms(tensordict, next_action),
        }

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policies' and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``distillation`` and ``q``, detached.
        """
        tensordict = self._blank_masked_rows(tensordict)
        with self._acting():
            return self._actor_loss(tensordict, self._current_noise(tensordict))
