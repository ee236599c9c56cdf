# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Implicit flow Q-learning: IQL's values, a flow that clones the data, and the best of N samples to act (FQL, appendix B).

The policy that acts is :class:`~deflow_torchrl.modules.BestOfNPolicy`; nothing of it but the flow and the critics is trained.
Where it differs from IDQL (https://arxiv.org/abs/2304.10573), whose rule it takes:
  1. A flow proposes the actions instead of a diffusion model, and is used as it is, without an average of its weights.
  2. The N actions are judged by the smaller *online* critic; IDQL takes the target critics.
Evaluation and exploration act alike, and online all losses go on.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.best_of_n import BestOfNPolicy
from deflow_torchrl.modules.policies import last_policy
from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, term
from deflow_torchrl.objectives.implicit_q import ImplicitQLoss


class IFQLLoss(ImplicitQLoss):
    """:class:`ImplicitQLoss` and :class:`FlowMatchingLoss` side by side, with disjoint gradients.

    Args:
        flow_policy (FlowMatchingPolicy): proposes actions; trained by ``loss_flow`` alone. Encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        expectile (float, optional): in (0, 1). Defaults to ``0.9``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        num_samples (int, optional): candidates N of :attr:`actor_network`. Defaults to ``32``.

    Raises:
        TypeError: if ``flow_policy`` is no :class:`~deflow_torchrl.modules.FlowMatchingPolicy`.
        ValueError: on an expectile outside (0, 1) or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import FlowMatchingPolicy
        >>> from deflow_torchrl.modules import make_qvalue_networks, make_value_network, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> loss = IFQLLoss(flow, make_qvalue_networks(3, 2, (16,)), make_value_network(3, (16,)))
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['loss_flow', 'loss_qvalue', 'loss_value']
    """

    out_keys = ["loss_value", "loss_qvalue", "loss_flow"]

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        qvalue_network: Critics,
        value_network: TensorDictModuleBase,
        *,
        expectile: float = 0.9,
        num_samples: int = 32,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_flow_policy(flow_policy)
        super().__init__(
            qvalue_network,
            value_network,
            expectile=expectile,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            policies={"flow_policy": flow_policy},
        )
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.num_samples = num_samples

    @property
    def actor_network(self) -> BestOfNPolicy:
        """The policy that acts, the best of ``num_samples`` actions of the flow; its parameters are the loss's."""
        flow, keys = self.flow_policy, self.tensor_keys
        return BestOfNPolicy(
            flow,
            self.qvalue_network,
            self.qvalue_network_params,
            self.num_samples,
            in_keys=flow.in_keys if len(flow.in_keys) == 2 else None,
            out_keys=last_policy(flow).out_keys,
            critic_action_key=keys.action,
            value_key=keys.state_action_value,
        )

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*super()._required_keys(tensordict), *acting.state_keys(self.flow_policy)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*super()._optional_keys(), self.tensor_keys.flow_noise, self.tensor_keys.flow_time]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return {**self._value_terms(tensordict)[0], "loss_flow": self._flow_term(tensordict)}

    def _flow_term(self, tensordict: TensorDictBase) -> Tensor:
        return self._reduce(self._flow_error(self.flow_policy, tensordict), tensordict)

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``; see :meth:`FlowMatchingLoss.flow_loss`."""
        return self._flow_term(tensordict), {}
