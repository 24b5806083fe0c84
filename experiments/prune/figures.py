"""What pictures does a pruning run have? Those that its findings have numbers for, in this order.

Here are those of the reporting examples: what is left of the accuracy as components go. Those of
the selection examples are in `experiments.prune.score_figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.plots import accuracy_curves, panels, style
from experiments.prune.curves import RANDOM
from experiments.prune.findings import NAMES, Findings, shots_of
from experiments.prune.pictures import differences, effect_bars, grid_map
from experiments.prune.score_figures import MAPS, WIDTH, map_of, score_figures, scores_at
from experiments.prune.tables import OWN, TRANSFERRED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN = (OWN, "aggregate", "weights", RANDOM)
"""Rankings of the summary, beside the best informed one of those that removed exactly."""
INFORMED = ("greedy", "exact", "re-scored")
BANDED = (OWN, RANDOM)
"""Rankings whose interval is drawn where there are more than three lines."""


def figures(findings: Findings) -> Mapping[str, Callable[[], Figure]]:
    """The figures of a run by file name, each made when it is asked for."""
    scored = score_figures(findings)
    made: dict[str, Callable[[], Figure]] = {}
    if findings.units:
        made["summary"] = partial(_summary, findings)
    if "importance" in scored:
        made["importance"] = scored["importance"]
    for unit in findings.units:
        made[f"accuracy_{unit}"] = partial(_accuracy, findings, unit)
    for unit in findings.units:
        if len(findings.tasks) > 1 or len(findings.shots) > 1:
            made[f"tasks_{unit}"] = partial(_tasks, findings, unit)
    if len(findings.transfer):
        made["transfer"] = partial(_transfer, findings)
    if len(findings.grid):
        made["grid"] = partial(_grid, findings)
    return {**made, **scored}


def _summary(findings: Findings) -> Figure:
    unit, most = findings.units[0], max(findings.shots)
    figure, axes = panels(1, 2, width=WIDTH / 2, height=3.7)
    rows = scores_at(findings, unit, most)
    title = f"importance at {shots_of(most)}"
    if rows.empty:
        axes[0, 0].set_visible(False)
    elif unit in MAPS:
        first = rows.loc[rows["stack"] == rows["stack"].iloc[0]]
        map_of(first, unit, ax=axes[0, 0], title=title, label="nats")
    else:
        with_ends = rows.assign(
            low=rows["value"] - 1.96 * rows["stderr"], high=rows["value"] + 1.96 * rows["stderr"]
        )
        effect_bars(with_ends, title=title, ylabel="nats", ax=axes[0, 0])
    _curves(
        findings,
        _rows(findings, unit, "", None),
        unit,
        main_rankings(findings, unit),
        axes[0, 1],
        title="accuracy, average over tasks and shots",
        chance=findings.chance,
    )
    return figure


def main_rankings(findings: Findings, unit: str) -> list[str]:
    """At most five rankings of a unit that say most beside each other."""
    names = list(
        dict.fromkeys(findings.removable.loc[findings.removable["unit"] == unit, "ranking"])
    )
    informed = next((name for name in INFORMED if name in names), None)
    chosen = [name for name in names if name in MAIN or name == informed]
    rest = [name for name in names if name not in chosen and name not in TRANSFERRED]
    chosen = (
        [*chosen, *rest[: 4 - len([c for c in chosen if c != RANDOM])]]
        if len(chosen) < 4
        else chosen
    )
    return [name for name in names if name in chosen]


def _accuracy(findings: Findings, unit: str) -> Figure:
    shots = findings.shots
    columns = min(len(shots), 3)
    figure, axes = panels(
        -(-len(shots) // columns), columns, width=WIDTH / max(columns, 2), height=3.5, share_y=True
    )
    every = _rankings(findings, unit)
    names = [n for n in every if n not in TRANSFERRED] or every
    for number, ax in enumerate(axes.flat):
        if number >= len(shots):
            ax.set_visible(False)
            continue
        _curves(
            findings,
            _rows(findings, unit, "", shots[number]),
            unit,
            names,
            ax,
            title=shots_of(shots[number]),
            chance=findings.chance,
            legend=False,
            ylabel="accuracy, average over tasks" if number % columns == 0 else "",
        )
    _legend_below(figure, axes[0, 0])
    return figure


def _tasks(findings: Findings, unit: str) -> Figure:
    tasks, shots = findings.tasks, findings.shots
    # One shot count alone: its tasks side by side.
    several = len(shots) > 1
    columns = min(len(shots) if several else len(tasks), 3)
    cells = [(t, s) for t in tasks for s in shots]
    per_task = -(-len(shots) // columns) * columns if several else 1
    places = [(t * per_task + s) for t in range(len(tasks)) for s in range(len(shots))]
    rows = -(-(max(places) + 1) // columns)
    figure, axes = panels(rows, columns, width=WIDTH / max(columns, 2), height=2.5, share_y=True)
    names = main_rankings(findings, unit)
    for ax in axes.flat:
        ax.set_visible(False)
    for place, (task, count) in zip(places, cells, strict=True):
        ax = axes.flat[place]
        ax.set_visible(True)
        _curves(
            findings,
            _rows(findings, unit, task, count),
            unit,
            names,
            ax,
            title=f"{task}, {shots_of(count)}".replace("_", " "),
            chance=findings.chances.get(task, np.nan),
            legend=False,
            ylabel="accuracy" if place % columns == 0 else "",
            xlabel=None if place // columns == rows - 1 else "",
        )
    _legend_below(figure, axes.flat[places[0]])
    return figure


def _transfer(findings: Findings) -> Figure:
    units = list(dict.fromkeys(findings.transfer["unit"]))
    tall = max(3.6, 0.3 * len(findings.tasks) + 1.6)
    figure, axes = panels(len(units), 2, width=WIDTH / 2, height=tall)
    for row, unit in enumerate(units):
        names = [n for n in _rankings(findings, unit) if n in (*TRANSFERRED, OWN, RANDOM)]
        _curves(
            findings,
            _rows(findings, unit, "", None),
            unit,
            names,
            axes[row, 0],
            title=f"{NAMES.get(unit, unit)}: average over tasks and shots",
            chance=findings.chance,
        )
        table = findings.transfer.loc[findings.transfer["unit"] == unit]
        shown = table.assign(
            **{name: 100 * table[name] for name in ("value", "low", "high")},
            task=table["task"].replace("all", "all tasks"),
        )
        differences(
            shown,
            title="difference to the task's own ranking",
            xlabel="points of accuracy, 25–75 % removed",
            ax=axes[row, 1],
        )
    return figure


def _grid(findings: Findings) -> Figure:
    rows = findings.grid.loc[findings.grid["shots"].notna()]
    rankings, shots = list(dict.fromkeys(rows["ranking"])), sorted(set(rows["shots"]))
    columns = min(len(shots), 3)
    per_ranking = -(-len(shots) // columns)
    wide = WIDTH / max(columns, 2)
    figure, axes = panels(len(rankings) * per_ranking, columns, width=wide, height=3.2)
    limit = 100 * float(rows["value"].abs().max()) or 1.0
    for ax in axes.flat:
        ax.set_visible(False)
    for line, ranking in enumerate(rankings):
        for number, count in enumerate(shots):
            ax = axes.flat[line * per_ranking * columns + number]
            ax.set_visible(True)
            own = rows.loc[(rows["ranking"] == ranking) & (rows["shots"] == count)]
            grid_map(own, title=f"{ranking}, {shots_of(count)}", limit=limit, ax=ax)
    return figure


def _curves(
    findings: Findings,
    rows: pd.DataFrame,
    unit: str,
    names: Sequence[str],
    ax: Axes,
    *,
    title: str,
    chance: float,
    legend: bool = True,
    ylabel: str = "accuracy",
    xlabel: str | None = None,
) -> None:
    """Curves of some rankings; with many lines only `BANDED` ones have their band."""
    chosen = pd.concat([rows.loc[rows["ranking"] == name] for name in names])
    if len(names) > 3:
        plain = ~chosen["ranking"].isin(list(BANDED))
        chosen = chosen.assign(**{n: chosen[n].mask(plain) for n in ("low", "high")})
    start = chosen.loc[chosen["removed"] == 0, "value"]
    accuracy_curves(
        chosen,
        baseline=float(start.iloc[0]) if len(start) else None,
        chance=chance if np.isfinite(chance) else None,
        title=title,
        xlabel=f"share of {NAMES.get(unit, unit)} removed" if xlabel is None else xlabel,
        ylabel=ylabel,
        legend=legend,
        ax=ax,
    )


def _legend_below(figure: Figure, ax: Axes) -> None:
    """One legend for all panels, under them."""
    handles, labels = ax.get_legend_handles_labels()
    with style():
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))


def _rows(findings: Findings, unit: str, task: str, shots: int | None) -> pd.DataFrame:
    """Curves of a unit on a task ("" for all) at a shot count (None for all)."""
    rows = findings.curves
    at = rows["shots"].isna() if shots is None else rows["shots"] == shots
    return rows.loc[(rows["unit"] == unit) & (rows["task"] == task) & at]


def _rankings(findings: Findings, unit: str) -> list[str]:
    rows = findings.removable
    return list(dict.fromkeys(rows.loc[rows["unit"] == unit, "ranking"]))
