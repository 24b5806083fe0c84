"""Which figures has a study of resets? Those that its frames have data for, in this order.

The names are those of the figures' files; the letters (F1 …) are the protocol's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.reset.report.data_figures import cycled, foretold, predictors, speed, unique_data
from experiments.reset.report.grid_figures import base_length, depth, exponents
from experiments.reset.report.recovery_figures import by_family, by_target, recovery
from experiments.reset.report.threshold_figures import armed, arms, shares, survival
from experiments.reset.result import (
    THRESHOLD,
    at_threshold,
    families,
    finished,
    lead,
    main,
    most_varied,
    targets,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.reset.result import Result

DEFAULT = ("recovery", "shares", "arms", "targets")
"""F1, F2, F7 and F8: what the default study draws."""


def figures(result: Result, *, paper: bool = True) -> Mapping[str, Callable[[], Figure]]:
    """The figures of a study by file name, each made when it is asked for; all, or `DEFAULT`."""
    ledger, crossings = result.ledger, result.crossings
    trained = main(lead(ledger))
    trained = trained.loc[trained["tokens"] > 0] if len(trained) else trained
    made: dict[str, Callable[[], Figure]] = {}
    if len(trained):
        made["recovery"] = partial(recovery, ledger)
    if len(main(lead(crossings))):
        made["shares"] = partial(shares, crossings)
    if len(armed(crossings)):
        made["arms"] = partial(arms, ledger, crossings)
    if len(targets(trained)) > 1:
        made["targets"] = partial(by_target, ledger)
    if not paper:
        return {name: made[name] for name in DEFAULT if name in made}
    if len(families(main(ledger))) > 1 or (len(ledger) and (ledger["arm"] == "A13").any()):
        made["families"] = partial(by_family, ledger)
    close = at_threshold(crossings)
    if len(close) and finished(close)["n_layers"].nunique() > 1:
        made["depth"] = partial(depth, crossings)
    slopes = estimable(result.slopes)
    if len(slopes):
        made["exponents"] = partial(exponents, slopes)
    if len(close) and _checkpoints(close) > 1:
        made["base_length"] = partial(base_length, crossings)
    if len(ledger) and _is_grid(cycled(ledger)):
        made["unique"] = partial(unique_data, ledger)
    if len(result.survival):
        made["survival"] = partial(survival, result.survival)
    if len(result.predictors) and len(close):
        known = foretold(result.predictors, crossings, THRESHOLD)
        if len(known):
            made["predictors"] = partial(predictors, result.predictors, crossings)
    if len(result.speeds):
        made["speed"] = partial(speed, result.speeds)
    return made


def estimable(slopes: pd.DataFrame) -> pd.DataFrame:
    """The exponents (N, D, T0) of a fit that have an interval."""
    if slopes.empty:
        return slopes
    ends = np.isfinite(slopes[["value", "low", "high"]].to_numpy(float)).all(axis=1)
    return slopes.loc[slopes["term"].isin(["N", "D", "T0"]) & ends]


def _checkpoints(close: pd.DataFrame) -> int:
    """How many lengths of base training there are of the shape that base_length shows."""
    known = close.loc[close["base_tokens"].notna()]
    return len(set(most_varied(known, "base_tokens")["base_tokens"]))


def _is_grid(rows: pd.DataFrame) -> bool:
    """Whether every target has two amounts of unique data and two of tokens: a surface."""
    rows = rows.loc[rows["tokens"] > 0]
    several = [
        own[name].nunique() > 1
        for _, own in rows.groupby("target")
        for name in ("unique", "tokens")
    ]
    return bool(several) and all(several)
