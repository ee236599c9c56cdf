# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Findings in a data set whose rows are valid one by one: sizes, ranges, duplicates, and jumps of the state.

A jump inside an episode shows two trajectories that were joined without an end between them. A step is judged by the *smooth*
dimensions: those whose 99th percentile of |s' - s| is under a tenth of the data's range (positions rather than velocities,
contacts or switches). Its ratio is the median over the smooth dimensions of |s' - s| / (that dimension's 99th percentile). It
is a jump where the ratio exceeds 3 and the ratios of the steps before and after it do not exceed 1: most of the slow
dimensions move at once, for one step. A set without smooth dimensions is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deflow_torchrl.errors import InputError

if TYPE_CHECKING:
    from deflow_torchrl.data.dataset import TransitionDataset

_CHANNELS = 4  # of one picture, at most: grey, colour, colour and depth
_SAMPLES = 100_000
_QUANTILE = 0.99
_SMOOTH = 0.1
_JUMP = 3.0
_USUAL = 1.0
_BYTES = 1 << 25
_HASHED_BYTES = 1 << 21  # the hash works on numbers twice as wide, or eight times


@dataclass(frozen=True)
class Jump:
    """The largest jump inside an episode.

    Attributes:
        transition: number of the transition.
        episode: number of its episode.
        step: its step in the episode.
        ratio: median over smooth dimensions of the step's size over the usual largest.
        count: jumps in the set.
    """

    transition: int
    episode: int
    step: int
    ratio: float
    count: int

    def __str__(self) -> str:
        others = "" if self.count == 1 else f" and {self.count - 1} more"
        return (
            f"the observation jumps inside episode {self.episode}, after its step {self.step} (row {self.transition}{others}): "
            f"{self.ratio:.0f} times the usual largest step in half of its slow dimensions"
        )


@dataclass(frozen=True)
class ValidationReport:
    """What was found when a set was built; data that cannot be used are refused, the rest is counted here.

    Attributes:
        transitions: N.
        episodes: episodes with at least one transition.
        shortest_episode: transitions of the shortest episode.
        longest_episode: transitions of the longest episode.
        reward_min: smallest reward.
        reward_max: largest reward.
        terminated: transitions without a bootstrap.
        clipped_actions: numbers moved to +-(1 - 1e-5).
        duplicated_transitions: transitions whose s and a equal an earlier one's.
        jump: the largest jump of the observation inside an episode, if there is any.
    """

    transitions: int
    episodes: int
    shortest_episode: int
    longest_episode: int
    reward_min: float
    reward_max: float
    terminated: int
    clipped_actions: int
    duplicated_transitions: int
    jump: Jump | None = None


def check_pictures(name: str, shape: Sequence[int], dtype: Any, *, source: str) -> None:
    """Refuse an array ``[N, H, W, C]`` that cannot be a column of pictures.

    Raises:
        InputError: on another type than uint8, or channels before the pixels.
    """
    if str(dtype).removeprefix("torch.") != "uint8":
        raise InputError(
            f"{source}: {name} has shape {tuple(shape)} and type {dtype}; images must be uint8, 0 to 255: convert them with "
            "(255 * x).round().astype(np.uint8) if they are 0 to 1, x.astype(np.uint8) if they are 0 to 255"
        )
    _, first, height, width = shape
    if first <= _CHANNELS < min(height, width):
        raise InputError(
            f"{source}: {name} has shape {tuple(shape)}, channels first; channels last is meant, "
            f"{(shape[0], height, width, first)}: convert it with x.transpose(0, 2, 3, 1)"
        )


def validate(dataset: TransitionDataset, *, clipped: int) -> ValidationReport:
    """Examine a :class:`deflow_torchrl.data.TransitionDataset` of whose actions ``clipped`` numbers were clipped."""
    lengths = dataset.episode_lengths
    lengths = lengths[lengths > 0]  # a trajectory of one observation is no episode
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


def find_jump(dataset: TransitionDataset) -> Jump | None:
    """Find the largest jump of a set of vector observations; ``None`` where there is none or the set cannot be judged."""
    if dataset.observation.dtype != torch.float32:
        return None
    width, length, starts = dataset.observation[0].nbytes, len(dataset), dataset.episode_starts
    sampled = dataset[:: -(-length // max(1, min(_SAMPLES, _BYTES // width)))]
    # torch.quantile has a limit on size; a sorted column has none.
    usual = (sampled["next", "observation"] - sampled["observation"]).abs().sort(0).values
    usual = usual[int(_QUANTILE * (len(usual) - 1))]
    values = sampled["observation"].sort(0).values
    low, high = (values[round(share * (len(values) - 1))] for share in (1 - _QUANTILE, _QUANTILE))
    smooth = (usual > 0) & (usual < _SMOOTH * (high - low))
    if int(smooth.sum()) < 2:
        return None
    ratio = torch.empty(length)
    for begin, part in dataset.chunks(max(1, _BYTES // width), doing="look for jumps"):
        moved = (part["next", "observation"] - part["observation"])[:, smooth].abs()
        ratio[begin : begin + len(part)] = (moved / usual[smooth]).median(dim=1).values
    begins = torch.zeros(length + 1, dtype=torch.bool)
    begins[starts] = True
    begins = begins[1:length]  # whether an episode begins between a step and the next
    ordinary, jumps = ratio <= _USUAL, ratio > _JUMP
    jumps[1:] &= ordinary[:-1] | begins
    jumps[:-1] &= ordinary[1:] | begins
    if not bool(jumps.any()):
        return None
    where = int(ratio.masked_fill(~jumps, 0).argmax())
    episode = int(torch.searchsorted(starts, where, right=True)) - 1
    return Jump(where, episode, where - int(starts[episode]), float(ratio[where]), int(jumps.sum()))


def _count_duplicates(dataset: TransitionDataset) -> int:
    """Count transitions whose s and a equal an earlier one's, by a 64-bit hash of their bytes."""
    hashes = np.empty(len(dataset), np.uint64)
    rows = max(1, _HASHED_BYTES // (dataset.observation[0].nbytes + dataset.action[0].nbytes))
    for begin, part in dataset.chunks(rows, doing="look for duplicates"):
        frames = dataset.read("observation", dataset.frames(torch.arange(begin, begin + len(part))))
        hashes[begin : begin + len(part)] = _hash_rows(frames) + np.uint64(3) * _hash_rows(part["action"])
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def _hash_rows(rows: torch.Tensor) -> np.ndarray:
    flat = rows.reshape(len(rows), -1).numpy()
    words = flat.view(np.uint32) if flat.shape[1] * flat.itemsize % 4 == 0 else flat
    odd = np.random.default_rng(words.shape[1]).integers(1 << 63, size=words.shape[1], dtype=np.uint64) * np.uint64(2)
    mixed = words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    return ((mixed ^ (mixed >> np.uint64(15))) * (odd + np.uint64(1))).sum(axis=1, dtype=np.uint64)
