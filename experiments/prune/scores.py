"""What do the selection examples say of the components, and how surely?

Importance by component; exact effects, and whether the gradient ranks as they do. (Where important
components sit, and who agrees about them: `experiments.prune.places`.) Seeds of a condition, which
is a task at a shot count, are pooled; conditions weigh the same; texts are the independent units:
examples that share one go together. These are the numbers that made the rankings, so no claim
about pruning rests on them alone: that is what the reporting examples are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float

from ablate.components import Component
from ablate.importance import Importance
from experiments.jackknife import jackknife_interval, left_out
from experiments.oracle import effect_table
from experiments.prune.cells import FEWEST
from experiments.prune.measured import Measured
from experiments.rank_measures import rank_features, spearman


class Sample(NamedTuple):
    """Importance of one unit's components on the examples of one condition, seeds pooled."""

    task: str
    shots: int
    values: Float[np.ndarray, "example component"]
    groups: list[str]


def per_example(importance: Importance, convention: str) -> Float[np.ndarray, "example component"]:
    """Absolute effects whose mean over examples is the score in a convention of the study.

    The reference's scores are ratios of sums: here each example's part of them, the divisor given.
    """
    effects = (importance.gate.abs() if convention == "gate" else importance.token).double()
    if convention == "reference":
        scores = importance.scores("reference")
        score = effects.new_tensor([scores[c] for c in importance.components])
        # What has no effect anywhere has no part of a score of 0.
        effects = effects * (score / effects.mean(0).clamp_min(1e-300))
    return effects.cpu().numpy()


def samples(measured: Measured, unit: str, convention: str) -> list[Sample]:
    """One for each task and shot count, in the order measured; none for a unit without scores."""
    found: dict[tuple[str, int], list[tuple[Float[np.ndarray, "a b"], list[str]]]] = {}
    for key, importance in measured.importance.items():
        places = {component: i for i, component in enumerate(importance.components)}
        if not all(component in places for component in measured.units[unit]):
            continue
        columns = [places[component] for component in measured.units[unit]]
        values = per_example(importance, convention)[:, columns]
        groups = [f"{key.task}: {group}" for group in measured.groups[key]]
        found.setdefault((key.task, key.shots), []).append((values, groups))
    return [
        Sample(
            task, shots, np.concatenate([v for v, _ in seeds]), [g for _, gs in seeds for g in gs]
        )
        for (task, shots), seeds in found.items()
    ]


def clustered(
    values: Float[np.ndarray, "example column"], groups: Sequence[str]
) -> tuple[Float[np.ndarray, "column"], Float[np.ndarray, "column"]]:
    """`statistics.mean_and_stderr` of every column, examples of one text together."""
    labels, index = np.unique(np.array(groups), return_inverse=True)
    mean = values.mean(axis=0)
    if len(labels) < 2:
        return mean, np.full(len(mean), np.nan)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, index, values - mean)
    scale = len(labels) / (len(labels) - 1)
    return mean, np.sqrt(scale * (sums**2).sum(axis=0)) / len(values)


def importance_table(measured: Measured, convention: str) -> pd.DataFrame:
    """Mean over tasks at each shot count, with the standard error over texts.

    Columns: unit, shots, component, stack, layer, head, value, stderr (head: −1 for what has none;
    a group's number for groups).
    """
    tables = []
    for unit, components in measured.units.items():
        of_shots: dict[int, list[Sample]] = {}
        for sample in samples(measured, unit, convention):
            of_shots.setdefault(sample.shots, []).append(sample)
        for shots, tasks in of_shots.items():
            means, errors = zip(*(clustered(t.values, t.groups) for t in tasks), strict=True)
            # Tasks are given, not drawn: their errors add up as variances.
            stderr = np.sqrt(np.sum(np.square(errors), axis=0)) / len(tasks)
            tables.append(
                located(components).assign(
                    unit=unit, shots=shots, value=np.mean(means, axis=0), stderr=stderr
                )
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def located(components: Sequence[Component]) -> pd.DataFrame:
    """Columns component, stack, layer, head (a group's number for groups; −1 for layers)."""
    return pd.DataFrame(
        {
            "component": [str(c) for c in components],
            "stack": [c.stack for c in components],
            "layer": [c.layer for c in components],
            "head": [getattr(c, "head", getattr(c, "group", -1)) for c in components],
        }
    )


def mean_importance(table: pd.DataFrame, unit: str, shots: int | None = None) -> dict[str, float]:
    """Importance by component's name: one shot count's, or the mean over them."""
    rows = table.loc[table["unit"] == unit] if len(table) else table
    if rows.empty:
        return {}
    rows = rows if shots is None else rows.loc[rows["shots"] == shots]
    means = rows.groupby("component", sort=False)["value"].mean()
    return {str(name): float(value) for name, value in means.items()}


def exact_effects(measured: Measured, generator: np.random.Generator) -> pd.DataFrame:
    """`oracle.effect_table` of the rise of the loss and the change of the score, unit by unit.

    Conditions weigh the same however many examples they have. Columns: unit, metric, then those of
    `effect_table`, and stack, layer, head.
    """
    tables = []
    for unit, components in measured.units.items():
        for metric in ("loss_rise", "score_change"):
            wide = _wide(measured.effects, components, metric)
            if wide.empty:
                continue
            conditions = wide.groupby(["task", "shots"])[wide.columns[0]]
            sizes = conditions.transform("size").to_numpy(np.float64)
            weights = rearrange(len(wide) / conditions.ngroups / sizes, "example -> example 1")
            table = effect_table(
                components,
                wide.to_numpy(np.float64) * weights,
                _texts(wide),
                generator,
            )
            places = located(components).drop(columns="component")
            tables.append(pd.concat([table, places], axis=1).assign(unit=unit, metric=metric))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def fidelity(measured: Measured, convention: str) -> pd.DataFrame:
    """Does the gradient rank the components as the exact rise of the loss does?

    Spearman's ρ of importance with the mean rise, and with the mean size of the rise (what a score
    of absolute effects estimates), in each condition of each seed, averaged. The interval is
    that of `experiments.jackknife` over texts. Columns: unit, exact, value, low, high, conditions.
    """
    rows = []
    for unit, components in measured.units.items():
        if len(components) < 2:
            continue
        wide = _wide(measured.effects, components, "loss_rise")
        pairs = list(_pairs(measured, convention, wide, components)) if len(wide) else []
        if not pairs:
            continue
        without = left_out(
            [pair.task for pair in pairs] * 2, [p.groups for p in pairs] + [p.rows for p in pairs]
        )
        count = len(without.strata)
        for exact in ("rise", "size"):
            points, replicates = [], []
            for number, pair in enumerate(pairs):
                effects = pair.effects if exact == "rise" else np.abs(pair.effects)
                points.append(spearman(pair.values.mean(axis=0), effects.mean(axis=0)))
                one = without.means(number, pair.values, 0, count)
                other = without.means(len(pairs) + number, effects, 0, count)
                replicates.append((rank_features(one) * rank_features(other)).sum(axis=1))
            present = np.isfinite(points)
            point = float(np.mean(np.compress(present, points))) if present.any() else np.nan
            left = np.compress(present, replicates, axis=0)
            if present.any() and all(len(set(pair.groups)) >= FEWEST for pair in pairs):
                low, high = jackknife_interval(
                    np.array(point), left.mean(axis=0), without.strata, limits=(-1.0, 1.0)
                )
            else:
                low = high = np.array(np.nan)
            rows.append((unit, exact, point, float(low), float(high), int(present.sum())))
    names = ["unit", "exact", "value", "low", "high", "conditions"]
    return pd.DataFrame(rows, columns=pd.Index(names))


class _Pair(NamedTuple):
    """Gradient and exact effects of one condition of one seed, and the texts of the examples."""

    task: str
    values: Float[np.ndarray, "example component"]
    groups: list[str]
    effects: Float[np.ndarray, "row component"]
    rows: list[str]


def _pairs(
    measured: Measured, convention: str, wide: pd.DataFrame, components: Sequence[Component]
) -> Iterator[_Pair]:
    """Every condition and seed that has both."""
    exact_of = {key: rows for key, rows in wide.groupby(level=["task", "shots", "seed"])}
    for key, importance in measured.importance.items():
        places = {component: i for i, component in enumerate(importance.components)}
        exact = exact_of.get((key.task, key.shots, key.seed))
        if exact is None or not all(component in places for component in components):
            continue
        values = per_example(importance, convention)[:, [places[c] for c in components]]
        groups = list(map(str, measured.groups[key]))
        rows = exact.index.get_level_values("group").astype(str).tolist()
        yield _Pair(key.task, values, groups, exact.to_numpy(np.float64), rows)


def _wide(effects: pd.DataFrame, components: Sequence[Component], metric: str) -> pd.DataFrame:
    """One metric of the exact effects: a row an example, a column a component; rows in which
    something was not measured are left out."""
    names = [str(c) for c in components]
    rows = effects.loc[effects["component"].astype(str).isin(names)] if len(effects) else effects
    if rows.empty:
        return pd.DataFrame()
    index = ["task", "shots", "seed", "group", "doc_id"]
    wide = rows.assign(component=rows["component"].astype(str)).pivot(
        index=index, columns="component", values=metric
    )
    return wide.reindex(columns=pd.Index(names)).dropna()


def _texts(wide: pd.DataFrame) -> list[str]:
    tasks, groups = (wide.index.get_level_values(name) for name in ("task", "group"))
    return [f"{task}: {group}" for task, group in zip(tasks, groups, strict=True)]
