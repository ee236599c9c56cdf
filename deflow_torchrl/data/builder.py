# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Columns from a stream of rows: checked, cast and stored some megabytes at a time, in memory or in memory-mapped files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deflow_torchrl.data.columns import allocate, as_column, release_pages
from deflow_torchrl.data.schema import ACTION_LIMIT, LARGEST, MIN_TRANSITIONS, ROUNDING
from deflow_torchrl.errors import InputError
from deflow_torchrl.processes import free_memory
from deflow_torchrl.progress import patient_bar


class ColumnBuilder:
    """Fills the columns of a data set of known size; :class:`deflow_torchrl.data.TransitionBuilder` makes the set of them.

    Frames (observations) and transitions are written separately and in order: an episode of T transitions has T + 1 frames,
    the last of which is its final observation. Every value is checked. Beside the columns themselves, memory is needed for
    the rows that are being added.

    Args:
        transitions: N.

    Keyword Args:
        frames: F, transitions plus episodes.
        observation_shape: ``(O,)``, or ``(H, W, C)`` of uint8 images.
        observation_dtype: ``torch.float32`` or ``torch.uint8``.
        action_dim: A.
        source: name of the data, for error messages.
        folder: existing folder for memory-mapped columns; in memory where ``None``.

    Raises:
        InputError: on fewer than two transitions or a full disk.
    """

    def __init__(
        self,
        transitions: int,
        *,
        frames: int,
        observation_shape: tuple[int, ...],
        action_dim: int,
        source: str,
        observation_dtype: torch.dtype = torch.float32,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if transitions < MIN_TRANSITIONS:
            number = "no transition" if transitions == 0 else f"{transitions} transition"
            raise InputError(f"{source} holds {number}; at least {MIN_TRANSITIONS} are needed")
        self.source = source
        self.folder = folder = None if folder is None else Path(folder).expanduser()
        self.clipped = 0
        """Numbers of actions moved to +-(1 - 1e-5)."""
        if folder is None and observation_dtype == torch.uint8:
            needed, free = frames * math.prod(observation_shape), free_memory()
            if free is not None and needed > free:
                raise InputError(
                    f"{source}: {frames:,} pictures take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
                    "keep them in files (storage=memmap, memmap_dir=), or take fewer"
                )
        self._columns = {
            name: allocate(name, (rows, *shape), dtype, folder)
            for name, rows, shape, dtype in (
                ("observation", frames, observation_shape, observation_dtype),
                ("action", transitions, (action_dim,), torch.float32),
                ("reward", transitions, (), torch.float32),
                ("terminated", transitions, (), torch.bool),
            )
        }
        self._written = dict.fromkeys(self._columns, 0)
        self._starts: list[int] = []
        self._outside, self._first_outside, self._largest_action = 0, "", 0.0
        self._bar = patient_bar(desc="read", total=frames + transitions, unit="row", unit_scale=True)

    def add_frames(self, observations: np.ndarray, *, rows: np.ndarray | None = None) -> None:
        """Append frames.

        Args:
            observations: ``[f, ...]``.

        Keyword Args:
            rows: their row numbers in the source, for error messages; the frame's number by default.

        Raises:
            InputError: on a wrong shape or type, NaN or infinity.
        """
        images = self._columns["observation"].dtype == torch.uint8
        values = self._checked("observations", observations, "observation", rows, "u" if images else "fiub")
        self._append("observation", values)
        self._bar.update(len(values))

    def add_actions(self, actions: np.ndarray, *, rows: np.ndarray | None = None) -> None:
        """Append actions ``[n, A]`` inside [-1, 1], clipped to +-(1 - 1e-5); arguments as in :meth:`add_frames`.

        Raises:
            InputError: on a wrong shape or type, NaN or infinity. Actions out of bounds are counted and refused by
                :meth:`finish`.
        """
        values = self._checked("actions", actions, "action", rows, "f")
        size = values.abs()
        outside = (size > 1 + ROUNDING).any(-1)
        if bool(outside.any()):
            if not self._outside:
                first = int(outside.nonzero()[0])
                numbers = ", ".join(f"{value:.4g}" for value in values[first].tolist())
                self._first_outside = f"row {self._row('action', first, rows)}: [{numbers}]"
            self._outside += int(outside.sum())
            self._largest_action = max(self._largest_action, float(size.max()))
        self.clipped += int((size > ACTION_LIMIT).sum())
        self._append("action", values.clamp_(-ACTION_LIMIT, ACTION_LIMIT))
        self._bar.update(len(values))

    def add_outcomes(self, rewards: np.ndarray, terminated: np.ndarray, *, rows: np.ndarray | None = None) -> None:
        """Append rewards ``[n]`` and flags ``[n]`` (nonzero: no bootstrap); arguments as in :meth:`add_frames`.

        Raises:
            InputError: on a wrong shape or type, NaN or infinity.
        """
        reward = self._checked("rewards", rewards, "reward", rows, "fiub")
        flags = self._checked("terminals", terminated, "terminated", rows, "fiub")
        if len(flags) != len(reward):
            raise InputError(f"{self.source}: {len(reward)} rewards, {len(flags)} terminals")
        self._append("reward", reward)
        self._append("terminated", flags != 0)

    def add_episode(
        self, *, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray
    ) -> None:
        """Append one episode of T transitions.

        Keyword Args:
            observations: ``[T + 1, ...]``, the final one included; NaN in it stands for nothing where the last row is terminal.
            actions: ``[T, A]``.
            rewards: ``[T]``.
            terminated: ``[T]``. The last transition is ``truncated`` where it is not terminated.

        Raises:
            InputError: as the other methods, and where the lengths disagree.
        """
        if not len(observations) - 1 == len(actions) == len(rewards) == len(terminated):
            raise InputError(
                f"{self.source}: episode {len(self._starts)} has {len(observations)} observations for {len(actions)} actions, "
                f"{len(rewards)} rewards and {len(terminated)} flags; expected one more than these"
            )
        self._starts.append(self._written["action"])
        observations = as_column("observations", observations, self.source)
        if len(terminated) and terminated[-1] and observations.dtype.kind == "f" and np.isnan(observations[-1]).any():
            observations = np.concatenate(
                [observations[:-1], observations[-2:-1]]
            )  # nobody looks behind a terminal row
        self.add_frames(observations)
        self.add_actions(actions)
        self.add_outcomes(rewards, terminated)

    def columns(self, episode_starts: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Check that every row was written, and give the columns of :class:`deflow_torchrl.data.TransitionDataset`.

        Args:
            episode_starts: number of each episode's first transition ``[E]``, where :meth:`add_episode` was not used.

        Raises:
            InputError: if rows are missing or actions were out of bounds.
        """
        self._bar.close()
        if self._outside:
            raise InputError(
                f"{self.source}: {self._outside} of {self._written['action']} actions leave [-1, 1] "
                f"(largest {self._largest_action:.4g}), first in {self._first_outside}; rescale the actions to [-1, 1] "
                "(own data: deflow data import --action-bounds LOW HIGH)"
            )
        starts = torch.as_tensor(self._starts if episode_starts is None else episode_starts, dtype=torch.int64)
        written = list(self._written.values())[:3]
        frames, actions, rewards = expected = [len(self._columns[name]) for name in ("observation", "action", "reward")]
        if written != expected or frames != actions + len(starts):
            raise InputError(
                f"{self.source}: {written[0]} observations, {written[1]} actions and {written[2]} rewards in {len(starts)} "
                f"episodes; expected {frames}, {actions} and {rewards}"
            )
        return {**self._columns, "episode_starts": starts}

    def _append(self, name: str, values: torch.Tensor) -> None:
        begin, column = self._written[name], self._columns[name]
        self._written[name] = begin + len(values)
        column[begin : begin + len(values)] = values
        release_pages(column, self.folder)

    def _checked(self, name: str, values: Any, into: str, rows: np.ndarray | None, kinds: str) -> torch.Tensor:
        column, values = self._columns[into], as_column(name, values, self.source)
        if values.dtype.kind not in kinds:
            expected = {"f": "floating point in [-1, 1]", "u": "uint8"}.get(kinds, "real numbers")
            raise InputError(f"{self.source}: {name} has type {values.dtype}, expected {expected}")
        if values.shape[1:] != column.shape[1:]:
            raise InputError(
                f"{self.source}: {name} has rows of shape {values.shape[1:]}, expected {tuple(column.shape[1:])}"
            )
        if self._written[into] + len(values) > len(column):
            raise InputError(f"{self.source}: more {name} than the {len(column)} announced")
        # A float64 beyond float32's range becomes infinite in the cast, and is refused like any other.
        with np.errstate(over="ignore"):
            dtype = np.uint8 if column.dtype == torch.uint8 else np.float32
            tensor = torch.from_numpy(np.array(values, dtype=dtype, order="C"))
        if tensor.is_floating_point() and not bool((fitting := tensor.abs() <= LARGEST).all()):
            row = int((~fitting.reshape(len(tensor), -1).all(-1)).nonzero()[0])
            what = (
                "a NaN or infinite value" if not bool(tensor[row].isfinite().all()) else f"a number beyond {LARGEST:g}"
            )
            raise InputError(
                f"{self.source}: {name} has {what} in row {self._row(into, row, rows)}; repair or drop that trajectory"
            )
        return tensor

    def _row(self, into: str, row: int, rows: np.ndarray | None) -> int:
        return self._written[into] + row if rows is None else int(rows[row])
