"""What does a pruning run look like to a reader: four figures, three tables, and what to doubt?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from experiments.plots import accuracy_curves, head_heatmap, panels, style
from experiments.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from experiments.prune_findings import Findings

CAPTIONS = {
    "summary": (
        "Left: gradient importance of every head, averaged over tasks, at the largest shot count. "
        "Right: accuracy averaged over tasks and shot counts, each pruned by its own order, least "
        "important first; bands are 95 % bootstrap intervals over shared texts, the grey band "
        "spans the random orders."
    ),
    "importance": "Gradient importance |∂L/∂ξ| of every head, in nats, averaged over tasks.",
    "accuracy": "Accuracy as heads go, task by task; the grey band spans the random orders.",
    "alone": (
        "What removing one head alone costs: points of accuracy, averaged over tasks and shots, on "
        "the selection examples. Outlined: the heads measured again on reporting examples."
    ),
}


def figures(findings: Findings) -> Mapping[str, Figure]:
    """The figures of a run, by file name."""
    return {
        "summary": _summary(findings),
        "importance": _importance(findings),
        "accuracy": _by_task(findings),
        "alone": _alone(findings),
    }


def report(findings: Findings) -> Report:
    """The page of a run; captions belong to the figures of `figures`."""
    study = findings.study
    return Report(
        title=f"Which heads of {study.model} does in-context learning need?",
        question=(
            f"Every head's importance for {len(findings.tasks)} tasks at "
            f"{_listed([str(s) for s in study.shots])} shots is the gradient of the loss on the "
            "right answer with respect to a gate on the head's output, on selection examples. "
            "Heads are removed (their output set to "
            f"{study.fill}) least important first, by the ranking of each task and shot count, so "
            "the average is over differently pruned models, and accuracy is "
            "measured on other examples, which had no say in the order.\n\n"
            f"Controls: {study.random_orders} random orders, and the order of the Frobenius norms "
            "of the heads' output weights, which know nothing of the tasks."
        ),
        findings=findings.sentences,
        captions=CAPTIONS,
        tables={
            "Heads that can go before the average falls by more than "
            f"{100 * study.tolerance:g} points": findings.removable,
            "The heads that cost most alone, measured again on reporting examples": (
                findings.critical
            ),
            "Accuracy of the whole model on reporting examples": findings.baseline,
        },
        caveats=_caveats(findings),
    )


def _caveats(findings: Findings) -> Sequence[str]:
    examples = findings.study.limit
    caveats = [
        f"{examples} examples a task and shot count: a single task's accuracy is uncertain by "
        f"about {100 * 1.96 * math.sqrt(0.25 / examples):.0f} points; raise `--limit` for more."
        if examples
        else "All examples of each task are used.",
        "Gradient importance is first order: a saturated head scores 0 and may matter; the heads "
        "removed alone are the check.",
        "Zero is an ablation that a head's constant output feels too: "
        "`--fill mean` leaves that output in place."
        if findings.study.fill == "zero"
        else "The fill was collected on selection examples.",
        "The most critical heads were chosen on selection examples; their cost in the table is "
        "from reporting examples, so it is not inflated by the choice.",
    ]
    if findings.truncated:
        caveats.append(
            f"{findings.truncated} prompts were longer than the context and lost their beginning."
        )
    return caveats


def _summary(findings: Findings) -> Figure:
    figure, axes = panels(1, 2, width=5.2, height=3.7)
    most = max(findings.study.shots)
    _heatmap(findings, most, axes[0, 0], f"importance at {most} shots")
    accuracy_curves(
        _drawn(findings.average),
        baseline=findings.average.loc[findings.average.removed == 0, "value"].iloc[0],
        chance=findings.chance,
        title="average over tasks and shots",
        ax=axes[0, 1],
    )
    return figure


def _importance(findings: Findings) -> Figure:
    shots = findings.study.shots
    figure, axes = panels(1, len(shots), width=5.2, height=3.7)
    for ax, count in zip(axes[0], shots, strict=True):
        _heatmap(findings, count, ax, f"{count} shots")
    return figure


def _heatmap(findings: Findings, shots: int, ax: Axes, title: str) -> None:
    rows = findings.importance
    rows = rows.loc[(rows.shots == shots) & (rows.convention == findings.study.convention)]
    mean = rows.groupby(["layer", "head"])["value"].mean().reset_index()
    head_heatmap(mean, title=title, label="nats", ax=ax)


def _by_task(findings: Findings) -> Figure:
    tasks, shots = findings.tasks, findings.study.shots
    figure, axes = panels(len(shots), len(tasks), width=3.1, height=2.6, share_y=True)
    for row, count in enumerate(shots):
        for column, task in enumerate(tasks):
            rows = findings.by_task
            rows = rows.loc[(rows.task == task) & (rows.shots == count)]
            accuracy_curves(
                _drawn(rows),
                baseline=rows.loc[rows.removed == 0, "value"].iloc[0],
                chance=findings.chances[task],
                title=f"{task}, {count} shots".replace("_", " "),
                ylabel="accuracy" if column == 0 else "",
                xlabel="share of heads removed" if row == len(shots) - 1 else "",
                legend=row == 0 and column == 0,
                ax=axes[row, column],
            )
    return figure


def _alone(findings: Findings) -> Figure:
    figure, axes = panels(1, 1, width=5.6, height=3.7)
    ax = axes[0, 0]
    cost = findings.alone.assign(value=-100 * findings.alone.value)
    head_heatmap(
        cost,
        signed=True,
        title="one head removed",
        label="points of accuracy",
        ax=ax,
    )
    with style():
        for layer, head in zip(findings.critical["layer"], findings.critical["head"], strict=True):
            ax.add_patch(_outline(int(head), int(layer)))
    return figure


def _outline(x: int, y: int) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.6)


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a ranking: random orders become their mean, within their range."""
    random = rows.loc[rows.ranking == "random"].groupby(["removed", "fraction"], as_index=False)
    band = random["value"].agg(["mean", "min", "max"]).reset_index()
    band = band.rename(columns={"mean": "value", "min": "low", "max": "high"})
    known = rows.loc[~rows.ranking.isin(["random", "whole"])]
    return pd.concat([known, band.assign(ranking="random")], ignore_index=True)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
