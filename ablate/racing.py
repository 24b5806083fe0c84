r"""Which components are the least important, decided without measuring every effect?

A race measures all components on a growing random sample of the units and drops each component as
soon as its verdict is certain enough (Maron & Moore 1993, "Hoeffding races"):

    bottom    is it one of the k components with the smallest mean effect?
    top       ... of the k largest?
    sign      is its mean effect above or below 0?

i < j is *certain* at a look if the interval of the paired difference (same units, first-order
effects as control variates; `ablate.sampling`) lies below 0. With R components left of which k′ are
still wanted, i is in when R − k′ of them are certainly larger, and out when k′ are certainly
smaller. Such a verdict can only be wrong if some pair (truly in, truly out) was ordered the wrong
way round at some look. With look weights w_l ∝ √n_l that sum to 1, each limit at look l is passed
with probability at most

    δ w_l / (2 k′ (R − k′))        bottom, top          δ w_l / (2 R)        sign

so with *all* pairs still in the race, the union bound over pairs and looks gives δ/2. The other
half pays for spending the level of dropped pairs on those that are left: a pair far enough apart
to pass even the largest level that a look can have, δ w_l/2, with less than its share δ w_l/(2 k
(N − k)) adds up with all others like it to δ/2 over the looks; the rest are so close together that
their components stay, and share δ w_l/2 by the union bound. This is an argument for differences
near Gaussian, not a proof: that close components stay is likely, not sure. The tests measure error
rates on normal, skewed, heavy-tailed and sparse effects.
Looks are few because every look costs: sizes grow by a factor.

At the last look every unit has been measured and means are exact. Those that differ at the
boundary (or from 0) by no more than `tie`, or by rounding, are `tied`, and are not told apart. With
`tie` the race also ends as soon as all differences that are left are certainly smaller than that.

Where it misleads: the certainty is about the mean over *these* units. It rests on spread that was
seen: see `ablate.sampling` on effects that sit in few units. Estimates of dropped components were
taken when they crossed a line, so they are a little too far from it. Their intervals are meant to
hold at all looks together, and are somewhat too narrow for that: with `error` 0.01, on the 24 heads
of the bundled model, 0 to 5 % of the races over one set of 400 to 2,500 examples had one that
missed. Of 4,800 races over sets on which nothing here was chosen, none had a wrong verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float

from ablate.components import Component
from ablate.population import Array, Effects, Population, blank, measure_
from ablate.sampling import Estimates, Fit, fit, limits, moments, moments_of_differences

if TYPE_CHECKING:
    import pandas as pd

Decision = Literal["bottom", "top", "sign"]
Verdict = Literal["in", "out", "above", "below", "tied", "open"]

FIRST = 32
"""Units of the first look, beyond the certain ones: what a tail must show itself in."""
GROWTH = 1.3
"""From look to look; fewer looks waste effects, more waste error probability."""
ROUNDING = 1e-9
"""Differences of exact means below this share of the largest effect are rounding."""


@dataclass(frozen=True)
class Look:
    """What one look decided.

    Attributes:
        units: measured by then, for every component still in the race.
        racing: components in the race before it.
        decided: of these, how many got a verdict.
    """

    units: int
    racing: int
    decided: int


@dataclass(frozen=True, eq=False)
class Race:
    """Where a race stands after a look.

    Attributes:
        decision, k, error: what was asked: which verdict, of how many, at what risk in all.
        verdicts: of each component; "open" while it is in the race.
        estimates: mean effects, each as of the last look that its component was in; the intervals
            are for all components and looks together, at 1 − error.
        looks: taken so far.
    """

    decision: Decision
    k: int
    error: float
    verdicts: tuple[Verdict, ...]
    estimates: Estimates
    looks: tuple[Look, ...]

    @property
    def finished(self) -> bool:
        """Has every component its verdict, if only that it is tied?"""
        return "open" not in self.verdicts

    def those(self, *verdicts: Verdict) -> tuple[Component, ...]:
        """Components with one of these verdicts, in the model's order."""
        found = zip(self.estimates.components, self.verdicts, strict=True)
        return tuple(component for component, verdict in found if verdict in verdicts)

    def frame(self) -> pd.DataFrame:
        """The estimates' rows, with a column verdict."""
        return self.estimates.frame().assign(verdict=self.verdicts)


def race(
    drawn: Population,
    effects: Effects,
    decision: Decision,
    k: int = 0,
    *,
    error: float = 0.01,
    tie: float = 0.0,
    known: Float[Array, "unit component"] | None = None,
) -> Race:
    """The last of `looks`."""
    *_, last = looks(drawn, effects, decision, k, error=error, tie=tie, known=known)
    return last


def looks(
    drawn: Population,
    effects: Effects,
    decision: Decision,
    k: int = 0,
    *,
    error: float = 0.01,
    tie: float = 0.0,
    known: Float[Array, "unit component"] | None = None,
) -> Iterator[Race]:
    """Race until every component has a verdict: where it stands, after each look.

    Args:
        drawn: the units, drawn; a race goes on where it was if they are drawn the same way.
        effects: measures exact effects.
        decision: what is asked of each component.
        k: how many components are to be in; none for "sign".
        error: probability that any verdict is wrong. Not kept where a component matters a lot on a
            few units only and the gradient does not announce them: with effects of +1 on 3 to 10 %
            of units and −0.02 elsewhere, a third to nearly all races by sign went wrong. Check the
            largest first-order effects, or sweep everything.
        tie: stop when all differences left are certainly smaller, in the effects' unit.
        known: effects of an earlier race (nan where not measured); not asked for again.

    Raises ValueError for a k, error or tie out of range.
    """
    count = len(drawn.components)
    if (decision == "sign") != (k == 0) or not 0 <= k < count:
        raise ValueError(
            f"{decision} {k} of {count} components asked for: give k from 1 to {count - 1} for "
            "bottom and top, and none for sign"
        )
    if not 0 < error < 0.5 or tie < 0:
        raise ValueError(f"error {error}, tie {tie} asked for: give 0 < error < 0.5 and tie ≥ 0")
    sizes = _schedule(len(drawn) - drawn.certain)
    roots = np.sqrt(sizes[:-1])
    risks = [*(error * roots / roots.sum()), 0.0]
    table = blank(drawn) if known is None else known.copy()
    verdicts: list[Verdict] = ["open"] * count
    numbers = np.full((4, count), np.nan)
    units = np.zeros(count, dtype=int)
    taken: tuple[Look, ...] = ()
    for size, risk in zip(sizes, risks, strict=True):
        left = np.flatnonzero([verdict == "open" for verdict in verdicts])
        total = drawn.certain + size
        sample = fit(drawn, measure_(table, drawn, effects, total, left), left)
        alone = limits(sample.mean, moments(sample.residuals), sample, risk / (2 * count))
        numbers[:, left] = np.stack([sample.mean, *alone])
        units[left] = total
        margin = max(tie, ROUNDING * np.nanmax(np.abs(table))) if sample.exact else 0.0
        if decision == "sign":
            given = _signs(sample, risk, margin, tie)
        else:
            wanted = k - sum(verdict == "in" for verdict in verdicts)
            given = _ends(sample, decision, wanted, risk, margin, tie)
        for component, verdict in zip(left, given, strict=True):
            verdicts[component] = verdict
        taken = (*taken, Look(total, len(left), sum(verdict != "open" for verdict in given)))
        value, stderr, low, high = numbers.copy()
        estimates = Estimates(
            drawn.components,
            value,
            stderr,
            low,
            high,
            units.copy(),
            len(drawn),
            1 - error,
            drawn.work(table),
            table.copy(),
        )
        yield Race(decision, k, error, tuple(verdicts), estimates, taken)
        if "open" not in verdicts:
            return


def _schedule(units: int) -> list[int]:
    """Sizes of the sample at each look; the last is everything.

    No look leaves fewer units out than the first takes in: what is uncertain is their mean, and
    the tails of few units are no better known than those of few measured ones.
    """
    sizes, size = [], float(FIRST)
    while size <= units - FIRST:
        sizes.append(int(size))
        size *= GROWTH
    return [*sizes, units]


def _signs(sample: Fit, risk: float, margin: float, tie: float) -> list[Verdict]:
    """Above or below 0, for each component still in the race."""
    spread = moments(sample.residuals)
    _, low, high = limits(sample.mean, spread, sample, risk / (2 * len(sample.mean)))
    small = (low >= -tie) & (high <= tie)
    return [
        "above" if above else "below" if below else "tied" if tied or sample.exact else "open"
        for above, below, tied in zip(low > margin, high < -margin, small & (tie > 0), strict=True)
    ]


def _ends(
    sample: Fit,
    decision: Literal["bottom", "top"],
    wanted: int,
    risk: float,
    margin: float,
    tie: float,
) -> list[Verdict]:
    """In or out, for each component still in the race, of which `wanted` are to be in."""
    count = len(sample.mean)
    difference = sample.mean[:, None] - sample.mean
    alpha = risk / (2 * wanted * (count - wanted))
    _, low, high = limits(difference, moments_of_differences(sample.residuals), sample, alpha)
    before, after = high < -margin, low > margin
    if decision == "top":
        before, after = after, before
    inside, outside = _settled(before, after, wanted)
    left = ~(inside | outside)
    pairs = np.ix_(left, left)
    apart = ~np.eye(left.sum(), dtype=bool)
    small = tie > 0 and ((low[pairs] >= -tie) & (high[pairs] <= tie))[apart].all()
    rest: Verdict = "tied" if sample.exact or small else "open"
    return ["in" if i else "out" if o else rest for i, o in zip(inside, outside, strict=True)]


def _settled(
    before: Bool[Array, "component component"],
    after: Bool[Array, "component component"],
    wanted: int,
) -> tuple[Bool[Array, "component"], Bool[Array, "component"]]:
    """(in, out) from which components certainly come before, or after, which others."""
    inside = np.zeros(len(before), dtype=bool)
    outside = inside.copy()
    while True:
        left = ~(inside | outside)
        places = wanted - inside.sum()
        enter = left & ((before & left).sum(1) >= left.sum() - places)
        leave = left & ~enter & ((after & left).sum(1) >= places)
        if not (enter | leave).any():
            return inside, outside
        # One kind at a time: who leaves is counted anew once the places have been taken.
        inside, outside = (inside | enter, outside) if enter.any() else (inside, outside | leave)
