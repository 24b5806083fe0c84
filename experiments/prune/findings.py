"""What did a pruning run find, in numbers and in one sentence?

`findings_of` turns what was measured into tables: `experiments.prune.tables` has those of the
reporting examples, `experiments.prune.scores` and `experiments.prune.places` those of the selection
examples. The sentence on the last line of stdout speaks of the first unit that was pruned, and
shortly of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.agreement import across_shots, partners
from experiments.prune import places, scores, tables
from experiments.prune.cells import cells_of
from experiments.prune.curves import RANDOM
from experiments.prune.measured import WHOLE, Measured
from experiments.prune.orders import SHOWN
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from experiments.prune.study import Pruning

NAMES = {"heads": "heads", "groups": "key/value groups", "ffns": "FFNs", "mixers": "mixers"}
"""How a unit is written."""
ORDERS = {
    "importance": "each task's and shot count's own order",
    "aggregate": "one order for all tasks at a shot count",
}
"""How some rankings are written in a sentence."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What figures, tables, page and headline are made of; a table of nothing is empty.

    Attributes:
        totals: components by unit, in the order measured.
        curves: `tables.average_table`: scores as components go.
        removable, contrasts, transfer, baseline, alone, grid, exported: the others of `tables`.
        importance, exact, fidelity: of `scores`.
        agreement, layers, thirds, capacity, induction: of `places`.
        partners, across_shots: `experiments.agreement` of `agreement`, unit by unit.
        partners_used: `Measured.partners`: those whose rankings were used.
    """

    study: Pruning
    totals: Mapping[str, int]
    tasks: tuple[str, ...]
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    chances: Mapping[str, float]
    truncated: int
    curves: pd.DataFrame
    removable: pd.DataFrame
    contrasts: pd.DataFrame
    transfer: pd.DataFrame
    baseline: pd.DataFrame
    alone: pd.DataFrame
    grid: pd.DataFrame
    importance: pd.DataFrame
    exact: pd.DataFrame
    fidelity: pd.DataFrame
    agreement: pd.DataFrame
    partners: pd.DataFrame
    partners_used: pd.DataFrame
    across_shots: pd.DataFrame
    layers: pd.DataFrame
    thirds: pd.DataFrame
    capacity: pd.DataFrame
    induction: pd.DataFrame
    induction_scores: pd.DataFrame
    exported: pd.DataFrame

    @property
    def chance(self) -> float:
        """Score of blind guesses, averaged over tasks."""
        known = [self.chances[task] for task in self.tasks if task in self.chances]
        return sum(known) / len(known) if known else math.nan

    @property
    def at_chance(self) -> list[str]:
        """Conditions in which the whole model is not told from blind guesses: nothing can fall."""
        rows = self.baseline
        if rows.empty:
            return []
        sure = rows["value"] - 1.96 * rows["stderr"].fillna(0) > rows["chance"]
        return [
            f"{row['task']} at {shots_of(row['shots'])}".replace("_", " ")
            for row in rows.loc[~sure & rows["chance"].notna()].to_dict("records")
        ]

    @property
    def not_ordered(self) -> list[str]:
        """Rankings asked for that order no unit of this model by these tasks."""
        made = set(self.removable["ranking"]) if len(self.removable) else set()
        names = {"partners": ("highest partner", "lowest partner")}
        return [
            name
            for name in self.study.rankings
            if not made & {*names.get(name, (SHOWN.get(name, name),))}
        ]

    @property
    def units(self) -> list[str]:
        """Units that some ranking removed, in the order measured."""
        pruned = set(self.removable["unit"])
        return [unit for unit in self.totals if unit in pruned]

    @property
    def outcome(self) -> Outcome:
        """The headline, and its numbers for machines."""
        extra: dict[str, Any] = {}
        if "heads" in self.units:
            extra |= {"heads": self.totals["heads"], **self._numbers("heads")}
        others = [unit for unit in self.units if unit != "heads"]
        if others:
            extra["units"] = {
                unit: {"components": self.totals[unit], **self._numbers(unit)} for unit in others
            }
        return Outcome(self._headline(), {**extra, "truncated_prompts": self.truncated})

    @property
    def metrics(self) -> pd.DataFrame:
        """All tidy rows of the run: `part` says what a row is of."""
        by_value = {
            "importance": (self.importance, "importance"),
            "curve": (self.curves, "score"),
            "removable": (self.removable, "components"),
            "contrast": (self.contrasts, "score_difference"),
            "transfer": (self.transfer, "score_difference"),
            "baseline": (self.baseline, "score"),
            "alone": (self.alone, "score_change"),
            "grid": (self.grid, "score_change"),
            "fidelity": (self.fidelity, "spearman"),
            "layer": (self.layers, "importance"),
            "third": (self.thirds, "share_of_top"),
            "capacity": (self.capacity, "share_left"),
        }
        parts = [
            frame.assign(part=part, metric=metric)
            for part, (frame, metric) in by_value.items()
            if len(frame)
        ]
        own = {
            "exact": self.exact,
            "agreement": self.agreement,
            "across shots": self.across_shots,
            "exported": self.exported,
        }
        parts += [frame.assign(part=part) for part, frame in own.items() if len(frame)]
        if len(self.induction):
            keys = ["shots", "score", "k", "components", "expected", "p"]
            melted = self.induction.melt(keys, ["overlap", "spearman"], "metric", "value")
            parts.append(
                melted.rename(columns={"score": "induction_score"}).assign(part="induction")
            )
        if len(self.induction_scores):
            names = [name for name in places.INDUCTION if name in self.induction_scores]
            melted = self.induction_scores.melt("component", names, "metric", "value")
            parts.append(melted.assign(part="induction score"))
        rows = pd.concat(parts, ignore_index=True)
        for name in ("stderr", "low", "high"):
            if name not in rows:
                rows[name] = np.nan
        return rows

    def ranking_of(self, unit: str) -> str:
        """The ranking that stands for a unit: its importance, or the first that is not random."""
        names = list(dict.fromkeys(self.removable.loc[self.removable["unit"] == unit, "ranking"]))
        return next((name for name in names if name != RANDOM), names[0])

    def removed(self, unit: str, ranking: str) -> pd.Series | None:
        """The row of `removable` averaged over shots; None for a ranking that was not used."""
        rows = self.removable
        rows = rows.loc[
            (rows["unit"] == unit) & (rows["ranking"] == ranking) & rows["shots"].isna()
        ]
        return None if rows.empty else rows.iloc[0]

    def _numbers(self, unit: str) -> dict[str, Any]:
        row = self.removed(unit, self.ranking_of(unit))
        random = self.removed(unit, RANDOM)
        assert row is not None
        alone = self.alone.loc[self.alone["unit"] == unit] if len(self.alone) else self.alone
        return {
            "removable": int(row["value"]),
            "removable_interval": None
            if math.isnan(row["low"])
            else [int(row["low"]), int(row["high"])],
            "removable_random": None if random is None else float(random["value"]),
            "critical": [str(name) for name in alone["component"]],
        }

    def _headline(self) -> str:
        if not self.units:
            mean = self.baseline["value"].mean()
            said = f"the whole model is right in {100 * mean:.1f} % of cases; nothing was pruned"
            return said + self._unexported()
        first, *rest = self.units
        ranking = self.ranking_of(first)
        said = (
            f"{self._can_go(first)} can go, by {ORDERS.get(ranking, f'the order {ranking!r}')}, "
            f"before the average accuracy falls by more than {100 * self.study.tolerance:g} points "
            f"({self._surely(first)})"
        )
        if rest:
            others = [f"{self._can_go(unit)} ({self._surely(unit)})" for unit in rest]
            said += f"; of the others {listed(others)}"
        costs = [costs_of(row) for row in self.alone.to_dict("records") if row["value"] < 0]
        if costs:
            said += f"; removing one alone costs most for {', '.join(costs[:6])}"
        return said + self._unexported()

    def _unexported(self) -> str:
        if self.study.export is None or len(self.exported):
            return ""
        return f"; nothing can go for --export {self.study.export}: no checkpoint was written"

    def _can_go(self, unit: str) -> str:
        row = self.removed(unit, self.ranking_of(unit))
        assert row is not None
        return f"{int(row['value'])} of {self.totals[unit]} {NAMES.get(unit, unit)}"

    def _surely(self, unit: str) -> str:
        row, random = self.removed(unit, self.ranking_of(unit)), self.removed(unit, RANDOM)
        assert row is not None
        said = interval_in_words(float(row["low"]), float(row["high"]))
        if random is not None and self.ranking_of(unit) != RANDOM:
            said += f"; random orders {int(random['value'])}"
        return said


def findings_of(study: Pruning, measured: Measured) -> Findings:
    """All tables of a run; every random draw follows the study's seed."""
    generator = np.random.default_rng(study.seed)
    cells = cells_of(measured.answers, generator)
    totals = tables.totals(measured)
    importance = scores.importance_table(measured, study.convention)
    agreement = places.agreements(measured, study.convention)
    whole = measured.answers.loc[measured.answers["unit"] == WHOLE]
    return Findings(
        study=study,
        totals=totals,
        tasks=tuple(dict.fromkeys(map(str, whole["task"]))),
        shots=tuple(sorted({int(s) for s in whole["shots"]})),
        seeds=tuple(sorted({int(s) for s in whole["seed"]})),
        chances=measured.chances,
        truncated=measured.truncated,
        curves=tables.average_table(cells, totals),
        removable=tables.removable_table(cells, totals, study.tolerance),
        contrasts=tables.contrast_table(cells, totals),
        transfer=tables.transfer_table(cells, totals),
        baseline=tables.baseline_table(measured),
        alone=tables.alone_table(measured, generator),
        grid=tables.grid_table(cells, totals),
        importance=importance,
        exact=scores.exact_effects(measured, generator),
        fidelity=scores.fidelity(measured, study.convention),
        agreement=agreement,
        partners=_by_unit(agreement, partners, several="task"),
        partners_used=measured.partners,
        across_shots=_by_unit(agreement, across_shots, several="shots"),
        layers=places.layers(measured, study.convention),
        thirds=places.thirds(measured, importance),
        capacity=places.capacity(measured, importance, generator),
        induction=places.induction_overlap(measured, importance),
        induction_scores=pd.DataFrame() if measured.induction is None else measured.induction,
        exported=tables.exported_table(cells, measured),
    )


def costs_of(row: Mapping[Any, Any]) -> str:
    """What removing one component costs, in words: `L0H1 (−3.2 ± 1.1 points)`."""
    points = f"{signed(100 * row['value'])}"
    if not math.isnan(row["stderr"]):
        points += f" ± {196 * row['stderr']:.1f}"
    return f"{row['component']} ({points} points)"


def interval_in_words(low: float, high: float) -> str:
    """`95 % interval 3–7`, or why there is none."""
    if math.isnan(low):
        return "too few texts for an interval"
    if low == high:
        return f"{low:g} in all resamples"
    return f"95 % interval {low:g}–{high:g}"


def signed(value: float, decimals: int = 1) -> str:
    """With its sign, a true minus."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def shots_of(number: float) -> str:
    """`1 shot`, `5 shots`."""
    return f"{number:.0f} shot{'' if number == 1 else 's'}"


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _by_unit(agreement: pd.DataFrame, table: Any, several: str) -> pd.DataFrame:
    """A table of `experiments.agreement` for every unit that compares several tasks, or shots."""
    if agreement.empty:
        return pd.DataFrame()
    apart = agreement.loc[agreement[f"{several}_a"] != agreement[f"{several}_b"]]
    found = [
        table(rows).assign(unit=unit)
        for unit, rows in agreement.groupby("unit", sort=False)
        if unit in set(apart["unit"])
    ]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
