"""What is inside trained hybrids, in pictures: parts that count, where they look, what they hold.

One seed a picture (the first): component L1H2 of one seed has nothing to do with that of another.
Probes are of the whole stream and compare, so their lines are means over seeds, with bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.hybrids.inside.ablations import ALL
from experiments.hybrids.report.line_styles import legend_below, line_colours, seed_band, short
from experiments.plots import DIVERGING, GREY, INK, SEQUENTIAL, annotate_cells, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MAPS = 9
"""Panels of one figure; more stay in the tables."""
SCORES = ("label", "input", "own", "previous", "pairing", "match", "match_shuffled")
"""Attention scores that are shown, in this order; `inside.label_attention` says what they are."""
SPELLED = {"match_shuffled": "match,\nshuffled"}


def importance(ablations: pd.DataFrame) -> Figure:
    """What goes without each head, FFN and mixer, of the first seed of each architecture and task.

    The score that is lost; where a task has no quick baseline, the rise of the squared error.
    """
    fill = str(ablations["fill"].iloc[0])
    rows = ablations.loc[ablations["fill"] == fill]
    cells = _cells(rows)
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    deepest = int(rows["layer"].max()) + 1
    figure, axes = panels(lines, columns, width=4.0, height=1.4 + 0.36 * deepest)
    for number, ax in enumerate(axes.flat):
        if number >= len(cells):
            ax.set_visible(False)
            continue
        task, architecture = cells[number]
        own = _of(rows, cells[number])
        own = own.loc[own["seed"] == own["seed"].min()]
        metric = "score_drop" if (own["metric"] == "score_drop").any() else "error_increase"
        own = own.loc[(own["metric"] == metric) & (own["examples"] == -1)]
        what = "score lost" if metric == "score_drop" else "error gained"
        _map(ax, own, f"{task}, {short(architecture, 22)}: {what}")
    return figure


def attention(looking: pd.DataFrame) -> Figure:
    """Where each head and mixer of the first seed looks: a panel an architecture and task.

    Rows are components, the last one ("even") attends to all before it alike; columns are scores,
    each of the prompts that it is about: of two kinds of prompts, the one with an x to match.
    """
    rows = looking.loc[(looking["examples"] == ALL) & looking["metric"].isin(SCORES)]
    rows = rows.loc[rows["seed"] == rows["seed"].min()]
    rows = rows.drop_duplicates(["task", "architecture", "component", "metric"], keep="first")
    cells = _cells(rows)
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    most = max(len(_of(rows, cell)["component"].unique()) for cell in cells)
    figure, axes = panels(lines, columns, width=4.0, height=1.1 + 0.2 * most)
    names = [name for name in SCORES if (rows["metric"] == name).any()]
    for number, ax in enumerate(axes.flat):
        if number >= len(cells):
            ax.set_visible(False)
            continue
        task, architecture = cells[number]
        _looking(ax, _of(rows, cells[number]), names, f"{task}, {short(architecture, 22)}")
    return figure


def probed(probes: pd.DataFrame) -> Figure:
    """R² of the function's weights by layer: a row a task, a column a number of examples.

    Dashed: the same with weights and prompts shuffled. Dotted: least squares on the examples.
    """
    tasks = [str(task) for task in probes["task"].unique()][:MOST_MAPS]
    counts = sorted(int(n) for n in probes["examples"].unique())
    figure, axes = panels(len(tasks), len(counts), width=3.4, height=2.9, share_y=True)
    colours = line_colours([str(name) for name in probes["architecture"].unique()])
    for line, task in zip(axes, tasks, strict=True):
        for ax, count in zip(line, counts, strict=True):
            rows = probes.loc[(probes["task"] == task) & (probes["examples"] == count)]
            _probed(ax, rows, colours)
            ax.set_title(f"{task}, {count} example{'s' * (count != 1)}", fontsize=9, color=INK)
            ax.set_ylabel("R² of the weights" if count == counts[0] else "")
    legend_below(figure, list(axes.flat))
    return figure


def _cells(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(task, architecture) of every panel."""
    pairs = rows[["task", "architecture"]].drop_duplicates().to_numpy()
    return [(str(task), str(architecture)) for task, architecture in pairs][:MOST_MAPS]


def _of(rows: pd.DataFrame, cell: tuple[str, str]) -> pd.DataFrame:
    return rows.loc[(rows["task"] == cell[0]) & (rows["architecture"] == cell[1])]


def _looking(ax: Axes, rows: pd.DataFrame, names: Sequence[str], title: str) -> None:
    table = rows.pivot(index="component", columns="metric", values="value")
    order = rows.sort_values(["layer", "kind", "head"], kind="stable")["component"].unique()
    parts = [*(name for name in order if name != "even"), *(n for n in order if n == "even")]
    matrix = table.reindex(index=parts, columns=list(names)).to_numpy(float)
    with style():
        ax.grid(visible=False)
        ax.set_facecolor("#eef1f4")
        image = ax.imshow(
            np.ma.masked_invalid(matrix), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto"
        )
        annotate_cells(ax, matrix, image, 2)
        ax.set_xticks(range(len(names)), [SPELLED.get(n, n) for n in names], fontsize=7)
        ax.set_yticks(range(len(parts)), parts, fontsize=7)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(title, fontsize=9, color=INK)


def _probed(ax: Axes, rows: pd.DataFrame, colours: dict[str, str]) -> None:
    best = rows.loc[rows["metric"] == "r2_least_squares", "value"].to_numpy(float)
    with style():
        for architecture, colour in colours.items():
            own = rows.loc[(rows["architecture"] == architecture) & (rows["layer"] != ALL)]
            if own.empty:
                continue
            seed_band(ax, own.loc[own["metric"] == "r2"], "layer", architecture, colour, -0.1)
            control = own.loc[own["metric"] == "r2_shuffled"].groupby("layer")["value"].mean()
            ax.plot(
                control.index, control.clip(lower=-0.1), color=colour, linestyle=(0, (4, 2)), lw=1
            )
        if best.size:
            ax.axhline(
                float(best.mean()), color=GREY, linestyle=(0, (1, 1.4)), label="least squares"
            )
        layers = int(rows["layer"].max())
        ax.set_xticks(range(layers + 1))
        ax.set(ylim=(-0.12, 1.05), xlabel="stream before block (last: behind all)")


def _map(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """Layers down, heads, FFN and mixer across."""
    names = [_column(component) for component in rows["component"]]
    heads = sorted({n for n in names if n.startswith("H")}, key=lambda name: int(name[1:]))
    columns = [*heads, *(n for n in ("F", "M") if n in names)]
    layers = int(rows["layer"].max()) + 1
    matrix = np.full((layers, len(columns)), np.nan)
    for name, row in zip(names, rows.to_dict("records"), strict=True):
        matrix[row["layer"], columns.index(name)] = row["value"]
    extent = float(np.nanmax(np.abs(matrix))) or 1.0
    spelled = {"F": "FFN", "M": "SSM"}
    with style():
        ax.grid(visible=False)
        ax.set_facecolor("#eef1f4")
        image = ax.imshow(
            np.ma.masked_invalid(matrix), cmap=DIVERGING, vmin=-extent, vmax=extent, aspect="auto"
        )
        annotate_cells(ax, matrix, image, 2 if extent >= 0.1 else 3)
        ax.set_xticks(range(len(columns)), [spelled.get(n, n) for n in columns])
        ax.set_yticks(range(layers))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(title, fontsize=9, color=INK)
        ax.set_ylabel("layer")


def _column(component: str) -> str:
    """L1H2 -> H2, L0F -> F, L3M -> M."""
    return component.lstrip("L").lstrip("0123456789")
