"""How does accuracy fall as components go, how many can go, and how sure are both?

A curve is the average over tasks and shot counts of one unit's components removed in one ranking's
order. How many can go: the largest number removed before the average first falls by more than a
tolerance. Two rankings differ by the mean over the steps of the difference of their curves. The
grid is the same for heads and FFNs together. All replicates are those of `experiments.prune.cells`:
what is compared is paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from experiments.prune.cells import LEVEL, Average, Cells, Values, spread, tails
from experiments.prune.measured import GRID, WHOLE
from experiments.statistics import holm

RANDOM = "random"
ORDER = (
    "importance",
    "aggregate",
    "aggregate (rank)",
    "aggregate (z)",
    "others",
    "highest partner",
    "lowest partner",
    "exact",
    "re-scored",
    "greedy",
    "weights",
    "activations",
    "prefix matching",
    "copying",
)
"""Rankings as tables and figures list them; those of files come after, random last."""


class Count(NamedTuple):
    """How many components can go, and the ends of the interval; nan where there is none."""

    best: int
    low: float
    high: float


class Contrast(NamedTuple):
    """How much higher one curve is than another on average, and whether that may be chance."""

    value: float
    stderr: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Average score of one unit and ranking at each number of removed components.

    Attributes:
        total: components of the unit.
        average: the first step is the whole model.
    """

    unit: str
    ranking: str
    total: int
    average: Average

    @property
    def removed(self) -> list[int]:
        """Numbers removed, ascending from 0; [step]."""
        return [removed for removed, _ in self.average.steps]

    def removable(self, tolerance: float) -> Count:
        """How many can go before the score first falls more than `tolerance`, with its interval."""
        best = int(self._safe(self.average.value[None], tolerance)[0])
        if not len(self.average.resampled):
            return Count(best, np.nan, np.nan)
        counts = self._safe(self.average.resampled, tolerance)
        low, high = np.quantile(counts, tails(), method="inverted_cdf")
        return Count(best, float(low), float(high))

    def frame(self) -> pd.DataFrame:
        """Rows: unit, ranking, removed, fraction, value, stderr, low, high, seeds."""
        steps = zip(self.removed, self.average.value, self.average.spreads, strict=True)
        rows = [(n, n / self.total, value, *around) for n, value, around in steps]
        names = ["removed", "fraction", "value", "stderr", "low", "high"]
        frame = pd.DataFrame(rows, columns=pd.Index(names))
        frame[["low", "high"]] = frame[["low", "high"]].clip(0.0, 1.0)  # shares of right answers
        frame.insert(0, "ranking", self.ranking)
        frame.insert(0, "unit", self.unit)
        return frame.assign(seeds=len(self.average.seeds))

    def _safe(self, values: Values, tolerance: float) -> Values:
        """`ablate.pruning.removable` of every row."""
        # As there: forgive the rounding of means of 0s and 1s, not a point.
        fell = values[:, :1] - values > tolerance + 1e-9
        steps = np.where(fell.any(axis=1), fell.argmax(axis=1), values.shape[1]) - 1
        return np.array(self.removed)[steps]


def curve_of(
    cells: Cells,
    unit: str,
    ranking: str,
    total: int,
    conditions: Iterable[tuple[str, int]] | None = None,
) -> Curve | None:
    """The curve of a ranking over `conditions` (all that it has, if None); None if it has none."""
    keys = cells.keys
    rows = keys.loc[(keys["unit"] == unit) & (keys["ranking"] == ranking)]
    wanted = set(_conditions(rows)) & set(_conditions(rows) if conditions is None else conditions)
    rows = _within(rows, wanted)
    average = cells.average(pd.concat([_starts(keys, rows), rows]))
    if average is None or len(average.steps) < 2 or average.steps[0] != (0, 0):
        return None
    return Curve(unit, ranking, total, average)


def curves(
    cells: Cells,
    totals: Mapping[str, int],
    conditions: Iterable[tuple[str, int]] | None = None,
    rankings: Sequence[str] | None = None,
) -> list[Curve]:
    """The curve of every ranking of every unit in `totals` (its number of components)."""
    wanted = None if conditions is None else list(conditions)
    found = []
    for unit, total in totals.items():
        names = rankings_of(cells, unit)
        for ranking in names if rankings is None else [r for r in rankings if r in names]:
            curve = curve_of(cells, unit, ranking, total, wanted)
            found += [] if curve is None else [curve]
    return found


def rankings_of(cells: Cells, unit: str) -> list[str]:
    """The rankings by which components of a unit go: known ones in `ORDER`, others, random."""
    names = set(map(str, cells.keys.loc[cells.keys["unit"] == unit, "ranking"]))
    known = [name for name in ORDER if name in names]
    return [*known, *sorted(names - {*ORDER, RANDOM}), *sorted(names & {RANDOM})]


def contrast(one: Curve, other: Curve, between: tuple[float, float] = (0.0, 1.0)) -> Contrast:
    """Mean of `one` − `other` over the common steps with a share above 0 and within `between`.

    With S seeds the standard error is that of the replicates, and interval and p are Student's with
    S − 1 degrees of freedom: orders differ between seeds, and with three of them quantiles of
    replicates are too sure. With one seed both are those of the replicates (p: twice the smaller
    share on either side of 0, at most 1), over texts alone. All nan without a common step.
    """
    shared = [
        step
        for step in one.average.steps
        if step in other.average.steps
        and step[0] > 0
        and between[0] - 1e-9 <= step[0] / one.total <= between[1] + 1e-9
    ]
    if not shared:
        return Contrast(*[np.nan] * 5)
    value = _over(one, shared, one.average.value[None])[0]
    value -= _over(other, shared, other.average.value[None])[0]
    if not len(one.average.resampled) or not len(other.average.resampled):
        return Contrast(float(value), *[np.nan] * 4)
    draws = _over(one, shared, one.average.resampled) - _over(
        other, shared, other.average.resampled
    )
    around, freedom = spread(draws), len(one.average.seeds) - 1
    if freedom < 1 or not around.stderr > 0:
        return Contrast(float(value), *around, p_of(draws))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * around.stderr
    p = 2 * float(stats.t.sf(abs(value) / around.stderr, freedom))
    return Contrast(float(value), around.stderr, float(value) - half, float(value) + half, p)


def p_of(draws: Values) -> float:
    """Two-sided p of replicates against 0: never 0 itself, 1 where all are 0, nan without any."""
    present = draws[np.isfinite(draws)]
    if present.size < 2:
        return np.nan
    below, above = (present < 1e-12).sum(), (present > -1e-12).sum()
    if np.ptp(present) < 1e-12:
        return 1.0 if below and above else np.nan
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + present.size)))


def contrasts(cells: Cells, unit: str, total: int, against: str = RANDOM) -> pd.DataFrame:
    """Every ranking of a unit against one of them, over the conditions that both have.

    Columns: unit, ranking, against, value, stderr, low, high, p, p_holm.
    """
    rows = []
    for ranking in rankings_of(cells, unit):
        pair = curve_of(cells, unit, ranking, total), curve_of(cells, unit, against, total)
        if ranking == against or pair[0] is None or pair[1] is None:
            continue
        both = set(pair[0].average.conditions) & set(pair[1].average.conditions)
        one, other = (curve_of(cells, unit, name, total, both) for name in (ranking, against))
        if one is not None and other is not None:
            rows.append((unit, ranking, against, *contrast(one, other)))
    names = ["unit", "ranking", "against", "value", "stderr", "low", "high", "p"]
    frame = pd.DataFrame(rows, columns=pd.Index(names))
    return frame.assign(p_holm=holm_of(frame["p"].to_numpy(np.float64)))


def holm_of(p: Values) -> Values:
    """Holm's p-values of the tests that could be made; nan stays nan."""
    adjusted = np.full(len(p), np.nan)
    made = np.isfinite(p)
    if made.any():
        adjusted[made] = holm(p[made])
    return adjusted


def grid(
    cells: Cells,
    heads: int,
    ffns: int,
    conditions: Iterable[tuple[str, int]] | None = None,
) -> pd.DataFrame:
    """Mean change of the score, against the whole model, with h heads and f FFNs removed.

    Cells with one of the two at 0 are taken from that unit's own curve where the grid has none.
    Columns: ranking, removed, ffns, fraction, ffns_fraction, value, stderr, low, high.
    """
    keys = cells.keys
    tables = []
    for ranking in rankings_of(cells, GRID):
        rows = keys.loc[(keys["unit"] == GRID) & (keys["ranking"] == ranking)]
        wanted = set(_conditions(rows))
        wanted &= wanted if conditions is None else set(conditions)
        own = {name: sorted(set(rows[name]) | {0}) for name in ("removed", "ffns")}
        edges = [
            keys.loc[(keys["unit"] == "heads") & (keys["ranking"] == ranking)],
            keys.loc[(keys["unit"] == "ffns") & (keys["ranking"] == ranking)].assign(
                ffns=lambda edge: edge["removed"].where(edge["ffns"] == 0, edge["ffns"]), removed=0
            ),
        ]
        every = pd.concat([rows, _starts(keys, rows), *edges])
        every = every.loc[every["removed"].isin(own["removed"]) & every["ffns"].isin(own["ffns"])]
        every = every.drop_duplicates(["task", "shots", "seed", "removed", "ffns"])
        average = cells.average(_within(every, wanted))
        if average is None or (0, 0) not in average.steps:
            continue
        start = average.steps.index((0, 0))
        value = average.value - average.value[start]
        changes = average.resampled - average.resampled[:, [start]]
        frame = pd.DataFrame(list(average.steps), columns=pd.Index(["removed", "ffns"]))
        spreads = pd.DataFrame(
            [spread(c) for c in changes.T], columns=pd.Index(["stderr", "low", "high"])
        )
        frame = frame.assign(
            ranking=ranking,
            fraction=frame["removed"] / heads,
            ffns_fraction=frame["ffns"] / ffns,
            value=value,
        )
        tables.append(pd.concat([frame, spreads], axis=1))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _over(curve: Curve, steps: Sequence[tuple[int, int]], values: Values) -> Values:
    """Mean over some steps of each row."""
    places = [curve.average.steps.index(step) for step in steps]
    return values[:, places].mean(axis=1)


def _starts(keys: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The whole model's cells in the conditions and seeds of some rows."""
    whole = keys.loc[keys["unit"] == WHOLE]
    return whole.merge(rows[["task", "shots", "seed"]].drop_duplicates())


def _conditions(rows: pd.DataFrame) -> list[tuple[str, int]]:
    pairs = rows[["task", "shots"]].drop_duplicates().itertuples(index=False)
    return [(str(task), int(shots)) for task, shots in pairs]


def _within(rows: pd.DataFrame, conditions: set[tuple[str, int]]) -> pd.DataFrame:
    """The rows of some conditions."""
    pairs = zip(rows["task"], rows["shots"], strict=True)
    return rows.loc[[(str(task), int(shots)) in conditions for task, shots in pairs]]
