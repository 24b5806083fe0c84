"""How do numbers look of which some are only known to be larger than something?

Maps whose censored cells are hatched and say what they exceed, survival steps, values with their
ranges and arrows where there is no end. A frame in, Axes out, as in `experiments.plots`.

Layers take the colours of `DEPTH`, so that their order is seen: light at the bottom of a model,
dark at the top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.plots import (
    CYCLE,
    FAINT,
    GREY,
    INK,
    PAPER,
    SEQUENTIAL,
    colour_bar,
    own_axes,
    style,
)

DEPTH = LinearSegmentedColormap.from_list(
    "ablate depth", ["#f0a830", "#e0603c", "#a8327d", "#4b2a8c", "#101a4d"]
)
"""From the first layer to the last: lightness falls all along, so it holds in grey too."""
HATCH = "#b9c2cb"


def depth_colours(count: int) -> list[str]:
    """Colours of `count` layers, the first one lightest; one layer alone is dark enough to read."""
    at = np.linspace(0, 1, count) if count != 1 else [0.7]
    return [to_hex(DEPTH(x)) for x in at]


def censored_map(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    value: str = "value",
    bound: str = "bound",
    text: Callable[[float], str] = "{:.2g}".format,
    limits: tuple[float, float] | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    label: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Rows `y` by columns `x` in the frame's order, on a logarithmic colour scale.

    A cell whose value is inf is hatched and reads ">" and its bound; one that is absent is empty.
    A value of 0 has the lightest colour. `limits` fix the range, so that panels compare. ValueError
    if a cell has two rows.
    """
    if frame.duplicated([x, y]).any():
        raise ValueError(f"several rows for one {y} and {x}: give one {value} for each cell")
    columns, lines = (list(dict.fromkeys(frame[name])) for name in (x, y))
    grid = frame.set_index([y, x])[[value, bound]]
    matrix = np.full((len(lines), len(columns)), np.nan)
    with style():
        ax = ax or own_axes(0.75 * len(columns) + 2.2, 0.4 * len(lines) + 1.2)
        ax.grid(visible=False)
        for (row, column), _ in np.ndenumerate(matrix):
            if (lines[row], columns[column]) not in grid.index:
                continue
            cell = grid.loc[(lines[row], columns[column])]
            matrix[row, column] = cell[value]
            if np.isinf(cell[value]):
                corner = column - 0.5, row - 0.5
                ax.add_patch(
                    Rectangle(
                        corner, 1, 1, facecolor="#f1f3f5", edgecolor=HATCH, hatch="////", lw=0
                    )
                )
                ax.text(
                    column,
                    row,
                    f">{text(cell[bound])}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=INK,
                    bbox={"facecolor": "#f1f3f5", "edgecolor": "none", "pad": 1.2},
                )
        shown = np.ma.masked_invalid(matrix)
        low, high = limits or log_limits(matrix)
        image = ax.imshow(
            np.ma.masked_invalid(np.clip(shown.filled(np.nan), low, None)),
            cmap=SEQUENTIAL,
            norm=LogNorm(low, high),
            aspect="auto",
        )
        for (row, column), number in np.ndenumerate(matrix):
            if np.isfinite(number):
                red, green, blue, _ = image.to_rgba(max(number, low))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                ax.text(
                    column,
                    row,
                    text(number),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=INK if light else PAPER,
                )
        for place in np.arange(1, len(columns)) - 0.5:
            ax.axvline(place, color=PAPER, linewidth=1.2)
        for place in np.arange(1, len(lines)) - 0.5:
            ax.axhline(place, color=PAPER, linewidth=1.2)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks(range(len(columns)), [str(name) for name in columns])
        ax.set_yticks(range(len(lines)), [str(name) for name in lines])
        ax.set_xlim(-0.5, len(columns) - 0.5)
        ax.set_ylim(len(lines) - 0.5, -0.5)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if label and np.isfinite(matrix).any():
            bar = colour_bar(ax, image, label)
            bar.ax.tick_params(length=0, which="minor")
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: text(v)))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return ax


def log_limits(values: Any) -> tuple[float, float]:
    """The smallest and largest positive finite value; a range of its own where there is none."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found) & (found > 0)]
    if found.size == 0:
        return 0.1, 1.0
    low, high = float(found.min()), float(found.max())
    return (low, high) if high > low else (low / 2, high * 2)


def survival_steps(
    frame: pd.DataFrame,
    *,
    x: str,
    group: str,
    y: str = "survival",
    low: str = "low",
    high: str = "high",
    title: str = "",
    xlabel: str = "",
    ylabel: str = "share not yet recovered",
    colours: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Kaplan–Meier curves: a falling step line for each `group`, shaded where low and high are.

    A value holds until the next one. `x` is logarithmic; rows at 0 are put at the left edge.
    """
    with style():
        ax = ax or own_axes(4.6, 3.3)
        given = colours or {}
        positive = frame.loc[frame[x] > 0, x]
        edge = float(positive.min()) / 2 if len(positive) else 1.0
        for number, (name, rows) in enumerate(frame.groupby(group, sort=False)):
            rows = rows.sort_values(x, kind="stable")
            colour = given.get(str(name), CYCLE[number % len(CYCLE)])
            at = rows[x].clip(lower=edge)
            if {low, high} <= set(rows.columns):
                ax.fill_between(
                    at, rows[low], rows[high], step="post", color=colour, alpha=0.14, lw=0
                )
            ax.step(at, rows[y], where="post", color=colour, label=str(name))
        ax.set_xscale("log")
        ax.set_ylim(-0.03, 1.05)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    return ax


def ranges(
    frame: pd.DataFrame,
    *,
    name: str = "name",
    value: str = "value",
    low: str = "low",
    high: str = "high",
    bound: str | None = None,
    notes: str | None = None,
    log: bool = False,
    colour: str = INK,
    title: str = "",
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """One line down the page a row: a dot at `value`, a bar from low to high, in the frame's order.

    With `bound`: a value of inf is an open triangle at its bound that points on, and an end of inf
    runs out of the picture. `notes` are written at the right edge.
    """
    with style():
        ax = ax or own_axes(5.2, 0.3 * len(frame) + 1.2)
        heights = np.arange(len(frame))
        numbers = frame[value].to_numpy(float)
        known = np.isfinite(numbers)
        bounds = frame[bound].to_numpy(float) if bound else np.full(len(frame), np.nan)
        ends = np.where(np.isinf(frame[high]), np.nan, frame[high])
        finite = [numbers[known], bounds[~known], np.asarray(frame[low]), ends]
        seen = np.concatenate([np.asarray(part, float) for part in finite])
        seen = seen[np.isfinite(seen) & ((seen > 0) | (not log))]
        log = log and bool(seen.size)  # a logarithmic axis needs something to show
        if log:
            ax.set_xscale("log")
        furthest = float(seen.max()) if seen.size else 1.0
        lowest, extent = float(seen.min()) if seen.size else 0.1, 0.0
        if seen.size:
            extent = float(np.ptp(seen))
        beyond = furthest * 100 if log else furthest + 9 * max(extent, 1e-9)
        right = np.where(np.isinf(frame[high].to_numpy(float)), beyond, frame[high])
        drawn = known & np.isfinite(frame[low].to_numpy(float))
        ax.hlines(
            heights[drawn], frame[low][drawn], right[drawn], color=colour, linewidth=1.5, alpha=0.65
        )
        ax.plot(numbers[known], heights[known], "o", color=colour, markersize=6, zorder=4)
        ax.plot(
            bounds[~known],
            heights[~known],
            ">",
            color=PAPER,
            markeredgecolor=colour,
            markeredgewidth=1.4,
            markersize=7,
            zorder=4,
        )
        if log:
            # A decade at least: fewer, and the marks between powers of ten write over each other.
            ax.set_xlim(min(lowest / 1.5, furthest / 10), furthest * 1.5)
        elif bool(np.isinf(frame[high].to_numpy(float)).any()):
            ax.set_xlim(lowest - 0.08 * extent, furthest + 0.08 * extent)
        ax.set_yticks(heights, [str(each) for each in frame[name]])
        ax.set_ylim(len(frame) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        if notes is not None:
            for height, note in enumerate(frame[notes]):
                ax.text(
                    1.01,
                    height,
                    str(note),
                    transform=ax.get_yaxis_transform(),
                    va="center",
                    fontsize=8,
                    color=FAINT,
                )
        ax.set(title=title, xlabel=xlabel)
    return ax


def open_ends(ax: Axes, frame: pd.DataFrame, *, x: str, bound: str, colour: str) -> None:
    """Open triangles that point up where a value is only known to be above its bound."""
    ax.plot(
        frame[x],
        frame[bound],
        "^",
        color=PAPER,
        markeredgecolor=colour,
        markeredgewidth=1.3,
        markersize=6.5,
        linestyle="none",
        zorder=4,
    )


def depth_key(ax: Axes | Sequence[Axes], count: int, label: str = "layer") -> None:
    """A colour bar of `DEPTH`, layers 0 to count − 1."""
    first = ax if isinstance(ax, Axes) else ax[0]
    figure = first.figure
    assert isinstance(figure, Figure)
    with style():
        shades = ScalarMappable(Normalize(0, max(count - 1, 1)), DEPTH)
        bar = figure.colorbar(shades, ax=ax, pad=0.02, fraction=0.04, aspect=28)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar.ax.invert_yaxis()
        bar.set_label(label)


def spelled_ticks(ax: Axes, text: Callable[[float], str], *, which: str = "x") -> None:
    """Ticks of a logarithmic axis at 1, 2, 5 or 1, 3 or 1 alone, by its range, as `text` says."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    if axis.get_scale() != "log":  # nothing above 0 to show
        axis.set_major_formatter(FuncFormatter(lambda v, _: text(v)))
        return
    low, high = sorted(ax.get_xlim() if which == "x" else ax.get_ylim())
    wide = high / max(low, 1e-300)
    subs = (1.0, 2.0, 5.0) if wide < 20 else (1.0, 3.0) if wide < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: text(v)))
    axis.set_minor_formatter(NullFormatter())


def threshold_lines(ax: Axes, levels: Sequence[float], text: Callable[[float], str]) -> None:
    """Thin level lines, each with its number at the right edge."""
    for level in levels:
        ax.axhline(level, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        ax.text(
            1.005,
            level,
            text(level),
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=7,
            color=FAINT,
        )


def key_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all panels, each name once; as wide as the figure has room for."""
    named = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if not named:
        return
    widths = [0.072 * len(name) + 0.55 for name in named]  # inches, by experience
    fits = len(named)
    if sum(widths) > figure.get_figwidth():
        fits = int(figure.get_figwidth() / max(widths))
    with style():
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=max(1, min(len(named), fits)),
            columnspacing=1.4,
        )
