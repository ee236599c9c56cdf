# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The refinement f_phi(s, a_base): one MLP that shifts the *sampled* action (DeFlow Eq. 7 and the instance-level remark)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.networks import CheckedModule
from deflow_torchrl.modules.policies import BoundedModel, check_bounds


class RefinementModel(BoundedModel):
    """Tensor-only core of :class:`RefinementPolicy`; arguments as there."""

    def __init__(self, refinement_network: nn.Module, *, low: float | Tensor, high: float | Tensor) -> None:
        super().__init__(low, high)
        self.refinement_network = refinement_network

    def forward(self, observation: Tensor, base_action: Tensor) -> tuple[Tensor, Tensor]:
        """Return (shift, action), both ``[..., A]``: the shift is unclipped, the action clip(base_action + shift)."""
        shift = self.refinement_network(torch.cat([observation, base_action], -1))
        return shift, self.clip(base_action + shift)


class RefinementPolicy(CheckedModule):
    """Shift a base action towards higher value: ``action = clip(base_action + f(observation, base_action))``.

    Args:
        refinement_network: any ``nn.Module`` called with ``cat([observation, base_action], -1)``, returning ``[..., A]``.
        action_dim: number of action dimensions A.

    Keyword Args:
        low: lower action bound, broadcast over the action dimensions.
        high: upper action bound.
        in_keys: observation key and base action key.
        out_keys: keys of the unclipped shift and of the clipped action.

    Raises:
        ValueError: if ``action_dim`` is not positive, the bounds are not ordered or of another width, or the keys are not two
            and two.
        TypeError: by calls, if an input's dtype does not fit the network's.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> policy = RefinementPolicy(torch.nn.Linear(3 + 2, 2), 2, low=-1.0, high=1.0)
        >>> td = policy(TensorDict(observation=torch.zeros(4, 3), base_action=torch.zeros(4, 2), batch_size=[4]))
        >>> td["action"].shape, td["refinement"].shape
        (torch.Size([4, 2]), torch.Size([4, 2]))
    """

    module: RefinementModel

    def __init__(
        self,
        refinement_network: nn.Module,
        action_dim: int,
        *,
        low: float | Tensor,
        high: float | Tensor,
        in_keys: Sequence[NestedKey] = ("observation", "base_action"),
        out_keys: Sequence[NestedKey] = ("refinement", "action"),
    ) -> None:
        if action_dim < 1:
            raise ValueError(f"action_dim must be positive, got {action_dim}")
        if len(in_keys) != 2 or len(out_keys) != 2:
            raise ValueError(
                "in_keys must be (observation, base_action) and out_keys (refinement, action), "
                f"got {in_keys} and {out_keys}"
            )
        check_bounds(action_dim, low=low, high=high)
        model = RefinementModel(refinement_network, low=low, high=high)
        super().__init__(model, in_keys=list(in_keys), out_keys=list(out_keys))
        self.action_dim = action_dim

    @property
    def observation_key(self) -> NestedKey:
        """Key of the observation."""
        return self.in_keys[0]

    @property
    def base_action_key(self) -> NestedKey:
        """Key of the prior's action."""
        return self.in_keys[1]

    @property
    def action_key(self) -> NestedKey:
        """Key of the refined, clipped action."""
        return self.out_keys[1]
