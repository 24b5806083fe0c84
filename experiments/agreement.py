r"""Do two tasks, or two shot counts, find the same components important?

Measures are those of `experiments.rank_measures`, with ``reference_order`` for comparison only.

Intervals are those of `experiments.jackknife`: they leave out a text at a time, in all conditions
of its task, and score again. Noise in the scores lowers agreement: with few examples two tasks
agree more than is seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from experiments.jackknife import LeftOut, jackknife_interval, left_out
from experiments.rank_measures import (
    kendall,
    order_features,
    overlap_p,
    rank_features,
    sign_features,
    top_members,
)

AGGREGATE = "aggregate"
METRICS = ("spearman", "kendall", "overlap", "reference_order")
_RANGE = dict.fromkeys(METRICS, (-1.0, 1.0)) | {"overlap": (0.0, 1.0)}
PAIRS = 2**15
"""Pairs of components up to which Kendall's tau gets an interval (256 components)."""
CHUNK = 25
"""Replicates whose features are held at a time."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Importance of every component on every example of a task at one shot count.

    Attributes:
        values: as `ablate.importance` has it (absolute), or any other effect; [example, component].
        groups: the text that an example comes from; [example].
    """

    task: str
    shots: int
    values: Float[np.ndarray, "example component"]
    groups: Sequence[Any]


def agreement(
    conditions: Sequence[Condition], *, share: float = 0.3, level: float = 0.95
) -> pd.DataFrame:
    """How much each two conditions agree: tasks at one shot count, and shot counts of one task.

    The task ``aggregate`` is the mean of all tasks at a shot count (each in it itself, as in the
    paper); it is there from two tasks on. Columns: task_a, shots_a, task_b, shots_b, metric, value,
    low, high, p (overlap only), k, components. An interval is nan where a task has one group and
    for Kendall's tau beyond 256 components.
    """
    _require_alike(conditions)
    keys = _keys(conditions)
    components = conditions[0].values.shape[1]
    k = max(1, round(share * components))
    pairs = [
        (i, j)
        for i, a in enumerate(keys)
        for j, b in enumerate(keys[i + 1 :], start=i + 1)
        if a[1] == b[1] or a[0] == b[0]
    ]
    whole = [np.asarray(c.values, dtype=np.float64).mean(axis=0)[None] for c in conditions]
    point = _metrics(_with_aggregates(conditions, whole), pairs, k)
    without = left_out([c.task for c in conditions], [c.groups for c in conditions])
    count = len(without.strata)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    replicates = np.full((len(METRICS), count, len(pairs)), np.nan)
    for chunk in chunks if np.bincount(without.strata).min() > 1 else []:
        found = _metrics(_scores(conditions, without, chunk), pairs, k)
        replicates[:, chunk.start : chunk.stop] = found
    rows = []
    for m, metric in enumerate(METRICS):
        lows, highs = jackknife_interval(
            point[m, 0], replicates[m], without.strata, level=level, limits=_RANGE[metric]
        )
        for p, (i, j) in enumerate(pairs):
            rows.append(
                (*keys[i], *keys[j], metric, point[m, 0, p], lows[p], highs[p])
                + (overlap_p(point[m, 0, p], components, k) if metric == "overlap" else np.nan,)
            )
    names = ["task_a", "shots_a", "task_b", "shots_b", "metric", "value", "low", "high", "p"]
    return pd.DataFrame(rows, columns=pd.Index(names)).assign(k=k, components=components)


def partners(frame: pd.DataFrame, metric: str = "spearman") -> pd.DataFrame:
    """With which other task each task agrees most and least, at each shot count.

    Columns: task, shots, which (highest or lowest), partner, value, low, high. Partners that tie
    have a row each; the aggregate is nobody's partner and has none.
    """
    rows = frame.loc[
        (frame.metric == metric)
        & (frame.shots_a == frame.shots_b)
        & (frame.task_a != AGGREGATE)
        & (frame.task_b != AGGREGATE)
    ]
    columns = ["task", "partner", "shots", "value", "low", "high"]
    both = pd.concat(
        rows.rename(columns={one: "task", other: "partner", "shots_a": "shots"})[columns]
        for one, other in (("task_a", "task_b"), ("task_b", "task_a"))
    )
    groups = both.groupby(["task", "shots"])["value"]
    found = [
        both.loc[both["value"] == groups.transform(extreme)].assign(which=which)
        for which, extreme in (("highest", "max"), ("lowest", "min"))
    ]
    table = pd.concat(found).sort_values(["task", "shots", "which", "partner"], ignore_index=True)
    return table.reindex(columns=["task", "shots", "which", "partner", "value", "low", "high"])


def across_shots(frame: pd.DataFrame) -> pd.DataFrame:
    """Agreement of two shot counts of one task, over tasks (the paper's Table 1).

    Columns: shots_a, shots_b, metric, value (mean over tasks), variance, tasks.
    """
    rows = frame.loc[(frame.task_a == frame.task_b) & (frame.task_a != AGGREGATE)]
    groups = rows.groupby(["metric", "shots_a", "shots_b"], sort=True)["value"]
    table = groups.agg(value="mean", variance="var", tasks="size").reset_index()
    return table.reindex(columns=["shots_a", "shots_b", "metric", "value", "variance", "tasks"])


def _scores(
    conditions: Sequence[Condition], without: LeftOut, chunk: range
) -> Float[np.ndarray, "condition replicate component"]:
    """Scores of every condition, then of the aggregate at each shot count, in some replicates."""
    own = [
        without.means(number, np.asarray(c.values, dtype=np.float64), chunk.start, chunk.stop)
        for number, c in enumerate(conditions)
    ]
    return _with_aggregates(conditions, own)


def _with_aggregates(
    conditions: Sequence[Condition], own: Sequence[Float[np.ndarray, "replicate component"]]
) -> Float[np.ndarray, "condition replicate component"]:
    aggregates = [
        np.mean([s for s, c in zip(own, conditions, strict=True) if c.shots == shots], axis=0)
        for shots in _aggregated(conditions)
    ]
    return np.stack([*own, *aggregates])


def _metrics(
    scores: Float[np.ndarray, "condition replicate component"],
    pairs: Sequence[tuple[int, int]],
    k: int,
) -> Float[np.ndarray, "metric replicate pair"]:
    conditions, replicates, components = scores.shape
    found = np.full((len(METRICS), replicates, len(pairs)), np.nan)
    small = components * (components - 1) // 2 <= PAIRS
    features = {
        "spearman": rank_features,
        "overlap": lambda s: top_members(s, k) / np.sqrt(k),
        "reference_order": order_features,
    } | ({"kendall": sign_features} if small else {})
    for metric, feature in features.items():
        vectors = feature(scores)
        for p, (i, j) in enumerate(pairs):
            found[METRICS.index(metric), :, p] = (vectors[i] * vectors[j]).sum(-1)
    if not small and replicates == 1:
        for p, (i, j) in enumerate(pairs):
            found[METRICS.index("kendall"), 0, p] = kendall(scores[i, 0], scores[j, 0])
    return found


def _aggregated(conditions: Sequence[Condition]) -> list[int]:
    """Shot counts at which there are several tasks."""
    shots = [c.shots for c in conditions]
    return [s for s in dict.fromkeys(shots) if shots.count(s) > 1]


def _keys(conditions: Sequence[Condition]) -> list[tuple[str, int]]:
    own = [(c.task, c.shots) for c in conditions]
    return own + [(AGGREGATE, shots) for shots in _aggregated(conditions)]


def _require_alike(conditions: Sequence[Condition]) -> None:
    keys = [(c.task, c.shots) for c in conditions]
    if len(conditions) < 2 or len(set(keys)) < len(keys):
        raise ValueError(
            f"agreement between {len(set(keys))} different conditions of {len(keys)}: give at "
            "least two, each task and shot count once"
        )
    for c in conditions:
        first = conditions[0]
        if c.values.shape[1] != first.values.shape[1] or len(c.groups) != len(c.values):
            raise ValueError(
                f"{c.task} with {c.shots} shots has values {c.values.shape} and {len(c.groups)} "
                f"groups: give one group an example, and {first.values.shape[1]} components as "
                f"{first.task} has"
            )
        if not np.isfinite(c.values).all():
            raise ValueError(f"{c.task} with {c.shots} shots has values that are not finite")
