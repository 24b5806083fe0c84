"""What do the rows of a study of resets say: crossings, answers, what is doubtful?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.reset import crossing, statements
from experiments.reset.accelerated import accelerated
from experiments.reset.result import THRESHOLD, Result, knows_length, main
from experiments.reset.survival import survival_steps
from experiments.reset.tables import answer_line, answers
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from experiments.reset.opened import Opened
    from experiments.reset.plan import Plan
    from experiments.reset.study import Resetting


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything a run ends with."""

    result: Result
    crossings: pd.DataFrame
    metrics: pd.DataFrame
    outcome: Outcome


def findings_of(
    study: Resetting,
    bases: Sequence[Opened],
    plan: Plan,
    ledger: pd.DataFrame,
    rates: pd.DataFrame,
    predictors: pd.DataFrame | None = None,
) -> Findings:
    """Crossings of the ledger, and all that is made of them."""
    crossings = crossing.crossings(ledger)
    close = main(crossings)
    close = close.loc[(close["kind"] == "absolute") & np.isclose(close["threshold"], THRESHOLD)]
    unit = "share" if knows_length(close) else "tokens"
    result = Result(
        model=" ".join(study.models) if len(study.models) < 4 else f"{len(study.models)} bases",
        ledger=ledger,
        crossings=crossings,
        survival=survival_steps(main(crossings), unit=unit) if len(close) else pd.DataFrame(),
        slopes=_slopes(close),
        predictors=pd.DataFrame() if predictors is None else predictors,
        rates=rates,
        statements=statements.statements(ledger, crossings, bases),
        left_out=plan.left_out,
    )
    return Findings(result, crossings, _tidy(ledger), _outcome(result))


def _slopes(close: pd.DataFrame) -> pd.DataFrame:
    """Exponents of N, D and T0 for each target: log T against their logarithms."""
    varied = [
        name
        for name, column in (("N", "n_layers"), ("D", "d_model"), ("T0", "base_tokens"))
        if close[column].dropna().nunique() > 1
    ]
    tables = [
        accelerated(rows, varied, ("family",) if rows["family"].nunique() > 1 else ()).assign(
            target=target
        )
        for target, rows in close.groupby("target")
        if varied
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _outcome(result: Result) -> Outcome:
    found = [
        {
            "family": family,
            "target": each.target,
            "unit": each.unit,
            "threshold": THRESHOLD,
            "median": _known(each.median),
            "interval": [_known(each.low), _known(each.high)],
            "bound": _known(each.bound),
            "censored": each.censored,
            "diverged": each.diverged,
            "students": each.students,
        }
        for family, each in answers(result)
    ]
    return Outcome(answer_line(result), {"answers": found})


def _known(value: float) -> float | None:
    """A number that JSON has; None for what was not reached or is not known."""
    return value if math.isfinite(value) else None


def _tidy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with its gap as `metric, value, stderr`; the other columns as they are."""
    frame = ledger.assign(metric="gap", value=ledger["gap"].astype(np.float64))
    front: list[Any] = ["metric", "value", "stderr"]
    return frame.loc[:, [c for c in frame.columns if c not in front] + front]
