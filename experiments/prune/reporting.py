"""What is left of the score, on examples that had no say, as components go?

Every reporting example under every mask: the whole model, each step of each order, the grid of two
units, and the components that cost most alone on selection examples. Seeds that ask the same
prompts are swept together, and a mask that several of them name is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ablate.components import Component, parse_component
from ablate.masks import Mask
from ablate.pruning import nested_masks
from experiments.prune.grading import Graded, scored
from experiments.prune.measured import ALONE, EXPORTED, GRID, WHOLE, Units
from experiments.prune.orders import quota_of

if TYPE_CHECKING:
    from ablate import HookedModel
    from ablate.pruning import Ranking
    from experiments.prune.conditions import Condition
    from experiments.prune.grading import Fills
    from experiments.prune.orders import Order, Orders
    from experiments.prune.study import Pruning
    from experiments.run_folder import RunFolder

CRITICAL = 3
"""Components of each unit that cost most alone, measured again on reporting examples."""
GRID_RANKINGS = ("importance", "aggregate")


@dataclass(frozen=True)
class Ablation:
    """A mask, and how it came to be; fields as the columns of `Measured.answers`."""

    mask: Mask
    unit: str
    ranking: str
    removed: int = 0
    ffns: int = 0
    component: str = ""


def reported(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    units: Units,
    conditions: Sequence[Condition],
    effects: pd.DataFrame,
    orders: Orders,
    exported: Mask,
    fills: Fills,
    bar: Any,
) -> pd.DataFrame:
    """Every reporting example under every ablation: `answers` of `Measured`."""
    critical = most_costly(effects, units)
    ablations = {
        condition.key: list(_ablations(study, orders.of[condition.key], critical, exported))
        for condition in conditions
    }
    frames = []
    for together in swept_together(study, conditions):
        first = together[0]
        bar.set_postfix_str(f"{first.name} test", refresh=False)
        masks = [ablation.mask for c in together for ablation in ablations[c.key]]
        graded = scored(folder, f"{first.name}-test", model, first.test, masks, fills(first), bar)
        frames += [_rows(condition, ablations[condition.key], graded) for condition in together]
    return pd.concat(frames, ignore_index=True)


def _rows(condition: Condition, ablations: Sequence[Ablation], graded: Graded) -> pd.DataFrame:
    """A row an ablation and example."""
    examples = len(graded.doc_id)
    of_mask = [graded.place[ablation.mask] for ablation in ablations]
    columns = {
        name: np.repeat([getattr(ablation, name) for ablation in ablations], examples)
        for name in ("unit", "ranking", "removed", "ffns", "component")
    }
    frame = pd.DataFrame(
        columns
        | {
            "doc_id": np.tile(graded.doc_id, len(ablations)),
            "group": np.tile(graded.group, len(ablations)),
            "score": graded.score[of_mask].ravel(),
            "loss": graded.loss[of_mask].ravel(),
        }
    )
    return frame.assign(**condition.key._asdict())


def swept_together(study: Pruning, conditions: Sequence[Condition]) -> list[list[Condition]]:
    """Conditions of one sweep: those that share reporting prompts, unless each has its donors."""
    found: dict[tuple[int, int], list[Condition]] = {}
    for condition in conditions:
        own = condition.key.seed if study.fill == "resample" else 0
        found.setdefault((id(condition.test), own), []).append(condition)
    return list(found.values())


def steps(
    study: Pruning,
    units: Units,
    conditions: Sequence[Condition],
) -> int:
    """Ticks of the progress bar: batches to be swept, and one each for importance and orders."""
    from experiments.prune.selection import removes_each

    exact = removes_each(study, sum(map(len, units.values())))
    alone = sum(len(c.selection.batches) for c in conditions) if exact else 0
    tests = sum(len(together[0].test.batches) for together in swept_together(study, conditions))
    return alone + tests + len(conditions) * (1 + len(units))


def most_costly(
    effects: pd.DataFrame, units: Units, count: int = CRITICAL
) -> dict[str, list[Component]]:
    """The components whose removal alone costs most, averaged over conditions, by unit.

    Equal costs (accuracies are coarse) are told apart by the rise of the loss.
    """
    by_condition = effects.groupby(["component", "task", "shots", "seed"])
    means = by_condition[["score_change", "loss_rise"]].mean()
    table = means.groupby("component").mean()
    order = table.assign(gain=-table.loss_rise).sort_values(["score_change", "gain"]).index
    return {
        unit: [c for c in map(parse_component, map(str, order)) if c in set(components)][:count]
        for unit, components in units.items()
    }


def _ablations(
    study: Pruning,
    orders: Sequence[Order],
    critical: Mapping[str, Sequence[Component]],
    exported: Mask,
) -> Iterator[Ablation]:
    yield Ablation(Mask(), WHOLE, WHOLE)
    if exported:
        yield Ablation(exported, EXPORTED, EXPORTED, len(exported))
    for components in critical.values():
        for component in components:
            yield Ablation(Mask([component]), ALONE, ALONE, 1, 0, str(component))
    for order in orders:
        for mask in _steps(study, order.ranking):
            yield Ablation(mask, order.unit, order.name, len(mask))
    if study.grid:
        for name in GRID_RANKINGS:
            by_unit = {order.unit: order for order in orders if order.name == name}
            if {"heads", "ffns"} <= by_unit.keys():
                heads, ffns = (
                    [Mask(), *_steps(study, by_unit[unit].ranking)] for unit in ("heads", "ffns")
                )
                for a in heads:
                    for b in ffns:
                        yield Ablation(a | b, GRID, name, len(a), len(b))


def _steps(study: Pruning, ranking: Ranking) -> list[Mask]:
    """The masks of a ranking at the shares asked for, each number of components once."""
    masks = nested_masks(ranking, sorted(study.fractions), quota=quota_of(study, ranking))
    return [mask for mask in dict.fromkeys(masks) if mask]
