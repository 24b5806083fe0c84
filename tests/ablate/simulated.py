"""Populations of effects with a known truth, for the tests of sampling and racing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ablate import Head
from ablate.components import Component
from ablate.population import Effects

Made = tuple[np.ndarray, np.ndarray | None]


def heads(count: int) -> tuple[Head, ...]:
    """As many components."""
    return tuple(Head(0, i) for i in range(count))


def looked_up(y: np.ndarray, calls: list[int] | None = None) -> Effects:
    """Exact effects from a table [unit, component]; `calls` gets the number of each request."""

    def effects(units: np.ndarray, chosen: tuple[Component, ...]) -> np.ndarray:
        if calls is not None:
            calls.append(len(units) * len(chosen))
        return y[np.ix_(units, [head.head for head in chosen])]

    return effects


def _normal(rng: np.random.Generator, units: int, count: int) -> Made:
    x = rng.normal(size=(units, count))
    return x + 0.5 * rng.normal(size=x.shape), x


def _skewed(rng: np.random.Generator, units: int, count: int) -> Made:
    x = rng.exponential(size=(units, count))
    return 0.8 * x + rng.exponential(size=x.shape), x


def _long_tail(rng: np.random.Generator, units: int, count: int) -> Made:
    x = rng.normal(size=(units, count))
    return x + np.exp(rng.normal(size=x.shape)), x


def _heavy(rng: np.random.Generator, units: int, count: int) -> Made:
    x = rng.standard_t(3, size=(units, count))
    return x + rng.standard_t(3, size=x.shape), x


def _sparse(rng: np.random.Generator, units: int, count: int) -> Made:
    """One unit in ten has an effect, and the gradient is noise."""
    hit = rng.random((units, count)) < 0.1
    return hit * rng.exponential(size=hit.shape), rng.normal(size=hit.shape)


def _sparse_alone(rng: np.random.Generator, units: int, count: int) -> Made:
    return _sparse(rng, units, count)[0], None


POPULATIONS: dict[str, Callable[[np.random.Generator, int, int], Made]] = {
    "normal": _normal,
    "skewed": _skewed,
    "long tail": _long_tail,
    "heavy tails": _heavy,
    "sparse": _sparse,
    "sparse, no gradient": _sparse_alone,
}
"""name -> (generator, units, components) -> (exact effects, first-order effects)"""
