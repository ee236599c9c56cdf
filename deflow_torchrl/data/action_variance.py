# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
r"""Intrinsic action variance: the spread of actions at similar states, from which the paper sets delta.

Paper, section 4 and appendix A.1: the variance of the actions of the k = 5 nearest neighbours of each state, averaged over
states and divided by the action dimension; delta is about 0.1 x that variance for manipulation, 1.0 x for navigation, and
0.001 on D4RL. delta and the variance are both *per action dimension* here (``divergence_reduction="mean"``).

The paper does not say the following, and the authors' code has no estimator:

1. whether a state is its own nearest neighbour. Default: no (``include_self=False``), its action is left out; with
   ``include_self=True`` it is one of the k;
2. whether the variance divides by k - 1 or by k. Default: k - 1 (``unbiased=True``), so that the value does not depend on k
   and data with noise of variance v give v; dividing by k gives (k - 1) / k of it, 0.8 for k = 5;
3. whether states are normalised. Default: no (``normalize=False``), Euclidean distance on observations as they are;
   ``normalize=True`` divides each observation dimension by its standard deviation over the set;
4. how many states are averaged over. Default: 20,000 drawn without replacement; their neighbours are searched in the
   whole set.

All of these together change less than the paper's "about" allows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch

from deflow_torchrl.errors import InputError

_QUERY_BLOCK = 256
# Rows kept beyond k, so that the ranking by coordinates decides and not the rounding of the search.
_SPARE = 8
_CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class ActionVariance:
    """Result of :func:`intrinsic_action_variance`, with the options it was computed with.

    Attributes:
        per_dimension: variance of each action dimension, averaged over the queried states, float64 ``[A]``.
        mean: average over dimensions: the paper's intrinsic action variance.
        interval: 95% bootstrap interval (low, high) of ``mean`` over the choice of the queried states. The variation between
            data sets is not included.
        k: neighbours of a state.
        queries: states queried.
        transitions: transitions in the set.
        include_self: whether a state is one of its own k neighbours.
        normalize: whether observations were divided by their standard deviation.
        unbiased: whether variances divide by k - 1 instead of k.
        bootstrap: resamples behind ``interval``.
        seed: seed of the queried states and of the resamples.
    """

    per_dimension: torch.Tensor
    mean: float
    interval: tuple[float, float]
    k: int
    queries: int
    transitions: int
    include_self: bool
    normalize: bool
    unbiased: bool
    bootstrap: int
    seed: int


def intrinsic_action_variance(
    observations: torch.Tensor | np.ndarray,
    actions: torch.Tensor | np.ndarray,
    *,
    k: int = 5,
    queries: int = 20_000,
    include_self: bool = False,
    normalize: bool = False,
    unbiased: bool = True,
    bootstrap: int = 1_000,
    seed: int = 0,
    chunk_size: int = 4_096,
    progress: Callable[[Iterator[torch.Tensor], int], Iterator[torch.Tensor]] | None = None,
) -> ActionVariance:
    """Average the variance of the actions of each state's k nearest neighbours; the module lists the paper's open points.

    The neighbours are the exact ones: all distances are computed in float64 around the data's mean, and the nearest
    candidates are ranked again by differences of their coordinates. A state is left out of its own neighbours by its row,
    so another row with the same observation is a neighbour at distance zero. Of equally distant states the lower row is
    taken if no more than eight tie, any of them otherwise.

    Args:
        observations: s, floating point ``[N, O]``; the search runs on their device.
        actions: a, floating point ``[N, A]``.

    Keyword Args:
        k: neighbours of a state, at least 2.
        queries: states to average over, drawn without replacement; all if the set has fewer.
        include_self: count a state as the first of its own k neighbours.
        normalize: divide each observation dimension by its standard deviation (constant ones are left as they are).
        unbiased: divide by k - 1 instead of k.
        bootstrap: resamples of the queried states behind the interval.
        seed: seed of the queried states and of the resamples; torch's global generator is not used.
        chunk_size: transitions compared with 256 states at a time, 8 MiB of distances by default; memory beyond that does
            not grow with N.
        progress: wraps the iterator of finished blocks of states (iterator, total), for a progress bar.

    Raises:
        InputError: on shapes, types or options that do not fit, NaN or infinity, or no more than k transitions.

    Examples:
        >>> states = torch.linspace(0, 1, 500).unsqueeze(-1)
        >>> noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> variance = intrinsic_action_variance(states, states + 0.1 * noise)
        >>> round(variance.mean, 2)
        0.01
    """
    for name, value, least in (("k", k, 2), ("queries", queries, 1), ("bootstrap", bootstrap, 1), ("seed", seed, 0)):
        if not least <= value < 2**63:
            raise InputError(f"{name} must be at least {least} (and below 2**63), got {value}")
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, got {chunk_size}")
    observations, actions = _checked("observations", observations), _checked("actions", actions)
    rows = len(observations)
    if len(actions) != rows:
        raise InputError(f"observations have {rows} rows, actions {len(actions)}; give one of each a transition")
    if rows <= k:
        raise InputError(f"{rows} transitions are too few for k={k} neighbours; give more than {k} or lower k")
    actions = actions.to(observations.device)
    generator = torch.Generator().manual_seed(seed)
    queried = torch.arange(rows) if queries >= rows else torch.randperm(rows, generator=generator)[:queries]

    def blocks() -> Iterator[torch.Tensor]:
        shift, scale = _standardisation(observations, normalize, chunk_size)

        def variance(block: torch.Tensor) -> torch.Tensor:
            neighbours = _nearest(
                observations, block, k=k, include_self=include_self, shift=shift, scale=scale, chunk_size=chunk_size
            )
            return actions[neighbours].double().var(dim=1, correction=int(unbiased)).cpu()

        return map(variance, queried.to(observations.device).split(_QUERY_BLOCK))

    total = -(-len(queried) // _QUERY_BLOCK)
    variances = torch.cat(list(blocks() if progress is None else progress(blocks(), total)))
    per_dimension = variances.mean(0)
    return ActionVariance(
        per_dimension=per_dimension,
        mean=float(per_dimension.mean()),
        interval=_bootstrap_interval(variances.mean(1), bootstrap, generator),
        k=k,
        queries=len(queried),
        transitions=rows,
        include_self=include_self,
        normalize=normalize,
        unbiased=unbiased,
        bootstrap=bootstrap,
        seed=seed,
    )


def suggest_target_divergence(variance: ActionVariance | float, *, domain: str) -> float:
    """Apply the paper's rule: delta is about 0.1 x the action variance for manipulation, 1.0 x for navigation, 0.001 on D4RL.

    Args:
        variance: a result of :func:`intrinsic_action_variance`, or its mean.

    Keyword Args:
        domain: ``"manipulation"``, ``"navigation"`` or ``"d4rl"``; a task's is in ``tasks/ogbench.json``.

    Raises:
        InputError: on another domain.
    """
    rules = paper_values()["rule"]
    rule = rules.get(domain)
    if rule is None:
        raise InputError(f"unknown domain {domain!r}; the paper's rule knows {', '.join(rules)}")
    if "constant" in rule:
        return rule["constant"]
    return rule["times_variance"] * (variance.mean if isinstance(variance, ActionVariance) else variance)


@functools.cache
def paper_values() -> dict[str, Any]:
    """Rule, four action variances and Table 6's deltas as copied from the paper: ``action_variance.json``."""
    return json.loads(resources.files(__package__).joinpath("action_variance.json").read_text(encoding="utf-8"))


def _checked(name: str, values: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(values, np.ndarray):
        if values.dtype.kind != "f":
            raise InputError(f"{name} have type {values.dtype}, expected floating point")
        native = values.dtype.newbyteorder("=")  # torch has no other byte order
        values = torch.from_numpy(np.require(values, native, ("C", "W")))
    if not isinstance(values, torch.Tensor):
        raise InputError(f"{name} are a {type(values).__name__}, expected a tensor or an array")
    if not values.dtype.is_floating_point:
        raise InputError(f"{name} have type {str(values.dtype).removeprefix('torch.')}, expected floating point")
    if values.ndim != 2 or values.shape[1] < 1:
        raise InputError(f"{name} have shape {tuple(values.shape)}, expected [transitions, dimensions]")
    finite = values.isfinite().all(-1)
    if not bool(finite.all()):
        raise InputError(f"{name} have a NaN or infinite value in row {int((~finite).nonzero()[0])}; repair or drop it")
    return values.detach()


def _standardisation(observations: torch.Tensor, normalize: bool, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset and scale of observations, float64 ``[O]``: centring keeps the distances of near neighbours precise."""
    mean = sum(part.double().sum(0) for part in observations.split(chunk_size)) / len(observations)
    if not normalize:
        return mean, torch.ones_like(mean)
    squares = sum((part.double() - mean).square().sum(0) for part in observations.split(chunk_size))
    constant = observations.amax(0) == observations.amin(0)
    return mean, (squares / len(observations)).sqrt().masked_fill(constant, 1.0)


def _nearest(
    observations: torch.Tensor,
    block: torch.Tensor,
    *,
    k: int,
    include_self: bool,
    shift: torch.Tensor,
    scale: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Find the k nearest neighbours of the rows ``block``, nearest first, ``[B, k]``."""
    own = -1.0 if include_self else torch.inf  # a state comes first or never among its own neighbours
    states = (observations[block].double() - shift) / scale
    nearest, candidates = states.new_empty(len(block), 0), block.new_empty(len(block), 0)
    for start in range(0, len(observations), chunk_size):
        part = (observations[start : start + chunk_size].double() - shift) / scale
        distances = torch.cdist(states, part, compute_mode="use_mm_for_euclid_dist")
        inside = ((block >= start) & (block < start + len(part))).nonzero().squeeze(-1)
        distances[inside, block[inside] - start] = own
        near = distances.topk(min(k + _SPARE, len(part)), largest=False, sorted=False)
        nearest = torch.cat([nearest, near.values], dim=1)
        candidates = torch.cat([candidates, near.indices + start], dim=1)
        if nearest.shape[1] > k + _SPARE:
            nearest, kept = nearest.topk(k + _SPARE, largest=False, sorted=False)
            candidates = candidates.gather(1, kept)
    candidates = candidates.sort(dim=1).values
    others = observations[candidates].double()
    exact = ((others - observations[block].double().unsqueeze(1)) / scale).square().sum(-1)
    exact[candidates == block.unsqueeze(1)] = own
    return candidates.gather(1, exact.argsort(dim=1, stable=True)[:, :k])


def _bootstrap_interval(values: torch.Tensor, resamples: int, generator: torch.Generator) -> tuple[float, float]:
    size = len(values)
    means = torch.stack([values[torch.randint(size, (size,), generator=generator)].mean() for _ in range(resamples)])
    tail = (1 - _CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high
