"""Laws of known parameters, brute force beside the solver, nothing beyond four times the run."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from experiments.reset.statistics.fits import FORMS, _linear, compare_forms, fit, fit_students
from tests.experiments.reset.invented import student

TOKENS = np.geomspace(1e3, 1e6, 31)
LAWS = {
    "power": 20 * TOKENS**-0.5,
    "floored": 20 * TOKENS**-0.5 + 0.03,
    "stretched": 0.5 * np.exp(-((TOKENS / 2e4) ** 0.4)),
}


@pytest.mark.parametrize("truth", FORMS)
def test_each_law_is_told_from_the_others_and_found(truth):
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal(TOKENS.size)
    table = compare_forms(TOKENS, LAWS[truth] * noise).set_index("form")
    assert bool(table["best"][truth])
    other = {"power": "stretched", "floored": "power", "stretched": "power"}[truth]
    assert table["delta_aic"][other] > 20
    assert table["held_error"][truth] < 0.3 * table["held_error"][other]
    assert table["exponent"][truth] == pytest.approx(0.4 if truth == "stretched" else 0.5, rel=0.05)
    if truth == "stretched":
        assert table["scale"][truth] == pytest.approx(2e4, rel=0.1)
    else:
        assert table["c"][truth] == pytest.approx(20, rel=0.15)
    if truth == "floored":
        assert table["floor"][truth] == pytest.approx(0.03, rel=0.15)
    assert table["reason"][truth] == ""


def test_a_power_law_needs_no_floor():
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal(TOKENS.size)
    table = compare_forms(TOKENS, LAWS["power"] * noise).set_index("form")
    assert table["floor"]["floored"] == pytest.approx(0, abs=0.003)
    assert table["delta_aic"]["floored"] > 0


def test_aic_is_of_the_errors_it_says():
    gaps = LAWS["floored"] * (1 + 0.02 * np.random.default_rng(1).standard_normal(TOKENS.size))
    row = compare_forms(TOKENS, gaps).set_index("form").loc["floored"]
    fitted = row["c"] * TOKENS ** -row["exponent"] + row["floor"]
    rss = (((gaps - fitted) / np.maximum(gaps, 0.01)) ** 2).sum()
    assert row["rss"] == pytest.approx(rss)
    assert row["aic"] == pytest.approx(31 * math.log(rss / 31) + 2 * 4)


def test_the_last_octave_is_held_out():
    gaps = LAWS["power"].copy()
    late = TOKENS > 5e5
    gaps[late] += 0.01  # a law that breaks where nobody has looked
    table = compare_forms(TOKENS, gaps).set_index("form")
    assert table["held_points"].eq(late.sum()).to_numpy().all()
    assert table["held_error"]["power"] == pytest.approx(0.01, rel=0.01)
    assert table["held_bias"]["power"] == pytest.approx(-0.01, rel=0.01)


@pytest.mark.parametrize("form", ["power", "floored"])
def test_the_linear_part_is_least_squares(form):
    generator = np.random.default_rng(2)
    shape, gaps = generator.random(9), generator.random(9)
    gaps += 2 * shape
    weights = generator.random(9) + 0.1
    columns = np.c_[shape, np.ones(9)] if form == "floored" else shape[:, None]
    expected, rss = np.linalg.lstsq(columns * weights[:, None], gaps * weights, rcond=None)[:2]
    found = _linear(shape, gaps, weights, form)
    assert found[0] == pytest.approx(expected[0])
    assert found[2] == pytest.approx(rss[0])
    if form == "floored":
        assert found[1] == pytest.approx(expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_no_other_parameters_do_better(form):
    law = LAWS["stretched" if form == "stretched" else "floored"]
    gaps = law * (1 + 0.1 * np.random.default_rng(3).standard_normal(TOKENS.size))
    curve = fit(TOKENS, gaps, form)
    assert curve is not None
    assert curve.rss == pytest.approx(
        (((curve(TOKENS) - gaps) / np.maximum(gaps, 0.01)) ** 2).sum()
    )

    def rss(x):
        if form == "stretched":
            fitted = x[0] * np.exp(-((TOKENS / np.exp(x[1])) ** np.exp(x[2])))
        else:
            fitted = x[0] * (TOKENS / 3e4) ** -np.exp(x[2])
            fitted = fitted + (x[1] if form == "floored" else 0)
        return (((fitted - gaps) / np.maximum(gaps, 0.01)) ** 2).sum()

    starts = [(1, 0.0 if form == "floored" else np.log(s), np.log(0.4)) for s in (1e2, 1e4)]
    options = {"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-12}
    best = min(
        optimize.minimize(rss, start, method="Nelder-Mead", options=options).fun for start in starts
    )
    assert curve.rss <= best * (1 + 1e-3)


def test_nothing_is_said_beyond_four_times_the_longest_run():
    curve = fit(TOKENS, LAWS["power"], "power")
    assert curve is not None
    assert curve(4e6) == pytest.approx(20 * 4e6**-0.5)
    with pytest.raises(ValueError, match="after 5e[+]06 tokens from runs of 1e[+]06"):
        curve(5e6)
    assert curve.reaches(0.05) == pytest.approx((20 / 0.05) ** 2)
    assert math.isnan(curve.reaches(0.001))
    floored = fit(TOKENS, LAWS["floored"], "floored")
    assert floored is not None
    assert floored.reaches(0.02) == math.inf
    assert floored.reaches(0.06) == pytest.approx((20 / 0.03) ** 2, rel=1e-3)
    stretched = fit(TOKENS, LAWS["stretched"], "stretched")
    assert stretched is not None
    assert stretched(stretched.reaches(0.1)) == pytest.approx(0.1)
    assert stretched.reaches(0.6) == 0


def test_too_few_points_have_a_reason_and_no_crash():
    table = compare_forms([0, 1e3, 1e4, 1e5], [1, 0.5, 0.2, 0.1]).set_index("form")
    assert math.isfinite(table["aic"]["power"])
    assert table["reason"]["floored"] == "3 evaluations for 3 parameters"
    assert math.isnan(table["aic"]["stretched"])
    empty = compare_forms([], [])
    assert empty["aic"].isna().to_numpy().all()
    assert not empty["best"].to_numpy().any()


def test_a_curve_that_rises_or_ends_below_zero_has_a_fit():
    rising = compare_forms(TOKENS, 0.1 + 1e-7 * TOKENS).set_index("form")
    assert rising["c"]["floored"] == 0
    assert rising["floor"]["floored"] > 0.1
    below = compare_forms(TOKENS, LAWS["power"] - 0.05).set_index("form")
    assert below["floor"]["floored"] == pytest.approx(-0.05, rel=0.01)


def test_every_student_has_its_fits():
    first = student(np.r_[0, TOKENS], np.r_[2, LAWS["power"]])
    other = student(
        np.r_[0, TOKENS], np.r_[2, LAWS["floored"]], known={"layer": 1}, status="diverged"
    )
    table = fit_students(pd.concat([first, other]))
    assert len(table) == 6
    assert table.loc[table["layer"] == 1, "reason"].eq("diverged").to_numpy().all()
    assert fit_students(first.iloc[:0]).empty
