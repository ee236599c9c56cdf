import itertools

import numpy as np
import pytest

from deflow_torchrl.reports import (
    inside_noise,
    interquartile_mean,
    mean_and_std,
    paired_difference,
    probability_of_improvement,
    sign_test,
    stratified_bootstrap,
    success_standard_error,
)
from deflow_torchrl.reports.statistics import (
    careful_standard_error,
    kendall_tau,
    seeds_inside_noise,
)


def outcomes(seed=0, episodes=60, gain=0.3):
    generator = np.random.default_rng(seed)
    common = generator.normal(size=episodes)
    return common + 0.5 * generator.normal(size=episodes), common + gain + 0.5 * generator.normal(size=episodes)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_is_that_of_scipys_paired_percentile_bootstrap(confidence):
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    first, second = outcomes()

    def difference(a, b, axis=-1):
        return b.mean(axis=axis) - a.mean(axis=axis)

    theirs = stats.bootstrap(
        (first, second), difference, paired=True, method="percentile", confidence_level=confidence, n_resamples=20_000,
        rng=np.random.default_rng(1), vectorized=True,
    ).confidence_interval  # fmt: skip
    ours = paired_difference(first, second, confidence=confidence, resamples=20_000)
    # Two Monte Carlo estimates of the same quantiles; the interval is 0.3 wide.
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours.mean == pytest.approx((second - first).mean())


def test_the_p_value_is_scipys_for_every_small_count():
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    for wins, losses in itertools.product(range(25), range(25)):
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-12), (wins, losses)
    assert sign_test(1200, 1300) == pytest.approx(stats.binomtest(1200, 2500).pvalue, rel=1e-9)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        interval = paired_difference(*outcomes(seed), resamples=500, seed=seed)
        hits += interval.low <= 0.3 <= interval.high
    # 200 trials at 0.95 have a standard deviation of 0.015.
    assert 0.90 <= hits / 200 <= 0.99


def test_what_the_episodes_have_in_common_drops_out():
    first, second = outcomes()
    paired = paired_difference(first, second)
    apart = paired_difference(first, np.random.default_rng(5).permutation(second))
    assert apart.mean == pytest.approx(paired.mean)
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)


def test_the_seed_fixes_the_interval_and_the_global_generator_is_left_alone():
    state = np.random.get_state()[1].copy()
    results = [paired_difference(*outcomes(), resamples=250, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[2.0]])])
def test_lists_that_do_not_pair_up_are_refused(first, second):
    with pytest.raises(ValueError, match="equally long"):
        paired_difference(first, second)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="confidence"):
        paired_difference([1.0], [2.0], confidence=1.0)
    with pytest.raises(ValueError, match="negative"):
        sign_test(-1, 2)


def scores_of_tasks(seed=0, seeds=(8, 5, 3), shift=0.0):
    generator = np.random.default_rng(seed)
    return [task + shift + 0.1 * generator.normal(size=number) for task, number in enumerate(seeds)]


def test_mean_and_deviation_are_over_seeds_by_s_minus_one():
    scores = np.random.default_rng(0).normal(size=8)
    assert mean_and_std(scores) == pytest.approx((scores.mean(), scores.std(ddof=1)), abs=1e-12)
    assert mean_and_std([0.25]) == (0.25, None), "one seed has no spread, not a spread of zero"


@pytest.mark.parametrize("number", range(1, 20))
def test_the_interquartile_mean_is_scipys_trimmed_mean(number):
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    scores = np.random.default_rng(number).normal(size=number)
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25), abs=1e-12)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize("statistic", ["mean", "interquartile mean"])
def test_the_bootstrap_of_one_task_is_scipys(confidence, statistic):
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    scores = np.random.default_rng(3).normal(size=24)
    ours = stratified_bootstrap(
        [scores], None if statistic != "mean" else lambda rows: rows.mean(1), confidence=confidence, resamples=20_000
    )
    theirs = stats.bootstrap(
        (scores,), np.mean if statistic == "mean" else lambda rows, axis=-1: stats.trim_mean(rows, 0.25, axis=axis),
        method="percentile", confidence_level=confidence, n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # Two Monte Carlo estimates of the same quantiles; the interval is 0.7 wide.
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_seeds_are_resampled_within_their_task():
    # Tasks far apart and seeds alike: drawn across tasks, the mean would vary by their distance.
    tasks = [[0.0, 0.0, 0.0], [10.0, 10.0]]
    interval = stratified_bootstrap(tasks, lambda rows: rows.mean(1))
    assert (interval.value, interval.low, interval.high) == (4.0, 4.0, 4.0)
    spread = stratified_bootstrap(scores_of_tasks(), lambda rows: rows.mean(1))
    # By hand: the variance of the mean is the sum of the tasks' own, n_t s_t^2 / n^2.
    variance = sum(len(task) * task.var() for task in scores_of_tasks()) / 16**2
    assert spread.high - spread.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.05)


def test_single_seeds_have_no_interval():
    single = stratified_bootstrap([[0.1], [0.2]])
    assert (single.value, single.low, single.high) == (0.15, None, None)
    assert probability_of_improvement([[0.1]], [[0.2]]).low is None


def test_the_probability_of_improvement_is_scipys_mann_whitney_u():
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    generator = np.random.default_rng(0)
    shares = []
    first = [generator.integers(0, 6, size=number) / 5 for number in (8, 3)]  # with ties
    second = [generator.integers(0, 6, size=number) / 5 for number in (5, 8)]
    for mine, theirs in zip(first, second, strict=True):
        share = stats.mannwhitneyu(mine, theirs).statistic / (mine.size * theirs.size)
        assert probability_of_improvement([mine], [theirs]).value == pytest.approx(share, rel=1e-12)
        shares.append(share)
    both = probability_of_improvement(first, second)
    assert both.value == pytest.approx(np.mean(shares), rel=1e-12)
    assert both.low < both.value < both.high
    assert probability_of_improvement(second, first).value == pytest.approx(1 - both.value, rel=1e-12)


def test_the_standard_error_of_a_rate_is_the_binomials():
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    for rate, episodes in itertools.product((0.0, 0.1, 0.5, 1.0), (1, 50, 150)):
        expected = stats.binom(episodes, rate).std() / episodes
        assert success_standard_error(rate, episodes) == pytest.approx(expected, rel=1e-12)


def test_equal_rates_differ_by_more_than_noise_in_one_of_twenty_comparisons():
    generator = np.random.default_rng(0)
    outside = 0
    for first, second in generator.binomial(100, 0.5, size=(2000, 2)) / 100:
        errors = [success_standard_error(rate, 100) for rate in (first, second)]
        outside += not inside_noise(first - second, *errors)
    # 2000 trials at 0.05 have a standard deviation of 0.005.
    assert 0.03 < outside / 2000 < 0.07


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_and_std([]),
        lambda: interquartile_mean([float("nan")]),
        lambda: stratified_bootstrap([]),
        lambda: stratified_bootstrap([[1.0], []]),
        lambda: stratified_bootstrap([[1.0, 2.0]], confidence=1.0),
        lambda: probability_of_improvement([[1.0]], []),
        lambda: success_standard_error(1.2, 5),
        lambda: success_standard_error(0.2, 0),
        lambda: inside_noise(0.1),
        lambda: inside_noise(0.1, -0.1),
    ],
)
def test_what_is_no_score_rate_or_error_is_refused(call):
    with pytest.raises(ValueError, match=r"expected|confidence"):
        call()


def test_the_agreement_of_rankings_is_scipys_kendall_tau():
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    generator = np.random.default_rng(0)
    for size in range(2, 12):
        for ties in (2, 5, 100):
            first, second = generator.integers(ties, size=(2, size))
            theirs = stats.kendalltau(first, second).statistic
            ours = kendall_tau(first, second)
            assert (ours is None) if np.isnan(theirs) else ours == pytest.approx(theirs)
    with pytest.raises(ValueError, match="equally long"):
        kendall_tau([1, 2], [1, 2, 3])


def test_seeds_are_inside_the_noise_where_scipys_welch_test_is_above_five_percent():
    stats = pytest.importorskip("scipy.stats", reason="cross-check against scipy")
    generator, seen = np.random.default_rng(0), set()
    for _ in range(200):
        first, second = generator.normal(size=8), generator.normal(generator.uniform(0, 3), size=6)
        value = stats.ttest_ind(first, second, equal_var=False).pvalue
        if abs(value - 0.05) > 0.003:  # the quantile has three digits
            seen.add(value > 0.05)
            assert seeds_inside_noise(first, second) == (value > 0.05)
    assert seen == {True, False}
    assert seeds_inside_noise([0.5, 0.5], [0.5, 0.5])
    assert not seeds_inside_noise([0.5, 0.5], [0.6, 0.6])
    with pytest.raises(ValueError, match="two seeds"):
        seeds_inside_noise([0.5], [0.1, 0.2])


def test_the_careful_error_is_above_zero_where_nothing_or_everything_succeeds():
    assert (
        careful_standard_error(0.0, 50)
        == pytest.approx(careful_standard_error(1.0, 50))
        == pytest.approx(0.019, abs=0.001)
    )
    assert careful_standard_error(0.5, 10_000) == pytest.approx(success_standard_error(0.5, 10_000), rel=1e-3)
    with pytest.raises(ValueError, match="rate"):
        careful_standard_error(1.5, 10)


def test_seeds_of_one_score_are_compared_with_seeds_of_several_without_a_warning():
    assert seeds_inside_noise([0.1, 0.1], [0.0, 0.3])
    assert not seeds_inside_noise([0.9, 0.9, 0.9], [0.1, 0.2, 0.1])
    assert seeds_inside_noise([0.1 + 0.2, 0.3], [0.3, 0.3, 0.3])
