"""The criterion: its test against enumeration and scipy, planted heads, and no heads at all."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ablate import Head
from probes.criterion import (
    CONTROL,
    EXACT_ROWS,
    MATCHING,
    NULLS,
    Criterion,
    judged,
    passing,
    rows_needed,
    sign_flip_p,
)

SHUFFLED = NULLS[1]
LENGTHS = (25, 60, 94, 128)


def scanned(
    heads: dict[str, dict], seeds: int = 3, noise: float = 0.02, seed: int = 1
) -> pd.DataFrame:
    """A scan whose scores are given, with noise: a number, or one for each of LENGTHS."""
    rng = np.random.default_rng(seed)
    rows = []
    for component, scores in heads.items():
        for s, (at, length) in itertools.product(range(seeds), enumerate(LENGTHS)):
            for score, level in scores.items():
                mean = level[at] if isinstance(level, tuple) else level
                value = float(mean + noise * rng.normal())
                rows.append(
                    {
                        "component": component,
                        "seed": s,
                        "length": length,
                        "score": score,
                        "value": value,
                    }
                )
    return pd.DataFrame(rows)


def head(matching: object, control: object, shuffled: object, attribution: float) -> dict:
    return {
        MATCHING: matching,
        CONTROL: control,
        SHUFFLED: shuffled,
        "attribution": attribution,
    }


PLANTED = {
    "L1H0": head(0.6, 0.05, 0.05, 3.0),  # induction
    "L1H1": head(0.9, 0.05, 0.05, 2.0),  # induction, the stronger one
    "L0H0": head(0.95, 0.95, 0.05, 3.0),  # a fixed distance back, on rows that repeat or not
    "L0H1": head(0.05, 0.05, 0.05, 5.0),  # copies, matches nothing
    "L0H2": head(0.8, 0.05, 0.05, 0.0),  # matches, copies nothing
    "L0H3": head(0.8, 0.05, 0.05, -2.0),  # matches, and takes away
    "L0H4": head(0.6, 0.05, 0.6, 3.0),  # looks at the earlier copies, whatever the token
    "L0H8": head(0.6, 0.05, 0.4, 3.0),  # looks at them, somewhat more where the token is right
    "L0H5": head(
        (0.95, 0.15, 0.15, 0.15), 0.05, 0.05, 3.0
    ),  # one length only, above 0.3 on average
    "L0H6": head(0.1, 0.01, 0.01, 3.0),  # better than its nulls, but little
    "L0H7": head(0.62, 0.35, 0.05, 3.0),  # more than its control, of which there is too much
} | {f"L2H{i}": head(0.05, 0.05, 0.05, 0.0) for i in range(10)}


def test_planted_heads_are_told_apart():
    table = judged(scanned(PLANTED))
    assert passing(table) == (Head(1, 1), Head(1, 0))
    of = table.set_index("component")
    assert list(table["component"]) == list(PLANTED)
    assert of.loc["L0H0", "positional"]
    assert of.loc["L0H0", "q"] > 0.05
    assert of.loc["L0H1", ["copies", "matches"]].tolist() == [True, False]
    assert not of.loc[["L0H0", "L0H4"], "matches"].any()  # enough, but no more than a null
    assert of.loc[["L0H2", "L0H3"], "matches"].all()
    assert not of.loc[["L0H2", "L0H3"], "copies"].any()
    assert of.loc["L0H4", f"p_{CONTROL}"] <= 1 / 4096 < 0.05 < of.loc["L0H4", "q"]
    assert of.loc["L0H4", ["positional", "unspecific"]].tolist() == [False, True]
    assert of.loc["L0H8", ["matches", "copies", "unspecific"]].tolist() == [True, True, True]
    assert of.loc["L0H7", ["positional", "unspecific"]].tolist() == [True, False]
    assert of.loc["L0H5", ["matches", "one_length"]].tolist() == [True, True]
    assert of.loc["L0H5", "lengths_matched"] == 1
    assert of.loc["L0H6", "q"] <= 0.05
    assert not of.loc["L0H6", "matches"]
    assert of.loc["L0H7", ["matches", "copies", "positional"]].tolist() == [True, True, True]
    assert (of["rows"] == 12).all()
    assert (of["lengths"] == 4).all()
    assert not of.drop("L0H5")["one_length"].to_numpy().any()


def test_the_thresholds_are_arguments():
    frame = scanned(PLANTED)
    assert Head(0, 6) in passing(judged(frame, Criterion(matching=0.05)))
    assert passing(judged(frame, Criterion(matching=0.7))) == (Head(1, 1),)
    assert passing(judged(frame, Criterion(copying=2.5))) == (Head(1, 0),)
    assert Head(0, 7) in passing(judged(frame, Criterion(share=0.9)))
    # Without the shuffled null, what looks at all earlier copies passes.
    assert Head(0, 4) in passing(judged(frame, Criterion(nulls=(CONTROL,))))
    # The lower end must lie above the threshold, not the mean alone.
    mean = float(judged(frame)["attribution"].iloc[0])
    assert Head(1, 0) not in passing(judged(frame, Criterion(copying=mean - 1e-4)))


def test_means_and_intervals_are_students():
    frame = scanned(PLANTED)
    table = judged(frame).set_index("component")
    for score in (MATCHING, CONTROL, SHUFFLED, "attribution"):
        cells = frame[(frame["component"] == "L0H4") & (frame["score"] == score)]["value"]
        interval = stats.ttest_1samp(cells, 0).confidence_interval(0.95)
        assert table.loc["L0H4", score] == pytest.approx(cells.mean())
        assert table.loc["L0H4", f"{score}_low"] == pytest.approx(interval.low)
        assert table.loc["L0H4", f"{score}_high"] == pytest.approx(interval.high)


def test_p_and_q_are_those_of_scipy():
    """Heads between certain and nothing, so that p takes many values."""
    heads = {f"L0H{i}": head(0.1 + 0.002 * i, 0.1, 0.1, 1.0) for i in range(20)}
    frame = scanned(heads, seeds=3)
    table = judged(frame)
    cells = frame.pivot_table(index="score", columns=["component", "seed", "length"])["value"]
    worst = []
    for row in table.itertuples():
        both = []
        for null in NULLS:
            d = (cells.loc[MATCHING] - cells.loc[null])[row.component].to_numpy()
            test = stats.permutation_test(
                (d,), np.sum, permutation_type="samples", alternative="greater", n_resamples=np.inf
            )
            assert getattr(row, f"p_{null}") == pytest.approx(test.pvalue)
            both.append(test.pvalue)
        worst.append(max(both))
    assert table["p"].tolist() == pytest.approx(worst)
    assert len(set(worst)) > 10
    # Benjamini–Hochberg by hand: the least p_(j)·m/j among those at least as large.
    order = sorted(range(20), key=lambda i: worst[i])
    for place, i in enumerate(order):
        by_hand = min(worst[order[j]] * 20 / (j + 1) for j in range(place, 20))
        assert table["q"][i] == pytest.approx(min(by_hand, 1))
    harmonic = sum(1 / j for j in range(1, 21))
    wider = judged(frame, Criterion(correction="by"))["q"]
    assert wider.tolist() == pytest.approx(np.minimum(table["q"] * harmonic, 1).tolist())


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_sign_flips_are_enumerated(rows: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(rows)
    d = np.stack([rng.normal(0.5, 1, rows), rng.integers(-1, 3, rows), np.zeros(rows)], axis=1)
    expected = [
        np.mean([np.dot(s, column) >= column.sum() - 1e-9 for s in _signs(rows)]) for column in d.T
    ]
    assert sign_flip_p(d, rng).tolist() == pytest.approx(expected)
    assert expected[2] == 1  # no difference anywhere
    monkeypatch.setattr("probes.criterion.SUMS", 7)  # a few patterns at a time
    assert sign_flip_p(d, rng).tolist() == pytest.approx(expected)


def _signs(rows: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=rows))


def test_beyond_that_they_are_sampled():
    rng = np.random.default_rng(0)
    d = rng.normal(0.35, 1, (EXACT_ROWS + 1, 3))
    d[:, 2] = 1e-12  # the same for every size
    exact = [np.mean([np.dot(s, c) >= c.sum() - 1e-9 for s in _signs(len(d))]) for c in d.T[:2]]
    sampled = sign_flip_p(d, rng, resamples=20_000)
    assert 0.005 < exact[0] < 0.9
    assert sampled[:2] == pytest.approx(exact, abs=0.012)
    assert sampled[2] <= 8 / 20_001  # 2^−17 is 1/131,072
    assert sign_flip_p(np.ones((40, 1)), rng, resamples=100)[0] == 1 / 101  # and never 0
    again = sign_flip_p(d, np.random.default_rng(5), resamples=500)
    assert again.tolist() == sign_flip_p(d, np.random.default_rng(5), resamples=500).tolist()


def test_rows_needed_is_where_a_lone_head_can_pass():
    assert rows_needed(24) == 9
    assert rows_needed(144) == 12
    assert rows_needed(4608) == 17
    assert rows_needed(1) == 5
    for heads, level, found in itertools.product((1, 7, 24, 200), (0.05, 0.01), (1, 5)):
        if found > heads:
            continue
        n = rows_needed(heads, level, found)
        for rows, passes in ((n, True), (n - 1, False)):
            p = np.array([2.0**-rows] * found + [1.0] * (heads - found))
            q = stats.false_discovery_control(p)
            assert (q[0] <= level + 1e-12) == passes
    wider = rows_needed(24, correction="by")
    for rows, passes in ((wider, True), (wider - 1, False)):
        p = np.array([2.0**-rows] + [1.0] * 23)
        assert (stats.false_discovery_control(p, method="by")[0] <= 0.05) == passes
    with pytest.raises(ValueError, match="30 of 24 heads"):
        rows_needed(24, found=30)


def test_as_many_rows_as_needed_are_enough_and_one_less_is_said():
    few = {name: PLANTED[name] for name in list(PLANTED)[:10]} | {
        f"L3H{i}": head(0.05, 0.05, 0.05, 0.0) for i in range(11)
    }
    few = {name: few[name] for name in few if name != "L1H1"}  # 20 heads: 9 rows
    frame = scanned(few)
    rows = list(itertools.product(range(3), LENGTHS))
    table = judged(_some(frame, rows[:9]), Criterion(matching=0.3))
    assert Head(1, 0) in passing(table)
    with pytest.raises(
        ValueError, match="8 rows .* 20 heads at level 0.05: .* 2\\^−8, .* scan 9 rows or more"
    ):
        judged(_some(frame, rows[:8]))


def _some(frame: pd.DataFrame, rows: list[tuple[int, int]]) -> pd.DataFrame:
    return frame.loc[[pair in rows for pair in zip(frame["seed"], frame["length"], strict=True)]]


def test_many_rows_are_sampled_finely_enough_for_a_lone_head():
    many = {"L0H0": head(0.8, 0.05, 0.05, 3.0)} | {
        f"L{1 + i // 40}H{i % 40}": head(0.05, 0.05, 0.05, 0.0) for i in range(400)
    }
    frame = scanned(many, seeds=5)
    assert passing(judged(frame)) == (Head(0, 0),)
    assert passing(judged(frame, resamples=8_020)) == (Head(0, 0),)
    with pytest.raises(ValueError, match="8019 sign patterns .* 401 heads .* sample 8020 or more"):
        judged(frame, resamples=8_019)


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_without_induction_heads_false_discoveries_keep_to_the_level(shared: float):
    """Heads that do the same with repetition as without it, alone or all moved by the same rows."""
    runs, heads = 200, 24
    rng = np.random.default_rng(3)
    shape = heads, 12
    keys = [
        (f"L0H{h}", s, n) for h, s, n in itertools.product(range(heads), range(3), range(20, 24))
    ]
    keys = pd.DataFrame(keys, columns=["component", "seed", "length"])
    false, false_both = 0, 0
    for _ in range(runs):
        parts = []
        for score in (MATCHING, CONTROL, SHUFFLED, "attribution"):
            noise = shared * rng.normal(size=(1, 12)) + math.sqrt(1 - shared**2) * rng.normal(
                size=shape
            )
            parts.append(keys.assign(score=score, value=0.2 + 0.05 * noise.flatten()))
        frame = pd.concat(parts, ignore_index=True)
        table = judged(frame)
        alone = stats.false_discovery_control(table[f"p_{CONTROL}"])
        false += bool((alone <= 0.05).any())
        false_both += bool((table["q"] <= 0.05).any())
    within = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / runs)
    assert false / runs <= within
    assert false_both <= false  # a head must beat both
    if not shared:
        assert false > 0  # the test is not one that never calls


def test_a_copying_score_of_the_weights_has_one_value_a_head():
    frame = scanned(PLANTED)
    ov = pd.DataFrame(
        {"component": list(PLANTED), "seed": -1, "length": -1, "score": "ov", "value": 0.5}
    )
    ov.loc[ov["component"] == "L1H0", "value"] = -0.2
    table = judged(pd.concat([frame, ov], ignore_index=True), Criterion(by="ov"))
    of = table.set_index("component")
    assert of.loc["L1H1", ["ov_low", "ov", "ov_high"]].tolist() == [0.5, 0.5, 0.5]
    # What matches without attribution may have an OV circuit that copies.
    assert set(passing(table)) == {Head(1, 1), Head(0, 2), Head(0, 3)}


def test_heads_without_a_copying_score_are_judged_and_not_called():
    frame = scanned(PLANTED)
    frame = frame[(frame["component"] != "L1H1") | (frame["score"] != "attribution")]
    table = judged(frame)
    assert passing(table) == (Head(1, 0),)
    row = table.set_index("component").loc["L1H1"]
    assert math.isnan(row["attribution"])
    assert math.isnan(row["attribution_low"])
    assert row["matches"]
    assert not row["copies"]


def test_rows_without_prefix_matching_are_left_out():
    frame = scanned(PLANTED)
    more = frame[frame["score"] != MATCHING].assign(seed=-1, value=9.0)
    more = more.drop_duplicates(["component", "length", "score"])
    both = pd.concat([more, frame], ignore_index=True)
    pd.testing.assert_frame_equal(judged(both), judged(frame))


def test_bad_input_is_one_clear_line():
    frame = scanned(PLANTED)
    with pytest.raises(ValueError, match="no score 'ov' in this scan: it has prefix_matching, "):
        judged(frame, Criterion(by="ov"))
    with pytest.raises(ValueError, match="no score 'prefix_matching_shuffled'"):
        judged(frame[frame["score"] != SHUFFLED])
    with pytest.raises(ValueError, match="measured twice"):
        judged(pd.concat([frame, frame], ignore_index=True))
    with pytest.raises(ValueError, match="prefix_matching_control of L1H0 was not measured"):
        judged(frame.drop(index=frame[frame["score"] == CONTROL].index[0]))
    with pytest.raises(ValueError, match="attribution of L1H0 was not measured"):
        judged(frame.drop(index=frame[frame["score"] == "attribution"].index[0]))
    with pytest.raises(ValueError, match="level 1.5"):
        Criterion(level=1.5)
    with pytest.raises(ValueError, match="at least one null"):
        replace(Criterion(), nulls=())
