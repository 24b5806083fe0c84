"""Which units are measured, in what order, and what has that cost?

A unit is an example, or a scene of examples that share demonstrations; its effects are means over
its examples, and count by their number. Units are measured in a random order without replacement,
so that any first n of them are a simple random sample, and a later look extends an earlier one.

Units at which some first-order effect is extreme (over four standard deviations) are not left to
chance: they come first, and the sample is of the others (a certainty stratum; Cochran 1977, §5.13).
Only the gradient decides which they are, so nothing is biased. Without it, five examples of 400
that carry half of a head's effect are in one sample and missing from the next.

Where it misleads: work is counted in the currency of `Costs`. Forwards, the default, suit a plain
loop; a sweep that runs only the blocks above a component makes its effects cheaper than that, and
the gradient does not become cheaper with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from ablate.components import Component

EXTREME = 4.0
"""Standard deviations of a first-order effect beyond which a unit is measured for certain."""
CERTAIN = 24
"""Units measured for certain, at most."""

Array = np.ndarray
Effects = Callable[[Int[Array, "unit"], tuple[Component, ...]], ArrayLike]
"""(units, components) -> exact effects [unit, component]: the mean over each unit's examples."""


@dataclass(frozen=True)
class Costs:
    """What an example costs, in any one currency; by default in forwards of a plain loop.

    Attributes:
        effect: of each component's exact effect, in the order of the components; empty: 1 each.
        whole: of the unmasked forward, wherever any effect is measured.
        gradient: of all first-order effects; a forward and a backward to frozen weights are 2.
    """

    effect: tuple[float, ...] = ()
    whole: float = 1.0
    gradient: float = 2.0


@dataclass(frozen=True)
class Work:
    """What was measured, and what measuring everything would have taken.

    Attributes:
        effects: unit × component effects measured, of `effects_in_all`.
        spent: their cost, with the unmasked forwards and the gradient.
        full: the cost of every effect and every unmasked forward, without a gradient.
    """

    effects: int
    effects_in_all: int
    spent: float
    full: float

    @property
    def saved(self) -> float:
        """1 − spent/full: below 0 where the gradient cost more than it spared."""
        return 1 - self.spent / self.full


@dataclass(frozen=True, eq=False)
class Population:
    """The units of a study: how large, in what order to be measured, and what is known of all.

    Attributes:
        components: the columns.
        order: every unit once; the first `certain` for sure, the others at random.
        certain: how many units are measured whatever the draw.
        weight: of each unit, its share of the examples times U; 1 where all are of one size.
        gradient: first-order effects of every unit, as the exact ones; None without.
        costs: of an example.
    """

    components: tuple[Component, ...]
    order: Int[Array, "unit"]
    certain: int
    weight: Float[Array, "unit"]
    gradient: Float[Array, "unit component"] | None
    costs: Costs

    def __len__(self) -> int:
        return len(self.order)

    def work(self, known: Float[Array, "unit component"]) -> Work:
        """The work behind the effects of `known` that are not nan."""
        done = ~np.isnan(known)
        each = np.asarray(self.costs.effect or (1.0,) * len(self.components))
        spent = self.weight @ (done @ each + self.costs.whole * done.any(1))
        if self.gradient is not None:
            spent += self.costs.gradient * self.weight.sum()
        full = self.weight.sum() * (each.sum() + self.costs.whole)
        return Work(int(done.sum()), done.size, float(spent), float(full))


def population(
    components: Sequence[Component],
    units: int,
    generator: torch.Generator,
    *,
    gradient: ArrayLike | None = None,
    sizes: Sequence[int] | None = None,
    costs: Costs | None = None,
    certain: int = CERTAIN,
) -> Population:
    """Draw the order in which `units` units are measured.

    Args:
        components: whose effects are asked for.
        units: how many units there are.
        generator: of the draw.
        gradient: [unit, component] first-order effects, of either sign; None does without.
        sizes: examples of each unit; means are then over examples. None: all of one size.
        costs: what an example costs; None counts forwards of a plain loop.
        certain: at most this many units (and a tenth of them all) are measured for certain.

    Raises ValueError for a gradient, sizes or costs that do not fit, and for no units.
    """
    components, costs = tuple(components), costs or Costs()
    if not components or units < 1:
        raise ValueError(
            f"effects of {len(components)} components on {units} units asked for: "
            "give at least one of each"
        )
    if costs.effect and len(costs.effect) != len(components):
        raise ValueError(f"{len(costs.effect)} costs for {len(components)} components: give each")
    if sizes is not None and (len(sizes) != units or min(sizes) < 1):
        raise ValueError(f"{len(sizes)} sizes for {units} units: give each, at least 1")
    weight = np.ones(units) if sizes is None else np.asarray(sizes) * units / np.sum(sizes)
    x, extreme = None, np.arange(0)
    if gradient is not None:
        x = np.asarray(gradient, dtype=float)
        if x.shape != (units, len(components)) or not np.isfinite(x).all():
            raise ValueError(
                f"a gradient of shape {list(x.shape)} for {units} units and {len(components)} "
                "components: give a finite first-order effect for each"
            )
        x = x * weight[:, None]
        spread = np.where(x.std(0) > 0, x.std(0), 1.0)
        distance = (np.abs(x - x.mean(0)) / spread).max(1)
        furthest = np.argsort(-distance, kind="stable")[: min(certain, units // 10)]
        extreme = furthest[distance[furthest] > EXTREME]
    shuffled = torch.randperm(units, generator=generator).numpy()
    order = np.concatenate([extreme, shuffled[~np.isin(shuffled, extreme)]])
    return Population(components, order, len(extreme), weight, x, costs)


def blank(drawn: Population) -> Float[Array, "unit component"]:
    """A table of effects in which nothing is known."""
    return np.full((len(drawn), len(drawn.components)), np.nan)


def measure_(
    table: Float[Array, "unit component"],
    drawn: Population,
    effects: Effects,
    count: int,
    columns: Int[Array, "chosen"],
) -> Float[Array, "sampled chosen"]:
    """Exact effects of `columns` on the first `count` units; what `table` lacks is asked for.

    Raises ValueError for effects of another shape, or not finite (with the unit and component).
    """
    units = drawn.order[:count]
    missing = np.isnan(table[np.ix_(units, columns)])
    rows, lacking = units[missing.any(1)], columns[missing.any(0)]
    if len(rows):
        chosen = tuple(drawn.components[c] for c in lacking)
        found = np.asarray(effects(rows, chosen), dtype=float)
        if found.shape != (len(rows), len(lacking)):
            raise ValueError(
                f"effects of shape {list(found.shape)} for {len(rows)} units and {len(lacking)} "
                "components: give one for each"
            )
        bad = np.argwhere(~np.isfinite(found))
        if len(bad):
            unit, component = bad[0]
            raise ValueError(
                f"the effect of {chosen[component]} on unit {rows[unit]} is "
                f"{found[unit, component]}: check the weights and the dtype (float16 overflows)"
            )
        table[np.ix_(rows, lacking)] = found
    return table[np.ix_(units, columns)]
