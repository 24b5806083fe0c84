"""Medians against an example by hand, lifelines and slow oracles."""

import math

import numpy as np
import pandas as pd
import pytest

from experiments.reset.statistics.survival import (
    _drawn_again,
    _medians,
    headline,
    kaplan_meier,
    survival_steps,
    turnbull,
)
from tests.experiments.reset.invented import crossing_rows


def times(tokens, status, **known):
    """Crossings at `tokens`; those that did not cross were trained that long."""
    tokens, status = np.asarray(tokens, dtype=float), np.asarray(status)
    crossed = status == "recovered"
    rows = crossing_rows(
        np.where(crossed, tokens, np.nan),
        np.where(crossed, tokens * 0.9, tokens),
        np.where(crossed, tokens * 1.1, np.inf),
        {"seed": np.arange(tokens.size)} | known,
    )
    return rows.assign(status=status)


R, C, D = "recovered", "censored", "diverged"


def test_survival_by_hand():
    # 6 students: S = 5/6 at 1, 4 left at 3 after one left at 2: 5/6·3/4 = 5/8, then 5/8·1/2 at 5
    rows = times([1, 2, 3, 4, 5, 6], [R, C, R, C, R, C])
    steps = survival_steps(rows).set_index("tokens")["survival"]
    assert steps.to_dict() == pytest.approx(
        {0: 1, 1: 5 / 6, 2: 5 / 6, 3: 5 / 8, 4: 5 / 8, 5: 5 / 16, 6: 5 / 16}
    )
    table = kaplan_meier(rows, ("target",)).iloc[0]
    assert table["median"] == 5
    assert (table["students"], table[R], table[C], table[D]) == (6, 3, 3, 0)
    assert table["share_censored"] == 0.5
    assert table["low"] <= 5 <= table["high"]


def test_a_median_that_is_not_reached_is_longer_than_the_time_there_was():
    table = kaplan_meier(times([1, 8, 9, 9e3], [R, C, C, C]), ("target",)).iloc[0]
    assert table["median"] == math.inf
    assert table["bound"] == 9e3
    assert table["text"] == "> 9 k"
    nobody = kaplan_meier(times([8, 9], [C, C]), ("target",)).iloc[0]
    assert nobody["median"] == math.inf
    assert math.isnan(nobody["low"])
    assert nobody["share_censored"] == 1


def test_one_that_diverged_early_is_not_on_the_mend():
    late = kaplan_meier(times([1, 5, 6, 7], [D, R, R, R]), ("target",)).iloc[0]
    assert late["median"] == 6  # S: 3/4 at 5, 1/2 at 6; were it gone at 1: 2/3, 1/3 at 6, too
    half = kaplan_meier(times([1, 1, 5, 6], [D, D, R, R]), ("target",)).iloc[0]
    assert half["median"] == 6  # were both gone at 1 it would be 5
    assert half["share_diverged"] == 0.5
    most = kaplan_meier(times([1, 1, 1, 5, 6], [D, D, D, R, R]), ("target",)).iloc[0]
    assert most["median"] == math.inf


def test_groups_and_thresholds_are_kept_apart():
    rows = times([1, 2, 3, 40, 50, 60], [R] * 6, layer=[0, 0, 0, 1, 1, 1])
    rows = pd.concat([rows, rows.assign(threshold=0.01, tokens=rows["tokens"] * 10)])
    table = kaplan_meier(rows, ("layer",)).set_index(["layer", "threshold"])["median"]
    assert table.to_dict() == {(0, 0.05): 2, (1, 0.05): 50, (0, 0.01): 20, (1, 0.01): 500}


def test_shares_need_a_known_length():
    rows = times([1e5, 3e5, 2e5], [R, C, R], base_tokens=1e6)
    table = kaplan_meier(rows, ("target",), "share").iloc[0]
    assert (table["median"], table["bound"], table["text"]) == (0.2, 0.3, "20 %")
    with pytest.raises(ValueError, match="training tokens of b0, which are not known"):
        kaplan_meier(rows.assign(base_tokens=np.nan), ("target",), "share")


def test_crossed_from_the_start_is_a_time_of_nothing():
    rows = times([0, 0, 5], [R, R, R])
    assert kaplan_meier(rows, ("target",)).iloc[0]["median"] == 0


def test_an_empty_frame_has_empty_tables():
    rows = times([1], [R]).iloc[:0]
    assert kaplan_meier(rows).empty
    assert survival_steps(rows).empty
    assert turnbull(rows).empty
    found = headline(rows, "lm", np.random.default_rng(0))
    assert found.text.endswith("not measured")
    assert math.isnan(found.median)


def test_turnbull_brackets_the_median():
    generator = np.random.default_rng(0)
    grid = np.geomspace(10, 1e4, 16)
    truth = np.exp(6 + generator.normal(size=60))
    index = grid.searchsorted(truth)
    lower, upper = np.r_[0, grid][index], np.r_[grid, np.inf][index]
    rows = crossing_rows(np.where(np.isinf(upper), np.nan, truth), lower, upper, {})
    found = turnbull(rows).iloc[0]
    assert found["after"] < np.median(truth) <= found["within"]
    assert found["within"] in grid
    nobody = turnbull(times([8, 9], [C, C])).iloc[0]
    assert (nobody["after"], nobody["within"]) == (9, math.inf)


def test_medians_of_many_draws_are_lifelines_of_the_rows_repeated():
    generator = np.random.default_rng(3)
    for _ in range(30):
        time = generator.integers(1, 8, 12).astype(float)
        crossed = generator.random(12) < 0.6
        counts = generator.integers(0, 4, (1, 12))
        repeated = np.repeat(np.arange(12), counts[0])
        rows = times(time[repeated], np.where(crossed[repeated], R, C))
        expected = kaplan_meier(rows, ("target",)).iloc[0]["median"]
        assert _medians(time, crossed, counts)[0] == expected


def test_draws_are_whole_bases_then_layers():
    parts = [
        times([1, 2, 3, 4], [R] * 4, layer=[0, 0, 1, 1], seed=[0, 1, 0, 1], base_seed=base)
        for base in range(3)
    ]
    rows = pd.concat(parts, ignore_index=True)
    weights, count, over = _drawn_again(rows, np.random.default_rng(0), 4000)
    assert (count, over) == (3, "bases, then layers")
    assert (weights.sum(axis=1) == 12).all()
    assert (weights[:, ::2] == weights[:, 1::2]).all()  # the seeds of a layer go together
    of_base = weights.reshape(-1, 3, 4).sum(axis=2)
    # each base is drawn Binomial(3, 1/3) times, with all its four students' weight
    assert (of_base % 4 == 0).all()
    assert of_base.var() == pytest.approx(16 * 3 * (1 / 3) * (2 / 3), rel=0.1)
    weights, count, over = _drawn_again(parts[0], np.random.default_rng(0), 4000)
    assert (count, over) == (1, "layers, then seeds")
    assert (weights[:, 0] != weights[:, 1]).any()
    assert weights[:, :2].sum(axis=1).var() == pytest.approx(4 * 2 * 0.25, rel=0.1)


def test_headline_says_median_interval_and_censored():
    layers = np.repeat(np.arange(6), 3)
    generator = np.random.default_rng(1)
    tokens = 1e4 * (1 + layers) * np.exp(0.1 * generator.normal(size=18))
    status = np.where(layers == 5, C, R)
    rows = times(tokens, status, layer=layers, seed=np.tile([0, 1, 2], 6), base_tokens=1e6)
    found = headline(rows, "lm", generator)
    assert found.median == np.sort(tokens / 1e6)[8]  # the first t with half of 18 across
    assert found.low < found.median < found.high
    assert found.censored == pytest.approx(1 / 6)
    assert found.over == "layers, then seeds"
    start = "median share of the original training tokens to come within 0.05 nat: "
    assert found.text.startswith(start)
    assert found.text.endswith("], 17 % censored")
    unknown = headline(rows.assign(base_tokens=np.nan, share=np.nan), "lm", generator)
    assert unknown.unit == "tokens"
    assert unknown.median == pytest.approx(found.median * 1e6)
    other = headline(pd.concat([rows, rows.assign(arm="A1", tokens=1.0)]), "lm", generator)
    assert other.students == 18
    early = rows.assign(base_share=0.5, tokens=1.0, share=1e-6)
    assert headline(pd.concat([rows, early]), "lm", generator).median == found.median


def test_headline_of_a_target_that_mostly_fails():
    rows = times([1e5, 3e5, 3e5, 3e5], [R, C, C, D], base_tokens=1e6, layer=[0, 1, 2, 3])
    found = headline(rows, "lm", np.random.default_rng(0))
    assert found.median == math.inf
    assert ": > 30 % [10 %, > 30 %], 50 % censored, 25 % diverged" in found.text
    one = headline(rows.iloc[:1], "lm", np.random.default_rng(0))
    assert one.text.endswith("10 %, 0 % censored (one student: no interval)")
