"""What does a pruning run say in words, most important first? Every sentence has its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from experiments.prune.findings import (
    NAMES,
    Findings,
    costs_of,
    interval_in_words,
    listed,
    shots_of,
    signed,
)

FEW = 3
"""Components at the top below which their share says too little for a sentence."""


def sentences(findings: Findings) -> list[str]:
    """The findings of the page."""
    return [
        *_removable_sentences(findings),
        *_contrast_sentences(findings),
        *_grid_sentences(findings),
        *_exported_sentences(findings),
        *_alone_sentences(findings),
        *_fidelity_sentences(findings),
        *_agreement_sentences(findings),
        *_place_sentences(findings),
        *_induction_sentences(findings),
    ]


def _removable_sentences(findings: Findings) -> list[str]:
    said = []
    tolerance = f"{100 * findings.study.tolerance:g}"
    for unit in findings.units:
        rows = findings.removable
        rows = rows.loc[(rows["unit"] == unit) & rows["shots"].isna()].to_dict("records")
        ends = [interval_in_words(row["low"], row["high"]) for row in rows]
        without = all(math.isnan(row["low"]) for row in rows)
        parts = [
            f"{row['value']:g} by {row['ranking']}" + ("" if without else f" ({end})")
            for row, end in zip(rows, ends, strict=True)
        ]
        said.append(
            f"{_named(unit)}: of {findings.totals[unit]}, this many can go before the average "
            f"falls by more than {tolerance} points: {listed(parts)}"
            + (f" ({ends[0]})." if without else ".")
        )
    return said


def _contrast_sentences(findings: Findings) -> list[str]:
    said = []
    for unit in findings.units:
        rows = findings.contrasts
        rows = rows.loc[rows["unit"] == unit] if len(rows) else rows
        called = [
            f"{row['ranking']} ({signed(100 * row['value'])})"
            for row in rows.to_dict("records")
            if row["p_holm"] < 0.05
        ]
        if called:
            said.append(
                f"{_named(unit)}: averaged over the steps, these orders differ in accuracy from "
                f"random ones, in points: {listed(called)} (each p < 0.05 after Holm's correction "
                f"over {counted(len(rows), 'order')})."
            )
        elif len(rows) and np.isfinite(rows["p_holm"].to_numpy(float)).any():
            said.append(
                f"{_named(unit)}: averaged over the steps, no order differs in accuracy from "
                "random ones by more than chance explains (smallest p "
                f"{rows['p_holm'].min():.2g} after Holm's correction over "
                f"{counted(len(rows), 'order')})."
            )
    return said


def _grid_sentences(findings: Findings) -> list[str]:
    said = []
    rows = findings.grid
    for ranking, own in rows.groupby("ranking", sort=False) if len(rows) else []:
        everywhere = own.loc[own["shots"].isna()]
        safe = everywhere.loc[everywhere["value"] >= -findings.study.tolerance - 1e-9]
        if len(safe):
            row = safe.loc[(safe["fraction"] + safe["ffns_fraction"]).idxmax()]
            said.append(
                f"Heads and FFNs together, by {ranking}: of the cells that lose at most "
                f"{100 * findings.study.tolerance:g} points, the one with most removed is "
                f"{100 * row['fraction']:.0f} % of heads and {100 * row['ffns_fraction']:.0f} % of "
                f"FFNs ({_points(row)}); chosen among {len(everywhere)} cells, so chance favours "
                "it."
            )
    return said


def _exported_sentences(findings: Findings) -> list[str]:
    if findings.exported.empty:
        return []
    table = findings.exported.set_index(["model", "metric"])
    parts = []
    for metric, own in findings.exported.groupby("metric", sort=False):
        rows = own.set_index("model")
        both = rows["value"].to_dict()
        if {"whole", "exported"} <= both.keys() and metric != "accuracy":
            whole, left = both["whole"], both["exported"]
            change = f"{signed(100 * (left / whole - 1), 0)} %"
            apart = rows["low"].max() > rows["high"].min()
            if metric == "tokens_per_second" and not apart:
                change = "single forwards overlap: no difference to speak of"
            said = f"{str(metric).replace('_', ' ')} {whole:,.0f} → {left:,.0f} ({change})"
            parts.append(said + (", in the same dtype" if metric == "bytes" else ""))
    changed = ("exported", "accuracy_change")
    if changed in table.index:
        parts.append(f"accuracy {_points(table.loc[changed].to_dict())}")
    return [f"The exported checkpoint beside the whole model: {', '.join(parts)}."]


def _alone_sentences(findings: Findings) -> list[str]:
    said = [
        f"{costs_of(row)} alone, on reporting examples (p = {row['p_holm']:.2g} after Holm's "
        f"correction); the loss changes by {signed(row['loss_rise'], 3)} nats."
        for row in findings.alone.to_dict("records")
    ]
    for unit in dict.fromkeys(findings.exact["unit"]) if len(findings.exact) else []:
        rows = findings.exact.loc[findings.exact["unit"] == unit]
        scores = rows.loc[rows["metric"] == "score_change"]
        loss = rows.loc[rows["metric"] == "loss_rise"]
        sure = loss.loc[(loss["p_holm"] < 0.05) & (loss["value"] > 0)]
        tied = int((scores["tied"] > 1).sum())
        said.append(
            f"{_named(str(unit))} removed alone on selection examples: the loss rises beyond "
            f"chance for {len(sure)} of {len(loss)} (Holm); in accuracy {tied} of {len(scores)} "
            "tie with another."
        )
    return said


def _fidelity_sentences(findings: Findings) -> list[str]:
    said = []
    for unit in dict.fromkeys(findings.fidelity["unit"]):
        rows = findings.fidelity.loc[findings.fidelity["unit"] == unit].set_index("exact")
        rise, size = rows.loc["rise"], rows.loc["size"]
        said.append(
            f"{_named(str(unit))}: the gradient orders components as their exact removal does with "
            f"Spearman's ρ = {_rho(rise)} (mean rise of the loss) and {_rho(size)} (mean size of "
            f"its change), averaged over {counted(int(rise['conditions']), 'condition')}."
        )
    return said


def _agreement_sentences(findings: Findings) -> list[str]:
    if findings.agreement.empty:
        return []
    said = []
    rows = findings.agreement
    tasks = rows.loc[
        (rows["metric"].isin(["spearman", "overlap"]))
        & (rows["shots_a"] == rows["shots_b"])
        & (rows["task_a"] != "aggregate")
        & (rows["task_b"] != "aggregate")
    ]
    for unit, own in tasks.groupby("unit", sort=False):
        parts = []
        k, components = int(own["k"].iloc[0]), int(own["components"].iloc[0])
        for shots, at in own.groupby("shots_a", sort=True):
            values = at.groupby("metric")["value"]
            mean, low, high = (values.agg(how)["spearman"] for how in ("mean", "min", "max"))
            overlap = values.mean()["overlap"]
            parts.append(
                f"ρ = {_minus(mean)} at {shots_of(shots)} ({_minus(low)} to {_minus(high)}"
                + (f"; {100 * overlap:.0f} % of the top {k} shared)" if k >= FEW else ")")
            )
        chance = f"; by chance they would share {100 * k / components:.0f} %" if k >= FEW else ""
        said.append(
            f"{_named(str(unit))}: two tasks' importance agrees, averaged over pairs, with "
            f"{listed(parts)}{chance}."
        )
    shots = findings.across_shots
    for unit in dict.fromkeys(shots["unit"]) if len(shots) else []:
        own = shots.loc[(shots["unit"] == unit) & (shots["metric"] == "spearman")]
        parts = [
            f"ρ = {_minus(row['value'])} between {row['shots_a']} and {row['shots_b']}"
            for row in own.to_dict("records")
        ]
        said.append(
            f"{_named(str(unit))}: numbers of shots of one task agree with {listed(parts)}, "
            f"averaged over {counted(int(own['tasks'].max()), 'task')}."
        )
    return said


def _place_sentences(findings: Findings) -> list[str]:
    said = []
    for unit in dict.fromkeys(findings.thirds["unit"]) if len(findings.thirds) else []:
        rows = findings.thirds.loc[findings.thirds["unit"] == unit]
        if rows["k"].iloc[0] < FEW:
            continue
        parts = [
            f"{100 * row['value']:.0f} % in the {row['third']} third (chance "
            f"{100 * row['expected']:.0f} %, p = {row['p']:.2g})"
            for row in rows.to_dict("records")
        ]
        said.append(
            f"{_named(str(unit))}: of the {rows['k'].iloc[0]} most important, {listed(parts)}."
        )
    return said


def _induction_sentences(findings: Findings) -> list[str]:
    rows = findings.induction
    if rows.empty:
        return []
    said = []
    for row in rows.loc[rows["shots"] == rows["shots"].max()].to_dict("records"):
        score = row["score"].replace("_", " ")
        said.append(
            f"At {shots_of(row['shots'])}, {100 * row['overlap']:.0f} % of the {row['k']} most "
            f"important heads are among the {row['k']} with the highest {score} score (chance "
            f"{100 * row['expected']:.0f} %, p = {row['p']:.2g}); over all heads ρ = "
            f"{_minus(row['spearman'])}."
        )
    return said


def _points(row: Mapping[str, float] | pd.Series) -> str:
    """`+3.2 points, 95 % interval 1.0 to 5.4`."""
    said = f"{signed(100 * float(row['value']))} points"
    if math.isnan(float(row["low"])):
        return said
    ends = [signed(100 * float(row[name])) for name in ("low", "high")]
    return f"{said}, 95 % interval {ends[0]} to {ends[1]}"


def _rho(row: pd.Series) -> str:
    said = _minus(float(row["value"]))
    if math.isnan(float(row["low"])):
        return said
    return f"{said} [{_minus(float(row['low']))}, {_minus(float(row['high']))}]"


def _minus(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _named(unit: str) -> str:
    name = NAMES.get(unit, unit)
    return name[0].upper() + name[1:]


def counted(number: int, what: str) -> str:
    """`1 task`, `3 tasks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
