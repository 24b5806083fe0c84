"""Crossings of curves whose crossing is known, and of each way to not cross."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.reset.statistics.crossing import (
    crossing_noise,
    crossings,
    equivalent_progress,
    final_gap,
    noise_floor,
    recovered_within,
)
from tests.experiments.reset.invented import student

GRID = np.r_[0, np.geomspace(1e3, 1e6, 31)]  # ten evaluations a decade


def power(tokens, c=20.0, alpha=0.5):
    """c t^−α; at 0 tokens the damage, which is not of the law."""
    with np.errstate(divide="ignore"):
        return np.where(tokens > 0, c * tokens**-alpha, 3.0)


def crossing(ledger, threshold=0.05, kind="absolute"):
    absolute, relative = ((threshold,), ()) if kind == "absolute" else ((), (threshold,))
    found = crossings(ledger, absolute, relative)
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 0.1), (0.5, 0.05), (0.8, 0.02), (1.2, 0.01)])
def test_a_power_law_crosses_where_it_says(alpha, tau):
    c = 20.0 * 1e3**alpha / 1e3**0.5
    row = crossing(student(GRID, power(GRID, c, alpha)), tau)
    truth = (c / tau) ** (1 / alpha)
    assert row["status"] == "recovered"
    assert row["tokens"] == pytest.approx(truth, rel=0.02)
    assert row["lower"] < truth <= row["upper"]
    assert GRID[GRID.searchsorted(truth)] == row["upper"]
    assert row["share"] == pytest.approx(row["tokens"] / 1e6)
    assert row["at_budget"] == 1e6


def test_relative_thresholds_ask_for_a_share_of_the_damage():
    ledger = student(GRID, power(GRID))
    for share in (0.9, 0.95):
        row = crossing(ledger, share, "relative")
        assert row["tokens"] == pytest.approx((20 / (3 * (1 - share))) ** 2, rel=0.02)


def test_noise_moves_a_crossing_little_and_not_only_late():
    generator = np.random.default_rng(0)
    truth = (20 / 0.05) ** 2
    found = np.array(
        [
            crossing(student(GRID, power(GRID) + 0.001 * generator.standard_normal(GRID.size)))[
                "tokens"
            ]
            for _ in range(100)
        ]
    )
    # 0.001 nat of noise on a slope of 0.5 · 0.05 nat per unit of log t: about 4 %
    assert np.std(np.log(found / truth)) < 0.06
    assert abs(np.mean(np.log(found / truth))) < 0.03


def test_a_dip_does_not_count_and_a_bump_does_not_move():
    tokens = [0, 100, 200, 400, 800, 1600, 3200]
    dip = crossing(student(tokens, [1, 0.2, 0.04, 0.2, 0.12, 0.04, 0.03]))
    assert (dip["lower"], dip["upper"]) == (800, 1600)
    bump = crossing(student(tokens, [1, 0.2, 0.06, 0.9, 0.045, 0.04, 0.03]))
    # M is 1, 0.2, 0.2, 0.2, 0.045: the dip to 0.06 did not hold, and 0.9 is a bump
    assert bump["tokens"] == pytest.approx(400 * 2 ** ((0.2 - 0.05) / (0.2 - 0.045)))
    late = crossing(student(tokens, [1, 0.07, 0.06, 0.3, 0.045, 0.04, 0.03]))
    # M is 1, 0.07, 0.07, 0.07, 0.045: 0.07 held, so the bump to 0.3 is noise
    assert late["tokens"] == pytest.approx(400 * 2 ** ((0.07 - 0.05) / (0.07 - 0.045)))


def test_a_last_evaluation_counts_only_if_the_run_says_it_recovered():
    tokens, gaps = [0, 100, 200, 400], [1, 0.2, 0.1, 0.04]
    assert crossing(student(tokens, gaps, status="recovered"))["upper"] == 400
    for status in ("budget", "running"):
        row = crossing(student(tokens, gaps, status=status))
        assert row["status"] == "censored"
        assert (row["lower"], row["upper"]) == (200, np.inf)  # it was above at 200, no later
        assert row["at_budget"] == 400


def test_one_that_never_crosses_is_censored_at_what_it_was_trained():
    row = crossing(student([0, 100, 200, 400], [1, 0.2, 0.04, 0.1]))
    assert row["status"] == "censored"
    assert (row["lower"], row["upper"], row["at_budget"]) == (400, np.inf, 400)
    assert math.isnan(row["tokens"])
    assert math.isnan(row["share"])


def test_divergence_is_a_class_and_leaves_what_was_crossed_before():
    ledger = student([0, 100, 200, 400, 800, 1600], [1, 0.2, 0.08, 0.07, 1.6, 1.7])
    found = crossings(ledger, (0.1, 0.05), ()).set_index("threshold")
    assert found.loc[0.1, "status"] == "recovered"
    assert found.loc[0.05, "status"] == "diverged"
    assert (found.loc[0.05, "lower"], found.loc[0.05, "upper"]) == (400, np.inf)
    edge = student([0, 100, 200], [1, 1.49, 1.2])
    assert crossing(edge)["status"] == "censored"  # half a nat above the reset, and no more
    lost = student([0, 100, 200], [1, np.nan, np.nan], status="diverged")
    assert crossing(lost)["status"] == "diverged"
    assert crossing(lost)["lower"] == 0


def test_a_dip_before_a_divergence_did_not_hold():
    row = crossing(student([0, 100, 200, 400], [1, 0.2, 0.04, 2.0]))
    assert (row["status"], row["lower"]) == ("diverged", 100)


def test_damage_below_the_threshold_is_no_time_at_all():
    row = crossing(student([0, 100, 200], [0.03, 0.02, 0.01]))
    assert (row["tokens"], row["lower"], row["upper"]) == (0, 0, 100)
    assert row["status"] == "recovered"
    harmed = crossing(student([0, 100, 200, 400], [0.03, 0.2, 0.04, 0.03]))
    assert (harmed["lower"], harmed["upper"]) == (100, 200)  # training itself went above first


def test_a_crossing_before_the_first_evaluation_is_linear_in_tokens():
    row = crossing(student([0, 100, 200], [0.09, 0.01, 0.0]))
    assert row["tokens"] == pytest.approx(50)
    assert (row["lower"], row["upper"]) == (0, 100)


def test_nothing_was_reset_so_no_share_of_the_damage():
    found = crossings(student([0, 100, 200], [0.0, 0.002, 0.001], known={"arm": "A1"}))
    assert set(found["kind"]) == {"absolute"}
    assert (found["tokens"] == 0).all()


def test_every_student_has_its_rows_whatever_became_of_it():
    students = [
        student([0, 100, 200], gaps, status=status, known={"seed": seed, "base_tokens": t0})
        for seed, (gaps, status, t0) in enumerate(
            [
                ([1, 0.01, 0.0], "recovered", 1e6),
                ([1, 0.9, 0.8], "budget", np.nan),
                ([1, 2.0, 3.0], "diverged", 1e6),
                ([1, 0.9, 0.02], "running", 1e6),
            ]
        )
    ]
    found = crossings(pd.concat(students))
    assert len(found) == 4 * 8
    assert found.groupby("seed").size().tolist() == [8] * 4
    assert set(found["status"]) == {"recovered", "censored", "diverged"}
    assert found["share"].isna()[(found["seed"] == 1).to_numpy()].to_numpy().all()


def test_annealed_rows_make_a_curve_only_together():
    raw = student([0, 100, 200, 400], [1, 0.2, 0.08, 0.06])
    one = student([400], [0.02], weights="annealed").assign(loss_reset=2.0)
    assert set(crossings(pd.concat([raw, one]))["weights"]) == {"raw"}
    forks = student([100, 200, 400], [0.1, 0.04, 0.02], weights="annealed").assign(loss_reset=2.0)
    found = crossings(pd.concat([raw, forks]), (0.05,), ()).set_index("weights")
    assert found.loc["raw", "status"] == "censored"
    assert (found.loc["annealed", "lower"], found.loc["annealed", "upper"]) == (100, 200)


@given(st.lists(st.floats(-0.1, 1.4), min_size=2, max_size=12), st.floats(0.001, 0.5))
def test_the_interval_is_the_slow_search(gaps, tau):
    tokens = np.r_[0, 100 * 2.0 ** np.arange(len(gaps) - 1)]
    row = crossing(student(tokens, [1.0, *gaps[1:]]), tau)
    gaps = [1.0, *gaps[1:]]
    held = [i for i in range(1, len(gaps) - 1) if gaps[i] <= tau and gaps[i + 1] <= tau]
    if held:
        assert (row["lower"], row["upper"]) == (tokens[held[0] - 1], tokens[held[0]])
        assert row["lower"] <= row["tokens"] <= row["upper"]
    else:
        assert row["status"] == "censored"
        assert row["lower"] == max(t for t, g in zip(tokens, gaps, strict=True) if g > tau)


def test_two_evaluations_at_one_place_are_refused():
    ledger = student([0, 100, 200], [1, 0.2, 0.1])
    with pytest.raises(ValueError, match="two evaluations of one student at 0 tokens"):
        crossings(pd.concat([ledger, ledger]))
    with pytest.raises(ValueError, match="no column gap"):
        crossings(ledger.drop(columns="gap"))


def test_an_empty_ledger_has_no_crossings():
    empty = student([0, 100], [1, 0.5]).iloc[:0]
    assert crossings(empty).empty
    assert {"tokens", "share", "status"} <= set(crossings(empty).columns)


@pytest.mark.parametrize(("correlation", "spread"), [(1.0, 0.04), (0.0, 0.04)])
def test_bootstrap_of_the_evaluations_matches_the_slope(correlation, spread):
    ledger = student(GRID, power(GRID), stderr=0.001)
    found = crossing_noise(
        ledger, np.random.default_rng(1), absolute=(0.05,), relative=(), correlation=correlation
    ).iloc[0]
    truth = (20 / 0.05) ** 2
    # half-width 1.96 · 0.001 nat over a slope of 0.025 nat per unit of log t: 0.078
    assert math.log(found["high"] / truth) == pytest.approx(1.96 * spread, rel=0.5)
    assert math.log(truth / found["low"]) == pytest.approx(1.96 * spread, rel=0.5)
    assert found["recovered"] == 1


def test_bootstrap_of_one_that_may_not_cross_has_no_upper_end():
    ledger = student([0, 100, 200, 400], [1, 0.2, 0.0495, 0.049], stderr=0.002)
    found = crossing_noise(ledger, np.random.default_rng(1), absolute=(0.05,), relative=(0.9,))
    assert found["high"].iloc[0] == np.inf
    assert 0.5 < found["recovered"].iloc[0] < 0.9
    unknown = crossing_noise(ledger.assign(stderr=np.nan), np.random.default_rng(1))
    assert unknown[["low", "high", "recovered"]].isna().to_numpy().all()
    with pytest.raises(ValueError, match="correlation 2"):
        crossing_noise(ledger, np.random.default_rng(1), correlation=2)


def test_equivalent_progress_reads_the_bases_own_curve():
    tokens = np.array([0, 1e3, 1e4, 1e5, 1e6])
    curve = pd.DataFrame({"tokens": tokens, "loss": [5.0, 4.0, 3.0, 3.2, 1.0]})
    q = equivalent_progress([6.0, 5.0, 4.0, 3.5, 3.0, 2.0, 1.0, 0.9, np.nan], curve)
    expected = [0, 0, 1e-3, 10**-2.5, 1e-2, 10**-0.5, 1, np.inf]
    assert q[:-1] == pytest.approx(expected)
    assert math.isnan(q[-1])
    assert (np.diff(q[:-2]) >= 0).all()
    assert equivalent_progress(4.0, curve, total=1e4) == pytest.approx(0.1)
    later = equivalent_progress([4.5, 4.0], curve.iloc[1:])
    assert math.isnan(later[0])
    with pytest.raises(ValueError, match="1 evaluations"):
        equivalent_progress(4.0, pd.DataFrame({"tokens": [0.0], "loss": [np.nan]}))


def test_noise_floor_is_of_the_arm_that_repairs_nothing():
    quiet = [
        student([0, 100, 200], [0, a, b], stderr=0.002, known={"arm": "A1", "seed": seed})
        for seed, (a, b) in enumerate([(0.002, 0.006), (0.0, -0.004)])
    ]
    loud = student([0, 100, 200], [1, 0.5, 0.3])
    floor = noise_floor(pd.concat([*quiet, loud])).iloc[0]
    assert floor["mean"] == pytest.approx((0.004 - 0.002) / 2)
    assert floor["stderr"] == pytest.approx(0.003)  # spread of 0.004 and −0.002, over √2
    assert floor["band"] == pytest.approx(0.005)  # at 200 tokens
    assert floor["students"] == 2
    one = noise_floor(quiet[0]).iloc[0]
    assert one["stderr"] == pytest.approx(0.002)
    assert noise_floor(loud).empty
    assert math.isnan(noise_floor(quiet[0].assign(stderr=np.nan)).iloc[0]["stderr"])


def test_final_gap_is_annealed_and_same_within_noise():
    raw = student([0, 100, 200], [1, 0.3, 0.2])
    annealed = student([100, 200], [0.1, 0.015], weights="annealed").assign(loss_reset=2.0)
    gaps = final_gap(pd.concat([raw, annealed]))
    assert gaps["gap"].tolist() == [0.015]
    assert gaps["recovery"].tolist() == pytest.approx([0.985])
    assert final_gap(raw).empty
    floor = pd.DataFrame({"base": ["b0"], "base_share": [1.0], "stderr": [0.008]})
    assert recovered_within(gaps, floor)["same"].tolist() == [True]  # 2 · 0.008 > 0.015
    quiet = recovered_within(gaps, floor.assign(stderr=0.001))
    assert (quiet["same"].tolist(), quiet["tolerance"].tolist()) == ([False], [0.01])
    unknown = recovered_within(gaps, floor.iloc[:0])
    assert unknown["tolerance"].tolist() == [0.01]


def test_a_loss_that_rises_and_comes_back_has_not_diverged():
    found = crossing(student([0, 100, 200, 300, 400], [1, 9, 0.3, 0.01, 0.01]))
    assert found["status"] == "recovered"
    assert 200 < found["tokens"] <= 300
    stays = crossing(student([0, 100, 200, 300], [1, 9, 0.3, 9]))
    assert stays["status"] == "diverged"
    assert stays["lower"] == 200
