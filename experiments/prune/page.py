"""What is on the page of a pruning run: question, captions, tables, and what to doubt?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from experiments.prune.cells import FEWEST, RESAMPLES
from experiments.prune.findings import NAMES, Findings, listed
from experiments.prune.sentences import counted, sentences
from experiments.prune.tables import MIDDLE, TRANSFERRED
from experiments.report import Report, chosen

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
        findings=sentences(findings),
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
        f"Importance for {counted(len(findings.tasks), 'task')} at {shots} is the gradient of "
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


def _tables(findings: Findings) -> Mapping[str, pd.DataFrame]:
    """Tables by caption; those of nothing are left out."""
    tolerance = f"{100 * findings.study.tolerance:g}"
    removable = findings.removable.assign(
        shots=[_shots(s) for s in findings.removable["shots"]],
        **{f"{name} %": 100 * findings.removable[name] for name in ("share",)},
    )
    made = {
        f"How many can go before the average falls by more than {tolerance} points": chosen(
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
        "selection examples": chosen(
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
        "The exported checkpoint beside the whole model; accuracy on reporting examples": (
            findings.exported
        ),
        "Exact effects on selection examples: the rise of the loss without a component, in nats": (
            _exact_table(findings)
        ),
        "Partners: the task that agrees most and least with each (Spearman's ρ)": chosen(
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
        "Accuracy of the whole model on reporting examples, in percent": chosen(
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
    return chosen(
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
        f"uncertain by up to {task:.0f} points; raise `--report-limit` for more.",
        f"Intervals draw texts and the {seeds} seeds again, seeds with their deviations made "
        f"larger by √({seeds}/{seeds - 1}): with so few seeds they are rough."
        if seeds > 1
        else "There is one seed: intervals are over texts only, and say nothing of other "
        "demonstrations or other selection examples.",
        f"Differences of two orders: Student's intervals and p with {max(seeds - 1, 1)} degrees of "
        "freedom, one less than seeds; more `--seeds` tell more."
        if seeds > 1
        else "Differences of two orders are over texts alone.",
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
    if findings.at_chance:
        said.append(
            "The whole model is not told from blind guesses in "
            f"{listed(findings.at_chance)}: what is at chance cannot fall, and makes averages "
            "look as if more could go. The curves of each task show which."
        )
    if findings.not_ordered:
        said.append(
            "Asked for, but they order nothing here (no heads, one task, or no exact effects): "
            f"{listed(findings.not_ordered)}."
        )
    if findings.study.grid and findings.grid.empty:
        said.append("No grid: it takes heads and FFNs, with an order for both.")
    if findings.study.export is not None and findings.exported.empty:
        said.append(
            f"No checkpoint was written to {findings.study.export}: nothing can go within the "
            "tolerance on the selection examples; `--export-mask` names components."
        )
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
    return chosen(
        points, {**keys, "value": "points", "low": "from", "high": "to", "p_holm": "p (Holm)"}
    )


def _shots(value: float) -> str:
    return "all" if math.isnan(value) else f"{value:.0f}"
