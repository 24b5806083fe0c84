r"""What is the mean score of every cell of a pruning run, and what might it have been?

A cell is (task, shots, seed, unit, ranking, removed, ffns); its score is the mean over the
reporting examples that count. Averages give every task at every shot count the same weight, and
every seed.

What might have been, in replicate b: from the G texts of each task G − 1 are drawn (with G the
spread of a mean would be √((G−1)/G) of what it is: Rao & Wu 1988), one draw for all shots, seeds,
rankings and steps, which have the same examples, so that differences are paired; and S seeds are
drawn from the S there are, each with its deviation from their mean m made larger,

    m_b + √(S/(S−1)) · mean over the drawn seeds s of (value_{b,s} − m_b),

or few seeds would seem too sure. One seed has no deviation: the spread is then of examples only.
Fewer than 5 texts in a task, or a spread of 0 (all answers right), say nothing of what else might
have been: there is no interval then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.prune.measured import ALONE, WHOLE

Values = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 5
"""Texts a task needs for an interval."""
CONDITION = ["task", "shots"]
CELL = [*CONDITION, "seed", "unit", "ranking", "removed", "ffns"]


class Spread(NamedTuple):
    """Standard error and 95 % interval; nan where there is none."""

    stderr: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Average:
    """Scores averaged over conditions at each of several steps.

    Attributes:
        steps: labels of the last axis: numbers removed, or pairs of them in the grid.
        conditions: what is averaged: (task, shots), each with the same weight.
        by_seed: the average of each seed; [seed, step].
        resampled: the average over seeds in each replicate, [resample, step]; no resamples where
            a task has too few texts.
    """

    steps: tuple[tuple[int, int], ...]
    conditions: tuple[tuple[str, int], ...]
    seeds: tuple[int, ...]
    by_seed: Values
    resampled: Values

    @property
    def value(self) -> Values:
        """The average over seeds; [step]."""
        return self.by_seed.mean(axis=0)

    @property
    def spreads(self) -> list[Spread]:
        """What each step's average might have been; [step]."""
        return [spread(column) for column in self.resampled.T]


@dataclass(frozen=True, eq=False)
class Cells:
    """Sums of the scores of each text in each cell, and how often each text is drawn.

    Attributes:
        keys: a row a cell: task, shots, seed, unit, ranking, removed, ffns, and its row in the
            tables of its task.
        sums: by task, the sum of the scores of a text; [cell, text].
        counts: by task, how many scores that is; [cell, text].
        weights: by task, how often a text is drawn; [resample, text].
        entropy: what the draws of seeds follow.
    """

    keys: pd.DataFrame
    sums: Mapping[str, Values]
    counts: Mapping[str, Values]
    weights: Mapping[str, Values]
    entropy: int

    def average(self, chosen: pd.DataFrame) -> Average | None:
        """Mean over the conditions of `chosen` (rows of `keys`) at the steps that all of them have.

        Seeds are those that every condition has. None where there is none, or no step.
        """
        rows: dict[tuple[str, int], dict[tuple[int, int, int], int]] = {}
        for task, shots, seed, removed, ffns, row in chosen[
            [*CONDITION, "seed", "removed", "ffns", "row"]
        ].itertuples(index=False):
            rows.setdefault((str(task), int(shots)), {})[seed, removed, ffns] = row
        if not rows:
            return None
        seeds = sorted(set.intersection(*({key[0] for key in found} for found in rows.values())))
        steps = sorted(
            {(removed, ffns) for _, removed, ffns in next(iter(rows.values()))}.intersection(
                *(
                    {key[1:] for key in found if key[0] == seed}
                    for found in rows.values()
                    for seed in seeds
                )
            )
        )
        if not seeds or not steps:
            return None
        points, draws = [], []
        certain = min(self.weights[task].shape[1] for task, _ in rows) < FEWEST
        for (task, _), found in rows.items():
            at = [found[seed, *step] for seed in seeds for step in steps]
            sums, counts, weights = self.sums[task][at], self.counts[task][at], self.weights[task]
            shape = len(seeds), len(steps)
            # A cell, or a draw of it, in which nothing counts has no mean: nan, passed on.
            with np.errstate(invalid="ignore"):
                points.append((sums.sum(axis=1) / counts.sum(axis=1)).reshape(shape))
                if not certain:
                    drawn = (weights @ sums.T) / (weights @ counts.T)
                    draws.append(drawn.reshape(-1, *shape))
        by_seed = np.mean(points, axis=0)
        resampled = np.empty((0, len(steps)))
        if not certain:
            resampled = with_seeds(np.mean(draws, axis=0), self._picks(seeds))
        return Average(tuple(steps), tuple(rows), tuple(seeds), by_seed, resampled)

    def _picks(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Which seeds are drawn, [resample, seed]: the same for all rankings that have them."""
        generator = np.random.default_rng([self.entropy, *(seed % 2**32 for seed in seeds)])
        return generator.integers(len(seeds), size=(RESAMPLES, len(seeds)))


def cells_of(answers: pd.DataFrame, generator: np.random.Generator) -> Cells:
    """The cells of `Measured.answers`, components removed alone left out.

    Every ranking starts at the whole model. A seed that only a ranking has (a random order more
    than there are demonstrations) starts at the mean of the whole model's seeds.
    """
    answers = answers.loc[answers["unit"] != ALONE]
    whole = answers.loc[answers["unit"] == WHOLE].assign(ranking=WHOLE, removed=0, ffns=0)
    rest = answers.loc[
        (answers["unit"] != WHOLE) & ((answers["removed"] > 0) | (answers["ffns"] > 0))
    ]
    missing = sorted(set(rest["seed"]) - set(whole["seed"]))
    answers = pd.concat([whole, *(whole.assign(seed=seed) for seed in missing), rest])
    keys, sums, counts, weights = [], {}, {}, {}
    for task, rows in answers.groupby("task", sort=False, observed=True):
        cell = rows.groupby(CELL, sort=True, observed=True).ngroup().to_numpy()
        text, labels = pd.factorize(rows["group"])
        found = rows[CELL].assign(row=cell).drop_duplicates("row").sort_values("row")
        shape = len(found), len(labels)
        score = rows["score"].to_numpy(np.float64)
        present = np.isfinite(score)
        place = (cell * len(labels) + text)[present]
        size = shape[0] * shape[1]
        name = str(task)
        sums[name] = np.bincount(place, score[present], size).reshape(shape)
        counts[name] = np.bincount(place, minlength=size).reshape(shape).astype(np.float64)
        even = np.full(len(labels), 1 / len(labels))
        weights[name] = generator.multinomial(len(labels) - 1, even, RESAMPLES).astype(np.float64)
        keys.append(found)
    entropy = int(generator.integers(2**32))
    return Cells(pd.concat(keys, ignore_index=True), sums, counts, weights, entropy)


def with_seeds(draws: Values, picks: NDArray[np.int64]) -> Values:
    """Replicates of the mean over seeds, [resample, step], from each's, [resample, seed, step].

    `picks` are the seeds drawn; [resample, seed].
    """
    mean = draws.mean(axis=1)
    seeds = draws.shape[1]
    if seeds < 2:
        return mean
    taken = np.take_along_axis(draws, picks[:, :, None], axis=1).mean(axis=1)
    return mean + np.sqrt(seeds / (seeds - 1)) * (taken - mean)


def spread(draws: Values) -> Spread:
    """What one number's replicates say: nan where there are none, or all are the same."""
    present = draws[np.isfinite(draws)]
    if present.size < 2 or np.ptp(present) < 1e-12:
        return Spread(np.nan, np.nan, np.nan)
    low, high = np.quantile(present, tails())
    return Spread(float(present.std(ddof=1)), float(low), float(high))


def tails() -> tuple[float, float]:
    """The two quantiles between which `LEVEL` lies."""
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
