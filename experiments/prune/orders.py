"""In what orders do components go?

A ranking names a unit's components, least important first, for one condition. Those that know the
task (importance, exact, re-scored, greedy) come from its selection examples; those of other tasks
(aggregate, others, partners) from theirs; weights, activations, prefix matching, copying and files
know no task; random knows nothing. Equal scores are ordered by chance, anew for each seed.

With T the tasks that are not unseen, at the same number of shots and the same seed:

    aggregate                        `ablate.rankings.combined` over T: mean, rank or z
    others                           the mean over T without this task, which it has never seen
    highest partner, lowest partner  the importance of the task in T whose scores agree with this
                                     one's most and least (Spearman's ρ)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from ablate.components import Component, KVGroup
from ablate.masks import Mask
from ablate.pruning import Quota, Ranking, random_ranking, removed_count, weight_magnitudes
from ablate.ranking_files import read_scores
from ablate.rankings import Combination, Scores, activation_magnitudes, combined, shuffled_ties
from ablate.stepwise import rescored, stepwise
from experiments.prune.grading import graded
from experiments.prune.measured import Key, Units
from experiments.rank_measures import spearman
from probes.induction import head_scores, induction_scan
from probes.readings import inputs_of
from probes.scoring import log_likelihoods

if TYPE_CHECKING:
    from ablate import Fill, HookedModel
    from experiments.prune.conditions import Condition
    from experiments.prune.grading import Fills
    from experiments.prune.selection import Selection
    from experiments.prune.study import Pruning
    from experiments.run_folder import RunFolder

SHOWN = {
    "aggregate-rank": "aggregate (rank)",
    "aggregate-z": "aggregate (z)",
    "prefix-matching": "prefix matching",
}
"""Names of rankings where they are not those of the options."""
AGGREGATES: Mapping[str, Combination] = {
    "aggregate": "mean",
    "aggregate-rank": "rank",
    "aggregate-z": "z",
}
ONE_BY_ONE = 64
"""Components up to which greedy removal goes one by one; beyond, a step of --fractions at once."""


@dataclass(frozen=True)
class Order:
    """A ranking of a unit's components, and what it is called."""

    unit: str
    name: str
    ranking: Ranking


@dataclass(frozen=True, eq=False)
class Orders:
    """All rankings, and what was found on the way.

    Attributes:
        of: the orders of each condition.
        partners, induction: as in `experiments.prune.measured.Measured`.
    """

    of: Mapping[Key, Sequence[Order]]
    partners: pd.DataFrame
    induction: pd.DataFrame | None

    @property
    def frame(self) -> pd.DataFrame:
        """unit, ranking, task, shots, seed, component, place."""
        rows = [
            (order.unit, order.name, *key, str(component), place)
            for key, orders in self.of.items()
            for order in orders
            for place, component in enumerate(order.ranking)
        ]
        names = ["unit", "ranking", "task", "shots", "seed", "component", "place"]
        return pd.DataFrame(rows, columns=pd.Index(names))


def file_scores(study: Pruning, model: HookedModel, units: Units) -> dict[str, Scores]:
    """The scores in --ranking-files by file name; ValueError for a file that fits no unit."""
    found: dict[str, Scores] = {}
    for path in study.ranking_files:
        name = Path(path).name
        if name in found:
            raise ValueError(f"two ranking files called {name}: rename one of them")
        scores = read_scores(path, model)
        if not any(set(components) <= scores.keys() for components in units.values()):
            kinds = ", ".join(units)
            raise ValueError(
                f"{name} scores no whole unit of this study ({kinds}): it has "
                f"{', '.join(str(c) for c in list(scores)[:3])}, …; give scores of all components "
                "of one, or other --units"
            )
        found[name] = scores
    return found


def require_orders(
    study: Pruning, model: HookedModel, units: Units, conditions: Sequence[Condition]
) -> None:
    """Refuse rankings of which none can order anything here."""
    names = set(study.rankings)
    if len({c.key.task for c in conditions if not c.unseen}) < 2:
        names -= {*AGGREGATES, "others", "partners"}
    if not {"heads", "groups"} & units.keys():
        names -= {"prefix-matching", "copying"}
    if not names and not study.ranking_files:
        raise ValueError(
            f"--rankings {' '.join(study.rankings)}: none of them orders the "
            f"{' or '.join(units)} of {model.name} by these tasks; give others, or more --tasks"
        )


def orders_of(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    units: Units,
    conditions: Sequence[Condition],
    chosen: Selection,
    files: Mapping[str, Scores],
    fills: Fills,
    bar: Any,
) -> Orders:
    """Every ranking asked for that this model and these tasks allow."""
    induction = _induction(study, folder, model, units)
    plain = _task_free(study, model, units, conditions, files, induction)
    found: dict[Key, list[Order]] = {condition.key: [] for condition in conditions}
    partners: list[dict[str, Any]] = []
    for number, (unit, components) in enumerate(units.items()):
        tables = {
            key: {c: s for c, s in of.scores(study.convention).items() if c in set(components)}
            for key, of in chosen.importance.items()
        }
        exact = _exact_scores(chosen.effects, components)
        for condition in conditions:
            key = condition.key
            bar.set_postfix_str(f"{condition.name} orders", refresh=False)
            among = _tables_beside(condition, conditions, tables)
            scores: dict[str, Scores] = {}
            if "importance" in study.rankings:
                scores["importance"] = tables[key]
            scores |= _aggregates(study, condition, tables[key], among)
            if "partners" in study.rankings:
                for which, task, rho in _partners(tables[key], among):
                    scores[f"{which} partner"] = among[task]
                    row = {"unit": unit, "which": which, "partner": task, "value": rho}
                    partners.append(key._asdict() | row)
            if "exact" in study.rankings and key in exact:
                scores["exact"] = exact[key]
            scores |= plain[unit]
            chance = torch.Generator().manual_seed(1000 * key.seed + number)
            orders = [Order(unit, name, shuffled_ties(s, chance)) for name, s in scores.items()]
            orders += _stepwise(study, folder, model, unit, components, condition, fills)
            if "random" in study.rankings:
                # One order a seed for all tasks: the average is of one and the same pruned model.
                chance = torch.Generator().manual_seed(1000 * key.seed + number)
                orders.append(Order(unit, "random", random_ranking(components, chance)))
            found[key] += orders
            bar.update()
    names = ["task", "shots", "seed", "unit", "which", "partner", "value"]
    return Orders(found, pd.DataFrame(partners, columns=pd.Index(names)), induction)


def quota_of(study: Pruning, components: Sequence[Component]) -> Quota:
    """The quota asked for; global for a unit of one component a layer, which no share divides."""
    places = {(component.stack, component.layer) for component in components}
    return study.quota if len(places) < len(components) else "global"


def _tables_beside(
    condition: Condition, conditions: Sequence[Condition], tables: Mapping[Key, Scores]
) -> dict[str, Scores]:
    """The importance for every other task that is not unseen, at the same shots and seed."""
    own = condition.key
    return {
        other.key.task: tables[other.key]
        for other in conditions
        if (other.key.shots, other.key.seed) == (own.shots, own.seed)
        and other.key.task != own.task
        and not other.unseen
    }


def _aggregates(
    study: Pruning, condition: Condition, own: Scores, among: Mapping[str, Scores]
) -> dict[str, Scores]:
    """Where there is another task: what all say, and what the others say."""
    if not among:
        return {}
    together = among if condition.unseen else {condition.key.task: own, **among}
    found: dict[str, Scores] = {}
    for name, how in AGGREGATES.items():
        if name in study.rankings:
            found[SHOWN.get(name, name)] = combined(together, how)
    if "others" in study.rankings:
        found["others"] = combined(among)
    return found


def _partners(own: Scores, among: Mapping[str, Scores]) -> Iterator[tuple[str, str, float]]:
    """(highest or lowest, task, Spearman's ρ); nothing where there is no choice to make."""
    rho = {task: spearman(list(own.values()), list(s.values())) for task, s in among.items()}
    rho = {task: value for task, value in rho.items() if np.isfinite(value)}
    if len(rho) > 1:
        for which, extreme in (("highest", max), ("lowest", min)):
            task = extreme(rho, key=lambda task: rho[task])
            yield which, task, rho[task]


def _exact_scores(effects: pd.DataFrame, components: Sequence[Component]) -> dict[Key, Scores]:
    """Mean rise of the loss without each component, by condition."""
    means = effects.groupby(["task", "shots", "seed", "component"])["loss_rise"].mean()
    found: dict[Key, Scores] = {}
    for task, shots, seed in effects[["task", "shots", "seed"]].drop_duplicates().to_numpy():
        of = means.loc[task, shots, seed]
        found[Key(str(task), int(shots), int(seed))] = {c: float(of[str(c)]) for c in components}
    return found


def _stepwise(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    unit: str,
    components: Sequence[Component],
    condition: Condition,
    fills: Fills,
) -> Iterator[Order]:
    """Orders that look again after each step, kept."""
    counts = sorted({removed_count(len(components), f) for f in study.fractions if f > 0})
    # Zero or a mean: the same for all batches (the study refuses donors here).
    fill = fills(condition)(condition.answers.batches[0])
    ways: dict[str, Callable[[], Ranking]] = {
        "re-scored": lambda: rescored(
            model,
            condition.readings(model),
            components,
            counts,
            convention=study.convention,
            quota=quota_of(study, components),
            fill=fill,
            checkpointing=study.checkpointing,
        ),
        "greedy": lambda: _greedy(study, model, condition, components, counts, fill),
    }
    by_name = {str(component): component for component in components}
    for name, way in ways.items():
        if name in study.rankings:
            key = f"{condition.name}-{unit}-{name}"
            kept = folder.partial(key)
            if kept is None:
                kept = pd.DataFrame({"component": [str(c) for c in way()]})
                folder.keep(key, kept)
            yield Order(unit, name, tuple(by_name[c] for c in kept.component))


def _greedy(
    study: Pruning,
    model: HookedModel,
    condition: Condition,
    components: Sequence[Component],
    counts: Sequence[int],
    fill: Literal["zero"] | Fill,
) -> Ranking:
    """`ablate.stepwise.greedy`, but what examples share is read once, not in every row."""
    prepared = condition.right

    def losses(gone: Mask, left: Ranking) -> Scores:
        masks = [gone | Mask([component]) for component in left]
        of_masks = graded(prepared, masks, *log_likelihoods(model, prepared, masks, fill=fill))
        return dict(zip(left, of_masks.loss.mean(axis=1).tolist(), strict=True))

    one_by_one = range(1, len(components)) if len(components) <= ONE_BY_ONE else counts
    return stepwise(components, one_by_one, losses, quota=quota_of(study, components))


def _task_free(
    study: Pruning,
    model: HookedModel,
    units: Units,
    conditions: Sequence[Condition],
    files: Mapping[str, Scores],
    induction: pd.DataFrame | None,
) -> dict[str, dict[str, Scores]]:
    """Scores that are the same for all tasks, by unit and name."""
    found: dict[str, dict[str, Scores]] = {unit: {} for unit in units}
    tables: dict[str, Scores] = {}
    if "weights" in study.rankings:
        tables["weights"] = weight_magnitudes(model)
    if "activations" in study.rankings:
        answers = [condition.answers for condition in conditions]
        batches = (inputs_of(model, batch, a.layout) for a in answers for batch in a.batches)
        tables["activations"] = activation_magnitudes(model, batches)
    for name in ("prefix-matching", "copying"):
        if name in study.rankings and induction is not None:
            tables[SHOWN.get(name, name)] = head_scores(induction, name.replace("-", "_"))
    for unit, components in units.items():
        for name, scores in tables.items():
            complete = _with_groups(model, scores) if unit == "groups" else scores
            if set(components) <= complete.keys():
                found[unit][name] = {c: complete[c] for c in components}
        for name, scores in files.items():
            if set(components) <= scores.keys():
                found[unit][name] = {c: scores[c] for c in components}
    return found


def _with_groups(model: HookedModel, scores: Scores) -> Scores:
    """Scores of the key/value groups: the mean of their heads'."""
    found: dict[Component, float] = {}
    for group in model.kv_groups:
        assert isinstance(group, KVGroup)
        heads = list(model.expand(Mask([group])))
        if all(head in scores for head in heads):
            found[group] = float(np.mean([scores[head] for head in heads]))
    return found


def _induction(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    units: Units,
) -> pd.DataFrame | None:
    """The scan of every head where a ranking asks for it, kept."""
    wanted = {"prefix-matching", "copying"} & set(study.rankings)
    if not wanted or not {"heads", "groups"} & units.keys():
        return None
    kept = folder.partial("induction")
    if kept is None:
        kept = induction_scan(model, scores=("prefix_matching", "copying"))
        folder.keep("induction", kept)
    return kept
