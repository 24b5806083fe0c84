"""How did training go, and whose predictions did each seed follow on the way?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator, StrMethodFormatter

from experiments.hybrids.cells import VARIANT
from experiments.hybrids.measuring.schemes import NONE, ZERO
from experiments.hybrids.report.line_styles import (
    legend_below,
    line_colours,
    seed_band,
    short,
)
from experiments.plots import (
    CYCLE,
    FAINT,
    GREY,
    PAPER,
    PURPLE,
    panels,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = tuple(digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5))
"""Ticks of an error over zero's."""
MOST_ROWS = 16
"""Seeds of one panel of schemes; of more, the first of each architecture."""


def training(curve: pd.DataFrame) -> Figure:
    """Held-out error over zero's against steps, a panel a task."""
    tasks = [str(task) for task in curve["task"].unique()]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    width = 6.4 if columns == 1 else 10.6 / columns
    figure, axes = panels(lines, columns, width=width, height=3.4)
    colours = line_colours([str(name) for name in curve["architecture"].unique()])
    for number, ax in enumerate(axes.flat):
        if number >= len(tasks):
            ax.set_visible(False)
            continue
        rows = curve.loc[curve["task"] == tasks[number]].assign(value=lambda f: f["share"])
        with style():
            for architecture, colour in colours.items():
                own = rows.loc[rows["architecture"] == architecture]
                if len(own):
                    seed_band(ax, own, "step", architecture, colour)
            ax.axhline(1, color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
            first = float(rows.loc[rows["step"] > 0, "step"].min()) if len(rows) else 1.0
            # Steps begin at 0: as far to the left as an evaluation is from the next.
            ax.set_xscale("symlog", linthresh=first if np.isfinite(first) else 1.0)
            ax.set_xlim(left=0)
            ax.set_yscale("log")
            low, high = ax.get_ylim()
            ticks = [share for share in SHARES if low <= share <= high]
            if len(ticks) > 1:
                ax.set_yticks(ticks)
                ax.yaxis.set_minor_locator(NullLocator())
            for formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                formatter(StrMethodFormatter("{x:g}"))
            ax.set(title=tasks[number], xlabel="steps")
            ax.set_ylabel("held-out error / zero's" if number % columns == 0 else "")
    legend_below(figure, list(axes.flat))
    return figure


def schemes(labels: pd.DataFrame) -> Figure:
    """The label of every checkpoint: a strip a seed, a panel a task and shift.

    A label that hangs on the prompts (little support) is pale.
    """
    cells = [(str(t), str(s)) for t, s in labels[["task", "shift"]].drop_duplicates().to_numpy()]
    colours = scheme_colours(labels)
    columns = min(2 if len(cells) < 5 else 3, len(cells))
    lines = -(-len(cells) // columns)
    strips = {cell: _strips(labels, *cell) for cell in cells}
    highest = max(len(found) for found in strips.values())
    figure, axes = panels(lines, columns, width=10.8 / max(columns, 2), height=1.5 + 0.24 * highest)
    for number, ax in enumerate(axes.flat):
        if number >= len(cells):
            ax.set_visible(False)
            continue
        task, shift = cells[number]
        with style():
            _draw_strips(ax, strips[task, shift], colours)
            where = "in distribution" if shift == "none" else f"{shift} prompts"
            ax.set(title=f"{task}, {where}", xlabel="steps")
    legend_below(figure, list(axes.flat))
    return figure


def scheme_colours(labels: pd.DataFrame) -> dict[str, str]:
    """none white, zero grey, others in the order in which they appear."""
    names = [str(name) for name in labels["label"].unique() if name != NONE]
    others = [name for name in names if name.split(" = ")[0] != ZERO]
    palette = (*CYCLE, PURPLE, "#7f5f3f", "#2b2b6b", "#c2b280")
    found = {name: palette[at % len(palette)] for at, name in enumerate(others)}
    found |= {name: GREY for name in names if name not in found}
    return found | {NONE: "#ffffff"}


def _strips(labels: pd.DataFrame, task: str, shift: str) -> list[tuple[str, pd.DataFrame]]:
    rows = labels.loc[(labels["task"] == task) & (labels["shift"] == shift)]
    seeds = rows[["architecture", "seed"]].drop_duplicates()
    if len(seeds) > MOST_ROWS:
        rows = rows.loc[rows["seed"] == rows["seed"].min()]
    found = []
    for (architecture, seed), part in rows.groupby(["architecture", "seed"], sort=False):
        named = short(str(architecture).replace(VARIANT, " σ "), 24)
        found.append((f"{named} · {seed}", part.sort_values("step")))
    return found


def _draw_strips(
    ax: Axes, strips: list[tuple[str, pd.DataFrame]], colours: Mapping[str, str]
) -> None:
    """Each label from its checkpoint to the next, on steps + 1 in logarithm."""
    for height, (_, part) in enumerate(strips):
        steps = part["step"].to_numpy(float)
        at = np.log10(1 + steps)
        gap = float(np.median(np.diff(at))) if len(at) > 1 else 0.2
        ends = np.append(at[1:], at[-1] + gap)
        for start, end, row in zip(at, ends, part.to_dict("records"), strict=True):
            support = row["support"] if np.isfinite(row["support"]) else 1.0
            ax.barh(
                height,
                end - start,
                left=start,
                height=0.78,
                color=colours[row["label"]],
                alpha=float(np.clip(support, 0.3, 1.0)),
                edgecolor=PAPER if row["label"] != NONE else "#dfe4e8",
                linewidth=0.5,
            )
    # The legend has squares of its own: a strip's may be pale.
    for name, colour in colours.items():
        if any((part["label"] == name).any() for _, part in strips):
            ax.scatter([], [], marker="s", s=50, color=colour, edgecolor=FAINT, label=name)
    last = max(float(part["step"].max()) for _, part in strips)
    ticks = [0, *(10**power for power in range(1, 1 + int(np.log10(max(last, 10)))))]
    ax.set_xticks(
        np.log10(1 + np.array(ticks)), [f"{tick:,}".replace(",", "\u202f") for tick in ticks]
    )
    ax.set_yticks(range(len(strips)), [name for name, _ in strips], fontsize=8)
    ax.set_ylim(len(strips) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)
