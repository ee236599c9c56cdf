# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
r"""Chunks of h actions as single transitions (Q-chunking, Li et al. 2025), read from a set of single steps.

The chunk that starts at step t has

* the observation s_t and the action :math:`(a_t, a_{t+1}, ..., a_{t+h-1})`, ``[h * A]``, step after step;
* the reward :math:`R = \sum_{k<h} \gamma^k r_{t+k}`, where gamma belongs to one step;
* the next observation of its last step, s_{t+h};
* ``terminated`` where any of its steps terminates (the authors' smallest mask), ``truncated`` where its last step ends the
  trajectory and nothing terminates;
* ``steps_to_next_obs`` = h, int64 ``[1]``: TorchRL's TD(0) estimator then bootstraps with gamma^h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase

from deflow_torchrl.data.schema import Rows
from deflow_torchrl.data.transitions import Transitions
from deflow_torchrl.errors import InputError

if TYPE_CHECKING:
    from deflow_torchrl.data.dataset import TransitionDataset

Ends = Literal["whole", "valid", "valid_row"]


class ChunkedDataset(Transitions):
    """The chunks of h actions of a data set; nothing is copied. Made by :meth:`deflow_torchrl.data.TransitionDataset.chunked`.

    Args:
        base: the set of single steps.
        length: h.

    Keyword Args:
        gamma: discount of one step.
        ends: see :meth:`deflow_torchrl.data.TransitionDataset.chunked`.

    Raises:
        InputError: on an option out of range, or a chunk longer than every trajectory.
    """

    def __init__(self, base: TransitionDataset, length: int, *, gamma: float = 0.99, ends: Ends = "whole") -> None:
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise InputError(f"a chunk of {length!r} steps is none; give a positive number of steps")
        if ends not in get_args(Ends):
            raise InputError(f"ends={ends!r} is unknown; there are whole and valid, and valid_row")
        if not 0.0 <= gamma <= 1.0:
            raise InputError(f"gamma={gamma!r} does not lie between 0 and 1")
        longest = int(base.episode_lengths.max())
        if length > longest:
            raise InputError(
                f"a chunk of {length} steps is longer than every trajectory of {base.source} (the longest has {longest})"
            )
        self.base = base
        self.length, self.gamma, self.ends = length, gamma, ends
        # "valid" and "valid_row" take the whole set for one trajectory, as the authors' sampling does.
        lengths = base.episode_lengths if ends == "whole" else base.episode_lengths.sum().unsqueeze(0)
        self._bounds = torch.nn.functional.pad((lengths - (length - 1)).clamp(min=0).cumsum(0), (1, 0))
        self._number = int(self._bounds[-1])
        self._offsets = torch.arange(length, device=base.device)
        self._discounts = (gamma ** self._offsets.double()).float()

    def __len__(self) -> int:
        """Number of chunks."""
        return self._number

    @property
    def device(self) -> torch.device:
        """Where the transitions are kept."""
        return self.base.device

    @property
    def num_episodes(self) -> int:
        """Trajectories of the set of single steps."""
        return self.base.num_episodes

    def to(self, device: torch.device | str) -> ChunkedDataset:
        """Copy the set of single steps into the memory of ``device``."""
        return ChunkedDataset(self.base.to(device), self.length, gamma=self.gamma, ends=self.ends)

    def stacked(self, frame_stack: int) -> ChunkedDataset:
        """The same chunks with observations of several frames, see :meth:`deflow_torchrl.data.TransitionDataset.stacked`."""
        return ChunkedDataset(self.base.stacked(frame_stack), self.length, gamma=self.gamma, ends=self.ends)

    def starts(self, rows: torch.Tensor) -> torch.Tensor:
        """Numbers of the first single steps of chunks, int64 of the shape of ``rows``."""
        episode = self._episode(rows)
        return self.base.episode_starts[episode] + rows - self._bounds[episode]

    def gather(self, rows: torch.Tensor) -> Rows:
        """Copy the chunks ``rows``, int64 ``[n]`` on the set's device."""
        first = self.starts(rows)
        last, steps = first + self.length - 1, first.unsqueeze(1) + self._offsets
        frames = self.base.observations(torch.stack([self.base.frames(first), self.base.frames(last) + 1]))
        action = self.base.read("action", steps).flatten(1)
        reward = (self.base.read("reward", steps) * self._discounts).sum(1, keepdim=True)
        terminated = self.base.read("terminated", steps).any(1, keepdim=True)
        done = terminated | self.base.is_last(last).unsqueeze(1)
        flags = torch.stack([terminated, done & ~terminated, done])
        return Rows(frames, action.unsqueeze(0), reward.unsqueeze(0), flags)

    def extras(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """``steps_to_next_obs`` int64 ``[n, 1]`` and, but for whole chunks, ``valid`` float32 ``[n, h]``, of rows ``[n, 1]``."""
        entries = {"steps_to_next_obs": torch.full((len(rows), 1), self.length, device=self.device)}
        if self.ends != "whole":
            ended = self.base.is_last(self.starts(rows).unsqueeze(1) + self._offsets[:-1]).cumsum(1) > 0
            valid = torch.nn.functional.pad((~ended).float(), (1, 0), value=1.0)
            entries["valid"] = valid if self.ends == "valid" else valid[:, -1:]
        return entries

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """Actions of the chunk that follows each in its trajectory; its own where none does. ``[*rows.shape, h * A]``."""
        following = rows + self.length
        inside = following < self._bounds[self._episode(rows) + 1]
        inside &= ~self.base.is_last(self.starts(rows) + self.length - 1)
        starts = self.starts(torch.where(inside, following, rows))
        return self.base.read("action", starts.unsqueeze(-1) + self._offsets).flatten(-2)

    def _episode(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self._bounds[1:], rows, right=True)

    def __repr__(self) -> str:
        return f"ChunkedDataset({len(self)} chunks of {self.length} steps, ends={self.ends!r}, of {self.base})"


def chunk_of(steps: Sequence[TensorDictBase], *, gamma: float) -> TensorDict:
    """Join consecutive steps ``[1]`` of one trajectory in TED into one chunk, as :class:`ChunkedDataset` does; ``[1]``.

    Args:
        steps: the h steps.

    Keyword Args:
        gamma: discount of one step.
    """
    joined: Any = torch.cat(list(steps))
    discounts = (gamma ** torch.arange(len(joined)).double()).float().to(joined["next", "reward"].device)
    chunk = joined[-1:].clone()
    chunk["observation"] = joined["observation"][:1].clone()
    chunk["action"] = joined["action"].reshape(1, -1)
    chunk["next", "reward"] = (joined["next", "reward"].squeeze(1) * discounts).sum().reshape(1, 1)
    chunk["next", "terminated"] = joined["next", "terminated"].any(0, keepdim=True)
    chunk["next", "truncated"] = chunk["next", "truncated"] & ~chunk["next", "terminated"]
    chunk["next", "done"] = chunk["next", "done"] | chunk["next", "terminated"]
    return chunk
