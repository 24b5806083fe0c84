"""What do the rows of a pruning run say, and how surely?

From one row per example and ablation to average curves with bootstrap bands, the number of heads
that can go, the price of each head alone, and the sentence that goes on the last line of stdout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.removal_curves import Count, average_curves
from experiments.run_folder import Outcome
from experiments.statistics import holm, mean_and_stderr, paired_permutation_test

if TYPE_CHECKING:
    from ablate import Head, HookedModel
    from experiments.prune import HeadPruning

CONDITION = ["task", "shots"]


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything the figures, the tables and the headline of a run are made of.

    Attributes:
        importance: task, shots, layer, head, convention, value, stderr.
        average: ranking, seed, removed, fraction, value, stderr, low, high; tasks and shots
            averaged with equal weight.
        by_task: the same for each task and shot count, without an interval.
        alone: layer, head, value (mean change of accuracy, selection examples), stderr.
        removable: ranking, heads, low and high: the 95 % interval's ends, or, for the mean of the
            random orders, the range over their seeds.
        critical: the most costly heads on reporting examples, in points, with Holm's p.
        baseline: accuracy of the whole model by task and shots.
        examples: one row per example and ablation.
    """

    study: HeadPruning
    tasks: tuple[str, ...]
    chances: Mapping[str, float]
    truncated: int
    importance: pd.DataFrame
    average: pd.DataFrame
    by_task: pd.DataFrame
    alone: pd.DataFrame
    removable: pd.DataFrame
    critical: pd.DataFrame
    baseline: pd.DataFrame
    examples: pd.DataFrame
    heads: int

    @property
    def chance(self) -> float:
        """Accuracy of blind guesses, averaged over tasks."""
        return sum(self.chances.values()) / len(self.chances)

    @property
    def outcome(self) -> Outcome:
        """The headline, and its numbers for machines."""
        rows = self.removable.set_index("ranking")
        known, random = rows.loc["importance"], rows.loc["random (mean)"]
        critical = ", ".join(
            f"{row['component']} ({_signed(row['points'])} ± {1.96 * row['stderr']:.1f} points)"
            for row in self.critical.to_dict("records")
        )
        headline = (
            f"{int(known.heads)} of {self.heads} heads can go, by each task's and shot count's own "
            "order, before the average accuracy falls by more than "
            f"{100 * self.study.tolerance:g} points (95 % interval {int(known.low)}–"
            f"{int(known.high)}; random orders {random.heads:.0f}); removing one alone costs most "
            f"for {critical}"
        )
        extra = {
            "heads": self.heads,
            "removable": int(known.heads),
            "removable_interval": [int(known.low), int(known.high)],
            "removable_random": float(random.heads),
            "critical": [str(c) for c in self.critical.component],
            "truncated_prompts": self.truncated,
        }
        return Outcome(headline, extra)

    @property
    def sentences(self) -> Sequence[str]:
        """The findings of the report."""
        rows = self.removable.set_index("ranking")
        return [
            f"{name} order: {row.heads:.3g} of {self.heads} heads can go "
            f"({'range over seeds' if row.seed < 0 else '95 % interval'} "
            f"{row.low:g}–{row.high:g})."
            for name, row in rows.iterrows()
        ] + [
            f"{row['component']} alone: {_signed(row['points'])} points on reporting examples "
            f"(standard error {row['stderr']:.1f}, Holm-adjusted p = {row['p']:.2g})."
            for row in self.critical.to_dict("records")
        ]

    @property
    def metrics(self) -> pd.DataFrame:
        """All tidy rows of the run: keys, metric, value, stderr; `part` says what a row is of."""
        parts = [
            self.importance.assign(part="importance"),
            self.average.assign(part="average", metric="acc"),
            self.by_task.assign(part="curve", metric="acc"),
            self.alone.assign(part="alone", metric="acc_change"),
            self.removable.rename(columns={"heads": "value"}).assign(
                part="removable", metric="heads"
            ),
            self.critical.rename(columns={"points": "value"}).assign(
                part="critical", metric="acc_change_points"
            ),
        ]
        return pd.concat(parts, ignore_index=True)


def findings_of(
    study: HeadPruning,
    model: HookedModel,
    *,
    importance: pd.DataFrame,
    examples: pd.DataFrame,
    critical: Sequence[Head],
    chances: Mapping[str, float],
    truncated: int,
) -> Findings:
    """Aggregate the rows of a run; every random draw follows the study's seed."""
    generator = np.random.default_rng(study.seed)
    total = len(model.heads)
    reporting = examples.loc[examples.split == "test"]
    curves = average_curves(reporting.loc[reporting.ranking != "alone"], generator)
    return Findings(
        study=study,
        tasks=tuple(dict.fromkeys(examples.task)),
        chances=chances,
        truncated=truncated,
        importance=_with_heads(importance, model).query("head >= 0"),
        average=pd.concat([c.frame(total) for c in curves], ignore_index=True),
        by_task=_by_task(reporting, total),
        alone=_with_heads(_alone(examples.loc[examples.split == "selection"]), model),
        removable=_removable({(c.ranking, c.seed): c.removable(study.tolerance) for c in curves}),
        critical=_with_heads(_critical(reporting, critical, generator), model),
        baseline=_baseline(reporting),
        examples=examples,
        heads=total,
    )


def _by_task(reporting: pd.DataFrame, total: int) -> pd.DataFrame:
    """Mean accuracy by task, shots, ranking, seed and step; step 0 of all is the whole model."""
    keys = [*CONDITION, "ranking", "seed", "removed"]
    means = (
        reporting.loc[reporting.ranking != "alone"]
        .groupby(keys, sort=False)["acc"]
        .agg(value="mean", stderr="sem")
        .reset_index()
    )
    whole = means.loc[means.ranking == "whole"].drop(columns=["ranking", "seed"])
    others = means.loc[means.ranking != "whole"]
    starts = others.filter(["ranking", "seed"]).drop_duplicates().merge(whole, how="cross")
    rows = pd.concat([starts, others], ignore_index=True)
    return rows.assign(fraction=rows.removed / total)


def _alone(selection: pd.DataFrame) -> pd.DataFrame:
    """Change of accuracy when one head is removed: mean over conditions, paired by example."""
    keys = [*CONDITION, "doc_id"]
    whole = selection.loc[selection.ranking == "whole"].set_index(keys)["acc"]
    rows = []
    for component, without in selection.loc[selection.ranking == "alone"].groupby("component"):
        change = without.set_index(keys)["acc"] - whole
        by_condition = change.groupby(level=CONDITION)
        means, errors = by_condition.mean(), by_condition.sem()
        rows.append(
            {
                "component": component,
                "value": means.mean(),
                "stderr": float(np.sqrt((errors**2).sum()) / len(errors)),
            }
        )
    return pd.DataFrame(rows)


def _critical(
    reporting: pd.DataFrame, heads: Sequence[Head], generator: np.random.Generator
) -> pd.DataFrame:
    """Cost of each chosen head on examples that did not choose it, in points of accuracy."""
    keys = [*CONDITION, "doc_id"]
    whole = reporting.loc[reporting.ranking == "whole"].set_index(keys).sort_index()
    rows = []
    for head in heads:
        without = reporting.loc[
            (reporting.ranking == "alone") & (reporting.component == str(head))
        ].set_index(keys)
        without = without.loc[whole.index]
        texts = _texts(whole)
        change, stderr = mean_and_stderr(without.acc - whole.acc, clusters=texts)
        # Texts are the independent units: sums over a text may swap sign, single examples may not.
        hurt, intact = (frame.groupby(texts).acc.sum() for frame in (without, whole))
        rows.append(
            {
                "component": str(head),
                "points": 100 * change,
                "stderr": 100 * stderr,
                "p": paired_permutation_test(hurt, intact, generator),
                "loss_rise": float((without.loss - whole.loss).mean()),
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(p=holm(table.p)) if len(table) else table


def _texts(rows: pd.DataFrame) -> list[str]:
    """The text that an example comes from: examples of one text are not independent."""
    tasks = rows.index.get_level_values("task")
    return [f"{task} {group}" for task, group in zip(tasks, rows.group, strict=True)]


def _removable(counts: Mapping[tuple[str, int], Count]) -> pd.DataFrame:
    """One row a ranking; random orders also as their mean, within their range."""
    rows = [
        {"ranking": name if name != "random" else f"random (seed {seed})", "seed": seed}
        | {"heads": float(count.best), "low": float(count.low), "high": float(count.high)}
        for (name, seed), count in counts.items()
    ]
    random = [count.best for (name, _), count in counts.items() if name == "random"]
    rows.append(
        {"ranking": "random (mean)", "seed": -1, "heads": float(np.mean(random))}
        | {"low": float(min(random)), "high": float(max(random))}
    )
    return pd.DataFrame(rows)


def _baseline(reporting: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the whole model: task by shots, in percent with standard errors."""
    whole = reporting.loc[reporting.ranking == "whole"]
    table = whole.groupby(CONDITION, sort=False)["acc"].agg(["mean", "sem", "size"]).reset_index()
    return pd.DataFrame(
        {
            "task": table.task,
            "shots": table.shots,
            "accuracy %": 100 * table["mean"],
            "standard error": 100 * table["sem"],
            "examples": table["size"],
        }
    )


def _with_heads(rows: pd.DataFrame, model: HookedModel) -> pd.DataFrame:
    """Add the columns layer and head (−1 for a component that is no head)."""
    places = {str(h): (h.layer, h.head) for h in model.heads}
    found = [places.get(str(name), (-1, -1)) for name in rows["component"]]
    return rows.assign(layer=[layer for layer, _ in found], head=[head for _, head in found])


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
