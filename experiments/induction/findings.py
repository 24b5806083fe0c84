"""What did a scan find, in numbers and in one sentence?

The headline names the heads that pass the criterion and what masking them leaves of the skill. With
a pruning run: how far heads that are important for tasks are those with high induction scores
(top 30 %, hypergeometric), and how much of the scores is left as heads go by importance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ablate.components import Component, parse_component
from experiments.rank_measures import shared_top
from experiments.run_folder import Outcome
from experiments.where import capacity_retained
from probes.criterion import passing
from probes.masking import effects

if TYPE_CHECKING:
    from experiments.induction.examples import Example
    from experiments.induction.measured import Measured
    from experiments.induction.study import Induction

TOP = 0.3
"""Share of heads that counts as the top."""
OVERLAPPED = ("prefix_matching", "attribution", "copying", "ov", "previous_token")
"""Scores set beside importance."""
SKILLS: Mapping[str, str] = {
    "copy_gain": "what repetition is worth",
    "icl_score": "what context is worth on text",
}
KEYS = ("component", "kind", "stack", "layer", "head")


@dataclass(frozen=True, eq=False)
class Findings:
    """What figures, tables, page and headline are made of; a table of nothing is empty.

    Attributes:
        heads: a row a component, a column a score, with its standard error over seeds.
        judgement: `probes.criterion.judged`.
        induction: the heads that pass, strongest first.
        effects: `probes.masking.effects` of them.
        overlap: shots, score, k, components, overlap, expected, p, spearman.
        capacity: `experiments.where.capacity_retained` of prefix matching.
    """

    study: Induction
    scan: pd.DataFrame
    heads: pd.DataFrame
    judgement: pd.DataFrame
    induction: tuple[Component, ...]
    effects: pd.DataFrame
    alone: pd.DataFrame
    positions: pd.DataFrame
    importance: pd.DataFrame
    overlap: pd.DataFrame
    capacity: pd.DataFrame
    examples: Sequence[Example]
    left_out: Sequence[str]

    @property
    def outcome(self) -> Outcome:
        """The headline, and its numbers for machines."""
        names = [str(head) for head in self.induction]
        all_k = self.against("whole")
        extra: dict[str, Any] = {
            "heads": len(self.judgement),
            "induction_heads": names,
            "criterion": self.criterion,
            "rows": int(self.judgement["rows"].iloc[0]) if len(self.judgement) else 0,
        }
        for row in all_k.to_dict("records"):
            if math.isfinite(row["left"]):
                extra.setdefault("left_without_them", {})[row["measure"]] = {
                    name: _rounded(row[key])
                    for name, key in (("share", "left"), ("low", "left_low"), ("high", "left_high"))
                }
        return Outcome(self._headline(names, all_k), extra)

    def against(self, other: str) -> pd.DataFrame:
        """Effects of masking all the heads that pass: skills alone."""
        rows = self.effects
        if rows.empty:
            return rows
        rows = rows.loc[(rows["set"] == "induction") & (rows["against"] == other)]
        return rows.loc[(rows["k"] == rows["k"].max()) & rows["measure"].isin(list(SKILLS))]

    @property
    def criterion(self) -> str:
        """What a head had to do, in words."""
        study = self.study
        return (
            f"prefix matching ≥ {study.matching:g} and above both nulls (q ≤ {study.level:g}), "
            f"{study.by} > {study.copying:g}"
        )

    def _headline(self, names: Sequence[str], all_k: pd.DataFrame) -> str:
        if self.judgement.empty:
            return f"no head of {self.study.model} could be judged: {self.left_out[-1]}"
        count = len(self.judgement)
        are = "is an induction head" if len(names) == 1 else "are induction heads"
        said = f"{len(names)} of {count} heads {are} ({self.criterion})"
        if not names:
            best = self.judgement.loc[self.judgement["prefix_matching"].idxmax()]
            return (
                f"no head of {count} is an induction head ({self.criterion}); the best prefix "
                f"matching is {best['prefix_matching']:.2f}, of {best['component']}"
            )
        said += f": {', '.join(names[:8])}" + (" …" if len(names) > 8 else "")
        without = f"; without {'it' if len(names) == 1 else 'them'} "
        if len(all_k):
            own, random = (
                self.of_set(name, "second_copy_loss") for name in ("induction", "random")
            )
            said += (
                f"{without}the second copy costs {own['value']:.2f} nats in the place of "
                f"{own['baseline']:.2f} (random sets as large {random['lowest']:.2f} to "
                f"{random['highest']:.2f})"
            )
        for row in (
            all_k.loc[all_k["measure"] == "icl_score"].to_dict("records") if len(all_k) else []
        ):
            if math.isfinite(row["left"]):
                random = self.of_set("random", "icl_score")["left"]
                left = [row[key] for key in ("left", "left_low", "left_high")] + [random]
                share, low, high, other = (f"{100 * x:.0f}".replace("-", "−") for x in left)
                said += (
                    f"{without}{share} % ({low} to {high}) of {SKILLS['icl_score']} is left "
                    f"(random heads {other} %)"
                )
        return said

    def of_set(self, name: str, measure: str) -> pd.Series:
        """What one kind of set, as large as that of the heads that pass, does to one measure."""
        rows = self.effects
        rows = rows.loc[
            (rows["set"] == name) & (rows["against"] == "whole") & (rows["measure"] == measure)
        ]
        return rows.loc[rows["k"] == rows["k"].max()].iloc[0]

    @property
    def metrics(self) -> pd.DataFrame:
        """All tidy rows of the run: `part` says what a row is of."""
        scores = self.scan.groupby([*KEYS, "score"], sort=False, dropna=False)["value"]
        means = scores.agg(value="mean", rows="size").reset_index()
        parts = [means.assign(part="score").rename(columns={"score": "metric"})]
        if len(self.judgement):
            numbers = [c for c in self.judgement.columns if c != "component"]
            judged = self.judgement.astype(dict.fromkeys(numbers, float)).melt(
                id_vars="component", var_name="metric"
            )
            parts.append(judged.assign(part="criterion"))
        if len(self.effects):
            renamed = self.effects.drop(columns="value").rename(columns={"difference": "value"})
            parts.append(renamed.assign(part="masked", metric=renamed["measure"]))
        if len(self.alone):
            parts.append(self.alone.assign(part="alone", metric="second_copy_loss_rise"))
        if len(self.positions):
            parts.append(self.positions.assign(part="position", metric="loss"))
        if len(self.overlap):
            renamed = self.overlap.rename(columns={"overlap": "value"})
            parts.append(renamed.assign(part="overlap", metric="top share"))
        if len(self.capacity):
            parts.append(self.capacity.assign(part="capacity", metric="share left"))
        return pd.concat(parts, ignore_index=True)


def findings_of(study: Induction, found: Measured) -> Findings:
    """Tables from what was measured."""
    induction = passing(found.judgement) if len(found.judgement) else ()
    overlap, capacity = _beside_importance(study, found)
    return Findings(
        study=study,
        scan=found.scan,
        heads=found.heads,
        judgement=found.judgement,
        induction=induction,
        effects=effects(found.masked) if len(found.masked) else pd.DataFrame(),
        alone=found.alone,
        positions=found.positions,
        importance=found.importance,
        overlap=overlap,
        capacity=capacity,
        examples=found.examples,
        left_out=found.left_out,
    )


def _beside_importance(study: Induction, found: Measured) -> tuple[pd.DataFrame, pd.DataFrame]:
    if found.importance.empty:
        return pd.DataFrame(), pd.DataFrame()
    rows = []
    table = found.heads.set_index("component")
    rankings: dict[str, Sequence[Component]] = {}
    for shots in sorted({int(s) for s in found.importance["shots"]}):
        own = found.importance.loc[found.importance["shots"] == shots]
        importance = {str(c): float(v) for c, v in zip(own["component"], own["value"], strict=True)}
        for score in OVERLAPPED:
            if score not in table:
                continue
            scored = {str(c): float(v) for c, v in table[score].dropna().items()}
            both = [name for name in importance if name in scored]
            if len(both) < 2:
                continue
            one, other = ([values[name] for name in both] for values in (importance, scored))
            rows.append({"shots": shots, "score": score} | shared_top(one, other, TOP))
        name = f"{shots} shot{'' if shots == 1 else 's'}"
        rankings[name] = [
            parse_component(c) for c in sorted(importance, key=importance.__getitem__)
        ]
    names = ["shots", "score", "k", "components", "overlap", "expected", "p", "spearman"]
    heads = set(map(str, found.importance["component"]))
    matching = {
        parse_component(str(name)): max(float(value), 0.0)
        for name, value in table["prefix_matching"].items()
        if str(name) in heads
    }
    capacity = capacity_retained(matching, rankings, np.random.default_rng(study.seed))
    return pd.DataFrame(rows, columns=pd.Index(names)), capacity


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
