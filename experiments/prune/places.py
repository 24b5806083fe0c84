"""Where do important components sit, who agrees about them, and do they do induction?

By layer and by third of depth; between tasks and between shot counts; and, for heads, beside their
induction scores. Importance is that of the selection examples, as in `experiments.prune.scores`:
seeds pooled, conditions alike, texts the independent units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ablate.components import Component, Head, parse_component
from experiments.agreement import Condition, agreement
from experiments.prune.measured import Measured
from experiments.prune.scores import mean_importance, samples
from experiments.rank_measures import shared_top
from experiments.where import capacity_retained, importance_by_layer, top_by_third

TOP = 0.3
"""Share of components that counts as the top."""
INDUCTION = ("prefix_matching", "copying")


def agreements(measured: Measured, convention: str) -> pd.DataFrame:
    """`experiments.agreement` of every unit with at least two conditions, and a column unit."""
    tables = []
    for unit, components in measured.units.items():
        conditions = [
            Condition(s.task, s.shots, s.values, s.groups)
            for s in samples(measured, unit, convention)
        ]
        if len(conditions) > 1 and len(components) > 1:
            table = agreement(conditions, share=TOP)
            tables.append(table.assign(unit=unit))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def layers(measured: Measured, convention: str) -> pd.DataFrame:
    """`where.importance_by_layer` of every unit at each shot count, and columns unit, shots."""
    tables = []
    for unit, components in measured.units.items():
        found = samples(measured, unit, convention)
        for shots in dict.fromkeys(s.shots for s in found):
            at = [s for s in found if s.shots == shots]
            table = importance_by_layer(components, [(s.values, s.groups) for s in at])
            tables.append(table.assign(unit=unit, shots=shots))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def thirds(measured: Measured, importance: pd.DataFrame) -> pd.DataFrame:
    """`where.top_by_third` of the mean importance of every unit, and a column unit."""
    depth: dict[str, int] = {}
    for component in (c for components in measured.units.values() for c in components):
        stack = "decoder" if component.stack == "cross" else component.stack
        depth[stack] = max(depth.get(stack, 0), component.layer + 1)
    tables = []
    for unit, components in measured.units.items():
        scores = mean_importance(importance, unit)
        if len(scores) > 1:
            named = {c: scores[str(c)] for c in components}
            tables.append(top_by_third(named, depth, share=TOP).assign(unit=unit))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def capacity(
    measured: Measured, importance: pd.DataFrame, generator: np.random.Generator
) -> pd.DataFrame:
    """`where.capacity_retained` of both induction scores as heads go by importance at each shot
    count (the mean over tasks); scores below 0 count as 0. A column score is added."""
    tables = []
    for score, heads in _induction(measured).items():
        clipped = {head: max(value, 0.0) for head, value in heads.items()}
        if not any(clipped.values()):
            continue
        rankings: dict[str, Sequence[Component]] = {}
        for shots in _shots(importance, "heads"):
            scores = mean_importance(importance, "heads", shots)
            order = sorted(clipped, key=lambda head, scores=scores: scores[str(head)])
            rankings[f"{shots} shot{'' if shots == 1 else 's'}"] = order
        table = capacity_retained(clipped, rankings, generator)
        tables.append(table.assign(score=score))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def induction_overlap(measured: Measured, importance: pd.DataFrame) -> pd.DataFrame:
    """Are the important heads those that match prefixes, or those that copy?

    Columns: shots, score, k, components, overlap (share of the top k that both have), expected,
    p (hypergeometric), spearman.
    """
    rows = []
    for shots in _shots(importance, "heads"):
        scores = mean_importance(importance, "heads", shots)
        for score, heads in _induction(measured).items():
            one = np.array([scores[str(head)] for head in heads])
            other = np.array(list(heads.values()))
            if len(one) < 2:
                continue
            rows.append({"shots": shots, "score": score} | shared_top(one, other, TOP))
    names = ["shots", "score", "k", "components", "overlap", "expected", "p", "spearman"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def _induction(measured: Measured) -> dict[str, Mapping[Component, float]]:
    """Induction scores of the unit heads, by name; of the heads that were scanned."""
    frame = measured.induction
    if frame is None or not len(frame) or "heads" not in measured.units:
        return {}
    heads = [str(head) for head in measured.units["heads"]]
    rows = frame.loc[frame["component"].astype(str).isin(heads)]
    parsed: list[Any] = [parse_component(str(name)) for name in rows["component"]]
    assert all(isinstance(head, Head) for head in parsed)
    return {
        name: dict(zip(parsed, rows[name].astype(float), strict=True))
        for name in INDUCTION
        if name in rows and len(rows) and np.isfinite(rows[name].astype(float)).all()
    }


def _shots(importance: pd.DataFrame, unit: str) -> list[int]:
    """Shot counts at which a unit has importance."""
    if importance.empty:
        return []
    return sorted({int(s) for s in importance.loc[importance["unit"] == unit, "shots"]})
