"""What do the frames of a study of hybrids say: scores, differences, failures, schemes, parts?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.hybrids.measured import FRAMES
from experiments.hybrids.measuring.comparisons import compared, failures_compared
from experiments.hybrids.measuring.denominators import DENOMINATORS
from experiments.hybrids.measuring.factors import (
    crossed,
    score_effects,
    step_effects,
    with_holm,
)
from experiments.hybrids.measuring.schemes import adoptions, switches
from experiments.hybrids.measuring.scores import drawn_all, failure_rows, over_seeds, score_rows
from experiments.hybrids.measuring.sums import gathered
from experiments.hybrids.measuring.waiting import medians
from experiments.hybrids.report.published import TASKS as PUBLISHED
from experiments.hybrids.report.published import beside_published
from experiments.report import minus
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from experiments.hybrids.measured import Measured
    from experiments.hybrids.study import Hybrids
    from experiments.run_folder import RunFolder

KEPT = tuple(name for name in FRAMES if name != "errors")
"""Frames that are left beside the metrics."""
REFERENCES = ("gpt2", "mamba")
"""Architectures that are denominators too: the paper's of trees and of parity."""
BY = ("architecture", "task", "shift", "seed")


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything a run ends with.

    Attributes:
        denominators: function class -> the baseline its scores are named after.
        scores: S of every seed and over seeds against every baseline (`scores.score_rows`).
        differences: from the first architecture, with Holm over all (`comparisons.compared`).
        failures: share of seeds that failed, and their comparison.
        waiting: median steps to each threshold, censored ones kept.
        score_effects, step_effects: of each factor on the score, and on the steps to a threshold;
            empty where nothing is crossed (`factors.crossed`).
        switches, adopted: changes of scheme, and when each scheme was first followed.
    """

    study: Hybrids
    measured: Measured
    denominators: Mapping[str, str]
    scores: pd.DataFrame
    differences: pd.DataFrame
    failures: pd.DataFrame
    failure_differences: pd.DataFrame
    waiting: pd.DataFrame
    score_effects: pd.DataFrame
    step_effects: pd.DataFrame
    switches: pd.DataFrame
    adopted: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """S over seeds in distribution, one row for each architecture and function class."""
        return over_seeds(self.scores, self.denominators, "none")

    @property
    def beside(self) -> pd.DataFrame:
        """Its cells beside the paper's, of the paper's function classes."""
        rows = self.table
        known = beside_published(rows.loc[rows["task"].isin(PUBLISHED)])
        return known.loc[known["value"].notna()]

    @property
    def metrics(self) -> pd.DataFrame:
        """Errors by number of examples, scores, differences and failures, as tidy rows."""
        parts = (
            self.measured.frames["errors"],
            self.scores,
            self.differences,
            self.failures,
            self.failure_differences,
            self.score_effects,
            self.step_effects,
        )
        return pd.concat([part for part in parts if len(part)], ignore_index=True)

    @property
    def outcome(self) -> Outcome:
        """The headline and its numbers."""
        rows = self.table
        lines, cells = [], []
        for task, part in rows.groupby("task", sort=False):
            named = ", ".join(
                f"{row['architecture']} {_interval(row)}" for row in part.to_dict("records")
            )
            lines.append(f"{task}: score against {self.denominators[str(task)]}: {named}")
        for row in rows.to_dict("records"):
            cells.append(
                {
                    "architecture": row["architecture"],
                    "task": row["task"],
                    "baseline": row["baseline"],
                    **{name: _known(row[name]) for name in ("value", "low", "high")},
                    "seeds": row["seeds"],
                }
            )
        effects = self.score_effects
        own = effects.loc[effects["order"] == 1].to_dict("records") if len(effects) else []
        lines += [f"{row['task']}: {row['effect']} {_change(row)}" for row in own]
        found = {"scores": cells}
        if len(effects):
            names = ["task", "baseline", "effect", "value", "low", "high", "holm"]
            found["effects"] = [
                {k: _known(v) if isinstance(v, float) else v for k, v in row.items()}
                for row in effects.filter(names).to_dict("records")
            ]
        return Outcome(minus("; ".join(lines)), found)


def finished(study: Hybrids, folder: RunFolder, measured: Measured) -> Outcome:
    """Write what was found into the folder."""
    from experiments.hybrids.report.figures import figures
    from experiments.hybrids.report.page import report

    findings = findings_of(study, measured)
    keep_frames(folder, measured)
    return folder.finish(
        findings.outcome, findings.metrics, figures=figures(findings), report=report(findings)
    )


def keep_frames(folder: RunFolder, measured: Measured) -> None:
    """Leave the frames that more can be computed from beside the metrics."""
    if not folder.leads:
        return
    for name in KEPT:
        if len(frame := measured.frames[name]):
            frame.to_parquet(folder.path / f"{name}.parquet", index=False)


def findings_of(study: Hybrids, measured: Measured) -> Findings:
    """All that is made of the frames."""
    frames = measured.frames
    generator = np.random.default_rng(study.seed)
    found = drawn_all(gathered(frames["sums"]), generator, references=REFERENCES)
    scores = pd.concat([score_rows(one) for one in found], ignore_index=True)
    denominators = {cell.task.name: _denominator(cell.task.name, scores) for cell in measured.cells}
    failures = failure_rows(scores, denominators)
    names = [cell.architecture for cell in measured.cells]
    reference = "gpt2" if "gpt2" in names else names[0]
    labels = frames["labels"]
    arrivals = _with_divergence(frames)
    first = [cell for cell in measured.cells if cell.task.name == measured.cells[0].task.name]
    crossing = crossed(first)
    effects = [
        score_effects(one, denominators[one.sums.task], crossing)
        for one in found
        if crossing and one.sums.shift == "none"
    ]
    return Findings(
        study,
        measured,
        denominators,
        scores,
        compared(found, denominators, generator, reference=reference),
        failures,
        failures_compared(failures, reference=reference),
        medians(arrivals, ("architecture", "task", "threshold")),
        with_holm(pd.concat(effects, ignore_index=True) if effects else pd.DataFrame()),
        with_holm(step_effects(arrivals, crossing) if crossing else pd.DataFrame()),
        switches(labels, BY) if len(labels) else pd.DataFrame(),
        adoptions(labels, BY) if len(labels) else pd.DataFrame(),
    )


def _denominator(task: str, scores: pd.DataFrame) -> str:
    """The baseline that a task's scores are named after: the paper's, the Bayes optimum's, or the
    one that gains most on the prompts that all were asked about."""
    if task in DENOMINATORS:
        return DENOMINATORS[task]
    rows = scores.loc[
        (scores["metric"] == "denominator")
        & (scores["task"] == task)
        & (scores["shift"] == "none")
        & ~scores["baseline"].str.startswith("trained ")
    ]
    return str(rows.loc[rows["value"].idxmax(), "baseline"])


def _with_divergence(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    arrivals, ended = frames["arrivals"], frames["ended"]
    keys = ["architecture", "task", "seed", "rate"]
    why = ended.set_index(keys)["why"] == "diverged"
    asked: Any = arrivals[keys]
    index: Any = pd.MultiIndex.from_frame(asked)
    return arrivals.assign(diverged=why.reindex(index).fillna(False).to_numpy(bool))


def _interval(row: Mapping[Any, Any]) -> str:
    if not math.isfinite(row["value"]):
        return "unknown"
    if not math.isfinite(row["low"]):
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _change(row: Mapping[Any, Any]) -> str:
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
