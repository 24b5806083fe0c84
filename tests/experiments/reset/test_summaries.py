"""Medians that keep the censored, curves that keep the early stopped, and what a reset costs."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.reset.result import main
from experiments.reset.statistics.crossing import crossings
from experiments.reset.statistics.summaries import (
    crossover,
    damage,
    lower_median,
    mean_curves,
    median_interval,
    medians,
    numbered,
    over_places,
    stragglers,
)
from experiments.reset.statistics.survival import kaplan_meier
from tests.experiments.reset import planted
from tests.experiments.reset.planted import T0, diverged, gap_of, ledger, student


def at(rows: pd.DataFrame, threshold: float = 0.05) -> pd.DataFrame:
    found = main(crossings(rows))
    return found.loc[(found["kind"] == "absolute") & (found["threshold"] == threshold)]


@pytest.mark.parametrize("n", [5, 6, 9, 25])
def test_interval_of_a_median_covers_as_often_as_it_says(n: int):
    values = np.arange(n, dtype=float)
    low, high = median_interval(values[::-1])
    if n < 6:
        assert np.isnan([low, high]).all()
        return
    # The true median is left of X_(k) if fewer than k of n fall below it.
    assert high == n - 1 - low
    missed = 2 * sum(stats.binom.pmf(i, n, 0.5) for i in range(int(low) + 1))
    assert missed <= 0.05
    assert 2 * sum(stats.binom.pmf(i, n, 0.5) for i in range(int(low) + 2)) > 0.05


def test_medians_count_the_censored_as_longer_and_bound_them():
    rows = pd.concat([student(0, seed=s) for s in (0, 1, 2)] + [student(1, seed=1)])
    table = medians(at(rows), ["layer"], "share").set_index("layer")
    # gap = damage (1 + t/t1)^-0.6: layer 0 needs (1.6/0.05)^(1/0.6) · 0.06 % of T0, far beyond 8 %.
    assert table.loc[0, "value"] == np.inf
    assert table.loc[0, "bound"] == pytest.approx(0.08)
    assert table.loc[0, "censored"] == 3
    exact = 0.0006 * ((1.6 / 2**1.6 / 0.05) ** (1 / 0.6) - 1)
    assert table.loc[1, "value"] == pytest.approx(exact, rel=0.01)
    assert (table.loc[1, "students"], table.loc[1, "censored"]) == (1, 0)


def test_medians_are_those_of_kaplan_and_meier():
    rows = pd.concat([ledger(range(6)), diverged()])
    own = at(rows)
    ours = medians(own, ["target"], "share").set_index("target")["value"]
    theirs = kaplan_meier(own, ["target"], "share").set_index("target")["median"]
    for target in ("lm", "hidden"):
        assert ours[target] == pytest.approx(theirs[target])
    assert lower_median(np.array([3.0, np.inf, 1.0, np.inf])) == 3.0


def test_places_and_not_seeds_make_the_interval():
    own = at(ledger(range(6)))
    table = over_places(own, ["target"], "share").set_index("target")
    alone = at(ledger(range(6), seeds=(1,)))
    for target in ("lm", "hidden"):
        values = medians(alone.loc[alone["target"] == target], ["layer"], "share")["value"]
        assert table.loc[target, "places"] == 6
        assert table.loc[target, "students"] == 18
        # Six places: the interval runs from the smallest to the largest (seed 1 is in the middle).
        assert table.loc[target, "low"] == pytest.approx(values.min(), rel=1e-6)
        assert table.loc[target, "high"] == np.inf


def test_tokens_where_the_length_is_not_known():
    rows = ledger(range(2), base_tokens=np.nan)
    table = medians(at(rows), ["target", "layer"], "tokens")
    known = medians(at(ledger(range(2))), ["target", "layer"], "share")
    finite = np.isfinite(table["value"])
    assert finite.any()
    assert np.allclose(table["value"][finite], T0 * known["value"][finite])


def test_curves_end_where_the_first_seed_stopped_and_the_others_go_on_alone():
    rows = numbered(pd.concat([student(3, seed=s, stop=0.02 + 0.02 * (s == 0)) for s in (0, 1, 2)]))
    line = mean_curves(rows, ["layer"])
    stopped = rows.loc[rows["seed"] == 0, "tokens"].max()
    assert line["tokens"].max() == stopped
    assert (line["students"] == 3).all()
    for row in line.to_dict("records"):
        gaps = [gap_of(row["tokens"], 3, "lm", seed) for seed in (0, 1, 2)]
        assert row["value"] == pytest.approx(np.mean(gaps))
        assert (row["low"], row["high"]) == pytest.approx((min(gaps), max(gaps)))
    rest = stragglers(rows, ["layer"])
    assert [int(r["seed"].iloc[0]) for r in rest] == [1, 2]
    assert all(r["tokens"].iloc[0] == stopped for r in rest)


def test_a_student_that_diverged_bends_no_mean():
    rows = pd.concat([ledger([2], targets=("lm",)), diverged(2)])
    rows = main(numbered(rows))
    with_it, without = (
        mean_curves(each, ["layer"]) for each in (rows, rows.loc[rows["seed"] != 3])
    )
    pd.testing.assert_frame_equal(with_it, without)
    assert 3 in {int(r["seed"].iloc[0]) for r in stragglers(rows, ["layer"])}


def test_crossover_is_where_it_was_planted():
    lines = [
        mean_curves(numbered(student(1, target=target, seed=1)), ["target"])
        for target in ("lm", "hidden")
    ]
    found = crossover(*lines)
    assert found is not None
    assert found.kind == "crosses"
    gaps = [gap_of(found.tokens, 1, target, 1) for target in ("lm", "hidden")]
    assert gaps[0] == pytest.approx(gaps[1], rel=0.01)
    back = crossover(lines[1], lines[0])
    assert back is not None
    assert back.kind == "behind"
    lower = crossover(lines[0], lines[0].assign(value=lines[0]["value"] - 0.001))
    assert lower is not None
    assert lower.kind == "ahead"
    assert crossover(lines[0], lines[1].iloc[:0]) is None


def test_damage_is_that_of_the_reset():
    table = damage(main(ledger(range(3)))).set_index("name")
    for layer in range(3):
        expected = np.mean([gap_of(0.0, layer, "lm", seed) for seed in (0, 1, 2)])
        assert table.loc[f"L{layer}", "value"] == pytest.approx(expected)
        assert table.loc[f"L{layer}", "skip"] == pytest.approx(1.01 * expected)
    assert damage(ledger().iloc[:0]).empty


def test_nothing_makes_empty_tables():
    nothing = ledger().iloc[:0]
    assert medians(crossings(nothing), ["layer"], "share").empty
    assert over_places(crossings(nothing), ["layer"], "share").empty
    assert mean_curves(numbered(nothing), ["layer"]).empty
    assert planted.result(nothing).crossings.empty


def test_being_ahead_at_the_last_evaluation_alone_is_no_crossover():
    tokens = [100.0, 200.0, 400.0, 800.0]
    lm = pd.DataFrame({"tokens": tokens, "value": [1.0, 0.8, 0.6, 0.5]})
    late = pd.DataFrame({"tokens": tokens, "value": [2.0, 1.5, 0.7, 0.4]})
    sooner = pd.DataFrame({"tokens": tokens, "value": [2.0, 1.5, 0.5, 0.4]})
    assert crossover(lm, late).kind == "behind"
    assert crossover(lm, sooner).kind == "crosses"
