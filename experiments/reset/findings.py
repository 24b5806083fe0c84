"""What do the rows of a study of resets say: crossings, answers, what is doubtful?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.reset.report import statements
from experiments.reset.report.aside_sentences import aside_answer, aside_sentences
from experiments.reset.report.tables import answer_line, answers
from experiments.reset.result import THRESHOLD, Result, knows_length, main
from experiments.reset.statistics import crossing
from experiments.reset.statistics.accelerated import accelerated
from experiments.reset.statistics.survival import survival_steps
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from experiments.reset.opened import Opened
    from experiments.reset.plan import Plan
    from experiments.reset.study import Resetting


FRAMES = ("crossings", "rates", "predictors")
"""Frames kept in a run folder beside its metrics."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything a run ends with."""

    result: Result
    metrics: pd.DataFrame
    outcome: Outcome

    def write(self, path: Path) -> None:
        """Leave the frames beside the metrics that are not rows of the ledger."""
        for name in FRAMES:
            frame = getattr(self.result, name)
            if len(frame):
                frame.to_parquet(path / f"{name}.parquet", index=False)


def findings_of(
    study: Resetting,
    bases: Sequence[Opened],
    plan: Plan,
    ledger: pd.DataFrame,
    rates: pd.DataFrame,
    predictors: pd.DataFrame,
) -> Findings:
    """Crossings of the ledger, and all that is made of them."""
    named = " ".join(study.models) if len(study.models) < 4 else f"{len(study.models)} bases"
    crossings = crossing.crossings(ledger)
    return _found(named, bases, ledger, crossings, rates, predictors, plan.left_out)


def together(runs: Sequence[tuple[str, Path]], bases: Sequence[Opened]) -> Findings:
    """What several finished runs say as one; a student that is in two of them counts once.

    Of a run called `rates` only the learning rates that were tried are taken: its students have
    rates of their own.
    """
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in ("ledger", *FRAMES)}
    for name, path in runs:
        if name != "rates":
            ledger = pd.read_parquet(path / "metrics.parquet")
            frames["ledger"].append(ledger.drop(columns=["metric", "value"]))
        for kept in FRAMES:
            if (kept == "rates" or name != "rates") and (path / f"{kept}.parquet").exists():
                frames[kept].append(pd.read_parquet(path / f"{kept}.parquet"))
    one = {
        name: pd.concat(found, ignore_index=True) if found else pd.DataFrame()
        for name, found in frames.items()
    }
    ledger = one["ledger"].drop_duplicates([*crossing.KEYS, "step", "weights"])
    crossings = one["crossings"].drop_duplicates([*crossing.KEYS, "weights", "kind", "threshold"])
    named = f"{len({base.name for base in bases})} bases"
    return _found(named, bases, ledger, crossings, one["rates"], one["predictors"], ())


def _found(
    model: str,
    bases: Sequence[Opened],
    ledger: pd.DataFrame,
    crossings: pd.DataFrame,
    rates: pd.DataFrame,
    predictors: pd.DataFrame,
    left_out: Sequence[str],
) -> Findings:
    close = main(crossings)
    close = close.loc[(close["kind"] == "absolute") & np.isclose(close["threshold"], THRESHOLD)]
    unit = "share" if knows_length(close) else "tokens"
    result = Result(
        model=model,
        ledger=ledger,
        crossings=crossings,
        survival=survival_steps(main(crossings), unit=unit) if len(close) else pd.DataFrame(),
        slopes=_slopes(close),
        predictors=predictors,
        rates=rates,
        statements=(
            *statements.statements(ledger, crossings, bases),
            *aside_sentences(ledger, crossings),
        ),
        left_out=left_out,
    )
    return Findings(result, _tidy(ledger), _outcome(result))


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
    found = [{"family": family} | each.record() for family, each in answers(result)]
    lines = [answer_line(result)] if found else []
    lines += [line for line in (aside_answer(result.ledger),) if line]
    return Outcome("; ".join(lines) or answer_line(result), {"answers": found})


def _tidy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with its gap as `metric, value, stderr`; the other columns as they are."""
    frame = ledger.assign(metric="gap", value=ledger["gap"].astype(np.float64))
    front: list[Any] = ["metric", "value", "stderr"]
    return frame.loc[:, [c for c in frame.columns if c not in front] + front]
