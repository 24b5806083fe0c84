"""The table of scores as a picture, alone and beside the paper's Table 3.

A cell has the score over seeds, half the width of its interval, and how many seeds failed where any
did. Colours go from 0 (as good as predicting 0) to 1 (as good as the baseline) in every table; what
is beyond has the colour of the end. Hatched: not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.hybrids.report.line_styles import short
from experiments.hybrids.report.published import DENOMINATORS
from experiments.plots import INK, PAPER, SEQUENTIAL, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def score_table(table: pd.DataFrame, failures: pd.DataFrame) -> Figure:
    """Architectures by tasks; columns of `table` as `scores.over_seeds` makes them."""
    failed = {
        (row["architecture"], row["task"]): (row["failed"], row["seeds"])
        for row in failures.to_dict("records")
        if row["shift"] == "none"
    }
    rows, columns = _names(table, "architecture"), _names(table, "task")
    against = table.drop_duplicates("task").set_index("task")["baseline"]
    heads = [f"{task}\n/ {against[task]}" for task in columns]
    notes = {}
    for row in table.to_dict("records"):
        cell = row["architecture"], row["task"]
        half = (row["high"] - row["low"]) / 2
        lines = [f"±{half:.3f}"] if math.isfinite(half) else []
        bad, count = failed.get(cell, (0, 0))
        notes[cell] = "\n".join([*lines, *([f"{bad} of {count} failed"] if bad else [])])
    figure, axes = panels(1, 1, width=2.9 + 1.25 * len(columns), height=1.5 + 0.52 * len(rows))
    _cells(axes[0, 0], table, "value", (rows, columns), heads, notes, "score over seeds")
    return figure


def beside(table: pd.DataFrame) -> Figure:
    """Ours and the paper's, of the cells that `published.beside_published` has."""
    ours = table.loc[table["value"].notna()]
    table = table.loc[table["architecture"].isin(_names(ours, "architecture"))]
    table = table.loc[table["task"].isin(_names(ours, "task"))]
    rows, columns = _names(table, "architecture"), _names(table, "task")
    notes = {
        (row["architecture"], row["task"]): f"[{row['low']:.2f}, {row['high']:.2f}]".replace(
            "-", "−"
        )
        for row in ours.to_dict("records")
        if math.isfinite(row["low"])
    }
    width = 2.0 + 1.2 * len(columns)
    figure, axes = panels(1, 2, width=max(width, 3.4), height=1.5 + 0.52 * len(rows))
    bases = table.dropna(subset=["baseline"]).drop_duplicates("task").set_index("task")["baseline"]
    heads = [f"{task}\n/ {bases[task]}" for task in columns]
    _cells(axes[0, 0], table, "value", (rows, columns), heads, notes, "this run")
    given = [f"{task}\n/ {DENOMINATORS.get(task, '')}".removesuffix("\n/ ") for task in columns]
    title = "the paper's Table 3, at its own size"
    _cells(axes[0, 1], table, "published", (rows, columns), given, {}, title)
    axes[0, 1].set_yticklabels([])
    return figure


def _cells(
    ax: Axes,
    table: pd.DataFrame,
    value: str,
    names: tuple[Sequence[str], Sequence[str]],
    heads: Sequence[str],
    notes: Mapping[tuple[str, str], str],
    title: str,
) -> None:
    rows, columns = names
    grid = table.pivot(index="architecture", columns="task", values=value)
    matrix = grid.reindex(index=list(rows), columns=list(columns)).to_numpy(float)
    with style():
        ax.grid(visible=False)
        ax.set_facecolor("#eef1f4")
        image = ax.imshow(
            np.ma.masked_invalid(matrix), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto"
        )
        for y, x in np.ndindex(matrix.shape):
            cell = str(rows[y]), str(columns[x])
            _cell(ax, image, x, y, float(matrix[y, x]), notes.get(cell, ""))
        for at in range(1, len(columns)):
            ax.axvline(at - 0.5, color=PAPER, linewidth=1.2)
        for at in range(1, len(rows)):
            ax.axhline(at - 0.5, color=PAPER, linewidth=1.2)
        ax.set_xticks(range(len(columns)), list(heads), fontsize=8.5)
        ax.set_yticks(range(len(rows)), [short(name) for name in rows])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(title)


def _cell(ax: Axes, image: Any, x: int, y: int, value: float, note: str) -> None:
    if not math.isfinite(value):
        ax.text(x, y, "–", ha="center", va="center", color=INK, fontsize=9)
        return
    red, green, blue = image.to_rgba(value)[:3]
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
    colour = INK if light else PAPER
    text = f"{value:.3f}".replace("-", "−")
    ax.text(x, y - (0.16 if note else 0), text, ha="center", va="center", color=colour, fontsize=9)
    if note:
        ax.text(x, y + 0.04, note, ha="center", va="top", color=colour, fontsize=7)


def _names(table: pd.DataFrame, column: str) -> list[str]:
    return [str(name) for name in table[column].unique()]
