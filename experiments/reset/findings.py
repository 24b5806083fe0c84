"""What do the rows of a study of resets say: crossings, answers, what is doubtful?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.reset import crossing
from experiments.reset.result import THRESHOLD, Result
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
) -> Findings:
    """Crossings of the ledger, and all that is made of them."""
    crossings = crossing.crossings(ledger)
    result = Result(
        model=" ".join(study.models) if len(study.models) < 4 else f"{len(study.models)} bases",
        ledger=ledger,
        crossings=crossings,
        rates=rates,
        left_out=plan.left_out,
    )
    return Findings(result, crossings, _tidy(ledger), _outcome(result))


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
    return frame[[c for c in frame.columns if c not in front] + front]
