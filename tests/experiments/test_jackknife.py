"""Against the formula of a mean, leaving out by hand, and how often intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from experiments import jackknife
from experiments.jackknife import jackknife_interval, left_out
from experiments.rank_measures import rank_features, spearman


def test_of_a_mean_it_is_students_interval():
    values = np.random.default_rng(0).normal(3, 2, (17, 2))
    without = left_out(["task"], [list(range(17))])
    replicates = without.means(0, values, 0, 17)
    low, high = jackknife_interval(values.mean(0), replicates, without.strata)
    for column in range(2):
        expected = stats.t.interval(
            0.95, 16, values[:, column].mean(), stats.sem(values[:, column])
        )
        assert (low[column], high[column]) == pytest.approx(expected)


def test_texts_are_left_out_of_all_lists_of_their_task():
    groups = [["a", "a", "b"], ["b", "c"], ["a", "d"]]
    values = [np.array([[1.0], [2], [6]]), np.array([[4.0], [8]]), np.array([[5.0], [7]])]
    without = left_out(["x", "x", "y"], groups)
    assert without.strata.tolist() == [0, 0, 0, 1, 1]  # a, b, c of x; a, d of y
    found = [without.means(i, v, 0, 5)[:, 0] for i, v in enumerate(values)]
    assert found[0] == pytest.approx([6, 1.5, 3, 3, 3])
    assert found[1] == pytest.approx([6, 8, 4, 6, 6])
    assert found[2] == pytest.approx([6, 6, 6, 7, 5])
    for i, value in enumerate(values):  # some replicates are those of all
        assert without.means(i, value, 1, 4)[:, 0] == pytest.approx(found[i][1:4])


def test_many_texts_go_in_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jackknife, "MOST", 10)
    values = np.random.default_rng(0).normal(0, 1, (200, 1))
    without = left_out([0], [list(range(200))])
    assert len(without.strata) == 10
    low, high = jackknife_interval(values.mean(0), without.means(0, values, 0, 10), without.strata)
    halves = float((high - low)[0]) / 2 / stats.t.ppf(0.975, 9)
    assert halves == pytest.approx(stats.sem(values[:, 0]), rel=0.5)


def test_nothing_is_said_of_one_text():
    without = left_out(["x", "y"], [["a", "a"], ["b", "c"]])
    replicates = np.zeros((3, 1))
    low, high = jackknife_interval(np.zeros(1), replicates, without.strata)
    assert np.isnan(low).all()
    assert np.isnan(high).all()


@pytest.mark.parametrize("components", [4, 24])
def test_intervals_of_a_rank_correlation_hold_the_truth(components: int):
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        truth = np.exp(0.7 * generator.standard_normal((2, components)))
        noise = np.exp(0.5 * generator.standard_normal((2, 24, components)))
        values = truth[:, None] * noise
        without = left_out(["x", "y"], [list(range(24))] * 2)
        one, other = (without.means(i, values[i], 0, 48) for i in (0, 1))
        replicates = (rank_features(one) * rank_features(other)).sum(1)
        value = spearman(values[0].mean(0), values[1].mean(0))
        low, high = jackknife_interval(
            np.array(value), replicates, without.strata, limits=(-1.0, 1.0)
        )
        assert low <= value <= high
        held += low <= spearman(*truth) <= high
    assert held >= 82
