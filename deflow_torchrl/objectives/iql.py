# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Implicit Q-learning as FQL's comparison runs it: IQL's values, and advantage-weighted regression of a unit Gaussian.

Where it differs from IQL's paper (https://arxiv.org/abs/2110.06169, Eq. 7):
  1. The standard deviation is fixed at one and the mean is not squashed; the paper's code learns the one and bounds the other.
  2. The weights take the *online* critics; the paper's equation has the targets.
  3. It explores by samples of that Gaussian, clipped to the bounds, and is evaluated at its mean.

TorchRL 0.14.1 has an ``IQLLoss``. On equal networks, with ``loss_function="l2"``, its ``loss_value`` and ``loss_qvalue`` are
those of here, and so is its ``loss_actor`` as long as targets and critics are equal: a test holds them against each other
(``tests/objectives/test_golden_values.py``). It is not reused because of what no setting of it changes, each seen in that test:
  1. Its weights exp(temperature (min_j Q_j - V)) take the *target* critics; the reference's take the online ones.
  2. ``loss_qvalue`` selects its inputs and loses a mask with them: padding counts, and a NaN there makes the loss one.
  3. The priority it writes is the squared TD error, and ``forward`` adds the policy's entries to the caller's batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.policies import GaussianPolicy
from deflow_torchrl.objectives.bc import check_gaussian
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction
from deflow_torchrl.objectives.implicit_q import ImplicitQLoss

MAX_WEIGHT = 100.0
"""Bound of the regression weights (IQL's and FQL's code)."""


class IQLLoss(ImplicitQLoss):
    """IQL (https://arxiv.org/abs/2110.06169) with a Gaussian policy of unit standard deviation.

    ``loss_value`` and ``loss_qvalue`` as :class:`ImplicitQLoss`; with online critics and both values fixed in the weight,

    ``loss_actor = -mean_batch w log N(a; m(s), I)``, ``w = min(exp(temperature (min_j Q_j(s, a) - V(s))), 100)``.

    Args:
        actor_network (GaussianPolicy): the policy to train.
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        temperature (float): the *inverse* temperature alpha of advantage-weighted regression, >= 0 (0 is behavioural cloning).
        expectile (float, optional): in (0, 1). Defaults to ``0.9``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Raises:
        TypeError: if ``actor_network`` is no :class:`~deflow_torchrl.modules.GaussianPolicy`.
        ValueError: on a negative temperature, an expectile outside (0, 1) or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import make_policy_network, make_qvalue_networks, make_value_network
        >>> policy = GaussianPolicy(make_policy_network(3, 2, (16,)))
        >>> loss = IQLLoss(policy, make_qvalue_networks(3, 2, (16,)), make_value_network(3, (16,)), temperature=1.0)
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['loss_actor', 'loss_qvalue', 'loss_value']
    """

    out_keys = ["loss_value", "loss_qvalue", "loss_actor"]

    actor_network: GaussianPolicy

    def __init__(
        self,
        actor_network: GaussianPolicy,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        temperature: float,
        expectile: float = 0.9,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        OffPolicyLoss.__init__(self, reduction=reduction)
        check_gaussian(actor_network)
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        self.convert_to_functional(actor_network, "actor_network")
        self._set_values(
            qvalue_network,
            value_network,
            expectile=expectile,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
        )
        self.temperature = float(temperature)

    def _acting(self) -> AbstractContextManager[Any]:
        return OffPolicyLoss._acting(self)

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [self.actor_network.observation_key, *super()._required_keys(tensordict)]

    def _actor_loss(self, tensordict: TensorDictBase, advantage: Tensor) -> Tensor:
        """``advantage`` is detached: the policy's loss moves neither critics nor values."""
        policy = self.actor_network
        log_prob = policy.module.log_prob(tensordict[policy.observation_key], tensordict[self.tensor_keys.action])
        weight = (self.temperature * advantage).exp().clamp(max=MAX_WEIGHT)
        return self._reduce_term(-weight * log_prob, tensordict)

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        terms, advantage = self._value_terms(tensordict)
        return {**terms, "loss_actor": self._actor_loss(tensordict, advantage)}

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_actor``.

        Args:
            tensordict: the networks' observations and ``action [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        tensordict = self._blank_masked_rows(tensordict)
        with torch.no_grad():
            qvalues = self._qvalues(tensordict, tensordict[self.tensor_keys.action], self.qvalue_network_params)
            advantage = qvalues.amin(0) - self._value(tensordict)
        with self._acting():
            return self._actor_loss(tensordict, advantage), {}
