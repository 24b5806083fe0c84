"""How does what only a pruning study measures look? A frame in, Axes out, as in `plots`.

Shares removed of two units as a map, effects of single components as bars, differences with their
intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from experiments.plots import (
    CYCLE,
    DIVERGING,
    FAINT,
    GREY,
    INK,
    KNOWN,
    PAPER,
    SKY,
    annotate_cells,
    colour_bar,
    own_axes,
    style,
)


def grid_map(
    frame: pd.DataFrame,
    *,
    title: str = "",
    limit: float | None = None,
    label: str = "points of accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Change of the score, in points, by the share of heads (across) and of FFNs (up) removed.

    Columns: fraction, ffns_fraction, value. `limit` fixes the colour range, so that panels compare.
    """
    table = frame.pivot(index="ffns_fraction", columns="fraction", values="value")
    matrix = 100 * table.to_numpy(float)
    extent = limit or float(np.nanmax(np.abs(matrix))) or 1.0
    with style():
        ax = ax or own_axes(0.5 * matrix.shape[1] + 2, 0.42 * matrix.shape[0] + 1.2)
        ax.grid(visible=False)
        image = ax.imshow(
            np.ma.masked_invalid(matrix),
            cmap=DIVERGING,
            vmin=-extent,
            vmax=extent,
            aspect="auto",
            origin="lower",
        )
        for x in range(1, matrix.shape[1]):
            ax.axvline(x - 0.5, color=PAPER, linewidth=1.0)
        for y in range(1, matrix.shape[0]):
            ax.axhline(y - 0.5, color=PAPER, linewidth=1.0)
        if matrix.size <= 120:
            annotate_cells(ax, matrix, image, 0 if extent >= 10 else 1)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks(range(matrix.shape[1]), [f"{100 * x:.0f}" for x in table.columns])
        ax.set_yticks(range(matrix.shape[0]), [f"{100 * y:.0f}" for y in table.index])
        ax.set(xlabel="heads removed, %", ylabel="FFNs removed, %", title=title)
        colour_bar(ax, image, label)
    return ax


def effect_bars(
    frame: pd.DataFrame,
    *,
    title: str = "",
    ylabel: str = "",
    marked: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """A bar a component from the columns component, value, low, high; `marked` ones are outlined.

    Ends that are nan are not drawn.
    """
    with style():
        ax = ax or own_axes(0.32 * len(frame) + 1.6, 3.0)
        places = np.arange(len(frame))
        value = frame["value"].to_numpy(float)
        edges = [1.8 if name in marked else 0.0 for name in frame["component"]]
        ax.bar(places, value, color=SKY, width=0.7, edgecolor=INK, linewidth=edges)
        ax.vlines(places, frame["low"], frame["high"], color=INK, linewidth=1.1)
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.grid(visible=False, axis="x")
        step = -(-len(frame) // 16)
        ax.set_xticks(places[::step], [str(name) for name in frame["component"][::step]])
        if len(frame) > 8:
            ax.tick_params(axis="x", labelrotation=60, labelsize=8)
        ax.set(title=title, ylabel=ylabel)
    return ax


def differences(
    frame: pd.DataFrame,
    *,
    title: str = "",
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Differences by task (down) and ranking (colour) with their intervals; 0 is a line.

    Columns: task, ranking, value, low, high, in points.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    names = list(dict.fromkeys(frame["ranking"]))
    cycle = iter(CYCLE)
    with style():
        ax = ax or own_axes(4.6, 0.35 * len(tasks) + 1.4)
        for number, name in enumerate(names):
            rows = frame.loc[frame["ranking"] == name]
            colour, marker = KNOWN.get(name) or (next(cycle, INK), "o")
            shift = 0.7 * ((number + 0.5) / len(names) - 0.5)
            places = [tasks.index(task) + shift for task in rows["task"]]
            ax.hlines(places, rows["low"], rows["high"], color=colour, linewidth=1.4, alpha=0.7)
            ax.plot(rows["value"], places, marker or "o", color=colour, label=name)
        ax.axvline(0, color=INK, linewidth=0.9)
        ax.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
        ax.set_ylim(len(tasks) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.set(title=title, xlabel=xlabel)
    return ax


def third_bars(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Share of the top in each third of depth, and under random choices.

    Columns: third, value, expected, low, high, and unit: the bars of a third side by side.
    """
    units = list(dict.fromkeys(frame["unit"]))
    thirds = list(dict.fromkeys(frame["third"]))
    with style():
        ax = ax or own_axes(4.0, 3.0)
        width = 0.8 / len(units)
        for number, unit in enumerate(units):
            rows = frame.loc[frame["unit"] == unit]
            places = np.arange(len(rows)) + (number - (len(units) - 1) / 2) * width
            ax.bar(places, rows["value"], width * 0.88, color=CYCLE[number], label=unit)
            ax.vlines(places, rows["low"], rows["high"], color=GREY, linewidth=5, alpha=0.45)
            ax.plot(places, rows["expected"], "_", color=INK, markersize=9, markeredgewidth=1.4)
        ax.set_xticks(range(len(thirds)), [f"{third} third" for third in thirds])
        ax.grid(visible=False, axis="x")
        ax.set(title=title, ylabel="share of the top 30 %")
        if len(units) > 1:
            ax.legend()
    return ax


def outline(ax: Axes, rows: Sequence[Mapping[Any, Any]]) -> None:
    """A frame around the cells of some heads: keys layer, head."""
    for row in rows:
        corner = int(row["head"]) - 0.46, int(row["layer"]) - 0.46
        ax.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.6))
