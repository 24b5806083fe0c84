"""How fast does the gap close? Curves over tokens: by layer (F1), by target (F8), by family (F9).

Lines are means over seeds, bands go from the smallest to the largest seed, and thin dotted lines
are single students: those trained on when others had stopped, and those that diverged (×). The gap
is logarithmic: where it is 0 or less, a line leaves the picture at the bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.censored_plots import depth_colours, key_below, spelled_ticks, threshold_lines
from experiments.plots import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    PINK,
    RED,
    panels,
    style,
)
from experiments.reset.learning.aside import (
    BRIDGE,
    DECODER_TOO,
    NO_OP,
    SILENT,
    WIPED,
    WIPED_OTHER,
)
from experiments.reset.report.aside_sentences import SCRATCH, aside_rows
from experiments.reset.result import (
    STACKS,
    TARGETS,
    THRESHOLD,
    at_place,
    families,
    knows_length,
    lead,
    main,
    one_weights,
    percent,
    place_name,
    places,
    targets,
    tokens_text,
    unit_of,
)
from experiments.reset.statistics.summaries import crossover, mean_curves, numbered, stragglers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = (0.1, 0.05, 0.02, 0.01)
"""Thresholds drawn, nat."""
TARGET_COLOURS = {"lm": BLUE, "hidden": RED, "logits": GREEN, "mix": PINK}
SOLID, DASHED, DOTTED = (0, ()), (0, (4, 2)), (0, (1, 1.4))
VARIANTS: Mapping[str, tuple[str, tuple[int, tuple[float, ...]]]] = {
    NO_OP: (GREY, SOLID),
    "one block wiped": (BLUE, DOTTED),
    WIPED: (BLUE, SOLID),
    SILENT: (BLUE, DASHED),
    WIPED_OTHER: (RED, SOLID),
    DECODER_TOO: (RED, DOTTED),
    BRIDGE: (RED, DASHED),
    f"{WIPED}, other width": (GREEN, SOLID),
    f"{BRIDGE}, other width": (GREEN, DASHED),
    SCRATCH: (INK, DASHED),
}
"""Of the aside."""
WIDE = 9.2
"""Inches of a full row of panels."""


def recovery(ledger: pd.DataFrame) -> Figure:
    """F1: gap against the share of T0, a line a layer; a column of panels a target, a row a stack.

    Grey: trained without a reset (A1). Dashed: the whole model from scratch (A7).
    """
    rows = numbered(lead(ledger))
    own = main(rows)
    names, stacks = targets(own), [s for s in STACKS if (own["stack"] == s).any()]
    cells = [(stack, target) for stack in stacks for target in names]
    columns = len(names) if len(names) > 1 else len(stacks)
    wide = 6.2 if columns == 1 else WIDE / min(columns, 2)
    lines = len(cells) // columns
    figure, axes = panels(lines, columns, width=wide, height=3.9, share_y=True)
    for number, (ax, (stack, target)) in enumerate(zip(axes.flat, cells, strict=True)):
        part = own.loc[(own["target"] == target) & (own["stack"] == stack)]
        title = f"{stack}: {TARGETS[target]}" if stack else TARGETS[target]
        _recovery_panel(ax, part, rows, title=title)
        ax.set_ylabel("gap to the old loss, nat" if number % columns == 0 else "")
        if number < len(cells) - columns:
            ax.set_xlabel("")
    _alike(list(axes.flat))
    key_below(figure, list(axes.flat))
    return figure


def by_target(ledger: pd.DataFrame) -> Figure:
    """F8: a panel a layer, a line a target; marked where local regression overtakes the LM loss."""
    own = main(numbered(lead(ledger)))
    found = places(own)
    columns = 3 if len(found) in (5, 6, 9) else min(len(found), 4)
    lines = -(-len(found) // columns)
    figure, axes = panels(lines, columns, width=max(WIDE / columns, 2.5), height=2.7, share_y=True)
    scale = _scale(own)
    narrow = "share of T0" if knows_length(own) else "tokens"
    for number, ax in enumerate(axes.flat):
        if number >= len(found):
            ax.set_visible(False)
            continue
        rows = at_place(own, found[number])
        _target_panel(ax, rows, scale, place_name(*found[number]))
        ax.set_ylabel("gap, nat" if number % columns == 0 else "")
        ax.set_xlabel(narrow if number + columns >= len(found) else "")
    _alike([ax for ax in axes.flat if ax.get_visible()], levels=False)
    key_below(figure, list(axes.flat))
    return figure


def by_family(ledger: pd.DataFrame) -> Figure:
    """F9: a panel a family, its layers trained on the LM loss; then the cross-attention aside.

    The aside (A13) has two panels where it was run: the gap, and how much of its source the
    decoder uses. Colours say whose encoder it is, solid lines that cross-attention was wiped.
    """
    aside = one_weights(numbered(aside_rows(ledger)))
    used = bool(len(aside)) and bool(aside["source_use"].notna().to_numpy().any())
    names = families(main(ledger))
    count = len(names) + int(len(aside) > 0) + int(used)
    columns = min(count, 3)
    lines = -(-count // columns)
    figure, axes = panels(lines, columns, width=WIDE / min(columns, 2), height=3.6)
    spots = list(axes.flat)
    for ax, family in zip(spots, names, strict=False):
        rows = numbered(lead(ledger, family))
        own = main(rows)
        own = own.loc[own["target"] == targets(own)[0]]
        _recovery_panel(ax, own, rows, title=family)
        ax.set_ylabel("gap to the old loss, nat")
        _alike([ax])
        _layer_legend(ax)
    if len(aside):
        at = len(names)
        _aside_panel(spots[at], aside, "gap", "cross-attention: gap")
        spots[at].set(yscale="log", ylabel="gap to the old loss, nat")
        _alike([spots[at]])
        if used:
            _aside_panel(spots[at + 1], aside, "source_use", "cross-attention: source-use")
            spots[at + 1].set_ylabel("source-use, 1 = as before")
            spots[at + 1].axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (6, 3)), zorder=1)
        with style():
            spots[at].legend(fontsize=6.5, loc="lower left")
    for ax in spots[count:]:
        ax.set_visible(False)
    return figure


def _recovery_panel(ax: Axes, own: pd.DataFrame, rows: pd.DataFrame, *, title: str) -> None:
    """Layers of one stack and target, beside the no-op band and the yardstick of `rows`."""
    scale, found = _scale(rows), places(own)
    with style():
        _no_op(ax, rows, own, scale)
        for place, colour in zip(found, depth_colours(len(found)), strict=True):
            here = at_place(own, place)
            alone = len({stack for stack, _ in found}) == 1
            _band(ax, here, scale, colour, f"L{place[1]}" if alone else place_name(*place))
        scratch = one_weights(rows.loc[rows["arm"] == "A7"])
        line = mean_curves(scratch, ["arm"])
        line = line.loc[line["tokens"] > 0]
        if len(line):
            ax.plot(
                line["tokens"] / scale,
                line["value"],
                color=INK,
                linewidth=1.3,
                linestyle=(0, (5, 2)),
                label="from scratch",
            )
        ax.set(xscale="log", yscale=_gap_scale(ax), title=title, xlabel=_xlabel(rows))


def _gap_scale(ax: Axes) -> str:
    """log, if any line is above 0: a layer that was not missed has no gap to show."""
    heights = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    return "log" if any((y > 0).any() for y in heights) else "linear"


def _target_panel(ax: Axes, rows: pd.DataFrame, scale: float, title: str) -> None:
    with style():
        lines = {}
        for target in targets(rows):
            here = rows.loc[rows["target"] == target]
            lines[target] = mean_curves(here, ["target"])
            _band(ax, here, scale, TARGET_COLOURS[target], TARGETS[target])
        ax.set(xscale="log", yscale=_gap_scale(ax), title=title)
        threshold_lines(ax, [THRESHOLD], "{:g}".format)
        if {"lm", "hidden"} <= lines.keys():
            met = crossover(lines["lm"], lines["hidden"])
            if met is not None and met.kind == "crosses":
                at = met.tokens / scale
                ax.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=2)
                ax.text(
                    at,
                    0.97,
                    f"{unit_of(rows)[1](at)} ",
                    transform=ax.get_xaxis_transform(),
                    va="top",
                    ha="right",
                    fontsize=8,
                )


def _aside_panel(ax: Axes, aside: pd.DataFrame, value: str, title: str) -> None:
    found = mean_curves(aside.loc[aside[value].notna()], ["variant"], value)
    scale = _scale(aside)
    found = found.loc[found["tokens"] > 0]
    with style():
        for name, rows in found.groupby("variant", sort=False):
            colour, dashes = VARIANTS.get(str(name), (PINK, SOLID))
            at = rows["tokens"] / scale
            if rows["students"].max() > 1:
                ax.fill_between(at, rows["low"], rows["high"], color=colour, alpha=0.12, lw=0)
            ax.plot(
                at, rows["value"], color=colour, linestyle=dashes, linewidth=1.6, label=str(name)
            )
        ax.set(xscale="log", xlabel=_xlabel(aside), title=title)
        spelled_ticks(ax, unit_of(aside)[1])


def _band(ax: Axes, rows: pd.DataFrame, scale: float, colour: str, label: str) -> None:
    line = mean_curves(rows, ["target"])
    line = line.loc[line["tokens"] > 0]
    at = line["tokens"] / scale
    if len(line) and line["students"].max() > 1:
        ax.fill_between(at, line["low"], line["high"], color=colour, alpha=0.16, lw=0)
    ax.plot(at, line["value"], color=colour, linewidth=1.7, label=label)
    for rest in stragglers(rows, ["target"]):
        rest = rest.loc[rest["tokens"] > 0]
        ax.plot(
            rest["tokens"] / scale,
            rest["gap"],
            color=colour,
            linewidth=1.0,
            linestyle=(0, (1, 1.4)),
            label="_single",
        )
        if rest["status_last"].iloc[0] == "diverged":
            last = rest.iloc[-1]
            ax.plot([last["tokens"] / scale], [last["gap"]], "x", color=colour, markersize=7)


def _no_op(ax: Axes, rows: pd.DataFrame, own: pd.DataFrame, scale: float) -> None:
    """Where students are that were not reset; those of the panel's own target if there are any."""
    calm = one_weights(rows.loc[rows["arm"] == "A1"])
    same = calm["target"].isin(own["target"])
    calm = calm.loc[same] if bool(same.to_numpy().any()) else calm
    if calm.empty:
        return
    at = calm.loc[calm["tokens"] > 0].groupby("tokens")["gap"].agg(["min", "max"])
    ax.fill_between(
        at.index.to_numpy(float) / scale,
        at["min"],
        at["max"],
        color=GREY,
        alpha=0.35,
        lw=0.8,
        label="no reset",
    )


def _alike(axes: Sequence[Axes], *, levels: bool = True) -> None:
    """The same limits for all panels: from below the smallest threshold to the largest gap."""
    shown = list(axes)
    ends = [ax.dataLim.get_points() for ax in shown]
    heights = [y for ax in shown for line in ax.lines for y in np.asarray(line.get_ydata(), float)]
    heights = [y for y in heights if np.isfinite(y) and y > 0]
    wide = [p[:, 0] for p in ends if np.isfinite(p).all() and (p[:, 0] > 0).all()]
    calm = any("no reset" in ax.get_legend_handles_labels()[1] for ax in shown)
    with style():
        for ax in shown:
            if heights:
                low = LEVELS[-1] / 3
                low = low if calm else max(min(*heights, LEVELS[-1]) * 0.8, low)
                ax.set_ylim(low, max(*heights, LEVELS[0]) * 1.25)
            if wide:
                ax.set_xlim(min(p[0] for p in wide) / 1.05, max(p[1] for p in wide) * 1.05)
            spelled_ticks(ax, _axis_text(ax))
            spelled_ticks(ax, "{:g}".format, which="y")
            if levels:
                threshold_lines(ax, LEVELS, "{:g}".format)


def _layer_legend(ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) <= 16:
        with style():
            ax.legend(
                handles,
                labels,
                fontsize=7.5,
                ncols=min(4, len(labels)),
                loc="upper center",
                bbox_to_anchor=(0.5, -0.16),
            )


def _scale(rows: pd.DataFrame) -> float:
    """What tokens are divided by: T0, or 1 where it is unknown."""
    return float(rows["base_tokens"].iloc[0]) if knows_length(rows) else 1.0


def _xlabel(rows: pd.DataFrame) -> str:
    return "share of the base's training tokens" if knows_length(rows) else "tokens"


def _axis_text(ax: Axes) -> Callable[[float], str]:
    return percent if ax.get_xlim()[1] <= 30 else tokens_text
