"""How much of it must be new, could it be foretold, and how fast was it?

Unique data against steps (F6), predictors of a layer's recovery (F11), speed-ups (F12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

CONTOURS = (0.2, 0.1, 0.05, 0.02, 0.01)
"""Gaps that have a line of their own."""


def unique_data(ledger: pd.DataFrame) -> Figure:
    """F6: gap by tokens processed (across) and unique data cycled (up); a panel a target.

    A ring is the smallest gap at that much unique data; left of the dashed line nothing was read
    twice.
    """
    own = cycled(ledger)
    names = targets(own)
    figure, axes = panels(1, len(names), width=9.2 / max(len(names), 2), height=3.6, share_y=True)
    known = knows_length(own)
    tables = {}
    for target in names:
        rows = own.loc[(own["target"] == target) & (own["tokens"] > 0)]
        rows = rows.assign(at=rows["tokens"] / (rows["base_tokens"] if known else 1.0))
        tables[target] = rows.pivot_table(index="unique", columns="at", values="gap")
    low, high = log_limits(np.concatenate([t.to_numpy(float).ravel() for t in tables.values()]))
    levels = np.geomspace(low, high, 15)
    image = None
    for number, (ax, target) in enumerate(zip(axes.flat, names, strict=True)):
        table = tables[target]
        x, y = table.columns.to_numpy(float), table.index.to_numpy(float)
        gap = np.ma.masked_invalid(np.clip(table.to_numpy(float), low, None))
        with style():
            ax.grid(visible=False)
            image = ax.contourf(x, y, gap, levels=levels, cmap=SEQUENTIAL, norm=LogNorm(low, high))
            marks = sorted(v for v in CONTOURS if low < v < high)
            if marks:
                lines = ax.contour(x, y, gap, levels=marks, colors=PAPER, linewidths=0.9)
                ax.clabel(lines, fmt="%g", fontsize=7.5)
            best = table.columns.to_numpy(float)[
                table.fillna(np.inf).to_numpy(float).argmin(axis=1)
            ]
            ax.plot(
                best, y, "o", color=PAPER, markeredgecolor=INK, markeredgewidth=1.2, clip_on=False
            )
            if known:
                ends = max(x.min(), y.min()), min(x.max(), y.max())
                if ends[0] < ends[1]:
                    ax.plot(ends, ends, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            ax.set(xscale="log", yscale="log", title=TARGETS[target])
            ax.set_xlim(x.min(), x.max())
            ax.set_ylim(y.min(), y.max())
            ax.set_xlabel("tokens processed, share of T0" if known else "tokens processed")
            ax.set_ylabel("unique data, share of T0" if number == 0 else "")
        spelled_ticks(ax, percent if known else tokens_text)
        spelled_ticks(ax, percent, which="y")
    if image is not None:
        with style():
            bar = figure.colorbar(image, ax=list(axes.flat), pad=0.02, fraction=0.04)
            bar.outline.set_visible(False)
            marks = [v for v in (*CONTOURS, 0.5, 1, 2, 5) if low <= v <= high]
            bar.set_ticks(marks, labels=[f"{v:g}" for v in marks])
            bar.ax.tick_params(length=0, labelsize=8, which="both")
            bar.set_label("gap, nat")
    return figure


def cycled(ledger: pd.DataFrame) -> pd.DataFrame:
    """Rows whose data is cycled, of the lead base and the place with most of them."""
    own = one_weights(lead(ledger.loc[ledger["unique"].notna()]))
    own = own.loc[own["arm"].isin(["A0", "A11"])]
    found = places(own)
    if not found:
        return own
    return at_place(own, max(found, key=lambda place: len(at_place(own, place))))


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
    own = own.loc[own["target"] == targets(own)[0]]
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
