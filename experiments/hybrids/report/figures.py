"""Which pictures has a study of hybrids? Those that its frames have data for, in this order.

    errors        squared error by number of examples beside baselines, a panel a function class
    shifts        the same out of distribution
    scores        the table of scores, architectures by function classes
    published     that table beside the paper's
    factors       effects of factors that are crossed
    training      held-out error against steps
    schemes       whose predictions each seed follows, as training goes on
    importance    what the score loses without each head, FFN and mixer
    attention     where each head and mixer looks
    probes        what a linear map reads off the stream, by layer

Lines are means over seeds; bands go from the smallest seed to the largest, since two or three seeds
have no interval worth drawing. Functions take frames and return figures; nothing is computed that
the tables do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.hybrids.report.factor_figures import factor_effects
from experiments.hybrids.report.inside_figures import attention, importance, probed
from experiments.hybrids.report.line_styles import legend_below, line_colours, seed_band
from experiments.hybrids.report.table_figures import beside, score_table
from experiments.hybrids.report.training_figures import schemes, training
from experiments.plots import GREY, INK, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.hybrids.findings import Findings

FLOOR = 1e-3
"""Errors below this share of zero's are off the picture: noise-free baselines reach 10⁻¹²."""
REFERENCES = ("zero", "least-squares", "bayes")
"""Baselines drawn beside the denominator, where a task has them."""
DASHES = ((0, (1, 2)), (0, (6, 2)), (0, (3, 2)), (0, (6, 2, 1, 2)))


def figures(findings: Findings) -> Mapping[str, Callable[[], Figure]]:
    """The figures of a run by file name, each made when it is asked for."""
    frames, named = findings.measured.frames, findings.denominators
    errors, table, theirs = frames["errors"], findings.table, findings.beside
    made: dict[str, Callable[[], Figure]] = {"errors": partial(error_curves, errors, named)}
    if len(errors.loc[errors["shift"] != "none"]):
        made["shifts"] = partial(shifted_curves, errors, named)
    if len(table):
        made["scores"] = partial(score_table, table, findings.failures)
    if len(theirs.dropna(subset=["value", "published"])):
        made["published"] = partial(beside, theirs)
    if len(findings.score_effects):
        made["factors"] = partial(factor_effects, findings.score_effects, findings.step_effects)
    if len(frames["curve"]):
        made["training"] = partial(training, frames["curve"])
    if len(frames["labels"]):
        made["schemes"] = partial(schemes, frames["labels"])
    if len(frames["ablations"]):
        made["importance"] = partial(importance, frames["ablations"])
    if len(frames["attention"]):
        made["attention"] = partial(attention, frames["attention"])
    if len(frames["probes"]):
        made["probes"] = partial(probed, frames["probes"])
    return made


def error_curves(errors: pd.DataFrame, denominators: Mapping[str, str]) -> Figure:
    """Squared error by number of examples, a panel a task, in distribution."""
    rows = errors.loc[errors["shift"] == "none"]
    tasks = [str(task) for task in rows["task"].unique()]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    width = 6.4 if columns == 1 else 10.6 / columns
    figure, axes = panels(lines, columns, width=width, height=3.5)
    colours = line_colours(_architectures(rows))
    for number, ax in enumerate(axes.flat):
        if number >= len(tasks):
            ax.set_visible(False)
            continue
        task = tasks[number]
        _curves(ax, rows.loc[rows["task"] == task], task, denominators.get(task, ""), colours)
        ax.set_ylabel("squared error" if number % columns == 0 else "")
    legend_below(figure, list(axes.flat))
    return figure


def shifted_curves(errors: pd.DataFrame, denominators: Mapping[str, str]) -> Figure:
    """The same out of distribution: a row a task, a column a shift."""
    rows = errors.loc[errors["shift"] != "none"]
    tasks = [str(task) for task in rows["task"].unique()]
    most = max(rows.loc[rows["task"] == task, "shift"].nunique() for task in tasks)
    width = 6.4 if most == 1 else 10.6 / most
    figure, axes = panels(len(tasks), most, width=width, height=3.2)
    colours = line_colours(_architectures(errors))
    for line, task in zip(axes, tasks, strict=True):
        own = rows.loc[rows["task"] == task]
        shifts = [str(shift) for shift in own["shift"].unique()]
        for number, ax in enumerate(line):
            if number >= len(shifts):
                ax.set_visible(False)
                continue
            part = own.loc[own["shift"] == shifts[number]]
            title = f"{task}, {shifts[number]}"
            _curves(ax, part, title, denominators.get(task, ""), colours)
            ax.set_ylabel("squared error" if number == 0 else "")
    legend_below(figure, list(axes.flat))
    return figure


def _curves(
    ax: Axes, rows: pd.DataFrame, title: str, denominator: str, colours: Mapping[str, str]
) -> None:
    """Every architecture with its band over seeds, and baselines dashed."""
    given = rows.loc[rows["architecture"] == ""]
    zero = given.loc[given["baseline"] == "zero", "value"].to_numpy(float)
    floor = FLOOR * float(zero.mean()) if zero.size else 1e-3
    with style():
        for (name, part), dashes in zip(_beside(given, denominator), DASHES, strict=False):
            ax.plot(
                part["examples"],
                part["value"].clip(lower=floor / 10),
                color=GREY if name == "zero" else INK,
                linewidth=1.2,
                linestyle=dashes,
                marker="x" if len(part) == 1 else "",
                label=name,
                zorder=2,
            )
        for architecture, colour in colours.items():
            own = rows.loc[rows["architecture"] == architecture]
            if len(own):
                seed_band(ax, own, "examples", architecture, colour, floor / 10)
        ax.set_yscale("log")
        top = float(rows.loc[rows["architecture"] != "", "value"].replace(np.inf, np.nan).max())
        highest = max(top, float(zero.max()) if zero.size else top)
        lowest = float(rows["value"].clip(lower=floor).min())
        if np.isfinite(highest) and highest > 0:
            ax.set_ylim(lowest / 1.5, highest * 1.6)
        ax.set(title=title, xlabel="examples before the point")


def _beside(given: pd.DataFrame, denominator: str) -> list[tuple[str, pd.DataFrame]]:
    """The baselines to draw; those with one curve are drawn once, under both names."""
    wanted = [n for n in dict.fromkeys((*REFERENCES, denominator)) if n]
    found: list[tuple[str, pd.DataFrame]] = []
    for name in wanted:
        part = given.loc[given["baseline"] == name].sort_values("examples")
        if part.empty:
            continue
        values = part["value"].to_numpy(float)
        size = float(np.nanmax(np.abs(values)))
        for at, (other, drawn) in enumerate(found):
            theirs = drawn["value"].to_numpy(float)
            if theirs.shape == values.shape and np.allclose(theirs, values, atol=1e-4 * size):
                found[at] = (f"{other} = {name}", drawn)
                break
        else:
            found.append((name, part))
    return found


def _architectures(rows: pd.DataFrame) -> Sequence[str]:
    return [str(name) for name in rows["architecture"].unique() if name]
