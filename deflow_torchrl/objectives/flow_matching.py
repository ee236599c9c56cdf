# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Flow matching: behaviour cloning by a velocity field (DeFlow Eq. 5).

Where the released code and the paper differ:
  1. Eq. 5 is a squared norm, a sum over action dimensions; the code averages over them. Default here: the average.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import OffPolicyLoss, Reduction, Terms, term


class FlowMatchingLoss(OffPolicyLoss):
    """Train a flow on the data's actions: ``loss_flow = mean |v(s, x_t, t) - (a - z)|^2``.

    ``x_t = (1 - t) z + t a``, ``z ~ N(0, I)``, ``t ~ U[0, 1)``; the mean is over batch and action dimensions.

    Args:
        flow_policy (FlowMatchingPolicy): the policy to train; encoders may stand before it in a ``TensorDictSequential``.

    Keyword Args:
        reduction (str, optional): see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if ``flow_policy`` is no :class:`~deflow_torchrl.modules.FlowMatchingPolicy`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_velocity_network
        >>> loss = FlowMatchingLoss(FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss(data)["loss_flow"].shape
        torch.Size([])

    Without tensordict: ``loss_flow = loss(observation=..., action=...)``.
    """

    out_keys = ["loss_flow"]

    def __init__(self, flow_policy: TensorDictModuleBase, *, reduction: Reduction | None = None) -> None:
        super().__init__(reduction=reduction)
        acting.check_flow_policy(flow_policy)
        self._add_policy(flow_policy, "flow_policy")

    @property
    def actor_network(self) -> TensorDictModuleBase:
        """The policy that acts: the flow."""
        return self.flow_policy

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*acting.state_keys(self.flow_policy), self.tensor_keys.action]

    def _optional_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.flow_noise, self.tensor_keys.flow_time, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return {"loss_flow": self._reduce(self._flow_error(self.flow_policy, tensordict), tensordict)}

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``.

        Args:
            tensordict: observation ``[*B, O]`` and action ``[*B, A]``; optionally ``flow_noise [*B, A]`` and
                ``flow_time [*B, 1]``, drawn in this order where absent.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._compute(tensordict)["loss_flow"], {}
