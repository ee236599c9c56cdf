# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IQL's values without a policy: expectile regression of V and TD(0) of twin critics on it (https://arxiv.org/abs/2110.06169).

Equations 5 and 6 of IQL, as FQL's re-implementation has them: V(s) regressed on the smaller of two target critics, no target of
V itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction, next_key
from deflow_torchrl.objectives.td_critic import TDCriticLoss


class ImplicitQLoss(TDCriticLoss):
    """Values of the best actions that the data hold, learned from the data's actions alone (IQL Eq. 5 and 6).

    With u = min_j Qbar_j(s, a) - V(s):

    * ``loss_value = mean_batch |expectile - 1(u < 0)| u^2``, target critics fixed;
    * ``loss_qvalue = mean_batch sum_j (Q_j(s, a) - y)^2``, ``y = r + gamma (1 - terminated) V(s')`` fixed.

    The sum over critics is the paper's; the other losses of this package average over them.

    Args:
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        expectile (float, optional): in (0, 1). Defaults to ``0.9``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

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

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        expectile: float = 0.9,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        OffPolicyLoss.__init__(self, reduction=reduction)
        self._set_values(
            qvalue_network,
            value_network,
            expectile=expectile,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
        )

    def _set_values(
        self,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        expectile: float,
        num_qvalue_nets: int,
        deactivate_vmap: bool,
    ) -> None:
        if not 0 < expectile < 1:
            raise ValueError(f"expectile must lie between 0 and 1, got {expectile}")
        self.convert_to_functional(value_network, "value_network")
        self._set_critic(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            create_target_params=True,
            deactivate_vmap=deactivate_vmap,
        )
        self.expectile = float(expectile)

    def _acting(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        keys = self.tensor_keys
        states = self.value_network.in_keys
        following = (*states, keys.reward, keys.done, keys.terminated)
        return [*self._critic_keys(), *states, keys.action, *map(next_key, following)]

    def _optional_keys(self) -> list[NestedKey]:
        return []

    def _value(self, observations: TensorDictBase) -> Tensor:
        """V(s) of shape ``td.shape``."""
        network = self.value_network
        with self.value_network_params.to_module(network, preserve_module_state=False):
            return network(observations.select(*network.in_keys))[self.tensor_keys.value].squeeze(-1)

    def _value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return (loss_value, V(s) detached)."""
        with torch.no_grad():
            qvalues = self._qvalues(tensordict, tensordict[self.tensor_keys.action], self.target_qvalue_network_params)
        value = self._value(tensordict)
        advantage = qvalues.amin(0) - value
        weight = torch.where(advantage < 0, 1 - self.expectile, self.expectile)
        return self._reduce_term(weight * advantage.square(), tensordict), value.detach()

    def _q_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss_qvalue, |TD error| of each sample, the largest of the ensemble, Q_j(s, a) ``[J, ...]`` detached)."""
        with torch.no_grad():
            following = self._value(tensordict["next"]).unsqueeze(-1)
            target = self.value_estimator.value_estimate(tensordict, next_value=following).squeeze(-1)
        qvalues = self._qvalues(tensordict, tensordict[self.tensor_keys.action], self.qvalue_network_params)
        error = qvalues - target
        td_error = error.detach().abs().amax(0)
        mask = self._mask(tensordict)
        loss = self._reduce_term(error.square().sum(0), tensordict)
        return loss, td_error if mask is None else torch.where(mask, td_error, 0.0), qvalues.detach()

    def _value_terms(self, tensordict: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        """Both losses with the priority, and the advantage min_j Q_j(s, a) - V(s) by the online critics, detached."""
        loss_value, value = self._value_loss(tensordict)
        loss_qvalue, td_error, qvalues = self._q_loss(tensordict)
        terms = {"loss_value": loss_value, "loss_qvalue": loss_qvalue, self.tensor_keys.priority: td_error}
        return terms, qvalues.amin(0) - value

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return self._value_terms(tensordict)[0]

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_value``.

        Args:
            tensordict: the networks' observations and ``action [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._value_loss(self._blank_masked_rows(tensordict))[0], {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: observation, ``action [..., A]`` and, under ``"next"``, observation, reward, done and terminated
                ``[..., 1]``.

        Returns:
            The loss and metadata ``td_error [...]``, detached.
        """
        loss, td_error, _ = self._q_loss(self._blank_masked_rows(tensordict))
        return loss, {"td_error": td_error}
