"""Races: wrong verdicts are as rare as stated, ties stay ties, work is what was called for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

import ablate.racing
from ablate.population import Costs, population
from ablate.racing import Decision, Race, limits, looks, race
from tests.ablate.simulated import POPULATIONS, heads, looked_up

UNITS, COUNT, K = 300, 10, 4
ERROR = 0.05

GAPS: dict[str, Callable[[], np.ndarray]] = {
    "near ties": lambda: np.where(np.arange(COUNT) < K, -0.02, 0.02),
    "a close pair": lambda: np.r_[np.full(K - 1, -1.0), -0.02, 0.02, np.full(COUNT - K - 1, 1.0)],
    "two groups": lambda: np.where(np.arange(COUNT) < K, -0.3, 0.3),
    "a ladder": lambda: np.linspace(-1, 1, COUNT),
}
"""name -> true mean effects; 0 lies between, too"""


def simulated(name: str, gaps: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Effects with exactly these means, in a random order of components, and their gradient."""
    rng = np.random.default_rng(seed)
    y, x = POPULATIONS[name](rng, UNITS, COUNT)
    return (y - y.mean(0)) / y.std() + rng.permutation(gaps), x


def is_wrong(result: Race, y: np.ndarray) -> bool:
    """Does a verdict contradict the exact means?"""
    means = y.mean(0)
    verdicts = np.array(result.verdicts)
    if result.decision == "sign":
        return bool(((verdicts == "above") & (means < 0)).any()) or bool(
            ((verdicts == "below") & (means > 0)).any()
        )
    order = np.argsort(means if result.decision == "bottom" else -means)
    return bool((verdicts[order[:K]] == "out").any() or (verdicts[order[K:]] == "in").any())


def errors(name: str, decision: Decision, repeats: int) -> tuple[int, float]:
    """(wrong races, mean share of the effects measured) over populations of every shape."""
    wrong, share = 0, 0.0
    for seed in range(repeats):
        gaps = list(GAPS.values())[seed % len(GAPS)]()
        y, x = simulated(name, gaps, seed)
        drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(seed), gradient=x)
        k = 0 if decision == "sign" else K
        result = race(drawn, looked_up(y), decision, k, error=ERROR)
        assert result.finished
        wrong += is_wrong(result, y)
        share += result.estimates.work.effects / y.size / repeats
    return wrong, share


def most(repeats: int) -> float:
    """As many errors as may happen: three binomial standard deviations over nominal."""
    return ERROR * repeats + 3 * np.sqrt(ERROR * repeats)


@pytest.mark.parametrize("decision", ["bottom", "top", "sign"])
@pytest.mark.parametrize("name", list(POPULATIONS))
def test_wrong_verdicts_are_rare(name: str, decision: Decision):
    repeats = 40
    wrong, share = errors(name, decision, repeats)
    assert wrong <= ERROR * repeats  # the union bound leaves room: not even chance is needed
    assert share < 0.95


def test_wrong_intervals_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """The test above would fail if the intervals were far too narrow."""
    right = limits

    def narrow(mean, of, sample, alpha):
        stderr, low, high = right(mean, of, sample, alpha)
        return stderr, mean + 0.25 * (low - mean), mean + 0.25 * (high - mean)

    monkeypatch.setattr(ablate.racing, "limits", narrow)
    wrong, _ = errors("normal", "bottom", 60)
    assert wrong > most(60)


def test_intervals_hold_at_all_looks_together():
    missed = 0
    for seed in range(60):
        y, x = simulated("normal", GAPS["a ladder"](), seed)
        drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(seed), gradient=x)
        low, high = np.full(COUNT, -np.inf), np.full(COUNT, np.inf)
        for at in looks(drawn, looked_up(y), "bottom", K, error=ERROR):
            low = np.fmax(low, at.estimates.low)
            high = np.fmin(high, at.estimates.high)
        missed += ((low > y.mean(0) + 1e-12) | (high < y.mean(0) - 1e-12)).any()
    assert missed <= ERROR * 60


def test_a_race_without_end_is_exact():
    """Components a hair apart are ordered by their exact means, each with all its units."""
    y, _ = simulated("normal", np.arange(COUNT) * 1e-5, 0)
    drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(0))
    result = race(drawn, looked_up(y), "top", K)
    best = sorted(np.argsort(y.mean(0))[-K:])
    assert [head.head for head in result.those("in")] == best
    np.testing.assert_allclose(result.estimates.value, y.mean(0), rtol=1e-12)
    assert (result.estimates.low == result.estimates.high).all()
    assert result.estimates.work.effects == y.size
    assert result.estimates.work.saved == 0


def test_ties_are_not_broken():
    y, _ = simulated("normal", GAPS["a ladder"](), 1)
    order = np.argsort(y.mean(0))
    here, there = order[K - 1], order[K]
    y[:, there] = np.random.default_rng(0).permutation(y[:, here])
    drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(0))
    result = race(drawn, looked_up(y), "bottom", K)
    assert {head.head for head in result.those("tied")} == {here, there}
    assert len(result.those("in")) == K - 1
    assert result.finished

    y[:, here] = 0  # a dead component has no sign
    result = race(drawn, looked_up(y), "sign")
    assert [head.head for head in result.those("tied")] == [here]


def test_what_differs_by_less_than_matters_is_a_tie_early():
    gaps = np.r_[np.full(K, -1.0), 0.0, 0.001, np.full(COUNT - K - 2, 1.0)]
    rng = np.random.default_rng(2)
    y = 0.1 * rng.normal(size=(UNITS, COUNT))
    y += gaps - y.mean(0)
    drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(0))
    to_the_end = race(drawn, looked_up(y), "bottom", K + 1)
    assert len(to_the_end.those("in")) == K + 1
    assert to_the_end.estimates.units.max() == UNITS
    early = race(drawn, looked_up(y), "bottom", K + 1, tie=0.1)
    assert early.those("tied") == (heads(COUNT)[K], heads(COUNT)[K + 1])
    assert early.estimates.units.max() < UNITS / 2
    signs = race(drawn, looked_up(y), "sign", tie=0.1)
    assert signs.those("tied") == early.those("tied")
    assert signs.estimates.units.max() < UNITS / 2


@pytest.mark.parametrize("name", ["normal", "sparse"])
def test_work_is_what_was_called_for(name: str):
    y, x = simulated(name, GAPS["a ladder"](), 3)
    calls: list[int] = []
    each = tuple(float(i % 3 + 1) for i in range(COUNT))
    drawn = population(
        heads(COUNT),
        UNITS,
        torch.Generator().manual_seed(0),
        gradient=x,
        costs=Costs(each, whole=2.0, gradient=3.0),
    )
    result = race(drawn, looked_up(y, calls), "bottom", K)
    found = result.estimates
    assert found.work.effects == sum(calls) == found.units.sum()
    spent = found.units @ np.array(each) + 2 * found.units.max() + 3 * UNITS
    assert found.work.spent == pytest.approx(spent)
    assert found.work.full == pytest.approx(UNITS * (sum(each) + 2))
    assert sum(look.decided for look in result.looks) == COUNT
    assert [look.racing for look in result.looks] == [
        COUNT - sum(look.decided for look in result.looks[:i]) for i in range(len(result.looks))
    ]


def test_a_cancelled_race_goes_on():
    y, x = simulated("normal", GAPS["a close pair"](), 4)
    calls: list[int] = []

    def draw():
        return population(heads(COUNT), UNITS, torch.Generator().manual_seed(7), gradient=x)

    whole = race(draw(), looked_up(y, calls), "bottom", K)
    total = sum(calls)
    calls.clear()
    *_, second = islice(looks(draw(), looked_up(y, calls), "bottom", K), 2)
    assert not second.finished
    known = second.estimates.effects
    again = race(draw(), looked_up(y, calls), "bottom", K, known=known)
    assert sum(calls) == total
    assert again.verdicts == whole.verdicts
    assert again.looks == whole.looks
    np.testing.assert_array_equal(again.estimates.value, whole.estimates.value)


def test_units_of_several_examples_count_by_their_number():
    y, _ = simulated("normal", GAPS["a ladder"](), 5)
    y[:10] += 100 * (np.arange(COUNT) == 0)  # decisive, unless these units weigh little
    sizes = [1] * 10 + [500] * (UNITS - 10)
    drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(0), sizes=sizes)
    result = race(drawn, looked_up(y), "bottom", K)
    expected = np.argsort(np.average(y, 0, weights=sizes))[:K]
    assert {head.head for head in result.those("in")} == set(expected)


def test_frame_has_the_verdicts():
    y, x = simulated("normal", GAPS["two groups"](), 6)
    drawn = population(heads(COUNT), UNITS, torch.Generator().manual_seed(0), gradient=x)
    result = race(drawn, looked_up(y), "bottom", K)
    frame = result.frame()
    assert set(frame[frame.verdict == "in"].component) == set(map(str, result.those("in")))
    assert (frame.low <= frame.value).all()
    assert (frame.value <= frame.high).all()
    assert not replace(result, verdicts=("open",) * COUNT).finished


def test_what_cannot_be_decided_is_refused():
    drawn = population(heads(4), 20, torch.Generator())
    effects = looked_up(np.zeros((20, 4)))
    for decision, k in (("bottom", 0), ("top", 4), ("sign", 2)):
        with pytest.raises(ValueError, match=f"{decision} {k} of 4 components asked for"):
            race(drawn, effects, decision, k)
    with pytest.raises(ValueError, match="error 0.0, tie 0.0 asked for"):
        race(drawn, effects, "bottom", 2, error=0.0)
    with pytest.raises(ValueError, match="tie -1.0 asked for"):
        race(drawn, effects, "bottom", 2, tie=-1.0)
