# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Behavioural cloning by a Gaussian of unit standard deviation (FQL's BC baseline).

Where the released code and the textbook differ:
  1. The standard deviation is fixed at one, so that the likelihood is a squared error and a constant. Default here: the code.
  2. It is evaluated at its mean, clipped to the bounds. No online run of it is published; here it explores as IQL does.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import OffPolicyLoss, Reduction, Terms, term


class BCLoss(OffPolicyLoss):
    """Maximum likelihood of the data's actions: ``loss_actor = -mean log N(a; m(s), I)``.

    That is ``mean_batch |a - m(s)|^2 / 2 + A log(2 pi) / 2``, the square summed over action dimensions.

    Args:
        actor_network (GaussianPolicy): the policy to train.

    Keyword Args:
        reduction: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if ``actor_network`` is no :class:`~deflow_torchrl.modules.GaussianPolicy`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import GaussianPolicy, make_policy_network
        >>> loss = BCLoss(GaussianPolicy(make_policy_network(3, 2, (16,))))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss(data)["loss_actor"].shape
        torch.Size([])

    Without tensordict: ``loss_actor = loss(observation=..., action=...)``.
    """

    out_keys = ["loss_actor"]

    def __init__(self, actor_network: TensorDictModuleBase, *, reduction: Reduction | None = None) -> None:
        acting.check_gaussian_policy(actor_network)
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network")

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*self.actor_network.in_keys, self.tensor_keys.action]

    def _optional_keys(self) -> list[NestedKey]:
        return []

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        log_prob = acting.log_prob(self.actor_network, tensordict, tensordict[self.tensor_keys.action])
        return {"loss_actor": self._reduce(-log_prob, tensordict)}

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: observation ``[..., O]`` and action ``[..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._compute(tensordict)["loss_actor"], {}
