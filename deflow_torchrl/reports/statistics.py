# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Means, intervals and tests: of runs over seeds and tasks, and of the same episodes under two policies.

A run's score is a mean over n episodes, so it has the noise of the episodes beside that of training: a success rate p has a
standard error of sqrt(p (1 - p) / n), 7 points at p = 0.5 and n = 50. The spread of several seeds' scores contains both, and so
does an interval that resamples seeds; the score of one seed shows neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deflow_torchrl.errors import MissingExtraError


@dataclass(frozen=True)
class Interval:
    """A statistic with its interval.

    Attributes:
        value: of the scores as they are.
        low: lower end of the interval; None where no stratum has two scores to resample.
        high: upper end; likewise.
        confidence: nominal coverage of the interval, 0.95 for example.
    """

    value: float
    low: float | None
    high: float | None
    confidence: float


def mean_and_std(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and their standard deviation by S - 1; None for the deviation of a single seed.

    The paper prints mean and standard deviation over seeds and does not say whether it divides by S or by S - 1. Divided by S,
    the deviation of its eight seeds is 0.94 times this one.

    Args:
        scores: a number a seed, ``[S]``.

    Raises:
        ValueError: without scores.

    Examples:
        >>> mean_and_std([0.2, 0.4, 0.6])
        (0.4, 0.2)
        >>> mean_and_std([0.5])
        (0.5, None)
    """
    values = _scores(scores)
    # Rounded to the digits of a float: summation leaves 0.4000000000000001.
    std = None if values.size == 1 else float(np.round(values.std(ddof=1), 15))
    return float(np.round(values.mean(), 15)), std


def interquartile_mean(scores: Sequence[float]) -> float:
    """Mean of the middle half of the scores: a quarter of them, rounded down, is cut off at either end.

    (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".)

    Args:
        scores: runs over all tasks and seeds, ``[S]``.

    Raises:
        ValueError: without scores.

    Examples:
        >>> interquartile_mean([0.0, 0.5, 0.7, 9.0])
        0.6
    """
    return float(np.round(_middle_mean(_scores(scores)[None])[0], 15))


def stratified_bootstrap(
    strata: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of runs; seeds are resampled within each task, never across tasks.

    Args:
        strata: for each task the scores of its seeds.
        statistic: scores ``[R, S]``, all tasks' one after the other, to a number a row ``[R]``; interquartile mean by default.

    Keyword Args:
        confidence: coverage of the interval. Of few seeds it is too narrow: three have ten different resamples.
        resamples: R.
        seed: seed of the resampling; the global generators are not touched.

    Raises:
        ValueError: if there is no task, or one without scores, or ``confidence`` is not in (0, 1).

    Examples:
        >>> stratified_bootstrap([[0.5, 0.5], [0.9, 0.9]], lambda scores: scores.mean(1))
        Interval(value=0.7, low=0.7, high=0.7, confidence=0.95)
    """
    if not strata:
        raise ValueError("expected at least one task's scores")
    of_all = _middle_mean if statistic is None else statistic
    tasks = [_scores(scores) for scores in strata]
    return _bootstrap(
        tasks,
        lambda drawn: of_all(np.concatenate(drawn, axis=1)),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def probability_of_improvement(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Probability that a run of ``first`` beats one of ``second`` on the same task, ties counting half; the mean over the tasks.

    On one task this is the Mann-Whitney U of ``first`` divided by the number of pairs.

    Args:
        first: for each task the scores of its seeds.
        second: the same tasks' of the other method; as many seeds are not needed.

    Keyword Args:
        confidence: coverage of the interval, a bootstrap over the seeds of each task.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: if the two do not have the same number of tasks, at least one; or a task has no scores.

    Examples:
        >>> probability_of_improvement([[0.9, 0.8]], [[0.1, 0.8]]).value
        0.875
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"expected the same tasks twice, got {len(first)} and {len(second)}")
    pairs = [_scores(scores) for both in zip(first, second, strict=True) for scores in both]

    def share_won(drawn: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean([_wins(mine, theirs) for mine, theirs in zip(drawn[::2], drawn[1::2], strict=True)], axis=0)

    return _bootstrap(pairs, share_won, confidence=confidence, resamples=resamples, seed=seed)


def success_standard_error(rate: float, episodes: int) -> float:
    """Standard error of a success rate over independent episodes, ``sqrt(p (1 - p) / n)``.

    It is 0 where all or none succeed, where it is of no use.

    Args:
        rate: share of successes p, in [0, 1].
        episodes: number of episodes n.

    Raises:
        ValueError: on a rate outside [0, 1] or no episodes.

    Examples:
        >>> success_standard_error(0.5, 100)
        0.05
    """
    if not 0 <= rate <= 1 or episodes < 1:
        raise ValueError(f"expected a rate in [0, 1] and at least one episode, got {rate} and {episodes}")
    return math.sqrt(rate * (1 - rate) / episodes)


def mean_interval(values: Sequence[float], *, rate: bool) -> Interval:
    """Mean of independent episodes with its 95% interval: Wilson's score interval of a rate, Student's t of other numbers.

    Args:
        values: each episode's outcome, ``[E]``; 0 or 1 of a rate.

    Keyword Args:
        rate: whether the mean is a rate.

    Raises:
        ValueError: without values.

    Examples:
        >>> round(mean_interval([1, 1, 1, 1], rate=True).low, 2)
        0.51
        >>> mean_interval([2.0], rate=False)
        Interval(value=2.0, low=None, high=None, confidence=0.95)
    """
    scores, confidence = _scores(values), 0.95
    mean, low, high = float(scores.mean()), None, None
    if rate:
        found = _scipy_stats().binomtest(round(scores.sum()), scores.size).proportion_ci(confidence, method="wilson")
        low, high = float(found.low), float(found.high)
    elif scores.size > 1:
        error = scores.std(ddof=1) / math.sqrt(scores.size)
        half = float(_scipy_stats().t.ppf((1 + confidence) / 2, scores.size - 1) * error)
        low, high = mean - half, mean + half
    return Interval(mean, low, high, confidence)


def inside_noise(gap: float, *errors: float, quantile: float = 1.96) -> bool:
    """Whether a gap of two means is within the noise: no larger than noise alone makes it in 95% of comparisons.

    Args:
        gap: difference of the means.
        *errors: standard error of each.

    Keyword Args:
        quantile: of the normal distribution, two-sided; 1.96 for 95%.

    Raises:
        ValueError: without errors, or on a negative one.

    Examples:
        >>> inside_noise(0.1, 0.05, 0.05), inside_noise(0.2, 0.05, 0.05)
        (True, False)
    """
    if not errors or min(errors) < 0:
        raise ValueError(f"expected standard errors, got {errors}")
    return abs(gap) <= quantile * math.sqrt(sum(error**2 for error in errors))


def careful_standard_error(rate: float, episodes: int) -> float:
    """Standard error of a success rate for comparisons: of the rate with one success and one failure added.

    At a rate of 0 or 1 the plain error is 0, so that a gap of one episode would count as a difference. The correction is that of
    Agresti and Caffo (2000, The American Statistician 54) for the comparison of two rates.

    Args:
        rate: share of successes p, in [0, 1].
        episodes: number of episodes n.

    Raises:
        ValueError: on a rate outside [0, 1] or no episodes.

    Examples:
        >>> careful_standard_error(0.0, 2) == success_standard_error(0.25, 4)
        True
    """
    success_standard_error(rate, episodes)
    return success_standard_error((rate * episodes + 1) / (episodes + 2), episodes + 2)


def seeds_inside_noise(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the spread of the seeds explains the gap of two means over seeds: Welch's test, two-sided, 95%.

    Args:
        first: a score a seed, at least two.
        second: the same of the other method.

    Raises:
        ValueError: if one has fewer than two.

    Examples:
        >>> seeds_inside_noise([0.7, 0.9, 0.8], [0.6, 0.8, 0.7]), seeds_inside_noise([0.7, 0.9, 0.8], [0.1, 0.2, 0.1])
        (True, False)
    """
    one, other = _scores(first), _scores(second)
    if min(one.size, other.size) < 2:
        raise ValueError("expected at least two seeds each")
    if one.var() == other.var() == 0:  # without any spread the test is undefined
        return bool(one.mean() == other.mean())
    # From their moments: scipy warns of samples without spread, which one of the two may be.
    moments = [number for sample in (one, other) for number in (sample.mean(), sample.std(ddof=1), sample.size)]
    return bool(_scipy_stats().ttest_ind_from_stats(*moments, equal_var=False).pvalue >= 0.05)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Agreement of two rankings of the same items: Kendall's tau-b, 1 for the same order, -1 for the reverse.

    Args:
        first: a number for each item, ``[M]``.
        second: another number for each item, ``[M]``.

    Returns:
        None where one of them ranks all items equal, or there are fewer than two.

    Raises:
        ValueError: if the two are not equally long.

    Examples:
        >>> round(kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]), 3)
        0.667
    """
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"expected two equally long lists of numbers, got shapes {one.shape} and {other.shape}")
    if one.size < 2:
        return None
    tau = float(_scipy_stats().kendalltau(one, other).statistic)
    return None if math.isnan(tau) else tau


def _scores(scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite scores, at least one, got {scores!r}")
    return values


def _middle_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of each row ``[R, S]``."""
    cut = scores.shape[1] // 4
    return np.sort(scores, axis=1)[:, cut : scores.shape[1] - cut].mean(1)


def _wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of pairs of a row's scores ``[R, S]`` and ``[R, T]`` in which the first is larger, ties half, ``[R]``."""
    difference = first[:, :, None] - second[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((1, 2))


def _bootstrap(
    samples: Sequence[np.ndarray],
    statistic: Callable[[Sequence[np.ndarray]], np.ndarray],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Percentile bootstrap of a statistic of samples, each drawn with replacement by itself as ``[R, S]``."""
    _check_confidence(confidence)
    value = float(np.round(statistic([sample[None] for sample in samples])[0], 15))
    if all(sample.size == 1 for sample in samples):
        return Interval(value, None, None, confidence)
    generator = np.random.default_rng(seed)
    drawn = [sample[generator.integers(sample.size, size=(resamples, sample.size))] for sample in samples]
    tail = (1 - confidence) / 2
    low, high = np.round(np.quantile(statistic(drawn), [tail, 1 - tail]), 15).tolist()
    return Interval(value, low, high, confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "scipy", "reports") from error
    return stats


@dataclass(frozen=True)
class PairedDifference:
    """Mean of second - first over pairs, with its interval.

    Attributes:
        mean: the difference of the means.
        low: lower end of the interval.
        high: upper end.
        confidence: nominal coverage of the interval, 0.95 for example.
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
) -> PairedDifference:
    """Difference of two means over the same episodes, with a percentile bootstrap interval over the pairs.

    Pairs are resampled whole, so the interval does not contain what both episodes of a pair share (start and noise). Few
    episodes, or differences that are all alike, give an interval that is too narrow.

    Args:
        first: a number for each episode, ``[E]``.
        second: the same of the other policy.

    Keyword Args:
        confidence: coverage of the interval.
        resamples: bootstrap resamples.
        seed: seed of the resampling; the global generators are not touched.

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
    _check_confidence(confidence)
    differences = second - first
    low = high = mean = float(differences.mean())
    if differences.size > 1:
        found = _scipy_stats().bootstrap(
            (differences,), np.mean, method="percentile", confidence_level=confidence, n_resamples=resamples,
            batch=100, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        low, high = np.round([found.low, found.high], 15).tolist()
    return PairedDifference(mean, low, high, confidence, differences.size)


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
    return float(_scipy_stats().binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
