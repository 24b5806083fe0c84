"""What each crossed factor does to the score and to the steps, a row of panels a function class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments.plots import CYCLE, GREY, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RATIOS = (
    (0.1, 0.2, 0.33, 0.5, 1, 2, 3, 5, 10),
    (0.5, 0.67, 0.8, 1, 1.25, 1.5, 2),
    (0.8, 0.9, 1, 1.1, 1.2, 1.3),
    (0.95, 1, 1.05),
)
"""Ticks of ratios: the first that put more than two on an axis."""


def factor_effects(scores: pd.DataFrame, steps: pd.DataFrame) -> Figure:
    """Effects on the score with their intervals; beside them, where known, ratios of steps."""
    tasks = [str(task) for task in scores["task"].unique()]
    most = int(scores.groupby("task").size().max())
    figure, axes = panels(
        len(tasks), 2 if len(steps) else 1, width=5.4, height=1.1 + 0.34 * max(most, 4)
    )
    for line, task in enumerate(tasks):
        own = scores.loc[scores["task"] == task]
        _forest(axes[line, 0], own, 0.0)
        axes[line, 0].xaxis.set_major_locator(MaxNLocator(5))
        axes[line, 0].set(
            title=task, xlabel=f"change of the score against {own['baseline'].iloc[0]}"
        )
        if not len(steps):
            continue
        ax, own = axes[line, 1], steps.loc[steps["task"] == task]
        if own.empty:
            ax.set_visible(False)
            continue
        named = own["effect"] + own["threshold"].map(", to {:g}".format)
        _forest(ax, own.assign(effect=named), 1.0)
        ax.set_xscale("log")
        ax.set(title=task, xlabel="ratio of steps to a share of zero's error")
        _spelled(ax, own)
    return figure


def _forest(ax: Axes, rows: pd.DataFrame, nothing: float) -> None:
    at = np.arange(len(rows))
    with style():
        ax.axvline(nothing, color=GREY, linewidth=1.0, zorder=1)
        ends = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        ax.errorbar(
            rows["value"], at, xerr=ends, fmt="o", markersize=5, color=CYCLE[0], elinewidth=1.4
        )
        ax.set_yticks(at, rows["effect"].tolist(), fontsize=8.5)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(visible=False, axis="y")


def _spelled(ax: Axes, rows: pd.DataFrame) -> None:
    """Ticks that are read as ratios: 0.5, 1, 2."""
    low, high = rows["low"].min(), rows["high"].max()
    ticks: list[float] = []
    for all_ticks in RATIOS:
        ticks = [tick for tick in all_ticks if low <= tick <= high]
        if len(ticks) > 2:
            break
    ticks = sorted({1, *ticks})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
