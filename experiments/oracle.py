"""What does removing each component cost, how surely, and which costs cannot be told apart?

    effect(c) = mean over examples of (score without c − score whole), paired by example

for accuracy, loss or any other score of an example (Bansal et al. 2023, eq. 7, with its sign
turned). Standard errors and tests take the text that examples share as the unit; p-values are
Holm's over all components asked about. Equal effects share their rank: with few examples most
components tie, and an order among them would be the order of the layers. Where it misleads:
each component goes alone, and the examples that chose a component must not report on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from experiments.statistics import holm, mean_and_stderr, sign_flip_tests

ROUNDING = 12
"""Decimals in which effects are compared: sums in another order are no other effects."""


def effect_table(
    components: Sequence[object],
    effects: Float[np.ndarray, "example component"],
    groups: Sequence[Any],
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int | None = None,
) -> pd.DataFrame:
    """Mean effect of every component, its standard error and interval, and whether it is 0.

    Args:
        effects: score without the component − score whole, of each example.
        groups: the text that an example comes from; [example].
        resamples: sign patterns where they cannot all be tried; by default 40 a component and at
            least 10,000, so that Holm's correction can call one.

    Columns: component, value, stderr, low, high (Student's t over groups), p, p_holm, rank (1 the
    lowest effect; equal effects share the mean), tied (components with the same effect, itself
    included), groups.
    """
    values = np.asarray(effects, dtype=np.float64)
    if values.ndim != 2 or values.shape != (len(groups), len(components)) or not values.size:
        raise ValueError(
            f"effects of shape {values.shape} for {len(groups)} groups and {len(components)} "
            "components: give [example, component], a group an example"
        )
    if not np.isfinite(values).all():
        bad = components[int(np.argwhere(~np.isfinite(values))[0][1])]
        raise ValueError(f"an effect of {bad} is not finite: check the losses")
    labels, index = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    sums = np.zeros((len(labels), len(components)))
    np.add.at(sums, index, values)
    # Texts are the independent units: a whole text's sum may swap its sign, no single example.
    p = sign_flip_tests(sums, generator, resamples=resamples or max(10_000, 40 * len(components)))
    estimates = [mean_and_stderr(column, clusters=index) for column in values.T]
    mean = np.array([e.mean for e in estimates])
    stderr = np.array([e.stderr for e in estimates])
    half = stderr * stats.t.ppf(0.5 + level / 2, max(len(labels) - 1, 1))
    rounded = np.round(mean, ROUNDING)
    _, group, sizes = np.unique(rounded, return_inverse=True, return_counts=True)
    return pd.DataFrame(
        {
            "component": [str(c) for c in components],
            "value": mean,
            "stderr": stderr,
            "low": mean - half,
            "high": mean + half,
            "p": p,
            "p_holm": holm(p),
            "rank": stats.rankdata(rounded),
            "tied": sizes[group],
            "groups": len(labels),
        }
    )
