"""After how many steps did a seed's error fall below a threshold?

Between two evaluations the error is taken to follow a power law of 1 + step, so the crossing of
θ · (error of predicting zero) is interpolated in log error over log(1 + step). A seed that never
crosses is kept as censored at the step it was last seen at: leaving it out would make an
architecture that often fails look fast.

Where it misleads. The first crossing counts, whatever comes after it. A seed that stopped early
for another threshold is censored for lower ones by that rule, not by its failure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd


def arrivals(curve: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """A row for every seed, rate and threshold: `arrived`, and the `step` of arrival or the last.

    `curve` has columns seed, rate, step and `share`, the error over that of predicting zero.
    """
    rows = []
    for key, mine in curve.groupby(["seed", "rate"], sort=False):
        seed, rate = key  # pyright: ignore[reportGeneralTypeIssues]
        ordered = mine.sort_values("step")
        steps, shares = ordered["step"].tolist(), ordered["share"].tolist()
        for threshold in thresholds:
            found = crossing(steps, shares, threshold)
            rows.append(
                {
                    "seed": seed,
                    "rate": rate,
                    "threshold": threshold,
                    "arrived": found is not None,
                    "step": float(steps[-1]) if found is None else found,
                }
            )
    columns = pd.Index(["seed", "rate", "threshold", "arrived", "step"])
    return pd.DataFrame(rows, columns=columns)


def crossing(steps: Sequence[int], shares: Sequence[float], threshold: float) -> float | None:
    """The step of the first crossing, interpolated; None if there is none. nan never crosses."""
    before: tuple[int, float] | None = None
    for step, share in zip(steps, shares, strict=True):
        if share <= threshold:
            if before is None or share <= 0 or not math.isfinite(before[1]):
                return float(step)
            (earlier, high) = before
            fall = math.log(high) - math.log(share)
            along = (math.log(high) - math.log(threshold)) / fall
            start, end = math.log1p(earlier), math.log1p(step)
            return math.expm1(start + along * (end - start))
        before = (step, share)
    return None
