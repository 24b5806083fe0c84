"""What do the selection examples say, in pictures? Importance, exact effects, place and agreement.

Units made of heads (or key/value groups) are maps of layers and heads, one for each stack; units
with one component a layer (FFNs, mixers) are lines over layers or bars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.agreement_plots import agreement_heatmap, capacity_curves, layer_curve
from experiments.plots import head_heatmap, panels, points, style
from experiments.prune.findings import NAMES, Findings, shots_of
from experiments.prune.pictures import effect_bars, outline, third_bars
from experiments.prune.places import INDUCTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.4
"""Inches of a figure: at its display size letters are those of the page."""
MAPS = ("heads", "groups")
"""Units drawn as maps."""


def score_figures(findings: Findings) -> Mapping[str, Callable[[], Figure]]:
    """The figures of the selection examples that there are numbers for, by file name."""
    made: dict[str, Callable[[], Figure]] = {}
    has_scores = len(findings.importance) > 0
    if has_scores:
        made["importance"] = partial(_importance, findings)
    if len(findings.exact):
        made["alone"] = partial(_alone, findings)
    if len(findings.exact) and has_scores:
        made["exact"] = partial(_exact, findings)
    if len(_agreeing(findings)):
        made["agreement"] = partial(_agreement, findings)
    if len(_mapped(findings)) or len(findings.capacity):
        made["where"] = partial(_where, findings)
    if len(findings.induction):
        made["induction"] = partial(_induction, findings)
    return made


def _importance(findings: Findings) -> Figure:
    shots = findings.shots
    maps = [(u, s) for u in findings.totals if u in MAPS for s in _stacks(findings, u)]
    lines = [(u, s) for u in findings.totals if u not in MAPS for s in _stacks(findings, u)]
    count = len(maps) * len(shots) + len(lines)
    columns = 3 if len(shots) % 3 == 0 and count != 4 else min(count, 2)
    wide = WIDTH / max(columns, 2)
    figure, axes = panels(-(-count // columns), columns, width=wide, height=3.0)
    free = iter(axes.flat)
    for unit, stack in maps:
        scores = findings.importance
        scores = scores.loc[(scores["unit"] == unit) & (scores["stack"] == stack)]
        limits = 0.0, float(scores["value"].max()) or 1.0
        for number in shots:
            own = scores.loc[scores["shots"] == number]
            title = _titled(unit, stack, shots_of(number))
            map_of(own, unit, ax=next(free), title=title, label="nats", limits=limits)
    for unit, stack in lines:
        _layer_lines(findings, unit, stack, next(free))
    for ax in free:
        ax.set_visible(False)
    return figure


def _alone(findings: Findings) -> Figure:
    exact = findings.exact
    metrics = [m for m in ("loss_rise", "score_change") if m in set(exact["metric"])]
    panels_of = [(u, s) for u in dict.fromkeys(exact["unit"]) for s in _stacks_in(exact, str(u))]
    figure, axes = panels(
        len(panels_of), len(metrics), width=WIDTH / max(len(metrics), 2), height=3.2
    )
    marked = set(findings.alone["component"])
    for row, (unit, stack) in enumerate(panels_of):
        for column, metric in enumerate(metrics):
            own = exact.loc[
                (exact["unit"] == unit) & (exact["stack"] == stack) & (exact["metric"] == metric)
            ]
            scale, label = (1, "rise of the loss, nats")
            if metric == "score_change":
                scale, label = 100, "points of accuracy"
            own = own.assign(**{name: scale * own[name] for name in ("value", "low", "high")})
            title = _titled(str(unit), stack, "one removed")
            ax = axes[row, column]
            if unit in MAPS:
                # What harms is warm, a loss that rises as an accuracy that falls.
                harm = {"signed": True, "flipped": metric == "loss_rise"}
                map_of(own, str(unit), ax=ax, title=title, label=label, **harm)
                chosen = own.loc[[name in marked for name in own["component"]]]
                with style():
                    outline(ax, chosen.to_dict("records"))
            else:
                effect_bars(own, title=title, ylabel=label, marked=sorted(marked), ax=ax)
    return figure


def _exact(findings: Findings) -> Figure:
    exact = findings.exact.loc[findings.exact["metric"] == "loss_rise"]
    units = [u for u in dict.fromkeys(exact["unit"]) if u in set(findings.importance["unit"])]
    columns = min(len(units), 3)
    rows = -(-len(units) // columns)
    figure, axes = panels(rows, columns, width=WIDTH / max(columns, 2), height=3.5)
    for number, ax in enumerate(axes.flat):
        if number >= len(units):
            ax.set_visible(False)
            continue
        unit = str(units[number])
        mean = findings.importance.loc[findings.importance["unit"] == unit]
        gradient = mean.groupby("component")["value"].mean()
        own = exact.loc[exact["unit"] == unit]
        table = own.assign(gradient=own["component"].map(gradient)).reset_index(drop=True)
        points(
            table,
            x="gradient",
            y="value",
            title=f"{NAMES.get(unit, unit)}{_rho(findings, unit)}",
            xlabel="importance (gradient), nats",
            ylabel="rise of the loss without it, nats",
            ax=ax,
        )
    return figure


def _agreement(findings: Findings) -> Figure:
    rows = _agreeing(findings)
    cells = [
        (str(unit), int(shots))
        for unit, own in rows.groupby("unit", sort=False)
        for shots in sorted(set(own["shots_a"]))
    ]
    size = len(set(rows["task_a"]) | set(rows["task_b"]))
    columns = int(np.clip(WIDTH // (0.42 * size + 1.6), 1, min(3, len(cells))))
    lines = -(-len(cells) // columns)
    figure, axes = panels(
        lines,
        columns,
        width=max(WIDTH / columns, 0.42 * size + 2.2),
        height=0.4 * size + 1.9,
    )
    for number, ax in enumerate(axes.flat):
        if number >= len(cells):
            ax.set_visible(False)
            continue
        unit, shots = cells[number]
        agreement_heatmap(
            rows.loc[rows["unit"] == unit],
            shots=shots,
            title=f"{NAMES.get(unit, unit)}, {shots_of(shots)}",
            ax=ax,
        )
        if number % columns:
            ax.set_yticklabels([])
    return figure


def _where(findings: Findings) -> Figure:
    lines = _mapped(findings)
    kept = list(dict.fromkeys(findings.capacity["score"])) if len(findings.capacity) else []
    count = len(lines) + len(kept) + bool(len(findings.thirds))
    columns = min(count, 2)
    figure, axes = panels(-(-count // columns), columns, width=WIDTH / 2, height=3.3)
    free = iter(axes.flat)
    for unit, stack in lines:
        _layer_lines(findings, unit, stack, next(free))
    if len(findings.thirds):
        shown = findings.thirds.assign(unit=findings.thirds["unit"].map(lambda u: NAMES.get(u, u)))
        third_bars(shown, title="where the most important sit", ax=next(free))
    for score in kept:
        own = findings.capacity.loc[findings.capacity["score"] == score]
        capacity_curves(
            own,
            title=f"{score.replace('_', ' ')} left as heads go",
            ylabel="share of the total score still there",
            ax=next(free),
        )
    for ax in free:
        ax.set_visible(False)
    return figure


def _induction(findings: Findings) -> Figure:
    most = max(findings.induction["shots"])
    scores = scores_at(findings, "heads", int(most))[["component", "value"]]
    table = findings.induction_scores.assign(
        component=findings.induction_scores["component"].astype(str)
    ).merge(scores, on="component")
    # A score that some heads have not (copying, in an encoder) has no overlap to show.
    shown = set(findings.induction.loc[findings.induction["shots"] == most, "score"])
    names = [name for name in INDUCTION if name in shown]
    figure, axes = panels(1, len(names), width=WIDTH / 2, height=3.5)
    for ax, name in zip(axes.flat, names, strict=True):
        rows = findings.induction
        row = rows.loc[(rows["score"] == name) & (rows["shots"] == most)].iloc[0]
        points(
            table,
            x=name,
            y="value",
            title=f"ρ = {row['spearman']:.2f}, {100 * row['overlap']:.0f} % of the top shared "
            f"(chance {100 * row['expected']:.0f} %)".replace("-", "−"),
            xlabel=f"{name.replace('_', ' ')} score",
            ylabel=f"importance at {shots_of(most)}, nats",
            ax=ax,
        )
    return figure


def map_of(rows: pd.DataFrame, unit: str, *, ax: Axes, **said: Any) -> None:
    """A map of heads, or of key/value groups in their place."""
    head_heatmap(rows, ax=ax, **said)
    if unit == "groups":
        ax.set_xlabel("key/value group")


def _layer_lines(findings: Findings, unit: str, stack: str, ax: Axes) -> None:
    rows = findings.layers
    rows = rows.loc[(rows["unit"] == unit) & (rows["stack"] == stack)]
    layer_curve(
        rows.assign(shots=[shots_of(s) for s in rows["shots"]]),
        group="shots",
        title=_titled(unit, stack, "by layer"),
        ylabel="mean importance, nats",
        ax=ax,
    )


def scores_at(findings: Findings, unit: str, shots: int) -> pd.DataFrame:
    """Importance of a unit's components at one shot count."""
    rows = findings.importance
    return rows if rows.empty else rows.loc[(rows["unit"] == unit) & (rows["shots"] == shots)]


def _stacks(findings: Findings, unit: str) -> list[str]:
    return _stacks_in(findings.importance, unit)


def _stacks_in(frame: pd.DataFrame, unit: str) -> list[str]:
    return list(dict.fromkeys(frame.loc[frame["unit"] == unit, "stack"])) if len(frame) else []


def _mapped(findings: Findings) -> list[tuple[str, str]]:
    """Units drawn as maps, with their stacks: their layers are lines in the figure `where`."""
    return [(u, s) for u in findings.totals if u in MAPS for s in _stacks(findings, u)]


def _agreeing(findings: Findings) -> pd.DataFrame:
    """Spearman's ρ between tasks at one shot count."""
    rows = findings.agreement
    if rows.empty:
        return rows
    return rows.loc[(rows["metric"] == "spearman") & (rows["shots_a"] == rows["shots_b"])]


def _rho(findings: Findings, unit: str) -> str:
    rows = findings.fidelity
    rows = rows.loc[(rows["unit"] == unit) & (rows["exact"] == "rise")]
    if rows.empty or not np.isfinite(rows["value"].iloc[0]):
        return ""
    return f": ρ = {rows['value'].iloc[0]:.2f} in a condition".replace("-", "−")


def _titled(unit: str, stack: str, what: str) -> str:
    return f"{stack} {NAMES.get(unit, unit)}, {what}".strip()
