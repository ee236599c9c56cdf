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

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, term
from deflow_torchrl.objectives.implicit_q import ImplicitQLoss

MAX_WEIGHT = 100.0
"""Bound of the regression weights (IQL's and FQL's code)."""


class IQLLoss(ImplicitQLoss):
    """IQL (https://arxiv.org/abs/2110.06169) with a Gaussian policy of unit standard deviation.

    ``loss_value`` and ``loss_qvalue`` as :class:`ImplicitQLoss`; with online critics and both values fixed in the weight,

    ``loss_actor = -mean_batch w log N(a; m(s), I)``, ``w = min(exp(temperature (min_j Q_j(s, a) - V(s))), 100)``.

    Args:
        actor_network (GaussianPolicy): the policy to train.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        temperature (float): the *inverse* temperature alpha of advantage-weighted regression, >= 0 (0 is behavioural cloning).
        expectile (float, optional): in (0, 1). Defaults to ``0.9``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if ``actor_network`` is no :class:`~deflow_torchrl.modules.GaussianPolicy`.
        ValueError: on a negative temperature, an expectile outside (0, 1) or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import GaussianPolicy
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
    _schedulable_buffers = frozenset({"temperature"})

    temperature: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        value_network: TensorDictModuleBase,
        *,
        temperature: float,
        expectile: float = 0.9,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_gaussian_policy(actor_network)
        super().__init__(
            qvalue_network,
            value_network,
            expectile=expectile,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            policies={"actor_network": actor_network},
        )
        self._add_coefficient("temperature", temperature)

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*self.actor_network.in_keys, *super()._required_keys(tensordict)]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        value_terms, advantage = self._value_terms(tensordict)
        return {**value_terms, "loss_actor": self._actor_term(tensordict, advantage)}

    def _actor_term(self, tensordict: TensorDictBase, advantage: Tensor) -> Tensor:
        """IQL Eq. 7. sg: the weights; the policy's loss moves neither critics nor values."""
        log_prob = acting.log_prob(self.actor_network, tensordict, tensordict[self.tensor_keys.action])
        weight = terms.advantage_weight(advantage, self.temperature, MAX_WEIGHT)
        return self._reduce(-weight * log_prob, tensordict)

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the networks' observations and ``action [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        with torch.no_grad():
            advantage = self.critics.values(tensordict).amin(0) - self._value(tensordict)
        return self._actor_term(tensordict, advantage), {}
