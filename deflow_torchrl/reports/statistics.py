# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Intervals and tests for results of the same episodes under two policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

_AT_A_TIME = 100


@dataclass(frozen=True)
class PairedDifference:
    """Mean of second - first over pairs, with its interval.

    Attributes:
        mean: the difference of the means.
        low: lower end of the interval.
        high: upper end.
        confidence: what the interval was asked for, 0.95 for example.
        pairs: number of pairs E.
    """

    mean: float
    low: float
    high: float
    confidence: float
    pairs: int


def paired_difference(
    first: Any,
    second: Any,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    progress: Callable[[Iterable[int], int], Iterable[int]] | None = None,
) -> PairedDifference:
    """Difference of two means over the same episodes, with a percentile bootstrap interval over the pairs.

    Pairs are resampled whole, so what the episodes have in common (start and noise) drops out of the interval. Few episodes,
    or differences that are all alike, give an interval that is too narrow.

    Args:
        first: a number an episode, ``[E]``.
        second: the same of the other policy.

    Keyword Args:
        confidence: coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling; the global generators are not touched.
        progress: wraps the loop over blocks of resamples, of which it is told the number.

    Raises:
        ValueError: if the two do not pair up or are empty, or ``confidence`` is not in (0, 1).

    Examples:
        >>> result = paired_difference([0, 0, 1, 0], [1, 0, 1, 1])
        >>> result.mean, result.low, result.high
        (0.5, 0.0, 1.0)
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"expected two equally long lists of numbers, got shapes {first.shape} and {second.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    differences = second - first
    generator = np.random.default_rng(seed)
    blocks = math.ceil(resamples / _AT_A_TIME)
    means = []
    for _ in range(blocks) if progress is None else progress(range(blocks), blocks):
        chosen = generator.integers(differences.size, size=(_AT_A_TIME, differences.size))
        means.append(differences[chosen].mean(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means)[:resamples], [tail, 1 - tail])
    return PairedDifference(
        mean=float(differences.mean()), low=float(low), high=float(high), confidence=confidence, pairs=differences.size
    )


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value that wins and losses are equally likely; ties are left out (McNemar's exact test).

    Args:
        wins: pairs in which the second succeeded alone.
        losses: pairs in which the first succeeded alone.

    Raises:
        ValueError: on a negative count.

    Examples:
        >>> sign_test(5, 0)
        0.0625
        >>> sign_test(3, 3)
        1.0
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"counts cannot be negative, got {wins} and {losses}")
    total = wins + losses
    # Integers of any size: exact for any number of episodes.
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)
