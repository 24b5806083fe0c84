"""The log-normal fit against lifelines, the model against a simulated truth, and refusals."""

import math

import numpy as np
import pandas as pd
import pytest
from lifelines import LogNormalAFTFitter

from experiments.lognormal import SMALLEST, _likelihood, fit_log_normal
from experiments.reset.statistics.accelerated import (
    accelerated,
    length_exponent,
    runs,
    verdict,
    zones,
)
from tests.experiments.reset.invented import crossing_rows

GRID = np.geomspace(1e3, 1e9, 61)
TRUTH = {"N": -0.4, "D": 0.8, "T0": 0.3, "first": 1.0, "last": 0.0}


def looked(truth, budget=np.inf):
    """The intervals in which evaluations on GRID up to `budget` find these times."""
    index = GRID.searchsorted(truth)
    lower, upper = np.r_[0, GRID][index], np.r_[GRID, np.inf][index]
    late = truth > budget
    return np.where(late, budget, lower), np.where(late, np.inf, upper)


def simulated(generator, *, budget=np.inf, of_base=0.3, noise=0.3, shapes=((4, 64), (8, 128))):
    """Students of 3 base seeds a shape, 2 checkpoints, all layers, 2 seeds."""
    known = [
        (n, d, base, share, layer, seed)
        for n, d in shapes
        for base in range(3)
        for share in (0.25, 1.0)
        for layer in range(n)
        for seed in range(2)
    ]
    names = ["n_layers", "d_model", "base_seed", "base_share", "layer", "seed"]
    rows = pd.DataFrame(known, columns=pd.Index(names))
    rows["base_tokens"] = rows["base_share"] * 1e6 * rows["d_model"]
    run = pd.factorize(runs(rows.assign(family="decoder", architecture="opt", base="b")))[0]
    mu = 5 + of_base * generator.standard_normal(run.max() + 1)[run]
    for term, column in (("N", "n_layers"), ("D", "d_model"), ("T0", "base_tokens")):
        mu = mu + TRUTH[term] * np.log(rows[column].to_numpy(float))
    mu += TRUTH["first"] * (rows["layer"].to_numpy() == 0)
    truth = np.exp(mu + noise * generator.standard_normal(len(rows)))
    lower, upper = looked(truth, budget * rows["base_tokens"].to_numpy(float))
    return crossing_rows(np.where(np.isinf(upper), np.nan, truth), lower, upper, rows)


def test_newton_finds_what_lifelines_finds():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 2))
    truth = np.exp(12 + x @ [0.5, -0.2] + 0.6 * generator.standard_normal(200))
    lower, upper = looked(truth, 4e5)
    # lifelines neither starts from log 0 nor likes large numbers.
    lower, upper = np.maximum(lower, 1.0) / 1e5, upper / 1e5
    assert np.isinf(upper).mean() > 0.05
    design = np.c_[np.ones(200), x]
    frame = pd.DataFrame(x, columns=pd.Index(["a", "b"])).assign(one=1.0, low=lower, high=upper)
    theirs = LogNormalAFTFitter(fit_intercept=False).fit_interval_censoring(frame, "low", "high")
    ours = fit_log_normal(design, lower, upper)
    assert ours is not None
    expected = theirs.params_["mu_"][["one", "a", "b"]]
    assert ours.coefficients == pytest.approx(expected.to_numpy(), abs=1e-4)
    errors = theirs.standard_errors_["mu_"][["one", "a", "b"]]
    assert np.sqrt(np.diag(ours.covariance)) == pytest.approx(errors.to_numpy(), rel=1e-3)
    assert math.log(ours.sigma) == pytest.approx(theirs.params_["sigma_"].iloc[0], abs=1e-4)


def test_derivatives_are_differences():
    generator = np.random.default_rng(1)
    design = np.c_[np.ones(8), generator.standard_normal(8)]
    low = np.r_[-np.inf, 0, 1, 2, 3, 0.5, -40, 30]
    high = np.r_[0, 0.5, np.inf, 2.2, np.inf, 1, -39, 31]
    at = np.array([0.7, 0.3, 1.3])
    _, gradient, hessian = _likelihood(design, low, high, at)
    for j in range(3):
        step = 1e-5 * np.eye(3)[j]
        up, down = (_likelihood(design, low, high, at + s * step) for s in (1, -1))
        assert (up[0] - down[0]) / 2e-5 == pytest.approx(gradient[j], rel=1e-5)
        assert (up[1] - down[1]) / 2e-5 == pytest.approx(hessian[j], rel=1e-4, abs=1e-6)


def test_a_fit_without_a_maximum_is_none_and_without_spread_is_bounded():
    ones = np.ones((3, 1))
    assert fit_log_normal(ones, np.full(3, 10.0), np.full(3, np.inf)) is None
    alike = fit_log_normal(ones, np.full(3, 10.0), np.full(3, 12.0))
    assert alike is not None
    assert alike.bounded
    assert alike.sigma == SMALLEST
    assert 10 <= math.exp(alike.coefficients[0]) <= 12
    with pytest.raises(ValueError, match="lower ≥ upper"):
        fit_log_normal(ones, np.full(3, 10.0), np.full(3, 10.0))


@pytest.mark.parametrize("budget", [np.inf, 0.03])
def test_the_model_covers_a_simulated_truth(budget):
    shapes = ((4, 64), (8, 64), (4, 128), (8, 128))
    covered, censored = [], []
    for seed in range(25):
        rows = simulated(np.random.default_rng(seed), budget=budget, shapes=shapes)
        censored.append((rows["status"] != "recovered").mean())
        table = accelerated(rows).set_index("term")
        assert (table.loc[list(TRUTH), "reason"] == "").all()
        covered.append([table["low"][k] <= v <= table["high"][k] for k, v in TRUTH.items()])
        assert table["clusters"].iloc[0] == 12
        assert table["over"].iloc[0] == "base runs"
    assert np.mean(censored) == pytest.approx(0 if budget == np.inf else 0.25, abs=0.15)
    assert (np.mean(covered, axis=0) >= 0.8).all()


def test_dropping_the_censored_would_be_wrong_and_keeping_them_is_not():
    estimates, dropped = [], []
    for seed in range(15):
        rows = simulated(np.random.default_rng(seed), budget=0.02, of_base=0.0, noise=0.8)
        for kept, into in ((rows, estimates), (rows[rows["status"] == "recovered"], dropped)):
            table = accelerated(kept, ("T0",), ("run",)).set_index("term")
            into.append(table["value"][["first", "T0"]].to_numpy())
    assert np.mean(estimates, axis=0) == pytest.approx([1.0, 0.3], abs=0.12)
    first, length = np.mean(dropped, axis=0)
    assert first < 0.7
    assert length > 0.5


def test_students_of_one_base_are_no_independent_draws():
    rows = simulated(np.random.default_rng(0), of_base=1.0)
    table = accelerated(rows, ("D",)).set_index("term")
    assert table["stderr"]["D"] > 2 * table["stderr_model"]["D"]


def test_exponent_of_the_bases_length_is_within_runs():
    rows = simulated(np.random.default_rng(0), of_base=2.0)
    found = length_exponent(rows).iloc[0]
    assert found["low"] < TRUTH["T0"] < found["high"]
    assert found["high"] - found["low"] < 0.2  # the bases' own level does not blur it
    alone = length_exponent(rows[rows["base_share"] == 1]).iloc[0]
    assert math.isnan(alone["value"])
    assert alone["reason"] == "one value only, or tied to other terms"


def test_a_layer_that_never_crosses_is_infinite_and_leaves_the_rest_alone():
    rows = simulated(np.random.default_rng(0), shapes=((4, 64), (8, 64), (8, 128)))
    first = rows["layer"] == 0
    blocked = rows.assign(
        lower=rows["lower"].where(~first, 1e8),
        upper=rows["upper"].where(~first, np.inf),
        status=rows["status"].where(~first, "censored"),
    )
    table = accelerated(blocked).set_index("term")
    without = accelerated(rows[~first]).set_index("term")
    assert table["value"]["first"] == np.inf
    assert table["reason"]["first"] == f"none of {first.sum()} crossed"
    for term in ("D", "T0", "last"):
        assert table["value"][term] == pytest.approx(without["value"][term], abs=1e-4)
        assert table["low"][term] == pytest.approx(without["low"][term], abs=1e-4)
    middle = zones(rows) == "middle"
    only_ends = rows.assign(
        upper=rows["upper"].where(~middle, np.inf),
        status=rows["status"].where(~middle, "censored"),
    )
    table = accelerated(only_ends).set_index("term")
    assert table["value"][["first", "last"]].isna().to_numpy().all()
    assert table["reason"]["first"] == f"none of the {middle.sum()} it is compared with crossed"
    without = accelerated(rows[~middle]).set_index("term")
    assert table["value"]["T0"] == pytest.approx(without["value"]["T0"], abs=1e-4)


def test_what_cannot_be_estimated_says_why():
    rows = simulated(np.random.default_rng(0), shapes=((4, 64), (8, 128)))
    table = accelerated(rows).set_index("term")  # N and D move together: which of them is it?
    for term in ("N", "D"):
        assert math.isnan(table["value"][term])
        assert table["reason"][term] == "one value only, or tied to other terms"
    assert math.isfinite(table["low"]["T0"])
    nobody = rows.assign(upper=np.inf, status="censored", tokens=np.nan)
    table = accelerated(nobody)
    assert table["value"].isna().to_numpy().all()
    assert set(table["reason"]) == {f"none of {len(rows)} students crossed"}
    assert set(table["verdict"]) == {"not estimable"}
    at_once = accelerated(rows.assign(lower=0.0, tokens=0.0))
    assert at_once["reason"].str.contains("before the first evaluation").to_numpy().all()
    one = accelerated(rows[rows["layer"] == 0].iloc[:1]).set_index("term")
    assert one["low"].isna().to_numpy().all()


def test_one_base_has_intervals_over_its_seeds_and_says_so():
    rows = simulated(np.random.default_rng(0), shapes=((8, 128),))
    one = rows[rows["base_seed"] == 0]
    table = accelerated(one, (), ()).set_index("term")
    assert table["over"].iloc[0] == "seeds of one base run"
    assert table["clusters"].iloc[0] == 2
    single = accelerated(one[one["seed"] == 0], (), ()).set_index("term")
    assert single["reason"]["first"] == "one cluster"
    assert math.isnan(single["low"]["first"])
    assert math.isfinite(single["value"]["first"])


def test_refusals():
    rows = simulated(np.random.default_rng(0))
    with pytest.raises(ValueError, match="log T0 of 72 students is not known"):
        accelerated(rows.assign(base_tokens=rows["base_tokens"].where(rows["base_share"] == 1)))
    with pytest.raises(ValueError, match="crossings of 2 kinds of weights and thresholds"):
        accelerated(pd.concat([rows, rows.assign(threshold=0.1)]))
    with pytest.raises(ValueError, match="no crossings"):
        accelerated(rows.iloc[:0])


def test_zones_and_verdicts():
    frame = pd.DataFrame({"layer": range(6), "n_layers": 6})
    assert zones(frame).tolist() == ["first", "between", "middle", "middle", "between", "last"]
    four = pd.DataFrame({"layer": range(4), "n_layers": 4})
    assert zones(four).tolist() == ["first", "middle", "middle", "last"]
    assert verdict(-0.1, 0.14) == "no effect"
    assert verdict(-0.1, 0.16) == "undecided"
    assert verdict(0.01, 0.16) == "effect"
    assert verdict(0.01, 0.16, math.nan) == "effect"
    assert verdict(math.nan, math.nan) == "not estimable"


def test_a_public_base_without_a_seed_is_a_run_of_its_own():
    rows = pd.DataFrame(
        {
            "family": ["decoder"] * 3,
            "n_layers": 12,
            "d_model": 768,
            "base_seed": [np.nan, np.nan, 0],
            "base": ["gpt2", "opt", "own"],
        }
    )
    rows["architecture"] = "opt"
    assert runs(rows).nunique() == 3
    # T5 and BART of one shape and seed are both encoder-decoders, and two bases
    rows = rows.assign(base_seed=0, architecture=["t5", "bart", "bart"])
    assert runs(rows).nunique() == 2


def test_seeds_between_the_same_two_evaluations_are_read_in_between():
    rows = simulated(np.random.default_rng(0), shapes=((8, 128),), noise=0.05, of_base=0.0)
    table = accelerated(rows[rows["base_seed"] == 0], ("T0",), ()).set_index("term")
    assert table["over"].iloc[0] == "seeds of one base run, T read between evaluations"
    assert (table["reason"] == "").all()
    assert table["low"]["first"] < TRUTH["first"] < table["high"]["first"]
    assert table["value"]["T0"] == pytest.approx(TRUTH["T0"], abs=0.05)
