"""Findings of a run that nobody made: planted needs must come out as planted numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ablate.components import FFN, Component, Head, KVGroup, Mixer
from ablate.importance import Importance
from experiments.prune import scores, tables
from experiments.prune.cells import cells_of
from experiments.prune.figures import figures, main_rankings
from experiments.prune.findings import Findings, findings_of, interval_in_words
from experiments.prune.measured import ALONE, EXPORTED, WHOLE, Key, Measured
from experiments.prune.page import report
from experiments.report import page
from experiments.statistics import holm, mean_and_stderr, sign_flip_tests
from tests.experiments.prune.invented import Settings, ffns, heads, measured

NEEDED = {"L0H0": 0.5, "L3H1": 0.3, "L3F": 0.4}


def found(of: Measured, **settings: Any) -> Findings:
    return findings_of(cast("Any", Settings(**settings)), of)


@pytest.fixture(scope="module")
def run() -> Measured:
    return measured(
        {"heads": heads(), "ffns": ffns()},
        rankings=("importance", "aggregate", "others", "exact", "weights", "random"),
        needed=NEEDED,
        alone=("L0H0", "L2H2", "L3F"),
        grid=True,
        induction=True,
    )


@pytest.fixture(scope="module")
def findings(run: Measured) -> Findings:
    return found(run)


def test_the_headline_and_its_numbers(findings: Findings):
    extra = findings.outcome.extra
    # 16 heads, two of them needed: 75 % go without loss, and no step beyond that was measured.
    assert (extra["heads"], extra["removable"], extra["removable_interval"]) == (16, 12, [12, 12])
    assert extra["critical"] == ["L0H0", "L2H2"]
    assert extra["removable_random"] < 12
    assert extra["truncated_prompts"] == 0
    assert extra["units"]["ffns"]["components"] == 4
    assert extra["units"]["ffns"]["removable"] == 3
    line = findings.outcome.headline
    assert line.startswith(
        "12 of 16 heads can go, by each task's and shot count's own order, before the average "
        "accuracy falls by more than 2 points (12 in all resamples; random orders "
    )
    assert "3 of 4 FFNs" in line
    assert "L0H0 (−" in line
    json.loads(findings.outcome.line(Path("run")))  # no nan


def test_the_same_run_gives_the_same_findings(run: Measured, findings: Findings):
    again = found(run)
    pd.testing.assert_frame_equal(again.metrics, findings.metrics)
    assert again.outcome == findings.outcome


def test_metrics_are_tidy_and_can_be_kept(findings: Findings, tmp_path: Path):
    rows = findings.metrics
    assert {"part", "metric", "value", "stderr", "low", "high"} <= set(rows.columns)
    assert not set(rows.part).union(rows.metric) & {None, np.nan}
    assert set(rows.part) == {
        *("importance", "curve", "removable", "contrast", "transfer", "baseline", "alone"),
        *("grid", "exact", "fidelity", "agreement", "across shots", "layer", "third"),
        *("capacity", "induction", "induction score"),
    }
    rows.to_parquet(tmp_path / "metrics.parquet", index=False)
    again = pd.read_parquet(tmp_path / "metrics.parquet")
    assert again["value"].to_numpy() == pytest.approx(rows["value"].to_numpy(float), nan_ok=True)


def test_curves_are_the_means_of_the_answers(run: Measured, findings: Findings):
    answers = run.answers
    for unit, ranking in (("heads", "random"), ("ffns", "weights")):
        own = answers.loc[(answers.unit == unit) & (answers.ranking == ranking)]
        means = own.groupby(["task", "shots", "seed", "removed"])["score"].mean()
        slow = means.groupby(["task", "shots", "removed"]).mean().groupby("removed").mean()
        rows = findings.curves
        rows = rows.loc[(rows.unit == unit) & (rows.ranking == ranking)]
        average = rows.loc[(rows.task == "") & rows.shots.isna()].set_index("removed")["value"]
        assert average[slow.index].to_numpy() == pytest.approx(slow.to_numpy())
        at = rows.loc[(rows.task == "recall") & (rows.shots == 5)].set_index("removed")["value"]
        one = means.xs("recall").xs(5).groupby("removed").mean()
        assert at[one.index].to_numpy() == pytest.approx(one.to_numpy())
    assert set(findings.curves.loc[findings.curves.task == "", "shots"].dropna()) == {0, 5}


def test_the_baseline_is_clustered_by_text(run: Measured, findings: Findings):
    whole = run.answers.loc[run.answers.unit == WHOLE]
    own = whole.loc[(whole.task == "copy") & (whole.shots == 5)]
    row = findings.baseline.set_index(["task", "shots"]).loc[("copy", 5)]
    mean, stderr = mean_and_stderr(own.score, clusters=own.group)
    assert (row["value"], row.stderr) == pytest.approx((mean, stderr))
    assert (row.chance, row.examples, row.texts, row.seeds) == (0.25, 40, 20, 3)


def test_components_removed_alone_against_plain_loops(run: Measured, findings: Findings):
    table = findings.alone.set_index("component")
    assert table.unit.to_dict() == {"L0H0": "heads", "L2H2": "heads", "L3F": "ffns"}
    answers = run.answers
    whole = answers.loc[answers.unit == WHOLE]
    keys = ["task", "shots", "seed", "doc_id"]
    p_values = []
    for name in ("L0H0", "L2H2", "L3F"):
        without = answers.loc[(answers.unit == ALONE) & (answers.component == name)]
        both = without.merge(whole, on=keys, suffixes=("", "_whole"))
        both = both.assign(change=both.score - both.score_whole)
        means, variances, texts = [], [], []
        for _, rows in both.groupby("task"):
            mean, stderr = mean_and_stderr(rows.change, clusters=rows.group)
            means.append(mean)
            variances.append(stderr**2)
            texts += rows.groupby("group").change.sum().tolist()
        row = table.loc[name]
        assert row["value"] == pytest.approx(np.mean(means))
        assert row.stderr == pytest.approx(np.sqrt(np.sum(variances)) / 2)
        p_values.append(sign_flip_tests(np.array(texts)[:, None], np.random.default_rng(1))[0])
        assert row.loss_rise == pytest.approx((both.loss - both.loss_whole).mean())
    assert table.p.to_numpy() == pytest.approx(p_values, abs=0.002)
    assert table.p_holm.to_numpy() == pytest.approx(holm(table.p))
    assert table.loc["L0H0", "p_holm"] < 0.01
    assert table.loc["L2H2", "p"] == 1.0  # it is not needed at all


def test_tasks_and_shots_weigh_the_same_when_examples_are_missing(run: Measured):
    # Half the scores of one task at one shot count do not count.
    answers = run.answers.copy()
    gone = (answers.task == "copy") & (answers.shots == 5) & (answers.doc_id % 2 == 0)
    answers.loc[gone, "score"] = np.nan
    table = tables.alone_table(replace(run, answers=answers), np.random.default_rng(0))
    row = table.set_index("component").loc["L0H0"]
    keys = ["task", "shots", "seed", "doc_id"]
    kept = answers.set_index(keys)
    without = kept.loc[(kept.unit == ALONE) & (kept.component == "L0H0"), "score"]
    change = without - kept.loc[kept.unit == WHOLE, "score"]
    slow = change.groupby(level=["task", "shots"]).mean().mean()
    assert row["value"] == pytest.approx(slow)


def test_the_transfer_table_is_paired_with_a_tasks_own_order(findings: Findings):
    table = findings.transfer.set_index(["unit", "task", "ranking"])
    rows = findings.curves.set_index(["unit", "task", "ranking"]).sort_index()
    assert set(findings.transfer.ranking) == {"aggregate", "others"}
    for task in ("copy", "recall"):
        own, other = (
            rows.loc[("heads", task, name)].groupby("fraction")["value"].mean()
            for name in ("importance", "others")
        )
        expected = (other - own)[[0.25, 0.5, 0.75]].mean()
        assert table.loc[("heads", task, "others"), "value"] == pytest.approx(expected)
    assert np.isnan(table.loc[("heads", "all", "others"), "p_holm"])


def test_exact_effects_are_means_over_conditions(run: Measured, findings: Findings):
    means = run.effects.groupby(["task", "shots", "component"])[["loss_rise", "score_change"]]
    slow = means.mean().groupby("component").mean()
    for metric in ("loss_rise", "score_change"):
        rows = findings.exact.loc[findings.exact.metric == metric].set_index("component")
        assert rows["value"].to_numpy() == pytest.approx(slow.loc[rows.index, metric].to_numpy())
    losses = findings.exact.loc[findings.exact.metric == "loss_rise"].set_index("component")
    assert set(losses.index[losses.p_holm < 0.01]) == set(NEEDED)
    assert losses.loc["L0H0", "value"] == pytest.approx(0.2, abs=0.002)
    assert (losses.loc["L3H1", "layer"], losses.loc["L3H1", "head"]) == (3, 1)
    tied = findings.exact.loc[findings.exact.metric == "score_change"].set_index("component").tied
    assert tied["L1H1"] > 1
    assert tied["L0H0"] == 1


def test_fidelity_is_spearmans_in_every_condition(run: Measured, findings: Findings):
    names = [str(c) for c in run.units["heads"]]
    found_rho = []
    for key, importance in run.importance.items():
        gradient = importance.gate.abs().mean(0)[: len(names)].numpy()
        own = run.effects.loc[
            (run.effects.task == key.task)
            & (run.effects.shots == key.shots)
            & (run.effects.seed == key.seed)
        ]
        exact = own.groupby("component")["loss_rise"].mean()[names]
        found_rho.append(stats.spearmanr(gradient, exact).statistic)
    row = findings.fidelity.set_index(["unit", "exact"]).loc[("heads", "rise")]
    assert row["value"] == pytest.approx(np.mean(found_rho))
    assert row.conditions == 12
    assert row.low < row.high


def test_importance_and_its_error_over_texts(run: Measured, findings: Findings):
    rows = findings.importance.set_index(["unit", "shots", "component"])
    means, variances = [], []
    for task in ("copy", "recall"):
        values, texts = [], []
        for seed in (0, 1, 2):
            key = Key(task, 5, seed)
            values += run.importance[key].gate.abs()[:, 0].double().tolist()
            texts += list(run.groups[key])
        mean, stderr = mean_and_stderr(values, clusters=texts)
        means.append(mean)
        variances.append(stderr**2)
    row = rows.loc[("heads", 5, "L0H0")]
    assert row["value"] == pytest.approx(np.mean(means))
    assert row.stderr == pytest.approx(np.sqrt(np.sum(variances)) / 2)
    assert rows.loc[("ffns", 0, "L3F"), ["layer", "head"]].tolist() == [3, -1]


def test_layers_thirds_and_induction_say_where_the_planted_heads_are(findings: Findings):
    layers = findings.layers.loc[(findings.layers.unit == "heads") & (findings.layers.shots == 5)]
    own = findings.importance.loc[
        (findings.importance.unit == "heads") & (findings.importance.shots == 5)
    ]
    assert layers["value"].to_numpy() == pytest.approx(own.groupby("layer")["value"].mean())
    assert layers.set_index("layer")["value"].idxmax() == 0
    assert set(findings.thirds.unit) == {"heads", "ffns"}
    assert findings.thirds.groupby("unit")["value"].sum().tolist() == pytest.approx([1, 1])
    row = findings.induction.set_index(["shots", "score"]).loc[(5, "prefix_matching")]
    scores_of = findings.induction_scores.set_index("component").prefix_matching
    importance = own.set_index("component")["value"]
    rho = stats.spearmanr(importance, scores_of[importance.index]).statistic
    assert row.spearman == pytest.approx(rho)
    kept = findings.capacity.loc[findings.capacity.score == "prefix_matching"]
    assert set(kept.ranking) == {"0 shots", "5 shots", "random"}
    order = importance.sort_values().index
    total = scores_of.sum()
    half = 1 - scores_of[order[:8]].sum() / total
    step = kept.loc[(kept.ranking == "5 shots") & (kept.removed == 8), "value"]
    assert step.item() == pytest.approx(half)


def test_the_reference_convention_keeps_its_scores():
    generator = torch.Generator().manual_seed(0)
    token = torch.rand(6, 3, generator=generator)
    token[:, 2] = 0
    importance = Importance(
        (Head(0, 0), Head(1, 0), FFN(0)),
        token,
        token,
        tokens=torch.tensor([9, 8, 7, 6, 5, 4]),
        predictions=torch.tensor([1, 1, 2, 1, 1, 2]),
    )
    for convention in ("gate", "token", "reference"):
        expected = list(importance.scores(convention).values())
        mean = scores.per_example(importance, convention).mean(axis=0)
        assert mean == pytest.approx(expected)


def drawn(findings: Findings) -> set[str]:
    """Every figure is made and drawn."""
    made = figures(findings)
    for figure in made.values():
        (figure() if callable(figure) else figure).draw_without_rendering()
    return set(made)


def test_figures_and_page(findings: Findings):
    assert drawn(findings) == {
        *("summary", "importance", "accuracy_heads", "accuracy_ffns", "tasks_heads", "tasks_ffns"),
        *("transfer", "grid", "alone", "exact", "agreement", "where", "induction"),
    }
    assert main_rankings(findings, "heads") == [
        *("importance", "aggregate", "exact", "weights", "random")
    ]
    said = report(findings)
    assert set(figures(findings)) <= set(said.captions)
    assert all(len(table) for table in said.tables.values())
    text = page(said, findings.outcome.headline, {}, {}, {})
    assert "nan" not in text.replace("finance", "")
    assert "12 by importance (12 in all resamples)" in text
    assert "3 seeds again" in text


UNITS: dict[str, Mapping[str, tuple[Component, ...]]] = {
    "mixers": {"mixers": tuple(Mixer(layer) for layer in range(5))},
    "two stacks": {
        "heads": (*heads(2, 3, "encoder"), *heads(2, 3, "decoder"), *heads(2, 3, "cross")),
        "ffns": tuple(FFN(layer, stack) for stack in ("encoder", "decoder") for layer in (0, 1)),
    },
    "groups": {
        "heads": heads(3, 4),
        "groups": tuple(KVGroup(layer, group) for layer in range(3) for group in range(2)),
        "ffns": ffns(3),
    },
    "one": {"ffns": (FFN(0),)},
}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("size", ["small", "several"])
def test_any_units_tasks_shots_and_seeds(units: str, size: str):
    several = size == "several"
    of = measured(
        UNITS[units],
        tasks=("copy", "recall") if several else ("copy",),
        shots=(0, 1, 5) if several else (2,),
        seeds=(3, 4) if several else (7,),
        texts=6 if several else 3,
        of_text=1,
        rankings=("importance", "others", "random") if several else ("weights",),
        exact=several,
        induction=several and "heads" in UNITS[units],
        alone=[str(next(iter(UNITS[units].values()))[0])],
    )
    got = found(of)
    drawn(got)
    text = page(report(got), got.outcome.headline, {}, {}, {})
    assert "nan" not in text
    json.loads(got.outcome.line(Path("run")))
    assert not got.metrics.empty
    if not several:
        assert "too few texts for an interval" in got.outcome.headline
        assert "±" not in got.outcome.headline
        assert "by the order 'weights'" in got.outcome.headline
        assert got.contrasts.empty
        assert "There is one seed" in text


def test_a_run_of_random_orders_alone_and_one_of_none():
    of = measured({"heads": heads()}, rankings=("random",), exact=False)
    got = found(of)
    assert "random orders" not in got.outcome.headline
    assert "random" in got.outcome.headline
    drawn(got)
    none = replace(of, answers=of.answers.loc[of.answers.unit == WHOLE])
    empty = found(none)
    assert "nothing was pruned" in empty.outcome.headline
    assert empty.outcome.extra == {"truncated_prompts": 0}
    drawn(empty)
    page(report(empty), empty.outcome.headline, {}, {}, {})


def test_an_exported_checkpoint_is_compared_with_the_whole_model(run: Measured):
    answers = run.answers
    one = answers.loc[(answers.unit == ALONE) & (answers.component == "L0H0")]
    gone = one.assign(unit=EXPORTED, ranking=EXPORTED, component="")
    sizes = pd.DataFrame(
        [
            ("whole", "parameters", 200.0, np.nan, np.nan),
            ("exported", "parameters", 150.0, np.nan, np.nan),
            ("whole", "tokens_per_second", 100.0, 80.0, 120.0),
            ("exported", "tokens_per_second", 130.0, 115.0, 140.0),
        ],
        columns=pd.Index(["model", "metric", "value", "low", "high"]),
    )
    got = found(replace(run, answers=pd.concat([answers, gone]), exported=sizes))
    table = got.exported.set_index(["model", "metric"])
    cost = got.alone.set_index("component").loc["L0H0"]
    change = table.loc[("exported", "accuracy_change")]
    assert change["value"] == pytest.approx(cost["value"])
    assert change.stderr == pytest.approx(cost.stderr, rel=0.1)
    assert table.loc[("whole", "accuracy"), "value"] == pytest.approx(got.baseline["value"].mean())
    said = " ".join(report(got).findings)
    assert "parameters 200 → 150 (−25 %)" in said
    assert "tokens per second 100 → 130 (single forwards overlap" in said
    faster = sizes.assign(low=sizes["low"] + 10 * (sizes["model"] == "exported"))
    got = found(replace(run, answers=pd.concat([answers, gone]), exported=faster))
    assert "tokens per second 100 → 130 (+30 %)" in " ".join(report(got).findings)
    assert "exported" in set(got.metrics.part)
    drawn(got)


def test_scores_that_do_not_count_are_left_out(run: Measured):
    answers = run.answers.copy()
    gone = answers.doc_id % 4 == 0
    answers.loc[gone, "score"] = np.nan
    got = found(replace(run, answers=answers))
    same = found(replace(run, answers=run.answers.loc[~gone]))
    keys = ["unit", "ranking", "task", "shots", "removed"]
    one, other = (f.curves.set_index(keys)["value"] for f in (got, same))
    assert one.to_numpy() == pytest.approx(other[one.index].to_numpy())


def test_intervals_in_words():
    assert interval_in_words(3, 7) == "95 % interval 3–7"
    assert interval_in_words(4, 4) == "4 in all resamples"
    assert interval_in_words(np.nan, np.nan) == "too few texts for an interval"


def test_draws_are_shared_by_the_cells_of_a_task(run: Measured):
    cells = cells_of(run.answers, np.random.default_rng(0))
    assert set(cells.weights) == {"copy", "recall"}
    assert (cells.weights["copy"].sum(axis=1) == 19).all()
    assert (cells._picks((0, 1, 2)) == cells._picks((0, 1, 2))).all()
