"""Layers, thirds and capacity by eye and by counting; the oracle's table; the pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ablate import FFN, Head
from experiments.agreement_plots import agreement_heatmap, capacity_curves, layer_curve
from experiments.oracle import effect_table
from experiments.statistics import holm, mean_and_stderr, paired_permutation_test, sign_flip_tests
from experiments.where import capacity_retained, importance_by_layer, top_by_third

HEADS = [Head(layer, head) for layer in range(6) for head in range(2)]


def test_importance_by_layer_is_the_mean_over_its_components():
    generator = np.random.default_rng(0)
    components = [*HEADS, FFN(0)]
    values = generator.normal(5, 1, (30, 13))
    frame = importance_by_layer(components, [(values, list(range(30)))])
    rows = frame.set_index(["kind", "layer"])
    assert rows.loc[("Head", 2), "value"] == pytest.approx(values[:, 4:6].mean())
    assert rows.loc[("FFN", 0), "components"] == 1
    per_example = values[:, 4:6].mean(axis=1)
    low, high = stats.t.interval(0.95, 29, per_example.mean(), stats.sem(per_example))
    found = rows.loc[("Head", 2)]
    assert (found.low, found.high) == pytest.approx((low, high))
    alone = importance_by_layer(components, [(values, ["one text"] * 30)])
    assert alone.low.isna().all()
    # Two tasks weigh the same, and their variances add up.
    both = importance_by_layer(
        components, [(values, list(range(30))), (values[:10] + 9, list(range(10)))]
    ).set_index(["kind", "layer"])
    few = per_example[:10] + 9
    assert both.loc[("Head", 2), "value"] == pytest.approx((per_example.mean() + few.mean()) / 2)
    error = np.hypot(stats.sem(per_example), stats.sem(few)) / 2
    found = both.loc[("Head", 2)]
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, 9) * error)


def test_thirds_count_the_top_and_its_expectation():
    # 12 heads; the top 4 are layer 4 and 5: the last third, all of it.
    scores = {h: float(h.layer) + h.head / 10 for h in HEADS}
    frame = top_by_third(scores, 6, share=1 / 3).set_index("third")
    assert frame["value"].tolist() == [0, 0, 1]
    assert frame["expected"].tolist() == pytest.approx([1 / 3] * 3)
    choices = [len({8, 9, 10, 11} & set(c)) for c in itertools.combinations(range(12), 4)]
    assert frame.loc["last", "p"] == pytest.approx(2 * np.mean([c >= 4 for c in choices]))
    assert frame.loc["first", "p"] == pytest.approx(2 * np.mean([c == 0 for c in choices]))
    tied = top_by_third(dict.fromkeys(HEADS, 1.0), 6, share=1 / 3)
    assert tied["value"].tolist() == pytest.approx([1 / 3] * 3)
    assert (tied["p"] > 0.3).all()
    with pytest.raises(ValueError, match="L5H0 in a depth of 5"):
        top_by_third(scores, 5)


def test_each_stack_has_its_own_depth():
    scores = {Head(3, 0, "encoder"): 3.0, Head(0, 0, "cross"): 2.0, FFN(1, "decoder"): 1.0}
    frame = top_by_third(scores, {"encoder": 4, "decoder": 2}, share=0.67)
    assert frame["value"].tolist() == [0.5, 0, 0.5]


def test_capacity_by_eye_and_its_random_band():
    score = dict(zip(HEADS[:4], [1.0, 2.0, 3.0, 4.0], strict=True))
    rankings = {"ascending": HEADS[:4], "descending": HEADS[:4][::-1]}
    generator = np.random.default_rng(0)
    frame = capacity_retained(score, rankings, generator, orders=4000)
    curves = {name: rows["value"].tolist() for name, rows in frame.groupby("ranking")}
    assert curves["ascending"] == pytest.approx([1, 0.9, 0.7, 0.4, 0])
    assert curves["descending"] == pytest.approx([1, 0.6, 0.3, 0.1, 0], abs=1e-12)
    assert curves["random"] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    kept = [1 - sum(order[:2]) / 10 for order in itertools.permutations([1, 2, 3, 4])]
    middle = frame[(frame.ranking == "random") & (frame.removed == 2)].iloc[0]
    assert (middle.low, middle.high) == pytest.approx((min(kept), max(kept)))
    with pytest.raises(ValueError, match="at least 0"):
        capacity_retained({HEADS[0]: -1.0, HEADS[1]: 2.0}, {}, generator)
    with pytest.raises(ValueError, match="'short' orders 1 components and 4"):
        capacity_retained(score, {"short": HEADS[:1]}, generator)


def test_many_sign_flip_tests_are_one_each():
    generator = np.random.default_rng(0)
    right = generator.integers(-1, 2, (40, 1)).astype(float)
    few = np.concatenate([generator.normal(0.5, 1, (8, 1)), np.zeros((32, 1))])
    many = generator.normal(0.3, 1, (40, 3))
    table = np.concatenate([right, few, many, np.zeros((40, 1))], axis=1)
    found = sign_flip_tests(table, generator, resamples=20_000)
    for column, p in zip(table.T, found, strict=True):
        alone = paired_permutation_test(column, np.zeros(40), generator, resamples=20_000)
        assert p == pytest.approx(alone, abs=0.02)
    assert found[-1] == 1.0


def test_the_oracles_table():
    generator = np.random.default_rng(1)
    groups = [f"text {i // 2}" for i in range(60)]
    effects = generator.normal(0, 1, (60, 5))
    effects[:, 1] -= 1.5
    effects[:, 4] = effects[::-1, 3]  # one mean, summed in another order
    frame = effect_table(HEADS[:5], effects, groups, generator)
    value, stderr = mean_and_stderr(effects[:, 1], clusters=groups)
    row = frame.set_index("component").loc["L0H1"]
    assert (row.value, row.stderr) == pytest.approx((value, stderr))
    sums = pd.Series(effects[:, 1]).groupby(groups).sum().to_numpy()
    alone = paired_permutation_test(sums, np.zeros(30), generator)
    assert row.p == pytest.approx(alone, abs=0.002)
    assert row.p_holm < 0.05
    assert (frame.p_holm.drop(1) > 0.05).all()
    assert frame.p_holm.to_numpy() == pytest.approx(holm(frame.p))
    assert frame.tied.tolist() == [1, 1, 1, 2, 2]
    assert frame["rank"][1] == 1
    assert frame["rank"][3] == frame["rank"][4]
    assert frame["rank"].sum() == 15


def test_enough_patterns_are_drawn_for_holm_to_call_one_of_many():
    generator = np.random.default_rng(2)
    effects = generator.normal(0, 1, (30, 300))
    effects[:, 7] = 1 + 0.1 * generator.normal(size=30)
    components = [Head(layer, head) for layer in range(20) for head in range(15)]
    frame = effect_table(components, effects, list(range(30)), generator)
    assert frame.p_holm[7] < 0.05
    assert (frame.p_holm < 0.05).sum() == 1


def test_the_oracle_refuses_what_does_not_match():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"effects of shape \(3, 2\) for 2 groups"):
        effect_table(HEADS[:2], np.zeros((3, 2)), [0, 1], generator)
    with pytest.raises(ValueError, match="an effect of L0H1 is not finite"):
        effect_table(HEADS[:2], np.array([[0, np.nan], [1, 1]]), [0, 1], generator)


def test_pictures_show_their_frames():
    rows = [("a", 0, "b", 0, 0.5), ("a", 0, "c", 0, -0.25), ("b", 0, "c", 0, 0.125)]
    names = ["task_a", "shots_a", "task_b", "shots_b", "value"]
    frame = pd.DataFrame(rows, columns=names).assign(metric="spearman")
    ax = agreement_heatmap(frame, shots=0)
    assert sorted({t.get_text() for t in ax.texts}) == ["0.12", "0.50", "−0.25"]
    assert len(ax.texts) == 6
    with pytest.raises(ValueError, match="no kendall between tasks at 0 shots"):
        agreement_heatmap(frame, shots=0, metric="kendall")
    generator = np.random.default_rng(0)
    layers = importance_by_layer(HEADS, [(generator.random((9, 12)), list(range(9)))])
    assert layer_curve(layers).lines[0].get_xdata().tolist() == list(range(6))
    score = dict(zip(HEADS, np.arange(12.0), strict=True))
    curves = capacity_curves(capacity_retained(score, {"importance": HEADS}, generator))
    assert [line.get_label() for line in curves.lines] == ["importance", "random"]
