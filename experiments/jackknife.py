"""How sure is a number that is no mean, such as a rank correlation of two mean scores?

With texts g in strata s (the tasks), G_s of them, and θ₋ₛ𝑔 the number without text g of s:

    variance = Σ_s (G_s − 1)/G_s · Σ_g (θ₋ₛ𝑔 − mean over g)²        interval = θ ± t · √variance

with Student's t of the smallest G_s − 1 degrees of freedom (Efron and Stein 1981; delete-a-group
jackknife). The interval always holds θ. In a simulation of Spearman's ρ between two tasks (4 or 24
components, 12 to 48 texts) it held the true ρ in 81 to 100 % of cases at a nominal 95 %;
bootstrap intervals held it in 66 to 86 % (basic) and 10 to 99 % (percentiles),
since drawing texts again adds noise, and noise lowers agreement. Where it misleads: noise in the
scores lowers θ itself, and with few texts the truth may lie above the interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

MOST = 50
"""Replicates in a stratum: where it has more groups, several are left out together."""


@dataclass(frozen=True, eq=False, repr=False)
class LeftOut:
    """One replicate for each group of each stratum, stratum by stratum."""

    strata: Int[np.ndarray, "replicate"]
    kept: Sequence[Float[np.ndarray, "own example"]]
    """Of each list, in the replicates of its own stratum: 0 for what is left out, 1 elsewhere."""
    first: Sequence[int]
    """Where those replicates begin."""

    def means(
        self, number: int, values: Float[np.ndarray, "example column"], start: int, stop: int
    ) -> Float[np.ndarray, "replicate column"]:
        """Mean of what list `number` keeps, in replicates start … stop; nan if nothing."""
        found = np.repeat(values.mean(axis=0)[None], stop - start, axis=0)
        kept, first = self.kept[number], self.first[number]
        low, high = max(start, first), min(stop, first + len(kept))
        if low < high:
            some = kept[low - first : high - first]
            with np.errstate(invalid="ignore"):
                found[low - start : high - start] = some @ values / some.sum(1, keepdims=True)
        return found


def left_out(strata: Sequence[Hashable], groups: Sequence[Sequence[Hashable]]) -> LeftOut:
    """Leave out each group once, in all lists of its stratum together.

    Args:
        strata: the stratum of each list; lists of one stratum share their groups.
        groups: the group of each example of each list.
    """
    block: dict[Hashable, dict[Hashable, int]] = {}
    for stratum, labels in zip(strata, groups, strict=True):
        known = block.setdefault(stratum, {})
        for label in labels:
            known.setdefault(label, len(known) % MOST)
    counts = [min(MOST, len(known)) for known in block.values()]
    starts = dict(zip(block, np.cumsum([0, *counts]).tolist(), strict=False))
    kept = []
    for stratum, labels in zip(strata, groups, strict=True):
        known = block[stratum]
        blocks = np.array([known[label] for label in labels])
        kept.append((np.arange(min(MOST, len(known)))[:, None] != blocks).astype(float))
    return LeftOut(
        np.repeat(np.arange(len(counts)), counts), kept, [starts[stratum] for stratum in strata]
    )


def jackknife_interval(
    value: Float[np.ndarray, "*which"],
    replicates: Float[np.ndarray, "replicate *which"],
    strata: Int[np.ndarray, "replicate"],
    *,
    level: float = 0.95,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Float[np.ndarray, "*which"], Float[np.ndarray, "*which"]]:
    """(low, high) of every number, within `limits`; nan where a stratum has one group, or a
    replicate is not finite."""
    variance = np.zeros(np.shape(value))
    fewest = np.inf
    for stratum in np.unique(strata):
        own = replicates[strata == stratum]
        count = len(own)
        fewest = min(fewest, count)
        variance = variance + (count - 1) / count * ((own - own.mean(axis=0)) ** 2).sum(axis=0)
    if fewest < 2:
        return np.full_like(variance, np.nan), np.full_like(variance, np.nan)
    half = stats.t.ppf((1 + level) / 2, fewest - 1) * np.sqrt(variance)
    half = np.where(np.isfinite(half), half, np.nan)
    return np.clip(value - half, *limits), np.clip(value + half, *limits)
