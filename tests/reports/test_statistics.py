import itertools

import numpy as np
import pytest

from deflow_torchrl.reports import paired_difference, sign_test


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
