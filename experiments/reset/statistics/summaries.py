"""How are many students made into one number, when some never got there?

Median: the smallest value that half do not exceed, as Kaplan and Meier's. A student that was
censored or diverged counts as longer than any other. If the median is such a student's, it is inf,
and `bound` says what it is at least: the median with every such student put at the last tokens at
which it was seen above the threshold.

Interval of a median over n units: the order statistics X_(k), X_(n+1−k) with the largest k for
which P(Binomial(n, ½) < k) ≤ (1 − level)/2 (Conover 1999, §3.2). It assumes nothing of the
distribution, and needs n ≥ 6 for 95 %. Units are places of a base: seeds of one place are reduced
to their median first, for they are no independent layers. Layers of one base are not drawn at
random either: the interval says how much they differ.

Curves are means over seeds as long as every seed was measured. A seed that stopped early would
otherwise bend the mean: what goes on behind it is kept apart, and so is a student that diverged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from experiments.reset.result import at_place, place_name, places
from experiments.reset.statistics.crossing import KEYS

PLACE = ("base", "base_share", "stack", "layer", "part")
"""Columns of one unit: a place of one base."""


class Crossover(NamedTuple):
    """Where one curve goes below another for good."""

    tokens: float
    """Interpolated on log tokens; nan unless `kind` is crosses."""
    kind: str
    """crosses, ahead (below all along), behind (above at the end)."""


def lower_median(values: NDArray[np.float64]) -> float:
    """The smallest value that half of them do not exceed: Kaplan and Meier's median."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def median_interval(
    values: Sequence[float] | NDArray[np.float64], level: float = 0.95
) -> tuple[float, float]:
    """Ends of the interval of the median; nan where there are too few values."""
    ordered = np.sort(np.asarray(values, dtype=float))
    k = int(stats.binom.ppf((1 - level) / 2, ordered.size, 0.5)) if ordered.size else 0
    if k == 0:
        return np.nan, np.nan
    return float(ordered[k - 1]), float(ordered[-k])


def amounts(crossings: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Crossings with `amount` (inf if not crossed) and `floor`, in `unit`: tokens or share."""
    scale = crossings["base_tokens"].to_numpy(float) if unit == "share" else 1.0
    reached = crossings["status"].to_numpy() == "recovered"
    above = crossings["lower"].to_numpy(float) / scale
    amount = np.where(reached, crossings[unit].to_numpy(float), np.inf)
    return crossings.assign(amount=amount, floor=np.where(reached, amount, above))


def medians(crossings: pd.DataFrame, by: Sequence[str], unit: str) -> pd.DataFrame:
    """Median amount of every group, over students.

    Columns: `by`, value (inf: more than `bound`), bound, smallest, largest, students, censored,
    diverged.
    """
    names = ["value", "bound", "smallest", "largest", "students", "censored", "diverged"]
    rows = []
    keys: Any
    known = amounts(crossings, unit) if len(crossings) else crossings
    for keys, own in known.groupby(list(by), sort=False, dropna=False) if len(known) else ():
        amount = own["amount"].to_numpy(float)
        counted = [int((own["status"] == status).sum()) for status in ("censored", "diverged")]
        bound = lower_median(own["floor"].to_numpy(float))
        rows.append(
            (*keys, lower_median(amount), bound, amount.min(), amount.max(), len(own), *counted)
        )
    return pd.DataFrame(rows, columns=pd.Index([*by, *names]))


def over_places(crossings: pd.DataFrame, by: Sequence[str], unit: str) -> pd.DataFrame:
    """Median over places (of each its seeds' median), its interval, and how many never got there.

    Columns: `by`, value, bound, low, high, smallest, largest, places, students, censored, diverged.
    """
    kept = [name for name in PLACE if name not in by]
    own = medians(crossings, [*by, *kept], unit)
    names = ["value", "bound", "low", "high", "smallest", "largest", "places"]
    rows = []
    keys: Any
    for keys, units in own.groupby(list(by), sort=False, dropna=False) if len(own) else ():
        value = units["value"].to_numpy(float)
        rows.append(
            (
                *keys,
                lower_median(value),
                lower_median(units["bound"].to_numpy(float)),
                *median_interval(value),
                value.min(),
                value.max(),
                len(units),
                *(int(units[name].sum()) for name in ("students", "censored", "diverged")),
            )
        )
    return pd.DataFrame(rows, columns=pd.Index([*by, *names, "students", "censored", "diverged"]))


def mean_curves(ledger: pd.DataFrame, by: Sequence[str], value: str = "gap") -> pd.DataFrame:
    """Mean over students at each number of tokens at which all that did not diverge were measured.

    Columns: `by`, tokens, base_tokens, value, low, high (smallest and largest), students.
    """
    tables = []
    keys: Any
    whole = ledger.loc[ledger["status_last"] != "diverged"] if len(ledger) else ledger
    for keys, own in whole.groupby(list(by), sort=False, dropna=False) if len(whole) else ():
        count = own["student"].nunique()
        at = own.groupby("tokens")[value].agg(["mean", "min", "max", "size"]).reset_index()
        at.columns = ["tokens", "value", "low", "high", "students"]
        at = at.loc[at["students"] == count]
        known: dict[str, Any] = dict(zip(by, keys, strict=True))
        tables.append(at.assign(base_tokens=own["base_tokens"].iloc[0], **known))
    names = [*by, "tokens", "base_tokens", "value", "low", "high", "students"]
    if not tables:
        return pd.DataFrame(columns=pd.Index(names))
    return pd.concat(tables, ignore_index=True).loc[:, names]


def stragglers(ledger: pd.DataFrame, by: Sequence[str]) -> list[pd.DataFrame]:
    """Rows of single students behind their group's mean, and all rows of those that diverged."""
    found = []
    for _, own in ledger.groupby(list(by), sort=False, dropna=False) if len(ledger) else ():
        whole = own.loc[own["status_last"] != "diverged"]
        last = whole.groupby("student")["tokens"].max().min()
        for _, rows in own.groupby("student", sort=False):
            rows = rows.sort_values("tokens")
            if rows["status_last"].iloc[0] != "diverged":
                rows = rows.loc[rows["tokens"] >= last]
            if len(rows) > 1:
                found.append(rows)
    return found


def numbered(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with `student` (a number) and `status_last` (how that student ended)."""
    if ledger.empty:
        return ledger.assign(student=pd.Series(dtype=int), status_last=pd.Series(dtype=str))
    student = ledger.groupby(list(KEYS), sort=False, dropna=False).ngroup().to_numpy()
    rows = ledger.assign(student=student).sort_values(["student", "tokens"], kind="stable")
    last = rows.groupby("student")["status"].transform("last")
    lost = (rows["status"] == "diverged").groupby(rows["student"]).transform("any")
    return rows.assign(status_last=last.mask(lost, "diverged"))


def crossover(first: pd.DataFrame, second: pd.DataFrame) -> Crossover | None:
    """Where the second mean curve goes below the first and stays there, for the last two common
    evaluations at least; None without common points."""
    both = first.merge(second, on="tokens", suffixes=("_first", "_second")).sort_values("tokens")
    both = both.loc[both["tokens"] > 0]
    if both.empty:
        return None
    lead = (both["value_second"] - both["value_first"]).to_numpy(float)
    log = np.log(both["tokens"].to_numpy(float))
    if (lead[-2:] >= 0).any():  # as a threshold, it has to hold for two evaluations
        return Crossover(np.nan, "behind")
    above = np.flatnonzero(lead >= 0)
    if above.size == 0:
        return Crossover(np.nan, "ahead")
    i = int(above[-1])
    part = lead[i] / (lead[i] - lead[i + 1])
    return Crossover(float(np.exp(log[i] + part * (log[i + 1] - log[i]))), "crosses")


def damage(ledger: pd.DataFrame) -> pd.DataFrame:
    """What a reset costs at each place: stack, layer, name, value (mean over students), skip.

    `skip` is what leaving the block out costs; nan where that was not measured.
    """
    rows = []
    first = numbered(ledger).groupby("student").head(1) if len(ledger) else ledger
    for place in places(first) if len(first) else ():
        own = at_place(first, place)
        rise = float((own["loss_reset"] - own["loss_base"]).mean())
        skip = float((own["loss_skip"] - own["loss_base"]).mean())
        rows.append((*place, place_name(*place), rise, skip))
    return pd.DataFrame(rows, columns=pd.Index(["stack", "layer", "name", "value", "skip"]))


def ends(ledger: pd.DataFrame) -> pd.DataFrame:
    """Each student's last row."""
    if ledger.empty:
        return ledger
    return ledger.loc[ledger.groupby("student")["tokens"].idxmax()]
