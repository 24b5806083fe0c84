"""Estimates against scipy, closed forms and slow oracles."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.statistics import (
    band_over_seeds,
    bootstrap_interval,
    holm,
    mean_and_stderr,
    paired_difference,
    paired_permutation_test,
    wilson_interval,
)

SAMPLE = np.random.default_rng(0).normal(3, 2, 40)
OTHER = SAMPLE + np.random.default_rng(1).normal(0.3, 1, 40)


def test_mean_and_stderr_are_scipys():
    assert mean_and_stderr(SAMPLE) == pytest.approx((SAMPLE.mean(), stats.sem(SAMPLE)))
    assert math.isnan(mean_and_stderr([2.0]).stderr)


def test_clusters_of_one_change_nothing_and_copies_add_no_certainty():
    plain = mean_and_stderr(SAMPLE)
    assert mean_and_stderr(SAMPLE, np.arange(40)) == pytest.approx(plain)
    copied = mean_and_stderr(np.repeat(SAMPLE, 5), np.repeat(np.arange(40), 5))
    assert copied == pytest.approx(plain)
    assert math.isnan(mean_and_stderr(SAMPLE, np.zeros(40)).stderr)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (412, 500)])
def test_wilson_interval_is_scipys(successes: int, n: int):
    expected = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
    assert wilson_interval(successes, n, 0.9) == pytest.approx((expected.low, expected.high))


def test_wilson_interval_refuses_nonsense():
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson_interval(11, 10)


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_bootstrap_interval_covers_as_often_as_it_says(method):
    generator = np.random.default_rng(2)
    covered = [
        low <= 1 <= high
        for low, high in (
            bootstrap_interval(
                generator.exponential(1, 60), generator, level=0.8, resamples=400, method=method
            )
            for _ in range(300)
        )
    ]
    assert np.mean(covered) == pytest.approx(0.8, abs=0.07)  # 3 standard errors


def test_bootstrap_interval_is_seeded_and_survives_equal_values():
    draw = [bootstrap_interval(SAMPLE, np.random.default_rng(5)) for _ in range(2)]
    assert draw[0] == draw[1]
    assert bootstrap_interval([0.25] * 9, np.random.default_rng(0)) == (0.25, 0.25)
    assert all(math.isnan(end) for end in bootstrap_interval([1.0], np.random.default_rng(0)))


def test_paired_difference_is_the_t_test():
    difference = paired_difference(SAMPLE, OTHER, 0.9)
    expected = stats.ttest_rel(SAMPLE, OTHER).confidence_interval(0.9)
    assert difference.mean == pytest.approx((SAMPLE - OTHER).mean())
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_pairs_must_pair():
    with pytest.raises(ValueError, match="2 a and 3 b"):
        paired_difference([1, 2], [1, 2, 3])


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7))
def test_permutation_test_equals_going_through_all_signs(differences: list[int]):
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    slow = np.mean([total >= observed for total in sums])
    p = paired_permutation_test(differences, [0] * len(differences), np.random.default_rng(0))
    assert p == pytest.approx(slow)


def test_permutation_test_of_right_and_wrong_is_mcnemars():
    right = np.array([1] * 300 + [0] * 200 + [1] * 30 + [0] * 12)
    after = np.array([1] * 300 + [0] * 200 + [0] * 30 + [1] * 12)
    p = paired_permutation_test(right, after, np.random.default_rng(0))
    assert p == pytest.approx(stats.binomtest(30, 42).pvalue)


def test_sampled_permutation_test_agrees_with_scipy_and_is_never_zero():
    p = paired_permutation_test(SAMPLE, OTHER, np.random.default_rng(0), resamples=20_000)
    expected = stats.permutation_test(
        (SAMPLE, OTHER),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).pvalue
    assert p == pytest.approx(expected, abs=0.01)
    far = paired_permutation_test(SAMPLE + 9, OTHER, np.random.default_rng(0), resamples=99)
    assert far == 0.01


def test_holm_by_eye():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_between_the_p_value_and_bonferronis(p_values: list[float]):
    adjusted = holm(p_values)
    p = np.array(p_values)
    assert np.all(adjusted >= p)
    assert np.all(adjusted <= np.minimum(1, p * p.size) + 1e-12)
    assert np.all(np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0)


def test_band_over_seeds_counts_seeds_not_examples():
    generator = np.random.default_rng(3)
    frame = pd.DataFrame(
        [
            {"step": step, "seed": seed, "value": step + seed + noise}
            for step in (0, 1)
            for seed in (0, 1, 2)
            for noise in generator.normal(0, 0.1, 50)
        ]
    )
    band = band_over_seeds(frame, ["step"])
    means = frame[frame["step"] == 1].groupby("seed")["value"].mean()
    row = band[band["step"] == 1].iloc[0]
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert (row["smallest"], row["largest"], row["seeds"]) == (means.min(), means.max(), 3)


def test_band_of_one_seed_has_no_width():
    band = band_over_seeds(pd.DataFrame({"step": [0], "seed": [0], "value": [1.0]}), ["step"])
    assert band["mean"].item() == 1.0
    assert math.isnan(band["low"].item())
