"""When a sweep over all examples is too much: exact effects of some, first-order effects of all.

Rows of readings become the units of a `Population`: gradient importance says of every row what each
component does to first order, and an exact sweep measures only the rows and components that are
asked for, when they are asked for.

    drawn, effects = drawn_from(model, readings, torch.Generator().manual_seed(0))
    sample_effects(drawn, effects, 100).frame()          # estimates with intervals
    race(drawn, effects, "bottom", 12, error=0.01)       # the least important dozen

Work is counted in branches (attentions, FFNs, mixers) that a row is run through, as `sweep` runs
them: a component costs the branches behind it, the whole model all of them, a gradient twice all.
Embeddings, vocabulary and overhead are left out.

Where it misleads: a small model with few components is swept so fast that a gradient of all rows is
a good part of the price (a seventh, with four layers of six heads). `gradient=False` does without;
so few rows then decide less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from ablate.components import Component
from ablate.effects import leave_one_out
from ablate.importance import answer_importance
from ablate.masks import Mask
from ablate.population import CERTAIN, Array, Costs, Effects, Population, population
from ablate.sweep import Reading

if TYPE_CHECKING:
    from ablate.fills import Fill
    from ablate.hooked import HookedModel


def drawn_from(
    model: HookedModel,
    readings: Iterable[Reading],
    generator: torch.Generator,
    *,
    components: Sequence[Component] | None = None,
    units: Sequence[int] | None = None,
    gradient: bool = True,
    certain: int = CERTAIN,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> tuple[Population, Effects]:
    """The rows of `readings` as a population, and what measures exact effects on them.

    Args:
        model: wrapped, in eval mode.
        readings: their rows are the examples; all are kept.
        generator: of the draw.
        components: whose effects; None for all.
        units: a label of every row, in order; rows with one label (a scene) are drawn together.
            None: every row for itself. Units are numbered in the order of their labels.
        gradient: whether first-order effects of all rows are taken as control variates.
        certain: units measured for certain, at most.
        fill: what stands in for a removed component; the same for any rows.
        memory: bytes beyond the model; None for half of what is free.

    Raises ValueError for labels that do not fit, and what `leave_one_out` and `answer_importance`
    raise.
    """
    readings = list(readings)
    chosen = tuple(model.components if components is None else components)
    sizes_of = [reading.batch for reading in readings]
    reading_of = np.repeat(np.arange(len(readings)), sizes_of)
    row_of = np.concatenate([np.arange(size) for size in sizes_of] or [np.arange(0)])
    labels = np.arange(len(row_of)) if units is None else np.asarray(units)
    if labels.shape != row_of.shape:
        raise ValueError(f"{labels.size} labels of units for {len(row_of)} rows: label each row")
    names, unit_of = np.unique(labels, return_inverse=True)
    sizes = np.bincount(unit_of)

    def effects(wanted: Int[Array, "unit"], of: tuple[Component, ...]) -> Array:
        picked = np.flatnonzero(np.isin(unit_of, wanted))
        parts = [
            _rows(readings[i], row_of[picked[reading_of[picked] == i]].tolist())
            for i in np.unique(reading_of[picked])
        ]
        swept = leave_one_out(model, parts, components=of, fill=fill, memory=memory)
        return _means(swept.effects.double().numpy(), unit_of[picked])[wanted]

    first_order = None
    if gradient:
        importance = answer_importance(model, readings, memory=memory)
        column = {component: i for i, component in enumerate(importance.components)}
        # One gate for all heads of a group: its derivative is the sum of theirs.
        mine = [[column[c] for c in model.expand(Mask([component]))] for component in chosen]
        gate = importance.gate.double().numpy()
        first_order = _means(-np.stack([gate[:, m].sum(1) for m in mine], 1), unit_of)
    drawn = population(
        chosen,
        len(names),
        generator,
        gradient=first_order,
        sizes=sizes.tolist(),
        costs=sweep_costs(model, chosen),
        certain=certain,
    )
    return drawn, effects


def sweep_costs(model: HookedModel, components: Sequence[Component]) -> Costs:
    """What `sweep` runs, in branches of the model: those that come after a component."""
    place = {c: i for i, site in enumerate(model.sites) for c in site.components}
    behind = [
        len(model.sites) - 1 - min(place[c] for c in model.expand(Mask([component])))
        for component in components
    ]
    count = float(len(model.sites))
    return Costs(tuple(map(float, behind)), whole=count, gradient=2 * count)


def _rows(reading: Reading, rows: list[int]) -> Reading:
    """The reading of these rows only, which ascend."""
    kept = torch.tensor(rows)
    number = torch.full((reading.batch,), -1)
    number[kept] = torch.arange(len(rows))
    row = number[reading.positions[:, 0].cpu()]
    return Reading(
        reading.inputs_of(kept),
        torch.stack([row, reading.positions[:, 1].cpu()], 1)[row >= 0],
        reading.targets[(row >= 0).to(reading.targets.device)],
    )


def _means(
    values: Float[Array, "row component"], unit_of: Int[Array, "row"]
) -> Float[Array, "unit component"]:
    """Mean over the rows of each unit; nan for units without rows here."""
    count = np.bincount(unit_of)
    sums = np.zeros((len(count), values.shape[1]))
    np.add.at(sums, unit_of, values)
    return sums / np.where(count, count, np.nan)[:, None]
