"""How much of it must be new, could it be foretold, and how fast was it?

Unique data against steps (F6), predictors of a layer's recovery (F11), speed-ups (F12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from experiments.censored_plots import log_limits, open_ends, spelled_ticks
from experiments.plots import CYCLE, FAINT, INK, MARKERS, PAPER, SEQUENTIAL, panels, points, style
from experiments.reset.result import (
    TARGETS,
    THRESHOLD,
    amount_label,
    at_place,
    at_threshold,
    clearest,
    knows_length,
    lead,
    one_weights,
    percent,
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

MOST_PLACES = 6
"""Rows of a figure that has one a place."""
CONTOURS = (0.2, 0.1, 0.05, 0.02, 0.01)
"""Gaps that have a line of their own."""


def unique_data(ledger: pd.DataFrame) -> Figure:
    """F6: gap by tokens processed (across) and unique data cycled (up); a row a place, a column a
    target.

    A ring is the smallest gap at that much unique data; right of the dashed line data is repeated.
    """
    own = cycled(ledger)
    own = own.loc[own["tokens"] > 0]
    names, found = targets(own), _spread(places(own))
    known = knows_length(own)
    own = own.assign(at=own["tokens"] / (own["base_tokens"] if known else 1.0))
    figure, axes = panels(
        len(found), len(names), width=9.2 / max(len(names), 2), height=2.5, share_y=True
    )
    tables = {
        (place, target): at_place(own, place)
        .query("target == @target")
        .pivot_table(index="unique", columns="at", values="gap")
        for place in found
        for target in names
    }
    low, high = log_limits(np.concatenate([t.to_numpy(float).ravel() for t in tables.values()]))
    image: Any = None
    for ax, ((place, target), table) in zip(axes.flat, tables.items(), strict=True):
        image = _surface(ax, table, (low, high), diagonal=known)
        ax.set_title(f"{place_name(*place)}: {TARGETS[target]}", fontsize=9.5)
        below, first = place == found[-1], target == names[0]
        ax.set_xlabel(("tokens, share of T0" if known else "tokens") if below else "")
        ax.set_ylabel("unique data, share of T0" if first else "", fontsize=8.5)
        spelled_ticks(ax, percent if known else tokens_text)
        spelled_ticks(ax, percent, which="y")
    with style():
        bar = figure.colorbar(image, ax=list(axes.flat), pad=0.02, fraction=0.04)
        bar.outline.set_visible(False)
        marks = [v for v in (*CONTOURS, 0.5, 1, 2, 5) if low <= v <= high]
        bar.set_ticks(marks, labels=[f"{v:g}" for v in marks])
        bar.ax.tick_params(length=0, labelsize=8, which="both")
        bar.set_label("gap, nat")
    return figure


def _surface(ax: Axes, table: pd.DataFrame, ends: tuple[float, float], *, diagonal: bool) -> Any:
    """A gap by unique data (rows) and tokens (columns) as filled contours."""
    low, high = ends
    x, y = table.columns.to_numpy(float), table.index.to_numpy(float)
    gap = np.ma.masked_invalid(np.clip(table.to_numpy(float), low, None))
    with style():
        ax.grid(visible=False)
        levels = np.geomspace(low, high, 15)
        image = ax.contourf(x, y, gap, levels=levels, cmap=SEQUENTIAL, norm=LogNorm(low, high))
        marks = sorted(v for v in CONTOURS if low < v < high)
        if marks and gap.min() < marks[-1]:
            lines = ax.contour(x, y, gap, levels=marks, colors=PAPER, linewidths=0.9)
            ax.clabel(lines, fmt="%g", fontsize=7.5)
        best = x[table.fillna(np.inf).to_numpy(float).argmin(axis=1)]
        ax.plot(best, y, "o", color=PAPER, markeredgecolor=INK, markeredgewidth=1.2, clip_on=False)
        repeats = max(x.min(), y.min()), min(x.max(), y.max())
        if diagonal and repeats[0] < repeats[1]:
            ax.plot(repeats, repeats, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set(xscale="log", yscale="log", xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    return image


def _spread(found: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """At most MOST_PLACES of the places, from the first to the last."""
    if len(found) <= MOST_PLACES:
        return found
    return [found[round(i)] for i in np.linspace(0, len(found) - 1, MOST_PLACES)]


def cycled(ledger: pd.DataFrame) -> pd.DataFrame:
    """Rows whose data is cycled, of the lead base."""
    own = one_weights(lead(ledger.loc[ledger["unique"].notna()]))
    return own.loc[own["arm"].isin(["A0", "A11"])]


def predictors(
    values: pd.DataFrame, crossings: pd.DataFrame, threshold: float = THRESHOLD
) -> Figure:
    """F11: a panel a predictor, a point a layer: what is known beforehand against what it took.

    Open triangles never came within the threshold; they stand at their bound.
    """
    table = foretold(values, crossings, threshold)
    unit, text = unit_of(crossings)
    names = list(dict.fromkeys(table["predictor"]))
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure, axes = panels(lines, columns, width=9.2 / max(columns, 2), height=3.2)
    for number, ax in enumerate(axes.flat):
        if number >= len(names):
            ax.set_visible(False)
            continue
        rows = table.loc[table["predictor"] == names[number]]
        rows = rows.loc[rows["bound"] > 0]
        known = np.isfinite(rows["amount"].to_numpy(float))
        label = amount_label(unit, threshold) if number % columns == 0 else ""
        with style():
            if known.any():
                points(rows.loc[known], x="value", y="bound", named=0, ax=ax)
            open_ends(ax, rows.loc[~known], x="value", bound="bound", colour=INK)
            for row in rows.to_dict("records"):
                _name(ax, str(row["name"]), row["value"], row["bound"])
            ax.set_yscale("log")
            ax.margins(0.14, 0.1)
            ax.set(title=names[number].replace("_", " "), ylabel=label)
        spelled_ticks(ax, text, which="y")
    return figure


def foretold(values: pd.DataFrame, crossings: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Predictors of the layers of the largest base that has some, beside their median amount at the
    threshold."""
    own = at_threshold(crossings, threshold)
    if "base" in values:
        own = own.loc[own["base"].isin(values["base"])]
    own = lead(own)
    if own.empty:
        return own
    own = own.loc[own["target"] == clearest(own)]
    keys = [name for name in ("base", "stack", "layer") if name in values]
    table = medians(own, keys, unit_of(own)[0]).rename(columns={"value": "amount"})
    joined = values.merge(table, on=keys)
    return joined.assign(
        name=[place_name(s, n) for s, n in zip(joined["stack"], joined["layer"], strict=True)]
    )


def speed(speeds: pd.DataFrame) -> Figure:
    """F12: speed-up over the plain way by layer, measured (points) and by arithmetic (dashed)."""
    figure, axes = panels(1, 1, width=6.2, height=3.6)
    ax = axes[0, 0]
    with style():
        for number, (mode, rows) in enumerate(speeds.groupby("mode", sort=False)):
            rows = rows.sort_values("layer")
            colour = CYCLE[number % len(CYCLE)]
            at = rows["layer"] / rows["n_layers"]
            ax.plot(at, rows["bound"], color=colour, linewidth=1.2, linestyle=(0, (5, 2)))
            marker = MARKERS[number % len(MARKERS)]
            ax.plot(at, rows["measured"], marker, color=colour, markersize=6, label=str(mode))
            if {"low", "high"} <= set(rows.columns):
                ax.vlines(at, rows["low"], rows["high"], color=colour, linewidth=1.2, alpha=0.7)
        ax.axhline(1, color=FAINT, linewidth=0.9, zorder=1)
        ax.set(title="speed-up over the plain way", xlabel="layer / number of layers")
        ax.set_ylabel("times as fast (dashed: by arithmetic)")
        ax.set_ylim(bottom=0)
        ax.legend()
    return figure


def _name(ax: Axes, name: str, x: float, y: float) -> None:
    ax.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7.5, color=FAINT)
