# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Transitions from a stream of rows: checked, cast and stored a chunk at a time, in memory or in memory-mapped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from deflow_torchrl.data.columns import allocate, release_pages
from deflow_torchrl.data.continuity import find_jump
from deflow_torchrl.data.dataset import TransitionDataset, ValidationReport
from deflow_torchrl.data.schema import ACTION_LIMIT, MIN_TRANSITIONS, ROUNDING
from deflow_torchrl.errors import InputError
from deflow_torchrl.progress import patient_bar

_HASHED_BYTES = 1 << 21  # the hash works on numbers twice as wide, or eight times


class TransitionBuilder:
    """Builds a :class:`TransitionDataset` of known size from chunks.

    Frames (observations) and transitions are written separately and in order: an episode of T transitions has T + 1 frames,
    the last of which is its final observation. Every value is checked on the way in; memory beyond the set itself is that
    of a chunk.

    Args:
        transitions: N.

    Keyword Args:
        frames: F, transitions plus episodes.
        observation_shape: ``(O,)``, or ``(H, W, C)`` of uint8 images.
        observation_dtype: ``torch.float32`` or ``torch.uint8``.
        action_dim: A.
        source: what the data are, for error messages.
        folder: keep the columns in memory-mapped files in this existing folder; in memory where ``None``.

    Raises:
        InputError: on fewer than two transitions or a full disk.

    Examples:
        >>> builder = TransitionBuilder(2, frames=3, observation_shape=(4,), action_dim=1, source="example")
        >>> builder.add_episode(
        ...     observations=np.zeros((3, 4)), actions=np.zeros((2, 1)), rewards=np.ones(2), terminated=np.array([0, 1])
        ... )
        >>> builder.finish()[:]["next", "done"].flatten().tolist()
        [False, True]
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
        folder: Path | None = None,
    ) -> None:
        if transitions < MIN_TRANSITIONS:
            number = "no transition" if transitions == 0 else f"{transitions} transition"
            raise InputError(f"{source} holds {number}; at least {MIN_TRANSITIONS} are needed")
        self.source = source
        self.folder = folder
        self.observation = allocate("observation", (frames, *observation_shape), observation_dtype, folder)
        self.action = allocate("action", (transitions, action_dim), torch.float32, folder)
        self.reward = allocate("reward", (transitions,), torch.float32, folder)
        self.terminated = allocate("terminated", (transitions,), torch.bool, folder)
        self._frames = self._actions = self._outcomes = 0
        self._starts: list[int] = []
        self._clipped = self._outside = 0
        self._first_outside: tuple[int, list[float]] | None = None
        self._largest_action = 0.0
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
        begin, end = self._frames, self._frames + len(observations)
        kinds = "fiub" if self.observation.dtype != torch.uint8 else "u"
        values = self._checked("observations", observations, self.observation, (begin, rows), kinds)
        self.observation[begin:end] = values
        self._frames = end
        self._bar.update(end - begin)
        release_pages(self.observation, self.folder)

    def add_actions(self, actions: np.ndarray, *, rows: np.ndarray | None = None) -> None:
        """Append actions ``[n, A]`` inside [-1, 1], clipped to +-(1 - 1e-5); arguments as in :meth:`add_frames`.

        Raises:
            InputError: on a wrong shape or type, NaN or infinity. Actions out of bounds are counted and refused by
                :meth:`finish`.
        """
        begin, end = self._actions, self._actions + len(actions)
        values = self._checked("actions", actions, self.action, (begin, rows), "f")
        size = values.abs()
        outside = (size > 1 + ROUNDING).any(-1)
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            if self._first_outside is None:
                self._first_outside = self._row(first, begin, rows), values[first].tolist()
            self._outside += int(outside.sum())
            self._largest_action = max(self._largest_action, float(size.max()))
        self._clipped += int((size > ACTION_LIMIT).sum())
        self.action[begin:end] = values.clamp_(-ACTION_LIMIT, ACTION_LIMIT)
        self._actions = end
        self._bar.update(end - begin)
        release_pages(self.action, self.folder)

    def add_outcomes(self, rewards: np.ndarray, terminated: np.ndarray, *, rows: np.ndarray | None = None) -> None:
        """Append rewards ``[n]`` and flags ``[n]`` (nonzero: no bootstrap); arguments as in :meth:`add_frames`.

        Raises:
            InputError: on a wrong shape or type, NaN or infinity.
        """
        begin, end = self._outcomes, self._outcomes + len(rewards)
        self.reward[begin:end] = self._checked("rewards", np.asarray(rewards), self.reward, (begin, rows), "fiub")
        flags = self._checked("terminals", np.asarray(terminated, np.float32), self.terminated, (begin, rows), "f")
        if len(flags) != end - begin:
            raise InputError(f"{self.source}: {end - begin} rewards, {len(flags)} terminals")
        self.terminated[begin:end] = flags != 0
        self._outcomes = end
        release_pages(self.reward, self.folder)
        release_pages(self.terminated, self.folder)

    def add_episode(
        self,
        *,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
    ) -> None:
        """Append one episode of T transitions.

        Keyword Args:
            observations: ``[T + 1, ...]``, the final one included.
            actions: ``[T, A]``.
            rewards: ``[T]``.
            terminated: ``[T]``. The last transition is ``truncated`` where it is not terminated.

        Raises:
            InputError: as the other methods, and where the lengths disagree.
        """
        number = len(self._starts)
        if not len(observations) - 1 == len(actions) == len(rewards) == len(terminated):
            raise InputError(
                f"{self.source}: episode {number} has {len(observations)} observations for {len(actions)} actions, "
                f"{len(rewards)} rewards and {len(terminated)} flags; expected one more than these"
            )
        self._starts.append(self._actions)
        self.add_frames(observations)
        self.add_actions(actions)
        self.add_outcomes(rewards, terminated)

    def finish(
        self, *, episode_starts: np.ndarray | None = None, about: dict[str, Any] | None = None
    ) -> TransitionDataset:
        """Check the whole and hand it over.

        Keyword Args:
            episode_starts: number of each episode's first transition ``[E]``, where :meth:`add_episode` was not used.
            about: what is known of the source (provenance, versions), kept with the set.

        Raises:
            InputError: if rows are missing or actions were out of bounds.
        """
        self._bar.close()
        if self._outside and self._first_outside is not None:
            row, action = self._first_outside
            numbers = ", ".join(f"{value:.4g}" for value in action)
            raise InputError(
                f"{self.source}: {self._outside} of {self._actions} actions leave [-1, 1] (largest {self._largest_action:.4g}), "
                f"first in row {row}: [{numbers}]; rescale the actions to [-1, 1] "
                "(own data: deflow data import --action-bounds LOW HIGH)"
            )
        starts = torch.tensor(self._starts) if episode_starts is None else torch.as_tensor(episode_starts)
        written = (self._frames, self._actions, self._outcomes)
        expected = (len(self.observation), len(self.action), len(self.reward))
        if written != expected or len(self.observation) != len(self.action) + len(starts):
            raise InputError(
                f"{self.source}: {written[0]} observations, {written[1]} actions and {written[2]} rewards in {len(starts)} "
                f"episodes; expected {expected[0]}, {expected[1]} and {expected[2]}"
            )
        dataset = TransitionDataset(
            observation=self.observation,
            action=self.action,
            reward=self.reward,
            terminated=self.terminated,
            episode_starts=starts.to(torch.int64),
            folder=self.folder,
            source=self.source,
            about=about,
        )
        dataset.report = _report(dataset, self._clipped)
        return dataset

    def _checked(
        self, name: str, values: np.ndarray, column: torch.Tensor, where: tuple[int, np.ndarray | None], kinds: str
    ) -> torch.Tensor:
        begin, rows = where
        if values.dtype.kind not in kinds:
            expected = {"f": "floating point in [-1, 1]", "u": "uint8"}.get(kinds, "real numbers")
            raise InputError(f"{self.source}: {name} has type {values.dtype}, expected {expected}")
        if values.shape[1:] != column.shape[1:]:
            raise InputError(
                f"{self.source}: {name} has rows of shape {values.shape[1:]}, expected {tuple(column.shape[1:])}"
            )
        if begin + len(values) > len(column):
            raise InputError(f"{self.source}: more {name} than the {len(column)} announced")
        dtype = np.uint8 if column.dtype == torch.uint8 else np.float32
        # A float64 beyond float32's range becomes infinite in the cast, and is refused like any other.
        with np.errstate(over="ignore"):
            tensor = torch.from_numpy(np.array(values, dtype=dtype, order="C"))
        if dtype == np.float32 and not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite().reshape(len(tensor), -1).all(-1)).nonzero()[0])
            raise InputError(
                f"{self.source}: {name} has a NaN or infinite value in row {self._row(row, begin, rows)}; "
                "repair or drop that trajectory"
            )
        return tensor

    def _row(self, row: int, begin: int, rows: np.ndarray | None) -> int:
        return begin + row if rows is None else int(rows[row])


def _report(dataset: TransitionDataset, clipped: int) -> ValidationReport:
    lengths = dataset.episode_lengths
    # An observation-only trajectory (one row) is no episode of anything.
    lengths = lengths[lengths > 0]
    return ValidationReport(
        transitions=len(dataset),
        episodes=len(lengths),
        shortest_episode=int(lengths.min()),
        longest_episode=int(lengths.max()),
        reward_min=float(dataset.reward.min()),
        reward_max=float(dataset.reward.max()),
        terminated=int(dataset.terminated.sum()),
        clipped_actions=clipped,
        duplicated_transitions=_count_duplicates(dataset),
        jump=find_jump(dataset),
    )


def _count_duplicates(dataset: TransitionDataset) -> int:
    """Transitions whose s and a equal an earlier one's, by a 64-bit hash of their bytes."""
    hashes = np.empty(len(dataset), np.uint64)
    rows = max(1, _HASHED_BYTES // (dataset.observation[0].nbytes + dataset.action[0].nbytes))
    for begin, part in dataset.chunks(rows, doing="look for duplicates"):
        end = begin + len(part)
        hashes[begin:end] = _hash_rows(part["observation"]) + np.uint64(3) * _hash_rows(part["action"])
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def _hash_rows(rows: torch.Tensor) -> np.ndarray:
    flat = rows.reshape(len(rows), -1).numpy()
    words = flat.view(np.uint32) if flat.shape[1] * flat.itemsize % 4 == 0 else flat
    odd = np.random.default_rng(words.shape[1]).integers(1 << 63, size=words.shape[1], dtype=np.uint64) * np.uint64(2)
    mixed = words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    return ((mixed ^ (mixed >> np.uint64(15))) * (odd + np.uint64(1))).sum(axis=1, dtype=np.uint64)
