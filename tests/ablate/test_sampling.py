"""Sampled effects: exactly unbiased, intervals that cover, exact at the end; by simulation."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch

import ablate.sampling
from ablate import Head
from ablate.population import Costs, Population, blank, measure_, population
from ablate.sampling import fit, limits, moments, moments_of_differences, sample_effects
from tests.ablate.simulated import POPULATIONS, heads, looked_up


def drawn_by_hand(order: tuple[int, ...], x: np.ndarray | None, certain: int = 0) -> Population:
    return Population(heads(2), np.array(order), certain, np.ones(len(order)), x, Costs())


@pytest.mark.parametrize("certain", [0, 1])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_mean_over_all_samples_is_the_population_mean(with_gradient: bool, certain: int):
    """Unbiased for the smallest of samples, with a unit whose gradient no other unit has."""
    rng = np.random.default_rng(0)
    y = rng.exponential(size=(7, 2))
    x = np.stack([rng.normal(size=7) + y[:, 0], np.eye(7)[3]], 1) if with_gradient else None
    means = []
    for sample in combinations(range(certain, 7), 4):
        rest = [u for u in range(certain, 7) if u not in sample]
        order = (*range(certain), *sample, *rest)
        drawn = drawn_by_hand(order, x, certain)
        means.append(fit(drawn, y[list(order[: certain + 4])], np.arange(2)).mean)
    np.testing.assert_allclose(np.mean(means, 0), y.mean(0), rtol=1e-12)


def test_slopes_are_those_of_the_sample_without_the_unit():
    """The closed form against the definition, refitted unit by unit."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    y += x
    drawn = drawn_by_hand(tuple(range(20)), x)
    found = fit(drawn, y[:8], np.arange(2))
    for c in range(2):
        rest = x[8:, c].mean()
        bridged = []
        for u in range(8):
            others = [v for v in range(8) if v != u]
            slope, _ = np.polyfit(x[others, c], y[others, c], 1)
            bridged.append(y[u, c] + (1 - 8 / 20) * slope * (rest - x[u, c]))
        assert found.mean[c] == pytest.approx(np.mean(bridged))


def test_moments_of_differences_are_those_of_the_differences():
    rng = np.random.default_rng(2)
    r = rng.exponential(size=(30, 4))
    r -= r.mean(0)
    pairs = moments_of_differences(r)
    for i, j in permutations(range(4), 2):
        alone = moments((r[:, i] - r[:, j])[:, None])
        for name in ("variance", "skewness", "kurtosis"):
            assert getattr(pairs, name)[i, j] == pytest.approx(getattr(alone, name)[0])


def misses(name: str, sample: int, level: float = 0.95, repeats: int = 8) -> tuple[int, int]:
    """(intervals that miss the mean, intervals) over populations × draws."""
    rng = np.random.default_rng(3)
    missed = total = 0
    for seed in range(repeats):
        y, x = POPULATIONS[name](rng, 300, 100)
        drawn = population(
            heads(100), 300, torch.Generator().manual_seed(seed), gradient=x, certain=0
        )
        found = sample_effects(drawn, looked_up(y), sample, level=level)
        # No interval is no miss: it claims nothing.
        missed += int(((found.low > y.mean(0)) | (found.high < y.mean(0))).sum())
        total += 100
    return missed, total


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("name", list(POPULATIONS))
def test_intervals_cover(name: str, level: float):
    """At least nominal, within three binomial standard deviations, at 100 of 300 units."""
    missed, total = misses(name, 100, level)
    expected = (1 - level) * total
    assert missed <= expected + 3 * np.sqrt(expected)
    assert name != "normal" or missed >= expected - 3 * np.sqrt(expected)  # and are not idle


def test_a_wrong_variance_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """The test above would fail if the intervals were a fifth too narrow."""
    right = limits

    def narrow(mean, of, sample, alpha):
        stderr, low, high = right(mean, of, sample, alpha)
        return stderr, mean + 0.8 * (low - mean), mean + 0.8 * (high - mean)

    monkeypatch.setattr(ablate.sampling, "limits", narrow)
    missed, total = misses("normal", 100)
    assert missed > 0.05 * total + 3 * np.sqrt(0.05 * total)


def test_the_gradient_narrows_what_it_foretells():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 3))
    y = 2 * x + 0.2 * rng.normal(size=(400, 3))
    widths = []
    for gradient in (None, -x):  # of either sign
        drawn = population(heads(3), 400, torch.Generator().manual_seed(0), gradient=gradient)
        found = sample_effects(drawn, looked_up(y), 50)
        widths.append((found.high - found.low).mean())
    assert widths[1] < 0.15 * widths[0]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_everything_measured_is_the_exact_mean_without_width(with_gradient: bool):
    y, x = POPULATIONS["skewed"](np.random.default_rng(5), 60, 4)
    exact = []
    for seed in range(2):
        drawn = population(
            heads(4),
            60,
            torch.Generator().manual_seed(seed),
            gradient=x if with_gradient else None,
            sizes=[1, 2, 3] * 20,
        )
        exact.append(sample_effects(drawn, looked_up(y), 60))
    found = exact[0]
    np.testing.assert_allclose(found.value, np.average(y, 0, weights=[1, 2, 3] * 20), rtol=1e-12)
    assert (found.low == found.value).all()
    assert (found.high == found.value).all()
    assert (found.stderr == 0).all()
    assert (exact[0].value == exact[1].value).all()  # to the last bit, whatever the order


def test_extreme_units_are_measured_for_certain():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(400, 2))
    x[[7, 300], [0, 1]] = 9, -12
    drawn = population(heads(2), 400, torch.Generator().manual_seed(0), gradient=x)
    assert drawn.certain == 2
    assert drawn.order[:2].tolist() == [300, 7]
    assert sorted(drawn.order) == list(range(400))
    # What sits there is in every estimate: no draw misses it.
    y = np.zeros((400, 2))
    y[[7, 300], [0, 1]] = 400.0
    found = sample_effects(drawn, looked_up(y + 0.01 * rng.normal(size=y.shape)), 40)
    np.testing.assert_allclose(found.value, 1.0, atol=0.01)


def test_a_sample_that_does_not_vary_gets_no_interval():
    y = np.random.default_rng(7).normal(size=(50, 2))
    y[:, 0] = 0.5
    drawn = population(heads(2), 50, torch.Generator().manual_seed(0))
    found = sample_effects(drawn, looked_up(y), 20)
    assert found.value[0] == 0.5
    assert np.isnan([found.stderr[0], found.low[0], found.high[0]]).all()
    assert np.isfinite([found.stderr[1], found.low[1], found.high[1]]).all()


def test_work_is_what_was_called_for():
    y = np.random.default_rng(8).normal(size=(40, 3))
    calls: list[int] = []
    costs = Costs((3.0, 2.0, 1.0), whole=4.0, gradient=8.0)
    drawn = population(heads(3), 40, torch.Generator().manual_seed(0), gradient=y, costs=costs)
    found = sample_effects(drawn, looked_up(y, calls), 10)
    assert found.work.effects == sum(calls) == 30
    assert found.work.effects_in_all == 120
    assert found.work.spent == pytest.approx(10 * (6 + 4) + 40 * 8)
    assert found.work.full == pytest.approx(40 * (6 + 4))
    assert found.work.saved == pytest.approx(1 - 420 / 400)
    again = sample_effects(drawn, looked_up(y, calls), 12, known=found.effects)
    assert sum(calls) == 36  # only what was not known
    assert np.isnan(found.effects).sum() == 90  # and what was given is not written to
    assert again.work.effects == 36


def test_frame_is_tidy():
    y = np.random.default_rng(9).normal(size=(40, 3))
    drawn = population(heads(3), 40, torch.Generator().manual_seed(0))
    frame = sample_effects(drawn, looked_up(y), 10).frame()
    assert list(frame.columns) == [
        *("component", "kind", "stack", "layer", "metric", "value", "stderr", "low", "high"),
        "units",
    ]
    assert frame.component.tolist() == ["L0H0", "L0H1", "L0H2"]
    assert (frame.units == 10).all()


def test_what_does_not_fit_is_refused(unchecked: None):
    generator = torch.Generator()
    with pytest.raises(ValueError, match="0 components on 5 units"):
        population([], 5, generator)
    with pytest.raises(ValueError, match=r"shape \[5, 3\] for 5 units and 2"):
        population(heads(2), 5, generator, gradient=np.zeros((5, 3)))
    with pytest.raises(ValueError, match="finite first-order"):
        population(heads(2), 5, generator, gradient=np.full((5, 2), np.nan))
    with pytest.raises(ValueError, match="4 sizes for 5 units"):
        population(heads(2), 5, generator, sizes=[1] * 4)
    with pytest.raises(ValueError, match="1 costs for 2"):
        population(heads(2), 5, generator, costs=Costs((1.0,)))
    drawn = population(heads(2), 50, generator)
    with pytest.raises(ValueError, match="3 units asked for: there are 50, and 4"):
        sample_effects(drawn, looked_up(np.zeros((50, 2))), 3)
    with pytest.raises(ValueError, match=r"shape \[1, 2\] for 4 units"):
        measure_(blank(drawn), drawn, lambda units, chosen: np.zeros((1, 2)), 4, np.arange(2))
    bad = np.zeros((50, 2))
    bad[drawn.order[1], 1] = np.inf
    with pytest.raises(ValueError, match=f"effect of {Head(0, 1)} on unit {drawn.order[1]} is inf"):
        sample_effects(drawn, looked_up(bad), 5)
