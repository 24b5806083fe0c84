"""Which colour has an architecture, and how is a line over seeds drawn? Alike in all figures.

Few architectures take the study's cycle. Of many, a family has a range and its members go along it:
GPT-2s from blue to violet, Llamas from red to yellow, those of Mamba alone green. Variants of one
architecture that begin with positions of other deviations share its colour; large ones are dashed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from experiments.hybrids.cells import VARIANT
from experiments.plots import BLUE, BROWN, CYCLE, GREEN, ORANGE, PINK, PURPLE, RED, SKY, style

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("#0b1f5c", "#2f6fdb", "#12a5c4", "#8b6fd6", "#d0a8ee"),
    "llama": ("#6f1d04", "#e0492f", "#f5a35c", "#e8c51c"),
    "mamba": ("#00573f", "#4fc09f"),
}
"""What a name begins with -> the colours from its first member to its last."""
OTHERS = (PURPLE, BROWN, PINK, GREEN, ORANGE, SKY, BLUE, RED)
LONGEST = 30
"""Letters of a name in a legend or on an axis."""
LARGE = 0.1
"""Deviations from here on are dashed: they are as large as what is added to them."""


def line_colours(architectures: Sequence[str]) -> dict[str, str]:
    """A colour for every architecture, in their order."""
    plain = list(dict.fromkeys(name.split(VARIANT)[0] for name in architectures))
    if len(plain) < len(architectures):
        colours = line_colours(plain)
        return {name: colours[name.split(VARIANT)[0]] for name in architectures}
    if len(architectures) <= len(CYCLE):
        return dict(zip(architectures, CYCLE, strict=False))
    family = {name: _family(name) for name in architectures}
    found = {}
    for name in architectures:
        kin = [other for other in architectures if family[other] == family[name]]
        if not family[name]:
            found[name] = OTHERS[kin.index(name) % len(OTHERS)]
            continue
        shades = LinearSegmentedColormap.from_list("family", list(FAMILIES[family[name]]))
        at = kin.index(name) / max(len(kin) - 1, 1)
        found[name] = to_hex(shades(at))
    return found


def seed_band(
    ax: Axes, rows: pd.DataFrame, x: str, name: str, colour: str, floor: float = 0.0
) -> None:
    """Mean over seeds of `value` against `x`, and a band from the smallest seed to the largest."""
    table = rows.groupby(x, sort=True)["value"].agg(["mean", "min", "max"]).clip(lower=floor)
    at = table.index.to_numpy(float)
    if rows["seed"].nunique() > 1:
        ax.fill_between(at, table["min"], table["max"], color=colour, alpha=0.15, lw=0)
    marker = "o" if len(table) == 1 else ""
    large = VARIANT in name and float(name.split(VARIANT)[1]) >= LARGE
    dashes = "--" if large else "-"
    ax.plot(at, table["mean"], dashes, color=colour, marker=marker, label=short(name, 40), zorder=3)


def short(name: str, longest: int = LONGEST) -> str:
    """A name that fits; blocks in words can be long."""
    return (
        textwrap.shorten(name.replace(",", ", "), longest, placeholder="…")
        if (len(name) > longest)
        else name
    )


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all panels, each name once, in columns that fit."""
    named = {}
    for ax in axes:
        if ax.get_visible():
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
    if not named:
        return
    widest = 0.075 * max(len(name) for name in named) + 0.6  # inches, by experience
    columns = int(np.clip(figure.get_figwidth() / widest, 1, len(named)))
    with style():
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
        )


def _family(name: str) -> str:
    """The family of a preset; of blocks in words, none."""
    if "," in name or "*" in name or name.startswith("mambaformer"):
        return ""
    return next((family for family in FAMILIES if name.startswith(family)), "")
