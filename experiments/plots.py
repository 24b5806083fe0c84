"""How does a study look? One style for every figure, and one function for each kind of picture.

Functions take a tidy DataFrame and return Axes; they neither load, compute, save nor show. Without
`ax` they draw on a figure of their own (`ax.figure`); `panels` makes several side by side. The
style lives in a context, so the user's matplotlib settings are as they were, and figures are made
without pyplot, so no window or backend is needed.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; a ranking has the same
colour and marker in every figure. Layers and heads count from 0; layer 0 is the top row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, FAINT, GRID, PAPER = "#1f2933", "#6b7785", "#e4e8ec", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, GREY = "#cc79a7", "#56b4e9", "#8a94a0"
PURPLE, BROWN = "#6a4c93", "#7f5f3f"
CYCLE = (BLUE, RED, GREEN, ORANGE, PINK, SKY)
MARKERS = ("o", "s", "D", "^", "v", "P")
KNOWN: Mapping[str, tuple[str, str]] = {
    "importance": (BLUE, "o"),
    "exact": (GREEN, "D"),
    "greedy": (RED, "^"),
    "re-scored": (SKY, "v"),
    "weights": (ORANGE, "s"),
    "magnitude": (ORANGE, "s"),
    "activations": (PINK, "P"),
    "prefix matching": (PURPLE, "X"),
    "copying": (BROWN, "d"),
    "aggregate": (PINK, "h"),
    "aggregate (rank)": (PURPLE, "p"),
    "aggregate (z)": (BROWN, "<"),
    "others": (GREEN, ">"),
    "highest partner": (SKY, "^"),
    "lowest partner": (RED, "v"),
    "random": (GREY, ""),
}
"""Colour and marker of known rankings, alike in all figures; others take the cycle's. Rankings that
know other tasks have colours of their own among themselves and beside importance."""
WIDTH, HEIGHT = 4.6, 3.3
"""Inches of one panel; two fill a README's width."""

SEQUENTIAL = LinearSegmentedColormap.from_list("ablate", ["#f5f8fa", "#a9cce3", BLUE, "#06283d"])
DIVERGING = LinearSegmentedColormap.from_list(
    "ablate±", ["#8a3500", RED, "#f7f7f7", BLUE, "#003c5e"]
)

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "figure.dpi": 100,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.9,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
}


@contextmanager
def style() -> Iterator[None]:
    """The project's look, for as long as the context lasts."""
    with mpl.rc_context(STYLE):
        yield


def panels(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    dpi: int = 160,
    share_y: bool = False,
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """A figure of rows x columns panels (inches each) in the project's style, and its Axes."""
    with style():
        figure = Figure(figsize=(width * columns, height * rows), dpi=dpi, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y)


def head_heatmap(
    scores: pd.DataFrame,
    *,
    value: str = "value",
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = None,
    signed: bool = False,
    flipped: bool = False,
    digits: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Layers x heads, one cell a head, from the columns `layer`, `head` and `value`.

    `limits` fix the colour range, so that panels compare; without, they are the scores' own,
    from 0 if nothing is below it. `signed` centres the range on 0, blue above it; `flipped`, blue
    below it. Cells carry their number when there are at most 100 (`digits` decimals; by the range
    if None). A layer may lack heads: those cells are hatched. ValueError if a head has two rows.
    """
    if scores.duplicated(["layer", "head"]).any():
        raise ValueError(f"several rows for one head: give one {value} for each layer and head")
    grid = scores.pivot(index="layer", columns="head", values=value)
    grid = grid.reindex(columns=range(int(scores["head"].max()) + 1))
    matrix = grid.to_numpy(dtype=float)
    low, high = limits or _limits(matrix, signed)
    with style():
        ax = ax or own_axes(
            min(0.52 * matrix.shape[1], 6.5) + 1.9, min(0.44 * matrix.shape[0], 5.0) + 1.1
        )
        ax.grid(visible=False)
        ax.set_facecolor("#eef1f4")
        _hatch(ax, matrix)
        image = ax.imshow(
            np.ma.masked_invalid(matrix),
            cmap=(DIVERGING.reversed() if flipped else DIVERGING) if signed else SEQUENTIAL,
            vmin=low,
            vmax=high,
            aspect="auto",
        )
        gap = 1.2 if max(matrix.shape) <= 16 else 0.5
        for x in range(1, matrix.shape[1]):
            ax.axvline(x - 0.5, color=PAPER, linewidth=gap)
        for y in range(1, matrix.shape[0]):
            ax.axhline(y - 0.5, color=PAPER, linewidth=gap)
        if matrix.size <= 100:
            annotate_cells(ax, matrix, image, _digits(low, high) if digits is None else digits)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        if grid.shape[0] <= 16:
            ax.set_yticks(range(grid.shape[0]), [str(layer) for layer in grid.index])
        else:
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        if grid.shape[1] <= 16:
            ax.set_xticks(range(grid.shape[1]))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="head", ylabel="layer", title=title)
        colour_bar(ax, image, label)
    return ax


def accuracy_curves(
    frame: pd.DataFrame,
    *,
    x: str = "fraction",
    y: str = "value",
    ranking: str = "ranking",
    low: str = "low",
    high: str = "high",
    baseline: float | None = None,
    chance: float | None = None,
    title: str = "",
    xlabel: str = "share of heads removed",
    ylabel: str = "accuracy",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against the share removed: a line for each ranking, shaded between low and high.

    Columns: `x` in [0, 1], `y`, `ranking`, and, where there is an interval, `low` and `high`. The
    ranking called random is drawn as its band with a thin line. `baseline` (the whole model) and
    `chance` are dashed and dotted lines.
    """
    with style():
        ax = ax or own_axes(WIDTH, HEIGHT)
        _lines(ax, frame, x, y, ranking, low, high)
        if baseline is not None:
            _reference(ax, baseline, "whole model", (0, (6, 3)))
        if chance is not None:
            _reference(ax, chance, "chance", (0, (1, 2)))
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        ax.margins(x=0.02)
        if legend:
            ax.legend()
    return ax


def curve(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str = "value",
    group: str | None = None,
    low: str = "low",
    high: str = "high",
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
    xlabel: str | None = None,
    ylabel: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """`y` against `x`, a line for each value of `group`: losses against tokens, say.

    Points are in the order of `x`; where the columns `low` and `high` exist, shaded between them.
    """
    with style():
        ax = ax or own_axes(WIDTH, HEIGHT)
        _lines(ax, frame, x, y, group, low, high)
        if log_x:
            ax.set_xscale("log")
        if log_y:
            ax.set_yscale("log")
        ax.set(xlabel=x if xlabel is None else xlabel, ylabel=y if ylabel is None else ylabel)
        ax.set_title(title)
        if group is not None:
            ax.legend()
    return ax


def points(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    name: str = "component",
    named: int = 4,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A point a component; those farthest out in `x` and in `y` carry their names."""
    with style():
        ax = ax or own_axes(4.0, 3.3)
        size = 22 if len(frame) <= 200 else 8
        ax.scatter(frame[x], frame[y], s=size, color=BLUE, alpha=0.65, linewidth=0, zorder=3)
        high, wide = (np.argsort(-frame[column].to_numpy(float)) for column in (y, x))
        far = list(dict.fromkeys([*high[:named], *wide[: min(2, named)]]))
        taken: list[tuple[float, float]] = []
        wide, high = (float(np.ptp(frame[c])) or 1.0 for c in (x, y))
        for row in frame.iloc[far].to_dict("records"):
            here = float(row[x]) / wide, float(row[y]) / high
            # Two names on one place read as none: the one farther out stays.
            if any(abs(here[0] - a) < 0.16 and abs(here[1] - b) < 0.06 for a, b in taken):
                continue
            taken.append(here)
            right = row[x] > frame[x].min() + 0.75 * wide
            ax.annotate(
                str(row[name]),
                (row[x], row[y]),
                xytext=(-5 if right else 5, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=8,
            )
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.margins(0.08)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return ax


def own_axes(width: float, height: float) -> Axes:
    """Axes of a figure of their own, in inches."""
    return panels(width=width, height=height)[1][0, 0]


def _lines(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, group: str | None, low: str, high: str
) -> None:
    if group is None:
        groups: list[tuple[str, pd.DataFrame]] = [("", frame)]
    else:
        groups = [(str(name), rows) for name, rows in frame.groupby(group, sort=False)]
    taken = {KNOWN[name][0] for name, _ in groups if name in KNOWN}
    others = ((c, m) for c, m in zip(CYCLE, MARKERS, strict=True) if c not in taken)
    for name, rows in groups:
        colour, marker = KNOWN[name] if name in KNOWN else next(others, (INK, ""))
        rows = rows.sort_values(x)
        is_random = name == "random"
        if len(rows) > 40:
            marker = ""
        if {low, high} <= set(rows.columns):
            ax.fill_between(
                rows[x],
                rows[low],
                rows[high],
                color=colour,
                alpha=0.28 if is_random else 0.16,
                lw=0,
            )
        ax.plot(
            rows[x],
            rows[y],
            color=colour,
            marker=marker,
            markeredgecolor=PAPER,
            markeredgewidth=0.7,
            linewidth=1.1 if is_random else None,
            zorder=2 if is_random else 3,
            label=name or None,
        )


def _reference(ax: Axes, level: float, name: str, dashes: tuple[int, tuple[int, int]]) -> None:
    ax.axhline(level, color=FAINT, linewidth=1.1, linestyle=dashes, zorder=1, label=name)


def _limits(matrix: np.ndarray[Any, Any], signed: bool) -> tuple[float, float]:
    present = matrix[np.isfinite(matrix)]
    if signed:
        extent = float(np.abs(present).max()) or 1.0
        return -extent, extent
    low, high = min(0.0, float(present.min())), float(present.max())
    return low, high if high > low else low + 1.0


def _digits(low: float, high: float) -> int:
    """Decimals that show two figures of the largest value: 0.53 -> 2, 0.041 -> 3."""
    extent = max(abs(low), abs(high))
    return int(np.clip(1 - np.floor(np.log10(extent)), 0, 4)) if extent > 0 else 0


def colour_bar(ax: Axes, image: Any, label: str) -> Colorbar:
    """What the colours of `image` mean, beside its axes."""
    assert isinstance(ax.figure, Figure)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.set_label(label)
    return bar


def annotate_cells(ax: Axes, matrix: np.ndarray[Any, Any], image: Any, digits: int) -> None:
    """Each cell's number, dark on light and light on dark."""
    for (row, column), score in np.ndenumerate(matrix):
        if np.isfinite(score):
            red, green, blue = to_rgb(image.to_rgba(score)[:3])
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            text = f"{round(score, digits) + 0.0:.{digits}f}".replace("-", "−")  # no −0.0
            ax.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color=INK if light else PAPER,
            )


def _hatch(ax: Axes, matrix: np.ndarray[Any, Any]) -> None:
    for row, column in np.argwhere(~np.isfinite(matrix)):
        ax.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor=GRID, lw=0
            )
        )
