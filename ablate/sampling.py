r"""How much does each component matter on average, from exact effects on a sample of the units?

A population of U units (examples, or scenes of examples that share demonstrations) has exact
leave-one-out effects y_uc, costly, and first-order effects x_uc, cheap and known of all units. From
a simple random sample s of n of them without replacement (f = n/U), per component c,

    ȳ_s + (1 − f) · (1/n) Σ_{u∈s} b_{s∖u} (x̄_rest − x_u)

estimates the population mean, where x̄_rest is the mean of x over the units outside s and b_{s∖u} is
the least-squares slope of y on x over the sample without u. As b_{s∖u} does not know y_u, the
estimate is exactly unbiased for any y and x, small samples included (Mickey 1959, JASA 54:594–612,
with groups of one); at n = U it is the exact mean. Its variance is taken as (1 − f) Σ r_u²/n/(n−1)
with deletion residuals r_u, weighted for the distance from x̄_s to x̄_rest that the slope has to
bridge (Särndal, Swensson & Wretman 1989, Biometrika 76:527–537).

The intervals are Student's with the degrees of freedom that the variance has at the residuals'
kurtosis, 2n/(κ − 1) where that is less than n − 2 (Satterthwaite 1946), and on the side of the long
tail as wide as Hall's skewness-corrected t, if wider (Hall 1992, JRSS B 54:221–228), with the terms
that hold without replacement.

Where it misleads: an interval knows only spread that it saw. An effect that sits in one unit of
fifty and that the gradient does not announce is likely not in a sample of thirty; coverage is
nominal from about ten such units in the sample on. A component whose residuals do not vary at all
in the sample gets no interval (nan), for a sample in which all agree says nothing about the unit
that does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from ablate.components import Component
from ablate.population import Array, Effects, Population, Work, blank, measure_

if TYPE_CHECKING:
    import pandas as pd

FLAT = 1e-10
"""Variance, as a share of the largest component's, below which a residual does not vary."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Estimated means of some components, and the residuals that say how sure they are.

    Attributes:
        mean: of each component over the population.
        residuals: r_u of the sampled units that were left to chance, centred.
        share: of the population's examples or units that was left to chance.
        units: how many of those units there are.
        spent: degrees of freedom that the slope took.
    """

    mean: Float[Array, "component"]
    residuals: Float[Array, "unit component"]
    share: float
    units: int
    spent: int

    @property
    def exact(self) -> bool:
        """Was every unit measured?"""
        return len(self.residuals) == self.units


def fit(
    drawn: Population, measured: Float[Array, "sampled chosen"], columns: Int[Array, "chosen"]
) -> Fit:
    """Means of components `columns` from the effects `measured` on the first units of the order.

    `measured` holds effects per example; at least three units beyond the certain ones are needed.
    """
    n_all, total = len(measured), len(drawn)
    y = measured * drawn.weight[drawn.order[:n_all], None]
    if n_all == total:
        # In the units' own order, so that the exact mean does not depend on the draw.
        y = y[np.argsort(drawn.order)]
        return Fit(y.mean(0), y - y.mean(0), 1.0, total, 0)
    sure, y = y[: drawn.certain].sum(0) / total, y[drawn.certain :]
    n, units = len(y), total - drawn.certain
    share, level = units / total, y.mean(0)
    if drawn.gradient is None:
        return Fit(sure + share * level, y - level, share, units, 0)
    x_all = drawn.gradient[drawn.order[drawn.certain :]][:, columns]
    x, rest = x_all[:n], x_all[n:].mean(0)
    centred, gap = x - x.mean(0), rest - x.mean(0)
    square = (centred**2).sum(0)
    inverse = np.divide(1.0, square, out=np.zeros_like(square), where=square > 1e-30)
    slope = inverse * (centred * y).sum(0)
    leverage = 1 / n + centred**2 * inverse
    # Without a unit that alone has another x than the others, there is no slope.
    alone = leverage > 1 - 1e-9
    deleted = (y - level - centred * slope) / np.where(alone, 1.0, 1 - leverage)
    deleted = np.where(alone, (y - level) * n / (n - 1), deleted)
    slopes = np.where(alone, 0.0, slope - centred * inverse * deleted)
    mean = level + (1 - n / units) * (slopes * (rest - x)).mean(0)
    residuals = deleted * np.where(alone, 1.0, 1 + n * centred * inverse * gap)
    return Fit(sure + share * mean, residuals - residuals.mean(0), share, units, 1)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean squares, skewness and kurtosis of residuals, or of their differences."""

    variance: Float[Array, "..."]
    skewness: Float[Array, "..."]
    kurtosis: Float[Array, "..."]


def moments(residuals: Float[Array, "unit component"]) -> Moments:
    """Of every component's residuals."""
    return _moments(
        (residuals**2).mean(0), (residuals**3).mean(0), (residuals**4).mean(0), residuals
    )


def moments_of_differences(residuals: Float[Array, "unit component"]) -> Moments:
    """Of r_i − r_j for every pair: [i, j]. Paired, as both are measured on the same units."""
    r, n = residuals, len(residuals)
    two, three, four = ((r**power).mean(0) for power in (2, 3, 4))
    by_1, by_2, by_3 = r.T @ r / n, (r**2).T @ r / n, (r**3).T @ r / n
    square = two[:, None] + two - 2 * by_1
    cube = three[:, None] - 3 * by_2 + 3 * by_2.T - three
    fourth = four[:, None] + four - 4 * by_3 - 4 * by_3.T + 6 * (r**2).T @ (r**2) / n
    return _moments(square, cube, fourth, residuals)


def _moments(square: Array, cube: Array, fourth: Array, residuals: Array) -> Moments:
    largest = (residuals**2).mean(0).max()
    varies = square > FLAT * largest
    spread = np.sqrt(np.where(varies, square, 1.0))
    # What does not vary has no variance to speak of, rather than none.
    return Moments(np.where(varies, square, np.nan), cube / spread**3, fourth / spread**4)


def limits(
    mean: Float[Array, "..."], of: Moments, sample: Fit, alpha: float
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """(standard error, low, high) of `mean`: each limit is passed with probability `alpha`.

    The standard error is 0 and both limits are the mean where every unit was measured; all are nan
    where the residuals do not vary.
    """
    if sample.exact:
        return np.zeros_like(mean), mean, mean
    n = len(sample.residuals)
    f = n / sample.units
    stderr = sample.share * np.sqrt((1 - f) * of.variance / (n - 1))
    freedom = np.clip(2 * n / np.maximum(of.kurtosis - 1, 1e-9), 2.0, n - 1 - sample.spent)
    t = -special.stdtrit(freedom, alpha)
    below, above = (np.maximum(t, tail) for tail in _hall(t, of.skewness, n, f))
    return stderr, mean - below * stderr, mean + above * stderr


def _hall(t: Array, skewness: Array, n: int, f: float) -> tuple[Array, Array]:
    """(below, above) the estimate, in standard errors: Hall's cubic transformation, inverted.

    T = (ȳ − μ)/s has, to order 1/√n, E T = −γ√(1−f)/2√n and third cumulant −γ(2−f)/√(n(1−f)).
    """
    root = 6 * np.sqrt(n * (1 - f))
    a, b = (2 - f) * skewness / root, (1 - 2 * f) * skewness / root
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    return (np.cbrt(1 + 3 * a * (t - b)) - 1) / a, -(np.cbrt(1 + 3 * a * (-t - b)) - 1) / a


@dataclass(frozen=True, eq=False)
class Estimates:
    """Mean effects of all components, each estimated from a sample of the units.

    Attributes:
        components: the rows of everything else.
        value, stderr, low, high: the estimate, its standard error and its interval; nan where the
            sample shows no spread.
        units: how many units were measured for each component, of `units_in_all`.
        level: of the intervals; of each alone from `sample_effects`, of all together from a race.
        work: what was measured.
        effects: the exact effects, nan where not measured: [unit, component].
    """

    components: tuple[Component, ...]
    value: Float[Array, "component"]
    stderr: Float[Array, "component"]
    low: Float[Array, "component"]
    high: Float[Array, "component"]
    units: Int[Array, "component"]
    units_in_all: int
    level: float
    work: Work
    effects: Float[Array, "unit component"]

    def frame(self) -> pd.DataFrame:
        """Tidy rows: component, kind, stack, layer, metric, value, stderr, low, high, units."""
        import pandas as pd

        return pd.DataFrame(
            {
                "component": [str(c) for c in self.components],
                "kind": [type(c).__name__ for c in self.components],
                "stack": [c.stack for c in self.components],
                "layer": [c.layer for c in self.components],
                "metric": "effect",
                "value": self.value,
                "stderr": self.stderr,
                "low": self.low,
                "high": self.high,
                "units": self.units,
            }
        )


def sample_effects(
    drawn: Population,
    effects: Effects,
    sample: int,
    *,
    level: float = 0.95,
    known: Float[Array, "unit component"] | None = None,
) -> Estimates:
    """Mean effects of every component from exact effects on `sample` units, the certain ones too.

    `known` holds effects of an earlier call (nan where not measured); they are not asked for again.
    Raises ValueError for a sample that is larger than the population or too small to tell a spread.
    """
    least = min(len(drawn), drawn.certain + 4)
    if not least <= sample <= len(drawn):
        raise ValueError(
            f"a sample of {sample} units asked for: there are {len(drawn)}, and {least} at least "
            "are needed for an interval"
        )
    table = blank(drawn) if known is None else known.copy()
    columns = np.arange(len(drawn.components))
    measured = measure_(table, drawn, effects, sample, columns)
    found = fit(drawn, measured, columns)
    stderr, low, high = limits(found.mean, moments(found.residuals), found, (1 - level) / 2)
    return Estimates(
        drawn.components,
        found.mean,
        stderr,
        low,
        high,
        np.full(len(columns), sample),
        len(drawn),
        level,
        drawn.work(table),
        table,
    )
