"""How do agreement and place look? Pictures of the tables of `agreement` and `where`.

As in `experiments.plots`: a frame in, Axes out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.plots import (
    DIVERGING,
    PAPER,
    accuracy_curves,
    annotate_cells,
    colour_bar,
    curve,
    own_axes,
    style,
)


def agreement_heatmap(
    frame: pd.DataFrame,
    *,
    shots: int,
    metric: str = "spearman",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Tasks x tasks at one shot count, each cell with its number; the diagonal is left empty.

    The colours run from −1 to 1 whatever the values, so that panels compare.
    """
    rows = frame.loc[(frame.metric == metric) & (frame.shots_a == shots) & (frame.shots_b == shots)]
    if rows.empty:
        raise ValueError(f"no {metric} between tasks at {shots} shots: give a frame that has it")
    names = list(dict.fromkeys([*rows.task_a, *rows.task_b]))
    grid = pd.DataFrame(np.nan, index=pd.Index(names), columns=pd.Index(names))
    for row in rows.to_dict("records"):
        grid.loc[row["task_a"], row["task_b"]] = row["value"]
        grid.loc[row["task_b"], row["task_a"]] = row["value"]
    matrix = grid.to_numpy(dtype=float)
    labels = [name.replace("_", " ") for name in names]
    with style():
        size = 0.55 * len(names)
        ax = ax or own_axes(size + 3.4, size + 1.9)
        ax.grid(visible=False)
        image = ax.imshow(np.ma.masked_invalid(matrix), cmap=DIVERGING, vmin=-1, vmax=1)
        for place in np.arange(1, len(names)) - 0.5:
            ax.axvline(place, color=PAPER, linewidth=1.2)
            ax.axhline(place, color=PAPER, linewidth=1.2)
        annotate_cells(ax, matrix, image, 2)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(names)), labels)
        ax.set_title(title)
        colour_bar(ax, image, metric)
    return ax


def layer_curve(
    frame: pd.DataFrame,
    *,
    group: str | None = None,
    title: str = "",
    ylabel: str = "mean importance of a component",
    ax: Axes | None = None,
) -> Axes:
    """Importance by layer, shaded between low and high; one line for each value of `group`."""
    ax = curve(frame, x="layer", group=group, title=title, xlabel="layer", ylabel=ylabel, ax=ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]) if frame["low"].min() < 0 else 0.0)
    return ax


def capacity_curves(
    frame: pd.DataFrame,
    *,
    title: str = "",
    ylabel: str = "share of the total score still there",
    ax: Axes | None = None,
) -> Axes:
    """Capacity retained against the share removed; random orders as their band."""
    return accuracy_curves(frame, title=title, ylabel=ylabel, ax=ax)
