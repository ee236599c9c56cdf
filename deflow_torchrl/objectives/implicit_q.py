# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IQL's values without a policy: expectile regression of V and TD(0) of twin critics on it (https://arxiv.org/abs/2110.06169).

Equations 5 and 6 of IQL, as FQL's re-implementation has them: V(s) regressed on the smaller of two target critics, no target of
V itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives import terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, term


class ImplicitQLoss(OffPolicyLoss):
    """Values of the best actions that the data hold, learned from the data's actions alone (IQL Eq. 5 and 6).

    With u = min_j Qbar_j(s, a) - V(s):

    * ``loss_value = mean_batch |expectile - 1(u < 0)| u^2``, target critics fixed;
    * ``loss_qvalue = mean_batch sum_j (Q_j(s, a) - y)^2``, ``y = r + gamma (1 - terminated) V(s')`` fixed.

    The sum over critics is the paper's; the other losses of this package average over them.

    Args:
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        expectile (float, optional): in (0, 1). Defaults to ``0.9``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

        policies (dict of str to TensorDictModule, optional): policies of a subclass, by the names of their attributes.

    Raises:
        ValueError: on an expectile outside (0, 1) or an unknown option.

    .. note:: gamma belongs to the value estimator: ``loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.
    """

    @dataclass
    class _AcceptedKeys(OffPolicyLoss._AcceptedKeys):
        """Those of every loss here, and the value network's.

        Attributes:
            value (NestedKey): entry that the value network writes. Defaults to ``"state_value"``.
        """

        value: NestedKey = "state_value"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_value", "loss_qvalue"]
    _schedulable_buffers = frozenset({"expectile"})
    _averaged: tuple[str, ...] = ()
    """Policies of a subclass whose averages are kept as ``target_NAME_params``."""

    expectile: Tensor

    def __init__(
        self,
        qvalue_network: Critics,
        value_network: TensorDictModuleBase,
        *,
        expectile: float = 0.9,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
        policies: Mapping[str, TensorDictModuleBase] | None = None,
    ) -> None:
        if not 0 < expectile < 1:
            raise ValueError(f"expectile must lie between 0 and 1, got {expectile}")
        super().__init__(reduction=reduction)
        for name, policy in (policies or {}).items():
            self._add_policy(policy, name, create_target_params=name in self._averaged)
        self._add_policy(value_network, "value_network")
        self._add_critics(qvalue_network, num_qvalue_nets=num_qvalue_nets, deactivate_vmap=deactivate_vmap)
        self._add_coefficient("expectile", expectile)

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = self.value_network.in_keys
        return [*self.critics.state_keys, *states, self.tensor_keys.action, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*self.critics.draw_keys, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return self._value_terms(tensordict)[0]

    def _value(self, state: TensorDictBase) -> Tensor:
        """V(s) ``[*B]``."""
        network = self.value_network
        return network(state.select(*network.in_keys))[self.tensor_keys.value].squeeze(-1)

    def _value_terms(self, tensordict: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        """Both losses, and the advantage min_j Q_j(s, a) - V(s) by the online critics, detached."""
        loss_value, value = self._value_term(tensordict)
        critic_terms, qvalues = self._critic_terms(tensordict)
        return {"loss_value": loss_value, **critic_terms}, qvalues.amin(0) - value

    def _value_term(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """IQL Eq. 5: (loss_value, V(s) detached). sg: the target critics."""
        with torch.no_grad():
            qvalue = self.critics.values(tensordict, target=True).amin(0)
        value = self._value(tensordict)
        # The default type, whatever the networks': results in double precision stay those of earlier versions.
        rounding = torch.get_default_dtype()
        loss = terms.expectile_regression(qvalue - value, self.expectile, weight_dtype=rounding)
        return self._reduce(loss, tensordict), value.detach()

    def _critic_terms(self, tensordict: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        """IQL Eq. 6: (loss_qvalue and the priority, Q_j(s, a) ``[J, *B]`` detached). sg: V(s')."""
        with torch.no_grad():
            target = self._bootstrap(tensordict, self._value(self._next(tensordict)))
        qvalues = self.critics.values(tensordict)
        error = qvalues - target
        critic_terms = {"loss_qvalue": error.square().sum(0), "td_error": error.detach().abs().amax(0)}
        return self._reduce_critic_terms(critic_terms, tensordict), qvalues.detach()

    @term
    def value_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_value``.

        Args:
            tensordict: the networks' observations and ``action [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._value_term(tensordict)[0], {}

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: observation, ``action [..., A]`` and, under ``"next"``, observation, reward, done and terminated
                ``[..., 1]``.

        Returns:
            The loss and metadata ``td_error [...]``, detached.
        """
        out, _ = self._critic_terms(tensordict)
        return out.pop("loss_qvalue"), out
