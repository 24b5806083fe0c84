"""The pictures of a scan: maps of scores, the criterion's box, losses by position, importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.agreement_plots import capacity_curves
from experiments.induction.findings import SKILLS
from experiments.plots import FAINT, GREY, RED, WIDTH, curve, head_heatmap, panels, points, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.induction.findings import Findings

MAPS: Mapping[str, str] = {
    "prefix_matching": "prefix matching",
    "prefix_matching_control": "the same keys, no repetition",
    "previous_token": "previous token",
    "duplicate_token": "duplicate token",
    "first_position": "first position",
    "entropy": "entropy, nats",
    "copying": "copying",
    "attribution": "attribution, logits",
    "ov": "OV eigenvalues",
    "qk_matching": "QK matching",
    "k_composition": "K-composition",
    "prefix_matching_reference": "prefix matching (paper's code)",
    "copying_reference": "copying (paper's code)",
}
"""Scores with a map, and how they are titled."""
SIGNED = ("copying", "attribution", "ov", "qk_matching")
SETS = {
    "whole": "whole model",
    "induction": "without induction heads",
    "random": "without random heads",
}
SHOWN = 3
"""Heads whose attention is a picture."""


def figures(findings: Findings) -> Mapping[str, Callable[[], Figure]]:
    """The figures of a run by file name, each made when it is asked for."""
    made: dict[str, Callable[[], Figure]] = {}
    heads, mixers = (findings.heads.query(f"head {sign} 0") for sign in (">=", "<"))
    for stack in map(str, heads["stack"].unique()):
        name = f"scores_{stack}" if stack else "scores"
        made[name] = partial(_scores, heads.loc[heads["stack"] == stack])
    if len(mixers):
        made["scores_mixers"] = partial(_scores, mixers)
    if len(findings.judgement):
        made["criterion"] = partial(_criterion, findings)
    if len(findings.positions):
        made["positions"] = partial(_positions, findings)
    if len(findings.effects):
        made["masked"] = partial(_masked, findings)
    if findings.examples:
        made["attention"] = partial(_attention, findings)
    if _distances(findings.heads):
        made["distance"] = partial(_distance, findings)
    if len(findings.overlap):
        made["importance"] = partial(_importance, findings)
    return made


def _scores(rows: pd.DataFrame) -> Figure:
    names = [name for name in MAPS if name in rows and rows[name].notna().to_numpy().any()]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    layers, width = rows["layer"].nunique(), rows["head"].nunique()
    figure, axes = panels(
        lines, columns, width=WIDTH / 3 + 1.2, height=float(np.clip(0.3 * layers + 1.1, 1.8, 6))
    )
    for number, ax in enumerate(axes.flat):
        if number >= len(names):
            ax.set_visible(False)
            continue
        name = names[number]
        shown = rows.loc[rows[name].notna(), ["layer", "head", name]].rename(
            columns={name: "value"}
        )
        bounded = name not in (*SIGNED, "entropy", "k_composition")
        head_heatmap(
            shown.assign(head=shown["head"].clip(lower=0)),
            title=MAPS[name],
            signed=name in SIGNED,
            limits=(0.0, 1.0) if bounded else None,
            digits=2 if width <= 8 else None,
            ax=ax,
        )
    return figure


def _criterion(findings: Findings) -> Figure:
    study, table = findings.study, findings.judgement
    figure, axes = panels(1, 2, width=WIDTH / 2 + 1, height=3.5)
    with style():
        left, right = axes.flat
        passed = table["induction"].to_numpy(bool)
        points(
            table,
            x="prefix_matching",
            y=study.by,
            title="the criterion's box",
            xlabel="prefix matching",
            ylabel=f"{study.by}{', logits' if study.by == 'attribution' else ''}",
            ax=left,
        )
        left.scatter(
            table.loc[passed, "prefix_matching"], table.loc[passed, study.by], color=RED, zorder=4
        )
        high = left.get_ylim()[1]
        left.plot(
            [study.matching, study.matching, max(1.0, left.get_xlim()[1])],
            [high, study.copying, study.copying],
            color=FAINT,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
        )
        points(
            table,
            x="prefix_matching",
            y="prefix_matching_control",
            title="what position alone gives",
            xlabel="prefix matching",
            ylabel="the same keys, no repetition",
            named=0,
            ax=right,
        )
        right.scatter(
            table.loc[passed, "prefix_matching"],
            table.loc[passed, "prefix_matching_control"],
            color=RED,
            zorder=4,
        )
        end = float(table["prefix_matching"].max())
        right.plot([0, end], [0, end / 2], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    return figure


def _positions(findings: Findings) -> Figure:
    table = findings.positions
    copies = sorted(set(table["copy"]))
    copies = [*copies[:3], *copies[3:][-1:]]  # the first ones and the last
    figure, axes = panels(1, len(copies), width=9.2 / len(copies), height=3.2, share_y=True)
    for number, (ax, copy) in enumerate(zip(axes.flat, copies, strict=True)):
        rows = table.loc[table["copy"] == copy]
        curve(
            rows.assign(set=rows["set"].map(SETS)),
            x="place",
            group="set",
            title=f"copy {copy + 1}",
            xlabel="place in the block",
            ylabel="loss, nats" if number == 0 else "",
            ax=ax,
        )
        ax.set_ylim(bottom=0)
        if number and ax.get_legend() is not None:
            ax.get_legend().remove()
    return figure


def _masked(findings: Findings) -> Figure:
    table = findings.effects.loc[findings.effects["against"] == "whole"]
    skills = [name for name in SKILLS if table.loc[table["measure"] == name, "left"].notna().any()]
    figure, axes = panels(1, max(1, len(skills)), width=WIDTH, height=3.2)
    names = {"induction": "induction heads", "random": "random", "layer_matched": "same layers"}
    for ax, skill in zip(axes.flat, skills, strict=False):
        rows = table.loc[table["measure"] == skill]
        shown = rows.assign(
            set=rows["set"].map(names),
            value=rows["left"],
            low=rows["left_low"],
            high=rows["left_high"],
        )
        curve(
            shown,
            x="k",
            group="set",
            title=f"left of {SKILLS[skill]}",
            xlabel="heads masked",
            ylabel="share left",
            ax=ax,
        )
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_xticks(sorted(set(rows["k"])))
    return figure


def _attention(findings: Findings) -> Figure:
    chosen = list(findings.examples[0].patterns.items())[:SHOWN]
    figure, axes = panels(1, len(chosen), width=3.1, height=3.6)
    with style():
        for ax, (component, pattern) in zip(axes.flat, chosen, strict=True):
            ax.imshow(pattern.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            ax.grid(visible=False)
            ax.set(title=str(component), xlabel="key", ylabel="query" if ax is axes.flat[0] else "")
    return figure


def _distances(heads: pd.DataFrame) -> list[str]:
    return [c for c in heads if c.startswith("distance_") and not c.endswith("_stderr")]


def _distance(findings: Findings) -> Figure:
    names = _distances(findings.heads)
    ranked = findings.heads.sort_values("prefix_matching", ascending=False).head(4)
    previous = findings.heads.sort_values("previous_token", ascending=False).head(1)
    chosen = pd.concat([ranked, previous]).drop_duplicates("component")
    rows: list[dict[str, Any]] = [
        {"component": row["component"], "place": place, "value": row[name]}
        for row in chosen.to_dict("records")
        for place, name in enumerate(names)
        if pd.notna(row[name])
    ]
    figure, axes = panels(1, 1, width=1.4 * WIDTH, height=3.2)
    ax: Axes = axes[0, 0]
    curve(
        pd.DataFrame(rows),
        x="place",
        group="component",
        title="how far back",
        xlabel="distance to the key, tokens",
        ylabel="share of attention",
        ax=ax,
    )
    labels = [name.removeprefix("distance_").replace("_", "–") for name in names]
    ax.set_xticks(range(len(names)), labels)
    return figure


def _importance(findings: Findings) -> Figure:
    most = int(findings.overlap["shots"].max())
    names = ["prefix_matching", findings.study.by]
    own = findings.importance.loc[findings.importance["shots"] == most, ["component", "value"]]
    table = findings.heads.merge(own, on="component")
    figure, axes = panels(1, 3, width=WIDTH / 1.45, height=3.4)
    for ax, name in zip(axes.flat, names, strict=False):
        row = findings.overlap
        row = row.loc[(row["score"] == name) & (row["shots"] == most)].iloc[0]
        points(
            table,
            x=name,
            y="value",
            title=f"{100 * row['overlap']:.0f} % of the top {row['k']} shared (p = {row['p']:.2g})",
            xlabel=name.replace("_", " "),
            ylabel=f"importance at {most} shots, nats" if ax is axes.flat[0] else "",
            ax=ax,
        )
    capacity_curves(
        findings.capacity,
        title="prefix matching left",
        ylabel="share of the total score",
        ax=axes.flat[2],
    )
    return figure
