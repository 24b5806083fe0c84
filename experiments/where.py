"""Where in a model do important components sit, and what goes when the unimportant ones go?

By layer: the mean score of a layer's components, with an interval over examples. By third: how
many of the top k sit in the first, middle and last third of depth, beside what k random components
would do. Capacity retained (Bansal et al. 2023, A.4): Σ of a score over the components still there
/ Σ over all, as a ranking removes them, beside random orders.

Layer l of L is in third ⌊3l/L⌋; in a model of two stacks each stack has its own depth. Where it
misleads: first-order scores of different layers are on one scale, of different kinds need not be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from ablate.components import Component
from experiments.jackknife import jackknife_interval, left_out
from experiments.rank_measures import top_members

THIRDS = ("first", "middle", "last")


def importance_by_layer(
    components: Sequence[Component],
    samples: Sequence[tuple[Float[np.ndarray, "example component"], Sequence[Any]]],
    *,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean importance of each layer's components of one kind, with a jackknife interval.

    Args:
        samples: importance on the examples of each task, and the text that each example comes from;
            tasks weigh the same, however many examples they have.

    Columns: stack, kind, layer, value, low, high, components.
    """
    for values, groups in samples:
        if values.shape != (len(groups), len(components)):
            raise ValueError(
                f"values of shape {values.shape} for {len(groups)} groups and {len(components)} "
                "components: give [example, component], a group an example"
            )
    places = [(c.stack, type(c).__name__, c.layer) for c in components]
    layers = sorted(set(places))
    own = [[p == layer for p in places] for layer in layers]
    means = [np.stack([values[:, o].mean(axis=1) for o in own], axis=1) for values, _ in samples]
    point = np.mean([m.mean(axis=0) for m in means], axis=0)
    without = left_out(range(len(samples)), [groups for _, groups in samples])
    count = len(without.strata)
    replicates = np.mean([without.means(i, m, 0, count) for i, m in enumerate(means)], axis=0)
    low, high = jackknife_interval(point, replicates, without.strata, level=level)
    rows = [
        (*place, *numbers, places.count(place))
        for place, *numbers in zip(layers, point, low, high, strict=True)
    ]
    names = ["stack", "kind", "layer", "value", "low", "high", "components"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def top_by_third(
    scores: Mapping[Component, float],
    layers: int | Mapping[str, int],
    *,
    share: float = 0.3,
    level: float = 0.95,
) -> pd.DataFrame:
    """How much of the top `share` of components sits in each third of depth.

    `layers` is the depth of the model (of each stack, where there are two). Components tied at the
    border share the places left. Columns: third, value (share of the top), expected, low, high
    (share under random choices: mean and central range), p (two-sided), k, components.
    """
    values = np.array(list(scores.values()))
    count = len(values)
    k = max(1, round(share * count))
    members = top_members(values, k)
    thirds = np.array([_third(c, layers) for c in scores])
    rows = []
    for number, name in enumerate(THIRDS):
        inside = int((thirds == number).sum())
        found = float(members[thirds == number].sum())
        chance = stats.hypergeom(count, inside, k)
        low, high = chance.ppf([(1 - level) / 2, (1 + level) / 2])
        # A tie across the border leaves parts of components: round towards the expectation.
        above = chance.sf(np.floor(found + 1e-9) - 1)
        below = chance.cdf(np.ceil(found - 1e-9))
        p = min(1.0, 2 * float(min(above, below)))
        rows.append((name, found / k, inside / count, low / k, high / k, p))
    names = ["third", "value", "expected", "low", "high", "p"]
    return pd.DataFrame(rows, columns=pd.Index(names)).assign(k=k, components=count)


def capacity_retained(
    score: Mapping[Component, float],
    rankings: Mapping[str, Sequence[Component]],
    generator: np.random.Generator,
    *,
    orders: int = 1000,
    level: float = 0.95,
) -> pd.DataFrame:
    """Share of the total of `score` still there as each ranking removes its components in order.

    Columns: ranking, removed, fraction, value, low, high. The ranking ``random`` has the exact
    mean, 1 − removed/N, and the central range of `orders` random orders; others have no interval
    (nan). ValueError for scores below 0, whose sum is no capacity, and for a ranking of other
    components.
    """
    values = np.array(list(score.values()), dtype=np.float64)
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or not values.sum() > 0:
        raise ValueError(
            "capacity is a share of a total: give finite scores of at least 0, not all 0 (clip "
            "scores that go below)"
        )
    steps = np.arange(len(values) + 1)
    fraction = steps / len(values)
    tables = []
    for name, ranking in rankings.items():
        if len(ranking) != len(values) or set(ranking) != set(score):
            raise ValueError(
                f"the ranking {name!r} orders {len(ranking)} components and {len(values)} have a "
                "score: both must be of the same components"
            )
        kept = _retained(np.array([score[c] for c in ranking])[None])[0]
        tables.append(_curve(name, steps, fraction, kept, np.nan, np.nan))
    drawn = _retained(generator.permuted(np.tile(values, (orders, 1)), axis=1))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    tables.append(_curve("random", steps, fraction, 1 - fraction, low, high))
    return pd.concat(tables, ignore_index=True)


def _retained(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share left after 0, 1, … N removals along each row."""
    gone = np.cumsum(ordered, axis=1) / ordered.sum(axis=1, keepdims=True)
    return 1 - np.concatenate([np.zeros((len(ordered), 1)), gone], axis=1)


def _curve(name: str, steps: Any, fraction: Any, value: Any, low: Any, high: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"ranking": name, "removed": steps, "fraction": fraction}
        | {"value": value, "low": low, "high": high}
    )


def _third(component: Component, layers: int | Mapping[str, int]) -> int:
    stack = "decoder" if component.stack == "cross" else component.stack
    depth = layers if isinstance(layers, int) else layers[stack]
    if component.layer >= depth:
        raise ValueError(f"{component} in a depth of {depth} layers: give the model's own depth")
    return 3 * component.layer // depth
