"""How many tokens until half of the students are back, when some never get there?

Kaplan–Meier: S(t) = Π_{t_i ≤ t} (1 − d_i/n_i), with d_i crossings at t_i and n_i students still on
their way; the median is the first t with S(t) ≤ ½. A student that ran out of budget leaves at the
last tokens known not to be enough; nobody is dropped. One that diverged is kept on its way to the
end of its group's time: it is not on the mend, and letting it leave would say it was like the rest.
One below the threshold from the start crosses at 0. A median that is not reached is ∞ and reads
"> bound", with bound the longest time in the group.

The tables take crossings as interpolated; the distance between evaluations is small beside the
spread of students where there are ten a decade. Where it is not, `turnbull` takes the intervals.

Intervals of `kaplan_meier` (Brookmeyer and Crowley 1982, by lifelines) take students as
independent. `headline` draws whole bases again, then layers of them; with one base, layers and then
seeds, so that its interval is about that base. With few bases it is too narrow, as any bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from lifelines import KaplanMeierFitter
from lifelines.utils import median_survival_times
from numpy.typing import NDArray

from experiments.reset.result import THRESHOLD, finished, knows_length, main, percent, tokens_text
from experiments.reset.statistics.accelerated import runs

Unit = Literal["tokens", "share"]
UNKNOWN = "?"
"""What `amount_text` says of nan."""


@dataclass(frozen=True)
class Headline:
    """The answer in one line, and its numbers; ∞ is "not reached", nan "nobody measured it"."""

    text: str
    target: str
    unit: Unit
    median: float
    low: float
    high: float
    bound: float
    """The longest time in the group: what an infinite number is at least."""
    censored: float
    diverged: float
    """Shares of the students."""
    students: int
    runs: int
    over: str
    """What was drawn again for the interval."""

    def record(self) -> dict[str, Any]:
        """The numbers as JSON has them: None for what was not reached or is not known."""

        def known(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "target": self.target,
            "unit": self.unit,
            "threshold": THRESHOLD,
            "median": known(self.median),
            "interval": [known(self.low), known(self.high)],
            "bound": known(self.bound),
            "censored": self.censored,
            "diverged": self.diverged,
            "students": self.students,
        }


def kaplan_meier(
    crossings: pd.DataFrame,
    by: Sequence[str] = ("target", "stack", "layer"),
    unit: Unit = "tokens",
    *,
    level: float = 0.95,
) -> pd.DataFrame:
    """The median of every group and threshold.

    Columns: by, weights, kind, threshold, students, recovered, censored, diverged (numbers),
    share_censored, share_diverged, median, low, high (∞: not reached), bound, text.
    """
    rows = []
    for group, times, crossed, part in _groups(crossings, by, unit):
        fitter = KaplanMeierFitter(alpha=1 - level).fit(times, crossed)
        low, high = (math.nan, math.nan)
        if crossed.any():
            ends = np.asarray(median_survival_times(fitter.confidence_interval_), dtype=float)
            low, high = float(ends.min()), float(ends.max())
        # lifelines' own median misses an S of ½ that rounding leaves a hair above.
        curve = fitter.survival_function_.iloc[:, 0]
        half = curve.index[curve.to_numpy() <= 0.5 + 1e-9]
        median, bound = float(half[0]) if len(half) else math.inf, float(times.max())
        counts = {name: int((part["status"] == name).sum()) for name in _STATUS}
        shares = {f"share_{name}": counts[name] / len(part) for name in _STATUS[1:]}
        rows.append(
            group
            | {"students": len(part)}
            | counts
            | shares
            | {"median": median, "low": low, "high": high, "bound": bound}
            | {"text": amount_text(median, bound, unit)}
        )
    names = [*by, *_SET, "students", *_STATUS, "share_censored", "share_diverged", "median"]
    return pd.DataFrame(rows, columns=pd.Index([*names, "low", "high", "bound", "text"]))


def survival_steps(
    crossings: pd.DataFrame,
    by: Sequence[str] = ("target",),
    unit: Unit = "tokens",
    *,
    level: float = 0.95,
) -> pd.DataFrame:
    """The curves to draw: by, weights, kind, threshold, tokens or share, survival, low, high."""
    tables = []
    for group, times, crossed, _ in _groups(crossings, by, unit):
        fitter = KaplanMeierFitter(alpha=1 - level).fit(times, crossed)
        ends = fitter.confidence_interval_.to_numpy()
        steps = fitter.survival_function_.to_numpy().ravel()
        table = pd.DataFrame({unit: fitter.survival_function_.index, "survival": steps})
        tables.append(table.assign(low=ends.min(axis=1), high=ends.max(axis=1), **group))
    names = [*by, *_SET, unit, "survival", "low", "high"]
    if not tables:
        return pd.DataFrame(columns=pd.Index(names))
    return pd.concat(tables, ignore_index=True).loc[:, names]


def turnbull(
    crossings: pd.DataFrame, by: Sequence[str] = ("target",), unit: Unit = "tokens"
) -> pd.DataFrame:
    """The median from intervals alone (Turnbull 1976): in (after, within]; within ∞: not reached.

    Columns: by, weights, kind, threshold, students, after, within. Slow beyond some hundred
    students a group.
    """
    rows = []
    for group, times, crossed, part in _groups(crossings, by, unit):
        scale = part["base_tokens"].to_numpy(float) if unit == "share" else 1.0
        lower = np.where(crossed, part["lower"].to_numpy(float) / scale, times)
        upper = np.where(crossed, part["upper"].to_numpy(float) / scale, math.inf)
        after, within = float(lower.max()), math.inf
        if crossed.any():
            fitter = KaplanMeierFitter().fit_interval_censoring(lower, upper)
            curve = fitter.survival_function_.iloc[:, 0].sort_index()
            half = np.flatnonzero(curve.to_numpy() <= 0.5 + 1e-6)
            ends = curve.index.to_numpy(float)
            if half.size and np.isfinite(ends[half[0]]):
                within = float(ends[half[0]])
                after = float(ends[half[0] - 1]) if half[0] else 0.0
        rows.append(group | {"students": len(part), "after": after, "within": within})
    return pd.DataFrame(rows, columns=pd.Index([*by, *_SET, "students", "after", "within"]))


def headline(
    crossings: pd.DataFrame,
    target: str,
    generator: np.random.Generator,
    *,
    threshold: float = THRESHOLD,
    resamples: int = 2000,
    level: float = 0.95,
) -> Headline:
    """Median share of T0 to come within `threshold` nat, over the main rows of finished bases.

    Main rows: whole blocks, the base's own initialiser, fresh data. In tokens where a T0 is not
    known.
    """
    rows = crossings.loc[
        (crossings["target"] == target)
        & (crossings["kind"] == "absolute")
        & np.isclose(crossings["threshold"].to_numpy(float), threshold)
    ]
    rows = finished(main(rows))
    unit: Unit = "share" if knows_length(rows) else "tokens"
    what = "share of the original training tokens" if unit == "share" else "tokens"
    asked = f"median {what} to come within {threshold:g} nat"
    if rows.empty:
        nan = math.nan
        return Headline(
            f"{asked}: not measured", target, unit, nan, nan, nan, nan, nan, nan, 0, 0, "nothing"
        )
    ((_, times, crossed, part),) = _groups(rows, ("target",), unit)
    weights, count, over = _drawn_again(part, generator, resamples)
    median = float(_medians(times, crossed, np.ones((1, len(part))))[0])
    draws = _medians(times, crossed, weights)
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(draws, ends, method="inverted_cdf") if over else [math.nan] * 2
    bound = float(times.max())
    censored, diverged = (float((part["status"] == name).mean()) for name in _STATUS[1:])
    shown = [amount_text(float(value), bound, unit) for value in (median, low, high)]
    text = f"{asked}: {with_ends(shown)}, {percent(censored)} censored"
    text += f", {percent(diverged)} diverged" if diverged else ""
    text += "" if over else " (one student: no interval)"
    return Headline(
        text,
        target,
        unit,
        median,
        float(low),
        float(high),
        bound,
        censored,
        diverged,
        len(part),
        count,
        over or "nothing",
    )


def with_ends(shown: Sequence[str]) -> str:
    """`3 % [1 %, > 6 %]` of a value and its ends as `amount_text` says them; one that is not known
    ends nothing."""
    value, low, high = shown
    return f"{value} [{low}, {high}]" if UNKNOWN not in (low, high) else value


def amount_text(value: float, bound: float, unit: Unit) -> str:
    """`3.1 %` or `340 k`; `> bound` for what was not reached, `?` for what is not known."""
    if math.isnan(value):
        return UNKNOWN
    shown = value if math.isfinite(value) else bound
    text = percent(shown) if unit == "share" else tokens_text(shown)
    return text if math.isfinite(value) else f"> {text}"


_STATUS = ("recovered", "censored", "diverged")
_SET = ("weights", "kind", "threshold")


def _groups(
    crossings: pd.DataFrame, by: Sequence[str], unit: Unit
) -> Iterator[
    tuple[dict[str, Any], Float[np.ndarray, "row"], Bool[np.ndarray, "row"], pd.DataFrame]
]:
    """Each group and threshold: its name, times, which of them are crossings, and its rows."""
    if unit == "share" and len(crossings) and not knows_length(crossings):
        bases = crossings.loc[crossings["base_tokens"].isna(), "base"].unique()
        raise ValueError(
            f"a share of the training tokens of {', '.join(map(str, bases))}, which are not known: "
            "give them, or ask for tokens"
        )
    names = [*by, *_SET]
    keys: Any
    for keys, part in crossings.groupby(names, dropna=False, sort=False):
        status = part["status"].to_numpy()
        crossed = status == "recovered"
        scale = part["base_tokens"].to_numpy(float) if unit == "share" else 1.0
        times = np.where(crossed, part["tokens"], part["lower"]).astype(float) / scale
        trained = part["at_budget"].to_numpy(float) / scale
        end = max(times.max(), trained[~crossed].max(initial=0.0))
        times = np.where(status == "diverged", end, times)
        yield dict(zip(names, keys, strict=True)), times, crossed, part


def _drawn_again(
    rows: pd.DataFrame, generator: np.random.Generator, resamples: int
) -> tuple[NDArray[np.int64], int, str]:
    """How often each row is drawn in each resample; the number of runs; what was drawn."""
    run = pd.factorize(runs(rows))[0]
    place = rows.groupby(["stack", "layer"], dropna=False, sort=False).ngroup().to_numpy()
    several = run.max() > 0
    outer, inner = (run, place) if several else (place, np.arange(len(rows)))
    weights = np.zeros((resamples, len(rows)), dtype=np.int64)
    groups = np.unique(outer)
    drawn = generator.multinomial(groups.size, np.full(groups.size, 1 / groups.size), resamples)
    for column, group in enumerate(groups):
        (own,) = np.nonzero(outer == group)
        found, number = np.unique(inner[own], return_inverse=True)
        # k draws of a group draw k times as many of its members.
        total, shares = drawn[:, column] * found.size, np.full(found.size, 1 / found.size)
        weights[:, own] = generator.multinomial(total, shares)[:, number]
    if len(rows) == 1:
        return weights, 1, ""
    return weights, int(run.max()) + 1, "bases, then layers" if several else "layers, then seeds"


def _medians(
    times: Float[np.ndarray, "row"],
    crossed: Bool[np.ndarray, "row"],
    weights: NDArray[Any],
) -> Float[np.ndarray, "draw"]:
    """Kaplan–Meier medians with each row counted `weights[draw, row]` times; ∞ if not reached."""
    order = np.lexsort((~crossed, times))  # at one time, crossings come before those that leave
    counted = weights[:, order].astype(float)
    left = np.cumsum(counted[:, ::-1], axis=1)[:, ::-1]
    lost = np.where(crossed[order], counted / np.maximum(left, 1e-300), 0.0)
    half = np.cumprod(1 - lost, axis=1) <= 0.5 + 1e-12
    return np.where(half.any(axis=1), times[order][half.argmax(axis=1)], np.inf)
