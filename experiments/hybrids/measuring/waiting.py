"""After how many steps is half of an architecture's seeds there, when some never get there?

Kaplan and Meier: S(t) = Π_{t_i ≤ t} (1 − d_i / n_i), with d_i arrivals at t_i and n_i seeds still
on their way; the median is the first t with S(t) ≤ ½. Reads what `arrivals` (an error below a
share of zero's) and `schemes.adoptions` (a scheme first followed) make: a row a seed, with
`arrived` and `step`. A seed that did not arrive leaves at the last step it was seen at; nobody is
dropped. One that diverged is kept on its way to the end of its group's time: it is not like those
that may yet arrive. A median that is not reached is ∞ and reads "> bound".

Where it misleads. The interval (Brookmeyer and Crowley 1982, by lifelines) is of seeds alone and
wide with few; one seed has none. Seeds that ran for fewer steps are taken to be like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from lifelines import KaplanMeierFitter
from lifelines.utils import median_survival_times


def medians(arrivals: pd.DataFrame, by: Sequence[str], *, level: float = 0.95) -> pd.DataFrame:
    """The median steps of every group: by, seeds, arrived, median, low, high, bound, text.

    `arrivals` may have a boolean column `diverged`. ∞ is "not reached".
    """
    rows = []
    for key, times, arrived in _groups(arrivals, by):
        fitter = KaplanMeierFitter(alpha=1 - level).fit(times, arrived)
        low, high = math.nan, math.nan
        if arrived.any() and len(times) > 1:
            ends = np.asarray(median_survival_times(fitter.confidence_interval_), dtype=float)
            low, high = float(ends.min()), float(ends.max())
        curve = fitter.survival_function_.iloc[:, 0]
        # lifelines' own median misses an S of ½ that rounding leaves a hair above.
        half = curve.index[curve.to_numpy() <= 0.5 + 1e-9]
        median, bound = float(half[0]) if len(half) else math.inf, float(times.max())
        counts = {"seeds": len(times), "arrived": int(arrived.sum())}
        numbers = {"median": median, "low": low, "high": high, "bound": bound}
        rows.append(key | counts | numbers | {"text": steps_text(median, bound)})
    names = [*by, "seeds", "arrived", "median", "low", "high", "bound", "text"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def survival(arrivals: pd.DataFrame, by: Sequence[str], *, level: float = 0.95) -> pd.DataFrame:
    """The curves to draw: by, step, survival, low, high."""
    tables = []
    for key, times, arrived in _groups(arrivals, by):
        fitter = KaplanMeierFitter(alpha=1 - level).fit(times, arrived)
        ends = fitter.confidence_interval_.to_numpy()
        steps = fitter.survival_function_.to_numpy().ravel()
        table = pd.DataFrame({"step": fitter.survival_function_.index, "survival": steps})
        tables.append(table.assign(low=ends.min(axis=1), high=ends.max(axis=1), **key))
    names = [*by, "step", "survival", "low", "high"]
    if not tables:
        return pd.DataFrame(columns=pd.Index(names))
    return pd.concat(tables, ignore_index=True).loc[:, names]


def times_on_the_way(
    group: pd.DataFrame,
) -> tuple[Float[np.ndarray, "row"], Bool[np.ndarray, "row"]]:
    """When each seed of a group arrived, or was last on its way; and whether it arrived.

    A seed that `diverged` without arriving is on its way to the end of the group's time.
    """
    times, arrived = group["step"].to_numpy(float), group["arrived"].to_numpy(bool)
    if "diverged" in group:
        lost = group["diverged"].to_numpy(bool) & ~arrived
        times = np.where(lost, times.max(), times)
    return times, arrived


def steps_text(value: float, bound: float) -> str:
    """`1 250`; `> 5 000` for what was not reached in 5 000 steps."""
    if math.isnan(value):
        return "?"
    sign, shown = ("> ", bound) if math.isinf(value) else ("", value)
    return f"{sign}{shown:,.0f}".replace(",", "\u202f")


def _groups(
    arrivals: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Float[np.ndarray, "row"], Bool[np.ndarray, "row"]]]:
    key: Any
    for key, part in arrivals.groupby(list(by), sort=False, dropna=False, observed=True):
        yield dict(zip(by, key, strict=True)), *times_on_the_way(part)
