"""What did each layer, arm and threshold take? Shares (F2), arms (F7), survival (F10).

A student that never came within the threshold is no missing value: it is hatched, or an open
triangle at the tokens it was trained on, and reads ">".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.censored_plots import (
    censored_map,
    depth_colours,
    depth_key,
    log_limits,
    ranges,
    spelled_ticks,
    survival_steps,
)
from experiments.plots import CYCLE, FAINT, INK, PAPER, panels, style
from experiments.reset.result import (
    ARMS,
    STACKS,
    TARGETS,
    THRESHOLD,
    finished,
    is_whole,
    lead,
    main,
    most_varied,
    near,
    one_weights,
    percent,
    place_name,
    places,
    targets,
    tokens_text,
    unit_of,
    usual_origin,
)
from experiments.reset.statistics.summaries import amounts, ends, medians, numbered, over_places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("absolute", "relative")
WITHIN = {"absolute": "within τ nat of the old loss", "relative": "share of the damage undone"}
GAP_ONLY = ("A1", "A2", "A4", "A5", "A6")
"""Arms that are read at their budget: not reset, or not meant to come back."""
BY_VARIANT = ("A9", "A10", "A11", "A12", "A13")


def shares(crossings: pd.DataFrame) -> Figure:
    """F2: median share of T0 by layer and threshold; a row of panels a target."""
    own = main(lead(crossings))
    unit, text = unit_of(own)
    by = ["target", "stack", "layer", "threshold"]
    table = pd.concat(  # a layer that was not missed has no relative thresholds
        [
            medians(of_kind, by, unit).assign(kind=kind)
            for kind in KINDS
            if len(of_kind := own.loc[own["kind"] == kind])
        ],
        ignore_index=True,
    )
    names = targets(own)
    found, kinds = places(own), [k for k in KINDS if (table["kind"] == k).any()]
    figure, axes = panels(
        len(names), len(kinds), width=9.2 / 2, height=float(np.clip(0.34 * len(found) + 1.2, 2, 7))
    )
    limits = log_limits(table["value"])
    for line, target in enumerate(names):
        for column, kind in enumerate(kinds):
            shown = table.loc[(table["target"] == target) & (table["kind"] == kind)]
            rising = kind == "relative"
            shown = shown.assign(
                order=[
                    found.index((s, n)) for s, n in zip(shown["stack"], shown["layer"], strict=True)
                ],
                place=[
                    place_name(s, n) for s, n in zip(shown["stack"], shown["layer"], strict=True)
                ],
                level=[
                    f"{100 * t:g} %" if rising else f"{t:g}" for t in shown["threshold"].tolist()
                ],
            ).sort_values(["order", "threshold"], ascending=[True, rising])
            last = column == len(kinds) - 1
            censored_map(
                shown,
                x="level",
                y="place",
                text=text,
                limits=limits,
                title=f"{TARGETS[target]}: {kind}",
                xlabel=WITHIN[kind] if line == len(names) - 1 else "",
                label=("share of T0" if unit == "share" else "tokens") if last else "",
                ax=axes[line, column],
            )
    return figure


def arms(ledger: pd.DataFrame, crossings: pd.DataFrame, threshold: float = THRESHOLD) -> Figure:
    """F7: what every arm took to come within the threshold; beside it, gaps at the budget.

    Of the bases with the most arms, on fresh data. The gap stands for arms that were not reset or
    not meant to come back, and for those of which no student came within the threshold. Small dots
    are single students, coloured by layer.
    """
    crossings, ledger = armed(crossings), armed(ledger)
    marked = one_weights(crossings)
    marked = named_arms(marked.loc[(marked["kind"] == "absolute") & near(marked, threshold)])
    last = named_arms(ends(one_weights(numbered(ledger))))
    reached = marked.loc[~marked["arm"].isin(GAP_ONLY)]
    came = reached.groupby("name")["status"].transform(lambda s: (s == "recovered").any())
    never = reached.loc[~came.astype(bool), "name"] if len(reached) else reached["name"]
    at_end = last.loc[last["arm"].isin(GAP_ONLY) | last["name"].isin(never)]
    both = [len(reached) > 0, len(at_end) > 0]
    tall = max(reached["name"].nunique(), at_end["name"].nunique(), 3)
    figure, axes = panels(1, sum(both), width=10.6 / 2, height=0.31 * tall + 1.5)
    spots = iter(axes.flat)
    found = places(pd.concat([rows[["arm", "stack", "layer"]] for rows in (reached, at_end)]))
    if both[0]:
        _reached_panel(next(spots), reached, found, threshold)
    if both[1]:
        _gap_panel(next(spots), at_end, found)
    if len(found) > 1:
        stacks = [s for s in STACKS if s and any(place[0] == s for place in found)]
        depth_key(list(axes.flat), len(found), ", then ".join(stacks) or "layer")
    return figure


def armed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the bases with the most arms, at their end, on fresh data of one origin."""
    if rows.empty:
        return rows
    return finished(most_varied(usual_origin(rows.loc[rows["unique"].isna()]), "arm"))


def survival(frame: pd.DataFrame) -> Figure:
    """F10: share of students not yet within a threshold; a panel a target, a line a threshold."""
    frame = frame.loc[frame["kind"] == "absolute"]
    names = targets(frame)
    share = "share" in frame and frame["share"].notna().to_numpy().all()
    x, text = ("share", percent) if share else ("tokens", tokens_text)
    figure, axes = panels(1, len(names), width=9.2 / max(len(names), 2), height=3.5, share_y=True)
    levels = sorted(set(frame["threshold"]), reverse=True)
    colours = {f"{t:g} nat": CYCLE[i % len(CYCLE)] for i, t in enumerate(levels)}
    for number, (ax, target) in enumerate(zip(axes.flat, names, strict=True)):
        rows = frame.loc[frame["target"] == target].sort_values("threshold", ascending=False)
        survival_steps(
            rows.assign(level=[f"{t:g} nat" for t in rows["threshold"]]),
            x=x,
            group="level",
            title=TARGETS[target],
            xlabel="share of the base's training tokens" if share else "tokens",
            ylabel="share not yet recovered" if number == 0 else "",
            colours=colours,
            ax=ax,
        )
        spelled_ticks(ax, text)
    return figure


def named_arms(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with `name`: the arm, its variant where it has several, and its layer if only one."""
    if rows.empty:
        return rows.assign(name=pd.Series(dtype=str))
    several = places(rows)
    names = []
    for row in rows.to_dict("records"):
        arm = str(row["arm"])
        words = ARMS.get(arm, "")
        said = {
            "A9": f"only {row['part']}",
            "A12": f"layers {str(row['layers']).replace(' ', '+')}" if row.get("layers") else words,
            "A10": f"law {row['law']}",
            "A13": f"cross-attention: {row['part']}, {row['law']}",
        }.get(arm, words)
        target = str(row["target"])
        if arm == "A11" or (target != "lm" and arm not in GAP_ONLY):
            said = "reset" if arm in ("A0", "A11") else said
            said = f"{said}, {TARGETS.get(target, target)}"
        elif arm == "A0":
            said = f"reset, {TARGETS['lm']}"
        names.append(f"{arm} {said}")
    rows = rows.assign(name=names)
    alone = rows.groupby("name")["layer"].transform("nunique") == 1
    whole = is_whole(rows)
    if len(several) > 1:
        where = [place_name(s, n) for s, n in zip(rows["stack"], rows["layer"], strict=True)]
        rows["name"] = np.where(
            alone & ~whole,
            [f"{n} ({w})" for n, w in zip(rows["name"], where, strict=True)],
            rows["name"],
        )
    number = [int(a.removeprefix("A")) for a in rows["arm"]]
    rank = [list(TARGETS).index(t) if t in TARGETS else 9 for t in rows["target"]]
    return rows.assign(number=number, rank=rank).sort_values(
        ["number", "rank", "name"], kind="stable"
    )


def _reached_panel(
    ax: Axes, rows: pd.DataFrame, found: list[tuple[str, int]], threshold: float
) -> None:
    unit, text = unit_of(rows)
    table = medians(rows, ["name"], unit).drop(columns=["smallest", "largest"])
    ends_ = over_places(rows, ["name"], unit).set_index("name").loc[table["name"]].reset_index()
    table["low"] = ends_["low"].fillna(ends_["smallest"])
    table["high"] = ends_["high"].fillna(ends_["largest"])
    table["note"] = [
        "" if not row["censored"] + row["diverged"] else _never(row)
        for row in table.to_dict("records")
    ]
    ranges(
        table,
        bound="bound",
        notes="note",
        log=True,
        title=f"to come within {threshold:g} nat",
        xlabel="share of the base's training tokens" if unit == "share" else "tokens",
        ax=ax,
    )
    order = {name: place for place, name in enumerate(table["name"])}
    known = amounts(rows, unit)
    known = known.assign(at=known["floor"], height=[order[name] for name in known["name"]])
    _students(ax, known, found, np.isinf(known["amount"].to_numpy(float)))
    spelled_ticks(ax, text)


def _gap_panel(ax: Axes, rows: pd.DataFrame, found: list[tuple[str, int]]) -> None:
    own = rows.groupby(["name", "base", "stack", "layer", "part"], sort=False)["gap"].median()
    own = own.reset_index().groupby("name", sort=False)["gap"]
    table = own.agg(value="median", low="min", high="max").reset_index()
    ranges(table, title="gap at the end of the budget", xlabel="nat", ax=ax)
    order = {name: place for place, name in enumerate(table["name"])}
    rows = rows.assign(at=rows["gap"], height=[order[name] for name in rows["name"]])
    _students(ax, rows, found, np.zeros(len(rows), bool))
    ax.axvline(0, color=FAINT, linewidth=0.9, zorder=1)
    ax.axvline(THRESHOLD, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)


def _students(
    ax: Axes, rows: pd.DataFrame, found: list[tuple[str, int]], is_open: np.ndarray
) -> None:
    """Single students under their arm's line, coloured by layer; open triangles never got there."""
    colours = dict(zip(found, depth_colours(len(found)), strict=True))
    own = [
        INK if whole else colours[(s, n)]
        for s, n, whole in zip(rows["stack"], rows["layer"], is_whole(rows), strict=True)
    ]
    with style():
        for shape, chosen in (("o", ~is_open), (">", is_open)):
            shades = [c for c, yes in zip(own, chosen, strict=True) if yes]
            ax.scatter(
                rows["at"][chosen],
                rows["height"][chosen] + 0.24,
                s=14 if shape == "o" else 20,
                marker=shape,
                c=shades if shape == "o" else PAPER,
                edgecolors=shades,
                linewidths=0.9,
                zorder=3,
            )


def _never(row: Mapping[Any, Any]) -> str:
    """`2 of 8 >`: how many never came within; of those, how many diverged."""
    never = row["censored"] + row["diverged"]
    split = f", {row['diverged']} diverged" if row["diverged"] else ""
    return f"{never}/{row['students']} never{split}"
