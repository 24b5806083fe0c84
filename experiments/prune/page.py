"""What does the page of a pruning run say: question, sentences, tables, and what to doubt?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.prune.cells import FEWEST, RESAMPLES
from experiments.prune.findings import (
    NAMES,
    Findings,
    costs_of,
    interval_in_words,
    listed,
    shots_of,
    signed,
)
from experiments.prune.tables import MIDDLE, TRANSFERRED
from experiments.report import Report

CONVENTIONS = {
    "gate": "|Σ_t ∂L/∂ξ_t|, averaged over examples",
    "token": "Σ_t |∂L/∂ξ_t|, averaged over examples",
    "reference": "Σ_t |∂L/∂ξ_t| as the paper's code divides it, the last layer apart",
}
QUOTAS = {"global": "from all layers together", "layer": "the same share of each layer"}
BANDS = (
    f"Bands are 95 % intervals of {RESAMPLES} replicates that draw texts and seeds again; a band "
    "of width 0 is left out."
)
CAPTIONS = {
    "summary": "Left: importance on selection examples, averaged over tasks and seeds, at the "
    "largest shot count. Right: accuracy on reporting examples, averaged over tasks, shot counts "
    f"and seeds, as components go, least important first. {BANDS} With more than three lines, only "
    "importance and the random orders have theirs.",
    "importance": "Importance on selection examples, averaged over tasks and seeds. Units with one "
    "component a layer are lines, with 95 % intervals over texts.",
    "transfer": "Rankings that know other tasks. Left: accuracy as components go. Right: how much "
    "the accuracy of a task differs when the order is not its own, averaged over the steps between "
    f"{100 * MIDDLE[0]:.0f} and {100 * MIDDLE[1]:.0f} % removed, with 95 % intervals.",
    "grid": "Heads and FFNs removed together: change of the accuracy against the whole model, in "
    "points, averaged over tasks and seeds.",
    "alone": "Every component removed alone on selection examples, averaged over tasks, shots and "
    "seeds. Outlined: those measured again on reporting examples. Bars have 95 % intervals over "
    "texts.",
    "exact": "Does the gradient say what removal does? A point a component, averaged over "
    "conditions; ρ is Spearman's within a condition, averaged over them.",
    "agreement": "Spearman's ρ of the importance of two tasks; `aggregate` is the mean over tasks, "
    "each of which is part of it.",
    "where": "Mean importance of a layer's components with 95 % intervals over texts; share of the "
    "top 30 % in each third of depth, beside random choices (bar: 95 %, dash: mean); and the share "
    "of the induction scores still there as heads go by importance (grey: random orders).",
    "induction": "Importance of every head beside its induction scores on repeated random tokens, "
    "which know no task.",
}


def report(findings: Findings) -> Report:
    """The page of a run; captions belong to the figures of `figures`."""
    study = findings.study
    units = listed([NAMES.get(unit, unit) for unit in findings.totals])
    captions = dict(CAPTIONS)
    for unit in findings.units:
        name = NAMES.get(unit, unit)
        captions[f"accuracy_{unit}"] = (
            f"Accuracy as {name} go, by number of shots, averaged over tasks and seeds. {BANDS}"
        )
        captions[f"tasks_{unit}"] = (
            f"Accuracy as {name} go, task by task, averaged over seeds. {BANDS}"
        )
    return Report(
        title=f"Which {units} of {study.model} does in-context learning need?",
        question=_question(findings),
        findings=_sentences(findings),
        captions=captions,
        tables=_tables(findings),
        caveats=_caveats(findings),
    )


def _question(findings: Findings) -> str:
    study = findings.study
    shots = listed([str(s) for s in findings.shots])
    shots += " shot" if findings.shots == (1,) else " shots"
    names = list(dict.fromkeys(findings.removable["ranking"]))
    return (
        f"Importance for {_count(len(findings.tasks), 'task')} at {shots} is the gradient of "
        "the loss on the right answer with respect to a gate on a component's output "
        f"({CONVENTIONS.get(study.convention, study.convention)}), on selection examples. "
        f"Components are removed (what stands in for their output: {study.fill}), least important "
        f"first, {QUOTAS.get(study.quota, study.quota)}, and accuracy is measured on other, "
        "reporting examples, which had no say in any order.\n\n"
        f"Seeds: {', '.join(map(str, findings.seeds))}; each draws its own demonstrations and "
        "selection examples. Accuracies are averaged over tasks and shot counts with equal weight; "
        "where an order is a task's own, that is an average over differently pruned models."
        + (f"\n\nOrders: {listed(names)}." if names else "")
    )


def _sentences(findings: Findings) -> list[str]:
    return [
        *_removable_sentences(findings),
        *_contrast_sentences(findings),
        *_grid_sentences(findings),
        *_alone_sentences(findings),
        *_fidelity_sentences(findings),
        *_agreement_sentences(findings),
        *_place_sentences(findings),
        *_induction_sentences(findings),
    ]


def _removable_sentences(findings: Findings) -> list[str]:
    said = []
    tolerance = f"{100 * findings.study.tolerance:g}"
    for unit in findings.units:
        rows = findings.removable
        rows = rows.loc[(rows["unit"] == unit) & rows["shots"].isna()].to_dict("records")
        parts = [
            f"{row['value']:g} by {row['ranking']} ({interval_in_words(row['low'], row['high'])})"
            for row in rows
        ]
        said.append(
            f"{_named(unit)}: of {findings.totals[unit]}, this many can go before the average "
            f"falls by more than {tolerance} points: {listed(parts)}."
        )
    return said


def _contrast_sentences(findings: Findings) -> list[str]:
    said = []
    for unit in findings.units:
        rows = findings.contrasts
        rows = rows.loc[rows["unit"] == unit] if len(rows) else rows
        called = [
            f"{row['ranking']} ({signed(100 * row['value'])})"
            for row in rows.to_dict("records")
            if row["p_holm"] < 0.05
        ]
        if called:
            said.append(
                f"{_named(unit)}: averaged over the steps, these orders differ in accuracy from "
                f"random ones, in points: {listed(called)} (each p < 0.05 after Holm's correction "
                f"over {_count(len(rows), 'order')})."
            )
        elif len(rows) and np.isfinite(rows["p_holm"].to_numpy(float)).any():
            said.append(
                f"{_named(unit)}: averaged over the steps, no order differs in accuracy from "
                "random ones by more than chance explains (smallest p "
                f"{rows['p_holm'].min():.2g} after Holm's correction over "
                f"{_count(len(rows), 'order')})."
            )
    return said


def _grid_sentences(findings: Findings) -> list[str]:
    said = []
    rows = findings.grid
    for ranking, own in rows.groupby("ranking", sort=False) if len(rows) else []:
        everywhere = own.loc[own["shots"].isna()]
        safe = everywhere.loc[everywhere["value"] >= -findings.study.tolerance - 1e-9]
        if len(safe):
            row = safe.loc[(safe["fraction"] + safe["ffns_fraction"]).idxmax()]
            said.append(
                f"Heads and FFNs together, by {ranking}: of the cells that lose at most "
                f"{100 * findings.study.tolerance:g} points, the one with most removed is "
                f"{100 * row['fraction']:.0f} % of heads and {100 * row['ffns_fraction']:.0f} % of "
                f"FFNs ({_points(row)}); chosen among {len(everywhere)} cells, so chance favours "
                "it."
            )
    return said


def _alone_sentences(findings: Findings) -> list[str]:
    said = [
        f"{costs_of(row)} alone, on reporting examples; the loss changes by "
        f"{signed(row['loss_rise'], 3)} nats (p = {row['p_holm']:.2g} after Holm's correction)."
        for row in findings.alone.to_dict("records")
    ]
    for unit in dict.fromkeys(findings.exact["unit"]) if len(findings.exact) else []:
        rows = findings.exact.loc[findings.exact["unit"] == unit]
        scores = rows.loc[rows["metric"] == "score_change"]
        loss = rows.loc[rows["metric"] == "loss_rise"]
        sure = loss.loc[(loss["p_holm"] < 0.05) & (loss["value"] > 0)]
        tied = int((scores["tied"] > 1).sum())
        said.append(
            f"{_named(str(unit))} removed alone on selection examples: the loss rises beyond "
            f"chance for {len(sure)} of {len(loss)} (Holm); in accuracy {tied} of {len(scores)} "
            "tie with another."
        )
    return said


def _fidelity_sentences(findings: Findings) -> list[str]:
    said = []
    for unit in dict.fromkeys(findings.fidelity["unit"]):
        rows = findings.fidelity.loc[findings.fidelity["unit"] == unit].set_index("exact")
        rise, size = rows.loc["rise"], rows.loc["size"]
        said.append(
            f"{_named(str(unit))}: the gradient orders components as their exact removal does with "
            f"Spearman's ρ = {_rho(rise)} (mean rise of the loss) and {_rho(size)} (mean size of "
            f"its change), averaged over {_count(int(rise['conditions']), 'condition')}."
        )
    return said


def _agreement_sentences(findings: Findings) -> list[str]:
    if findings.agreement.empty:
        return []
    said = []
    rows = findings.agreement
    tasks = rows.loc[
        (rows["metric"].isin(["spearman", "overlap"]))
        & (rows["shots_a"] == rows["shots_b"])
        & (rows["task_a"] != "aggregate")
        & (rows["task_b"] != "aggregate")
    ]
    for unit, own in tasks.groupby("unit", sort=False):
        parts = []
        for shots, at in own.groupby("shots_a", sort=True):
            values = at.groupby("metric")["value"]
            mean, low, high = values.mean(), values.min(), values.max()
            parts.append(
                f"ρ = {_minus(mean['spearman'])} at {shots_of(shots)} "
                f"({_minus(low['spearman'])} to {_minus(high['spearman'])}; {100 * mean['overlap']:.0f} % of the top shared)"
            )
        k, components = own["k"].iloc[0], own["components"].iloc[0]
        said.append(
            f"{_named(str(unit))}: two tasks' importance agrees, averaged over pairs, with "
            f"{listed(parts)}; by chance they would share {100 * k / components:.0f} % of the top "
            f"{k}."
        )
    shots = findings.across_shots
    for unit in dict.fromkeys(shots["unit"]) if len(shots) else []:
        own = shots.loc[(shots["unit"] == unit) & (shots["metric"] == "spearman")]
        parts = [
            f"ρ = {_minus(row['value'])} between {row['shots_a']} and {row['shots_b']}"
            for row in own.to_dict("records")
        ]
        said.append(
            f"{_named(str(unit))}: numbers of shots of one task agree with {listed(parts)}, "
            f"averaged over {_count(int(own['tasks'].max()), 'task')}."
        )
    return said


def _place_sentences(findings: Findings) -> list[str]:
    said = []
    for unit in dict.fromkeys(findings.thirds["unit"]) if len(findings.thirds) else []:
        rows = findings.thirds.loc[findings.thirds["unit"] == unit]
        parts = [
            f"{100 * row['value']:.0f} % in the {row['third']} third (chance "
            f"{100 * row['expected']:.0f} %, p = {row['p']:.2g})"
            for row in rows.to_dict("records")
        ]
        said.append(
            f"{_named(str(unit))}: of the {rows['k'].iloc[0]} most important, {listed(parts)}."
        )
    return said


def _induction_sentences(findings: Findings) -> list[str]:
    rows = findings.induction
    if rows.empty:
        return []
    return [
        f"At {shots_of(row['shots'])}, {100 * row['overlap']:.0f} % of the {row['k']} most "
        f"important heads are among the {row['k']} with the highest {row['score'].replace('_', ' ')} score "
        f"(chance {100 * row['expected']:.0f} %, p = {row['p']:.2g}); over all heads ρ = "
        f"{_minus(row['spearman'])}."
        for row in rows.loc[rows["shots"] == rows["shots"].max()].to_dict("records")
    ]


def _tables(findings: Findings) -> Mapping[str, pd.DataFrame]:
    """Tables by caption; those of nothing are left out."""
    tolerance = f"{100 * findings.study.tolerance:g}"
    removable = findings.removable.assign(
        shots=[_shots(s) for s in findings.removable["shots"]],
        **{f"{name} %": 100 * findings.removable[name] for name in ("share",)},
    )
    made = {
        f"How many can go before the average falls by more than {tolerance} points": _chosen(
            removable,
            {
                "unit": "unit",
                "ranking": "ranking",
                "shots": "shots",
                "components": "of",
                "value": "can go",
                "low": "from",
                "high": "to",
                "share %": "share %",
            },
        ),
        "Difference to random orders in points of accuracy, averaged over the steps; p is Holm's "
        "over a unit's orders": _in_points(
            findings.contrasts, {"unit": "unit", "ranking": "ranking"}
        ),
        "Difference to a task's own order in points of accuracy, between "
        f"{100 * MIDDLE[0]:.0f} and {100 * MIDDLE[1]:.0f} % removed; p is Holm's over tasks and "
        "orders": _in_points(
            findings.transfer, {"unit": "unit", "task": "task", "ranking": "ranking"}
        ),
        "What one removed alone costs, in points of accuracy on reporting examples; chosen on "
        "selection examples": _chosen(
            findings.alone.assign(
                points=100 * findings.alone["value"], error=100 * findings.alone["stderr"]
            ),
            {
                "unit": "unit",
                "component": "component",
                "points": "points",
                "error": "standard error",
                "p_holm": "p (Holm)",
                "loss_rise": "loss rise, nats",
            },
        ),
        "Exact effects on selection examples: the rise of the loss without a component, in nats": (
            _exact_table(findings)
        ),
        "Partners: the task that agrees most and least with each (Spearman's ρ)": _chosen(
            findings.partners,
            {
                "unit": "unit",
                "task": "task",
                "shots": "shots",
                "which": "which",
                "partner": "partner",
                "value": "ρ",
                "low": "from",
                "high": "to",
            },
        ),
        "Accuracy of the whole model on reporting examples, in percent": _chosen(
            findings.baseline.assign(
                **{name: 100 * findings.baseline[name] for name in ("value", "stderr", "chance")}
            ),
            {
                "task": "task",
                "shots": "shots",
                "value": "accuracy %",
                "stderr": "standard error",
                "chance": "chance %",
                "examples": "examples",
                "texts": "texts",
                "seeds": "seeds",
            },
        ),
    }
    return {caption: table for caption, table in made.items() if len(table)}


def _exact_table(findings: Findings) -> pd.DataFrame:
    rows = findings.exact
    if rows.empty:
        return rows
    rows = rows.loc[rows["metric"] == "loss_rise"].sort_values("value", ascending=False)
    return _chosen(
        rows,
        {
            "unit": "unit",
            "component": "component",
            "value": "loss rise",
            "low": "from",
            "high": "to",
            "p_holm": "p (Holm)",
        },
    )


def _caveats(findings: Findings) -> Sequence[str]:
    texts = int(findings.baseline["texts"].min()) if len(findings.baseline) else 0
    seeds = len(findings.seeds)
    task = 100 * 1.96 * math.sqrt(0.25 / texts) if texts else math.nan
    said = [
        f"A task has {texts} texts or more to report on: one task's accuracy at one shot count is "
        f"uncertain by up to {task:.0f} points; raise `--limit` for more.",
        f"Intervals draw texts and the {seeds} seeds again, seeds with their deviations made "
        f"larger by √({seeds}/{seeds - 1}): with so few seeds they are rough."
        if seeds > 1
        else "There is one seed: intervals are over texts only, and say nothing of other "
        "demonstrations or other selection examples.",
        "Tasks and shot counts are those given, not drawn: no interval speaks of other tasks.",
        "Importance is first order: what is saturated scores 0 and may matter. Exact removal is "
        "the check, and takes one component at a time.",
        "The average is over differently pruned models where an order is a task's own; only the "
        "orders that know no task or all tasks are of one model.",
        "p-values are Holm's within one table and unit; nothing corrects over tables, units or "
        "runs. p of the top 30 % in the thirds and in induction are uncorrected, and take "
        "components as exchangeable.",
        {
            "zero": "Zero is far from what a component usually writes: `--fill mean` and "
            "`--fill resample` leave its usual output in place.",
            "mean": "What stands in is the mean over selection examples.",
            "resample": "What stands in was drawn from other selection examples.",
        }.get(findings.study.fill, f"What stands in: {findings.study.fill}."),
    ]
    if texts < FEWEST:
        said.append(
            f"Some task has fewer than {FEWEST} texts: averages that it is part of have no "
            "interval, because so few texts cannot give one."
        )
    if len(findings.alone):
        said.append(
            "Components removed alone were chosen on selection examples; their cost in the table "
            "is from reporting examples, so it is not inflated by the choice."
        )
    if set(TRANSFERRED) & set(findings.removable["ranking"]):
        said.append(
            "`aggregate` contains the task itself; `others` does not, and is the order of a task "
            "never seen."
        )
    if findings.truncated:
        said.append(
            f"{findings.truncated} prompts were longer than the context and lost their beginning."
        )
    return said


def _in_points(frame: pd.DataFrame, keys: Mapping[str, str]) -> pd.DataFrame:
    """Differences of a table in points, with their interval and p."""
    if frame.empty:
        return frame
    points = frame.assign(**{name: 100 * frame[name] for name in ("value", "low", "high")})
    return _chosen(
        points, {**keys, "value": "points", "low": "from", "high": "to", "p_holm": "p (Holm)"}
    )


def _chosen(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Some columns under other names."""
    if frame.empty:
        return frame
    return frame.reindex(columns=list(columns)).set_axis(list(columns.values()), axis="columns")


def _points(row: Mapping[str, float] | pd.Series) -> str:
    """`+3.2 points, 95 % interval 1.0 to 5.4`."""
    said = f"{signed(100 * float(row['value']))} points"
    if math.isnan(float(row["low"])):
        return said
    ends = [signed(100 * float(row[name])) for name in ("low", "high")]
    return f"{said}, 95 % interval {ends[0]} to {ends[1]}"


def _rho(row: pd.Series) -> str:
    said = _minus(float(row["value"]))
    if math.isnan(float(row["low"])):
        return said
    return f"{said} [{_minus(float(row['low']))}, {_minus(float(row['high']))}]"


def _minus(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _named(unit: str) -> str:
    name = NAMES.get(unit, unit)
    return name[0].upper() + name[1:]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shots(value: float) -> str:
    return "all" if math.isnan(value) else f"{value:.0f}"
