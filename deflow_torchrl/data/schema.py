# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The entries of a transition in TorchRL's TED layout, and their limits.

==============================  ==========  =======================================================================
entry                           shape       meaning
==============================  ==========  =======================================================================
``observation``                 ``[N, O]``  s, float32; images ``[N, H, W, C]`` uint8
``action``                      ``[N, A]``  a, float32, inside +-(1 - 1e-5)
``("next", "observation")``     ``[N, O]``  s'
``("next", "reward")``          ``[N, 1]``  r(s, a), float32
``("next", "terminated")``      ``[N, 1]``  bool: the return is not bootstrapped after this transition
``("next", "truncated")``       ``[N, 1]``  bool: the trajectory was cut here, the return is bootstrapped
``("next", "done")``            ``[N, 1]``  bool: terminated or truncated
==============================  ==========  =======================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict

ACTION_LIMIT = 1.0 - 1e-5
"""The reference clips the data's actions to +-(1 - 1e-5)."""

ROUNDING = 1e-6
"""How far rounding may take an action beyond its bound before it counts as outside."""

LARGEST = 1e15
"""A larger observation or reward is taken for a placeholder: the squares that losses and optimisers take would overflow."""

MIN_TRANSITIONS = 2
"""A smaller set is taken for a mistake."""

TRANSITION_KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
    ("next", "truncated"),
    ("next", "done"),
)
"""The entries of a transition, in the order of every tuple of columns."""


class Rows(NamedTuple):
    """n transitions in four tensors instead of seven: fewer reads, and every entry is a contiguous view.

    Attributes:
        frames: s and s' ``[2, n, ...]``.
        action: ``[1, n, A]``.
        reward: ``[1, n, 1]``.
        flags: terminated, truncated and done ``[3, n, 1]``.
    """

    frames: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    flags: torch.Tensor

    @classmethod
    def of(cls, columns: Sequence[torch.Tensor]) -> Rows:
        """Copy seven columns ``[n, ...]`` in the order of :data:`TRANSITION_KEYS`."""
        observation, action, next_observation, reward, *flags = columns
        frames = torch.stack([observation, next_observation])
        return cls(frames, action.unsqueeze(0), reward.unsqueeze(0), torch.stack(flags))

    def columns(self) -> tuple[torch.Tensor, ...]:
        """Seven views ``[n, ...]`` in the order of :data:`TRANSITION_KEYS`."""
        return self.frames[0], self.action[0], self.frames[1], self.reward[0], *self.flags.unbind(0)

    def take(self, rows: torch.Tensor) -> Rows:
        """Copy the transitions ``rows`` [m]."""
        return Rows(*(part.index_select(1, rows) for part in self))

    def tensordict(
        self,
        *,
        device: torch.device | None = None,
        next_action: torch.Tensor | None = None,
        about: dict[str, torch.Tensor] | None = None,
    ) -> TensorDict:
        """Wrap the views in a TensorDict ``[n]``.

        Keyword Args:
            device: its device.
            next_action: ``("next", "action")`` ``[n, A]``.
            about: more entries ``[n, ...]``.
        """
        observation, action, next_observation, reward, terminated, truncated, done = self.columns()
        following = {
            "observation": next_observation,
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "done": done,
        }
        if next_action is not None:
            following["action"] = next_action
        size = observation.shape[:1]
        # The checks of the public constructor take as long as reading the rows.
        following = TensorDict._new_unsafe(following, batch_size=size, device=device)
        entries = {"observation": observation, "action": action, "next": following, **(about or {})}
        return TensorDict._new_unsafe(entries, batch_size=size, device=device)
