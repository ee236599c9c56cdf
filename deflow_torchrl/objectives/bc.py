# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Behavioural cloning by a Gaussian of unit standard deviation (FQL's BC baseline).

Where the released code and the textbook differ:
  1. The standard deviation is fixed at one, so that the likelihood is a squared error and a constant. Default here: the code.
  2. It is evaluated at its mean, clipped to the bounds. No online run of it is published; here it explores as IQL does.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.policies import GaussianPolicy
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction


class BCLoss(OffPolicyLoss):
    """Maximum likelihood of the data's actions: ``loss_actor = -mean log N(a; m(s), I)``.

    That is ``mean_batch |a - m(s)|^2 / 2 + A log(2 pi) / 2``, the square summed over action dimensions.

    Args:
        actor_network (GaussianPolicy): the policy to train.

    Keyword Args:
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).

    Raises:
        TypeError: if ``actor_network`` is no :class:`~deflow_torchrl.modules.GaussianPolicy`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import make_policy_network
        >>> loss = BCLoss(GaussianPolicy(make_policy_network(3, 2, (16,))))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss(data)["loss_actor"].shape
        torch.Size([])

    Without tensordict: ``loss_actor = loss(observation=..., action=...)``.
    """

    out_keys = ["loss_actor"]

    actor_network: GaussianPolicy

    def __init__(self, actor_network: GaussianPolicy, *, reduction: Reduction | None = None) -> None:
        super().__init__(reduction=reduction)
        check_gaussian(actor_network)
        self.convert_to_functional(actor_network, "actor_network")

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [self.actor_network.observation_key, self.tensor_keys.action]

    def _optional_keys(self) -> list[NestedKey]:
        return []

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        policy = self.actor_network
        log_prob = policy.module.log_prob(tensordict[policy.observation_key], tensordict[self.tensor_keys.action])
        return {"loss_actor": self._reduce_term(-log_prob, tensordict)}

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        """Compute ``loss_actor``.

        Args:
            tensordict: observation ``[..., O]`` and action ``[..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        with self._acting():
            return self._compute(self._blank_masked_rows(tensordict))["loss_actor"], {}


def check_gaussian(policy: object) -> None:
    """Raise TypeError unless ``policy`` has the likelihood that BC and IQL maximise."""
    if not isinstance(policy, GaussianPolicy):
        raise TypeError(f"a GaussianPolicy is needed, got {type(policy).__name__}")
