# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Does the state jump inside an episode, as where two trajectories were joined without an end between them?

A step is judged by the *smooth* dimensions: those whose 99th percentile of |s' - s| is under a tenth of the data's range
(positions rather than velocities, contacts or switches). Its ratio is the median over the smooth dimensions of
|s' - s| / (that dimension's 99th percentile). It jumps where the ratio exceeds 3 and those of the steps before and behind it do
not exceed 1: most of what is otherwise slow moves at once, once. A set without smooth dimensions is not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deflow_torchrl.data.dataset import TransitionDataset

_SAMPLES = 100_000
_QUANTILE = 0.99
_SMOOTH = 0.1
_JUMP = 3.0
_USUAL = 1.0
_BYTES = 1 << 25


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


def find_jump(dataset: TransitionDataset) -> Jump | None:
    """The largest jump of a set of vector observations; ``None`` where there is none or the set cannot be judged."""
    if dataset.observation.dtype != torch.float32:
        return None
    width = dataset.observation[0].nbytes
    stride = -(-len(dataset) // max(1, min(_SAMPLES, _BYTES // width)))
    sampled = dataset[torch.arange(0, len(dataset), stride, device=dataset.device)]
    steps = (sampled["next", "observation"] - sampled["observation"]).abs().cpu()
    # torch.quantile has a limit on size; a sorted column has none.
    usual = steps.sort(0).values[int(_QUANTILE * (len(steps) - 1))]
    observations = sampled["observation"].cpu().sort(0).values
    low, high = (observations[round(share * (len(observations) - 1))] for share in (1 - _QUANTILE, _QUANTILE))
    smooth = (usual > 0) & (usual < _SMOOTH * (high - low))
    if int(smooth.sum()) < 2:
        return None
    ratio = torch.empty(len(dataset))
    ends = torch.zeros(len(dataset), dtype=torch.bool)
    for begin, part in dataset.chunks(max(1, _BYTES // width), doing="look for jumps"):
        moved = (part["next", "observation"] - part["observation"]).cpu()[:, smooth].abs()
        ratio[begin : begin + len(part)] = (moved / usual[smooth]).median(dim=1).values
    starts = dataset.episode_starts.cpu()
    ends[starts[starts > 0] - 1] = True
    usual_after = torch.cat([(ratio[1:] <= _USUAL) | ends[:-1], torch.tensor([True])])
    usual_before = torch.cat([torch.tensor([True]), (ratio[:-1] <= _USUAL) | ends[:-1]])
    jumps = (ratio > _JUMP) & usual_before & usual_after
    if not bool(jumps.any()):
        return None
    where = int(ratio.masked_fill(~jumps, 0).argmax())
    episode = int(torch.searchsorted(starts, where, right=True)) - 1
    return Jump(where, episode, where - int(starts[episode]), float(ratio[where]), int(jumps.sum()))
