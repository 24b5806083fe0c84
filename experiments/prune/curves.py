"""How does accuracy fall as components go, how many can go, and how sure are both?

Input is one row per (task, shots, ranking, seed, removed, example): right or wrong. The average
gives every task and shot count the same weight. Intervals come from a bootstrap that resamples
groups of examples that share a text (within each task, the same groups for all shots, rankings
and steps), so that differences are paired: the same examples are scored with and without a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ablate.pruning import removable

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Curve:
    """Average accuracy of one ranking (and seed) at each number of removed components.

    Attributes:
        removed: counts, ascending from 0; [step].
        mean: average accuracy; [step].
        resampled: the same under each bootstrap resample; [resample, step].
    """

    ranking: str
    seed: int
    removed: NDArray[np.int64]
    mean: NDArray[np.float64]
    resampled: NDArray[np.float64]

    def removable(self, tolerance: float) -> Count:
        """How many can go before accuracy first falls more than `tolerance`, with its interval."""
        counts = [int(c) for c in self.removed]
        draws = [removable(counts, list(row), tolerance=tolerance) for row in self.resampled]
        low, high = np.quantile(draws, _tails(), method="inverted_cdf")
        best = removable(counts, list(self.mean), tolerance=tolerance)
        return Count(best, int(low), int(high))

    def frame(self, total: int) -> pd.DataFrame:
        """Rows: ranking, seed, removed, fraction, value, stderr, low, high."""
        low, high = np.quantile(self.resampled, _tails(), axis=0)
        return pd.DataFrame(
            {
                "ranking": self.ranking,
                "seed": self.seed,
                "removed": self.removed,
                "fraction": self.removed / total,
                "value": self.mean,
                "stderr": self.resampled.std(axis=0, ddof=1),
                "low": low,
                "high": high,
            }
        )


class Count(NamedTuple):
    """A number of components and the ends of its interval."""

    best: int
    low: int
    high: int


def average_curves(examples: pd.DataFrame, generator: np.random.Generator) -> list[Curve]:
    """The average curve of every (ranking, seed) in `examples`.

    Columns used: task, shots, ranking, seed, removed, group, doc_id, acc. Rows of the ranking
    ``whole`` (nothing removed) start every curve. All curves share their resamples.
    """
    whole = examples.loc[examples.ranking == "whole"]
    tables: dict[tuple[str, int], list[tuple[NDArray[np.float64], NDArray[np.int64]]]] = {}
    counts: dict[tuple[str, int], NDArray[np.int64]] = {}
    pairs = examples.loc[examples.ranking != "whole"].groupby(["ranking", "seed"], sort=False)
    for pair, rows in pairs:
        ranking, seed = cast("tuple[str, int]", pair)
        key = (str(ranking), int(seed))
        for _, of_task in pd.concat([whole, rows]).groupby("task", sort=True):
            wide = of_task.pivot_table(
                index=["group", "doc_id"], columns=["removed", "shots"], values="acc"
            )
            # Shots are averaged per example: [doc, step].
            steps = wide.T.groupby(level="removed").mean().T
            groups = pd.factorize(steps.index.get_level_values("group"))[0]
            tables.setdefault(key, []).append((steps.to_numpy(), groups))
            counts[key] = steps.columns.to_numpy(dtype=np.int64)
    draws = _resamples([groups for _, groups in next(iter(tables.values()))], generator)
    curves = []
    for key, of_tasks in tables.items():
        mean = np.mean([table.mean(axis=0) for table, _ in of_tasks], axis=0)
        resampled = np.mean(
            [
                _weighted_means(table, groups, weights)
                for (table, groups), weights in zip(of_tasks, draws, strict=True)
            ],
            axis=0,
        )
        curves.append(Curve(*key, counts[key], mean, resampled))
    return curves


def _resamples(
    groups_of_tasks: Sequence[NDArray[np.int64]], generator: np.random.Generator
) -> list[NDArray[np.float64]]:
    """How often each group is drawn in each resample, task by task: [resample, group]."""
    weights = []
    for groups in groups_of_tasks:
        count = int(groups.max()) + 1
        weights.append(
            generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
        )
    return weights


def _weighted_means(
    table: NDArray[np.float64], groups: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean over examples when group g counts weights[:, g] times: [resample, step]."""
    by_example = weights[:, groups]
    return by_example @ table / by_example.sum(axis=1, keepdims=True)


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
