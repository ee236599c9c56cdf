# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The interface of every set of transitions: indexing, uniform drawing and reading part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict

from deflow_torchrl.data.schema import Rows
from deflow_torchrl.progress import patient_bar


class Transitions(ABC):
    """An immutable set of transitions; ``transitions[index]`` is a TensorDict in TED (:mod:`deflow_torchrl.data.schema`)."""

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of transitions."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the transitions are kept."""

    @property
    @abstractmethod
    def num_episodes(self) -> int:
        """E, the number of episodes."""

    @abstractmethod
    def gather(self, rows: torch.Tensor) -> Rows:
        """Copy the transitions ``rows``, int64 ``[n]`` on the set's device."""

    @abstractmethod
    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """Action of the transition that follows each in its episode; at an episode's end the transition's own.

        Args:
            rows: numbers of transitions, int64 of any shape on the set's device.

        Returns:
            ``[*rows.shape, A]``.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Transitions:
        """Copy the set into the memory of ``device``; the set itself if it is there already."""

    @abstractmethod
    def stacked(self, frame_stack: int) -> Transitions:
        """The set with observations of several frames, see :meth:`deflow_torchrl.data.TransitionDataset.stacked`."""

    def extras(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """More entries ``[n, ...]`` of the transitions ``rows`` [n]; none here."""
        return {}

    def __getitem__(self, index: Any) -> TensorDict:
        """Transitions in TED.

        Args:
            index: an integer, slice, list, range, array or tensor of integers of any shape, or a mask ``[N]``.
        """
        return self.transitions(row_numbers(index, len(self), self.device))

    def draw(self, *shape: int, next_action: bool = False) -> TensorDict:
        """Draw transitions uniformly with replacement, ``[*shape]``, without synchronising with the host.

        With ``next_action`` they hold ``("next", "action")`` too, see :meth:`next_actions`.
        """
        return self.transitions(torch.randint(len(self), shape, device=self.device), next_action=next_action)

    def transitions(self, rows: torch.Tensor, *, next_action: bool = False) -> TensorDict:
        """Transitions ``rows`` in TED; int64 of any shape on the set's device, not checked."""
        flat = rows.reshape(-1)
        following = self.next_actions(flat) if next_action else None
        found = self.gather(flat).tensordict(next_action=following, about=self.extras(flat))
        return found if rows.ndim == 1 else found.reshape(rows.shape)

    def chunks(self, rows: int, *, doing: str) -> Iterator[tuple[int, TensorDict]]:
        """Yield (number of the first transition, transitions) over the set, with a bar named ``doing`` if it takes long."""
        for begin in patient_bar(range(0, len(self), rows), desc=doing, unit="chunk"):
            yield begin, self[begin : begin + rows]


def row_numbers(index: Any, length: int, device: torch.device) -> torch.Tensor:
    """Turn any index into non-negative row numbers, int64 of the index's shape.

    Args:
        index: an integer, slice, list, range, array or tensor of integers of any shape, or a mask ``[length]``.
        length: number of rows.
        device: device of the result.

    Raises:
        IndexError: if it is no index, or out of range (an accelerator notices that when it reads).
    """
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if index is Ellipsis:
        index = slice(None)
    if isinstance(index, slice):
        return torch.arange(*index.indices(length), device=device)
    try:
        rows = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IndexError(f"{index!r} is no index of transitions") from error
    if rows.dtype == torch.bool:
        if rows.shape != (length,):
            raise IndexError(f"a mask of shape {tuple(rows.shape)} for {length} transitions")
        return rows.nonzero().squeeze(-1)
    if rows.numel() and (rows.is_floating_point() or rows.is_complex()):
        raise IndexError(f"an index of type {rows.dtype}; integers are needed")
    rows = rows.to(torch.int64)
    rows = torch.where(rows < 0, rows + length, rows)
    # An accelerator checks by itself, without making the host wait.
    if rows.device.type == "cpu" and bool(((rows < 0) | (rows >= length)).any()):
        raise IndexError(f"an index is out of range for {length} transitions")
    return rows
