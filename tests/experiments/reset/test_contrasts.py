"""Contrasts, rank correlations and crossovers against planted effects and hand-made curves."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.reset.statistics.contrasts import (
    _rank_differences,
    position_contrasts,
    predictor_ranks,
    target_contrast,
    target_crossovers,
)
from experiments.statistics import holm
from tests.experiments.reset.invented import crossing_rows, student


def planted(effect, *, bases=6, layers=6, seeds=2, noise=0.2, censored=(), target="lm"):
    """Crossings at e^(12 + effect(layer) + base + noise); layers in `censored` never cross."""
    generator = np.random.default_rng(0)
    known = pd.DataFrame(
        itertools.product(range(bases), range(layers), range(seeds)),
        columns=pd.Index(["base_seed", "layer", "seed"]),
    )
    known["n_layers"] = layers
    known["base"] = "b" + known["base_seed"].astype(str)
    known["target"] = target
    base = generator.standard_normal(bases)[known["base_seed"]]
    mu = 12 + known["layer"].map(effect).to_numpy(float) + base
    tokens = np.exp(mu + noise * generator.standard_normal(len(known)))
    never = known["layer"].isin(censored).to_numpy()
    return crossing_rows(
        np.where(never, np.nan, tokens),
        np.where(never, 1e8, tokens * 0.9),
        np.where(never, np.inf, tokens * 1.1),
        known,
    )


def test_a_slow_first_layer_is_found_and_nothing_else():
    rows = planted(lambda layer: 1.5 * (layer == 0))
    table = position_contrasts(rows, np.random.default_rng(0)).set_index("contrast")
    assert table["low"]["first"] < 1.5 < table["high"]["first"]
    assert table["ratio"]["first"] == pytest.approx(math.exp(1.5), rel=0.2)
    assert table["holm"]["first"] < 0.01
    assert table["low"]["last"] < 0 < table["high"]["last"]
    assert table["method"].eq("model").to_numpy().all()
    assert table["p_ranks"]["first"] == pytest.approx(2 / 2**6)
    assert table["holm"].to_numpy() == pytest.approx(holm(table["p"]))
    assert table["over"].iloc[0].startswith("base runs")


def test_a_valley_over_depth_is_the_quadratic():
    rows = planted(lambda layer: 8 * (layer / 5 - 0.5) ** 2)
    table = position_contrasts(rows, np.random.default_rng(0)).set_index("contrast")
    assert table["low"]["depth²"] < 8 < table["high"]["depth²"]
    assert table["ratio"]["depth²"] == pytest.approx(math.exp(2), rel=0.2)
    assert table["ratio_low"]["depth²"] < table["ratio"]["depth²"] < table["ratio_high"]["depth²"]
    assert table["ratio_low"]["depth²"] == pytest.approx(math.exp(table["low"]["depth²"] / 4))


def test_a_first_layer_that_never_crosses_is_judged_by_ranks():
    rows = planted(lambda layer: 0, censored=[0])
    table = position_contrasts(rows, np.random.default_rng(0)).set_index("contrast")
    assert table["value"]["first"] == np.inf
    assert table["method"]["first"] == "ranks"
    assert table["p"]["first"] == pytest.approx(2 / 2**6)
    assert table["reason"]["first"] == "none of 12 crossed"
    assert table["method"]["last"] == "model"


def test_one_that_never_crosses_ranks_above_all_others():
    rows = planted(lambda layer: 0, censored=[0])
    differences = _rank_differences(rows, "first")
    # two of twelve students share ranks 11 and 12; the others have 5.5 on average
    assert differences.shape == (6,)
    assert (differences > 11.5 - 10).all()


def test_nobody_crossed_or_one_base_alone():
    nobody = planted(lambda layer: 0, censored=range(6))
    table = position_contrasts(nobody, np.random.default_rng(0))
    assert table["value"].isna().to_numpy().all()
    assert table["reason"].eq("none of 72 students crossed").to_numpy().all()
    assert (table["p"].to_numpy() == 1).all()  # all ranks tie
    one = planted(lambda layer: layer == 0, bases=1, seeds=3)
    table = position_contrasts(one, np.random.default_rng(0)).set_index("contrast")
    assert table["over"]["first"].startswith("seeds of one base run")
    assert table["p_ranks"]["first"] == pytest.approx(0.25)
    single = planted(lambda layer: layer == 0, bases=1, seeds=1)
    table = position_contrasts(single, np.random.default_rng(0)).set_index("contrast")
    assert table["method"].eq("none").to_numpy().all()
    assert table["holm"].isna().to_numpy().all()
    two_layers = planted(lambda layer: 0, layers=2)
    table = position_contrasts(two_layers, np.random.default_rng(0)).set_index("contrast")
    assert math.isnan(table["value"]["depth²"])


def test_contrasts_call_as_often_as_they_say_when_there_is_nothing():
    called = []
    for seed in range(60):
        rows = planted(lambda layer: 0, bases=4, seeds=1)
        order = (
            np.random.default_rng(seed).permuted(np.arange(24).reshape(4, 6), axis=1).ravel()
        )  # layers are exchangeable within a base
        for column in ("tokens", "lower", "upper"):
            rows[column] = rows[column].to_numpy()[order]
        table = position_contrasts(rows, np.random.default_rng(0))
        called.append((table["holm"] <= 0.05).any())
    assert np.mean(called) <= 0.12


def test_local_regression_against_the_loss():
    rows = pd.concat(
        [planted(lambda layer: 0), planted(lambda layer: -0.7, target="hidden", noise=0.3)]
    )
    found = target_contrast(rows).iloc[0]
    assert found["term"] == "hidden against lm"
    assert found["low"] < -0.7 < found["high"] < 0
    with pytest.raises(ValueError, match=r"there are only \['lm'\]"):
        target_contrast(planted(lambda layer: 0))


TOKENS = [0, 100, 200, 400, 800]


def pair(one, other, **known):
    return pd.concat(
        [
            student(TOKENS, one, known={"arm": "A0"} | known),
            student(TOKENS, other, known={"target": "hidden", "arm": "A11", "rate": 0.1} | known),
        ]
    )


def test_crossovers_are_where_the_other_stays_lower():
    rows = pd.concat(
        [
            pair([1, 0.5, 0.3, 0.2, 0.15], [1, 0.7, 0.2, 0.25, 0.1]),
            pair([1, 0.5, 0.3, 0.2, 0.15], [1, 0.4, 0.2, 0.15, 0.1], layer=1),
            pair([1, 0.5, 0.3, 0.2, 0.15], [1, 0.4, 0.2, 0.15, 0.2], layer=2),
            student(TOKENS, [1, 0.5, 0.3, 0.2, 0.15], known={"layer": 3}),
        ]
    )
    table = target_crossovers(rows).set_index("layer")
    assert table["status"].to_dict() == {0: "crosses", 1: "ahead", 2: "behind"}
    # below at 200, not at 400, below for good at 800: halfway in log t
    assert (table["lower"][0], table["upper"][0]) == (400, 800)
    assert table["tokens"][0] == pytest.approx(400 * 2**0.5)
    assert table["share"][0] == pytest.approx(table["tokens"][0] / 1e6)
    assert (table["lower"][2], table["upper"][2]) == (800, np.inf)
    assert table["gap_other"][0] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="several students of target lm"):
        target_crossovers(pd.concat([rows, rows.assign(arm="A1")]))
    assert target_crossovers(rows[rows["target"] == "lm"]).empty


def test_curves_of_other_evaluations_are_read_in_between():
    one = student([0, 100, 400], [1, 0.5, 0.3])
    other = student([0, 200, 400, 800], [1, 0.45, 0.1, 0.0], known={"target": "hidden"})
    found = target_crossovers(pd.concat([one, other])).iloc[0]
    # at 200 the loss target is read as 0.4: 0.05 ahead, and 0.2 behind at 400
    assert found["tokens"] == pytest.approx(200 * 2**0.2)
    assert found["gap_one"] == pytest.approx(0.3)


def test_predictors_rank_with_the_censored_on_top():
    rows = planted(lambda layer: -layer, bases=4, layers=5, noise=0.01, censored=[0])
    measured = pd.DataFrame(
        {"layer": range(5), "distance": [5.0, 4, 3, 2, 1], "mixed": [1.0, 5, 2, 4, 3], "flat": 1.0}
    )
    names = ["distance", "mixed", "flat", "damage"]
    table = predictor_ranks(rows, measured, names, np.random.default_rng(0)).set_index("predictor")
    assert table["value"]["distance"] == pytest.approx(1)
    expected = stats.spearmanr(measured["mixed"], [5, 4, 3, 2, 1]).statistic
    assert table["value"]["mixed"] == pytest.approx(expected)
    assert table["p"]["distance"] < 0.01
    assert table["p"]["mixed"] > 0.1
    assert (table["bases"]["distance"], table["places"]["distance"]) == (4, 20)
    assert table["crossed"]["distance"] == 16
    assert table["reason"]["distance"] == "the same whatever is left out"
    for name in ("flat", "damage"):
        assert math.isnan(table["value"][name])
        assert table["reason"][name].startswith("no base with three layers")


def test_ties_of_layers_that_never_crossed_share_a_rank():
    rows = planted(lambda layer: layer, bases=1, layers=6, noise=0.01, censored=[0, 1])
    measured = pd.DataFrame({"layer": range(6), "number": [3.0, 6, 1, 2, 4, 5]})
    found = predictor_ranks(rows, measured, ["number"], np.random.default_rng(0)).iloc[0]
    expected = stats.spearmanr([3, 6, 1, 2, 4, 5], [5.5, 5.5, 1, 2, 3, 4]).statistic
    assert found["value"] == pytest.approx(expected)
    assert found["low"] < expected < found["high"] <= 1
    assert found["over"] == "layers of these bases"
    # p of every order of six layers, by brute force
    ranks = np.array([5.5, 5.5, 1, 2, 3, 4])
    all_orders = [
        stats.spearmanr([3, 6, 1, 2, 4, 5], ranks[list(order)]).statistic
        for order in itertools.permutations(range(6))
    ]
    exact = np.mean(np.abs(all_orders) >= abs(expected) - 1e-9)
    assert found["p"] == pytest.approx(exact, abs=0.02)


def test_refusals_of_predictors():
    rows = planted(lambda layer: layer, bases=1)
    twice = pd.DataFrame({"layer": [0, 0], "number": [1.0, 2.0]})
    with pytest.raises(ValueError, match="one for each layer"):
        predictor_ranks(rows, twice, ["number"], np.random.default_rng(0))
    with pytest.raises(ValueError, match="no predictor other"):
        predictor_ranks(rows, twice.iloc[:1], ["other"], np.random.default_rng(0))
