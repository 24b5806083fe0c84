"""Does it depend on depth, on N and D, on how long the base was trained?

Relative depth (F3), exponents of N and D (F4), length of the base (F5). Exponents and intervals
come from the fits and are only drawn here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.censored_plots import (
    depth_colours,
    depth_key,
    key_below,
    log_limits,
    open_ends,
    ranges,
    spelled_ticks,
)
from experiments.plots import FAINT, GREEN, MARKERS, SKY, panels, style
from experiments.reset.result import (
    FAMILIES,
    STACKS,
    TARGETS,
    THRESHOLD,
    amount_label,
    at_place,
    at_threshold,
    clearest,
    finished,
    most_varied,
    place_name,
    places,
    targets,
    tokens_text,
    unit_of,
)
from experiments.reset.statistics.summaries import medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EQUIVALENCE = 0.15
"""An exponent whose interval lies within ± this counts as no effect."""


def depth(crossings: pd.DataFrame, threshold: float = THRESHOLD) -> Figure:
    """F3: tokens to recover against relative depth, a line an N, a panel a stack and D, towards the
    target that most students came back by.

    Points are medians over base and reset seeds, bars go from the smallest to the largest.
    """
    own = finished(at_threshold(crossings, threshold))
    target = clearest(own)
    own = own.loc[own["target"] == target]
    unit, text = unit_of(own)
    size = ["family", "stack", "d_model", "n_layers"]
    table = medians(own, [*size, "layer"], unit)
    cells = [
        (family, stack, int(width), here)
        for family in FAMILIES
        for stack in STACKS
        for width in sorted(set(table["d_model"]))
        if (here := _of(table, family=family, stack=stack, d_model=width))["value"].max() > 0
    ]
    deep = sorted(set(table["n_layers"]))
    colours = dict(zip(deep, depth_colours(len(deep)), strict=True))
    columns = min(len(cells), 3)
    lines = -(-len(cells) // columns)
    figure, axes = panels(lines, columns, width=9.2 / max(columns, 2), height=3.1, share_y=True)
    for ax in axes.flat[len(cells) :]:
        ax.set_visible(False)
    for at, (ax, (family, stack, width, here)) in enumerate(zip(axes.flat, cells, strict=False)):
        with style():
            for number, layers in enumerate(deep):
                rows = here.loc[here["n_layers"] == layers].sort_values("layer")
                if len(rows):
                    marker = MARKERS[number % len(MARKERS)]
                    # Apart by a hair, so that equal depths do not hide each other.
                    aside = 0.014 * (number - (len(deep) - 1) / 2)
                    _depth_line(ax, rows, colours[layers], f"N = {layers}", marker, aside)
            ax.set_yscale("log")
            ax.set_xlim(-0.06, 1.06)
            whose = f"{family}'s {STACKS[stack].strip()}, " if stack else f"{family}, "
            ax.set_title(f"{whose if len(cells) > 1 else ''}D = {width}", fontsize=9.5)
            ax.set_xlabel("depth, L / (N − 1)" if at + columns >= len(cells) else "")
            label = f"{amount_label(unit, threshold)},\n{TARGETS[target]}"
            ax.set_ylabel(label if at % columns == 0 else "", fontsize=8.5)
    seen = pd.concat([table["value"], table["bound"]]).to_numpy(float)
    low, high = log_limits(seen)
    for ax in axes.flat:
        ax.set_ylim(low / 1.5, high * 1.5)
        spelled_ticks(ax, text, which="y")
    key_below(figure, [ax for ax in axes.flat if ax.get_visible()])
    return figure


def _of(table: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """Rows with these values."""
    for name, value in columns.items():
        table = table.loc[table[name] == value]
    return table


def exponents(slopes: pd.DataFrame) -> Figure:
    """F4: exponents of tokens to recover with their intervals, and the band of equivalence."""
    named = slopes.assign(
        name=[
            f"{row['term']}, {TARGETS.get(row['target'], row['target'])}"
            if row.get("target")
            else str(row["term"])
            for row in slopes.to_dict("records")
        ]
    )
    figure, axes = panels(1, 1, width=6.2, height=0.34 * len(named) + 1.5)
    ax = axes[0, 0]
    with style():
        ax.axvspan(-EQUIVALENCE, EQUIVALENCE, color=GREEN, alpha=0.14, lw=0, zorder=0)
        ax.axvline(0, color=FAINT, linewidth=0.9, zorder=1)
    ranges(
        named,
        title="exponents of the tokens to recover",
        xlabel=f"exponent (green: within ±{EQUIVALENCE:g}, no effect to speak of)",
        ax=ax,
    )
    return figure


def base_length(crossings: pd.DataFrame, threshold: float = THRESHOLD) -> Figure:
    """F5: tokens to recover against the base's own tokens, a line a layer, a panel a target.

    Dashed: the same number of tokens whatever the base (β = 0), and the same share (β = 1).
    """
    own = at_threshold(crossings, threshold)
    own = most_varied(own.loc[own["base_tokens"].notna()], "base_tokens")
    several = [t for t, rows in own.groupby("target") if rows["base_tokens"].nunique() > 1]
    own = own.loc[own["target"].isin(several)]
    names, found = targets(own), places(own)
    figure, axes = panels(1, len(names), width=9.2 / max(len(names), 2), height=3.7, share_y=True)
    for number, (ax, target) in enumerate(zip(axes.flat, names, strict=True)):
        rows = own.loc[own["target"] == target]
        with style():
            for place, colour in zip(found, depth_colours(len(found)), strict=True):
                table = medians(at_place(rows, place), ["base_tokens"], "tokens")
                table = table.sort_values("base_tokens")
                known = np.isfinite(table["value"].to_numpy(float))
                at = table.loc[known & (table["value"] > 0)]  # 0 is off a logarithmic axis
                ax.plot(
                    at["base_tokens"], at["value"], "o-", color=colour, label=place_name(*place)
                )
                open_ends(ax, table.loc[~known], x="base_tokens", bound="bound", colour=colour)
            ax.set(xscale="log", yscale="log", title=TARGETS[target])
            ax.set_xlabel("tokens the base was trained on")
            ax.set_ylabel(f"tokens to come within {threshold:g} nat" if number == 0 else "")
            _guides(ax)
        for which in ("x", "y"):
            spelled_ticks(ax, tokens_text, which=which)
    if len(found) > 8:
        depth_key(list(axes.flat), len(found))
    else:
        key_below(figure, list(axes.flat))
    return figure


def _depth_line(
    ax: Axes, rows: pd.DataFrame, colour: str, label: str, marker: str, aside: float
) -> None:
    rows = rows.assign(at=rows["layer"] / (rows["n_layers"] - 1).clip(lower=1) + aside)
    known = np.isfinite(rows["value"].to_numpy(float))
    came = rows.loc[known & (rows["value"] > 0)]
    ax.plot(came["at"], came["value"], marker=marker, color=colour, label=label, zorder=3)
    top = np.where(np.isinf(came["largest"].to_numpy(float)), 1e3 * came["value"], came["largest"])
    ax.vlines(came["at"], came["smallest"], top, color=colour, linewidth=1.3, alpha=0.6)
    open_ends(ax, rows.loc[~known], x="at", bound="bound", colour=colour)


def _guides(ax: Axes) -> None:
    """Lines of β = 0 and β = 1 through the middle of what is drawn."""
    (left, bottom), (right, top) = ax.dataLim.get_points()
    if not (np.isfinite([left, right, bottom, top]).all() and 0 < left < right and bottom > 0):
        return
    middle, height = np.sqrt(left * right), np.sqrt(bottom * top)
    x = np.array([left, right])
    ends = ax.get_ylim()
    for beta in (0, 1):
        ax.plot(x, height * (x / middle) ** beta, color=SKY, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.text(
            1.005,
            height * (right / middle) ** beta,
            f"β = {beta}",
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=FAINT,
        )
    ax.set_ylim(ends)
