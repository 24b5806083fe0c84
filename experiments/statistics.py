"""How sure is a number: standard errors, intervals, paired tests, many tests, spread over seeds.

Everything takes plain arrays and, where chance is involved, a numpy Generator. Intervals are
two-sided at `level`. A quantity that one observation cannot give (a spread of one) is nan.

Sources: Wilson 1927 (proportions); Efron 1987 (BCa bootstrap); Fisher 1935 and Phipson & Smyth 2010
(permutation tests, and why a sampled p-value is never 0); Holm 1979 (many tests); Liang & Zeger
1986 (clusters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

EXACT_LIMIT = 2**16
"""Sign patterns that a permutation test goes through one by one; beyond, it samples."""


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference a − b over pairs, its standard error and its interval."""

    mean: float
    stderr: float
    low: float
    high: float


def mean_and_stderr(values: ArrayLike, clusters: ArrayLike | None = None) -> Estimate:
    """Mean x̄ and its standard error s/√n, s² with n − 1; nan for a single value.

    With `clusters` (one label a value: the document, the seed), values of one cluster may depend
    on each other: √(G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))²) / n over G clusters. With one value a
    cluster both are equal. ValueError on no values.
    """
    x = _vector(values)
    mean = float(x.mean())
    if clusters is None:
        return Estimate(mean, float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan)
    labels, index = np.unique(np.asarray(clusters), return_inverse=True)
    _same_length(x, index, "values", "clusters")
    if labels.size < 2:
        return Estimate(mean, math.nan)
    sums = np.bincount(index, weights=x - mean)
    scale = labels.size / (labels.size - 1)
    return Estimate(mean, float(math.sqrt(scale * (sums**2).sum()) / x.size))


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: within [0, 1], and not a point at 0 or n."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: give 0 ≤ successes ≤ n with n ≥ 1")
    z = stats.norm.ppf(0.5 + level / 2)
    p, z2n = successes / n, z * z / n
    centre = (p + z2n / 2) / (1 + z2n)
    half = z / (1 + z2n) * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return Interval(
        0.0 if successes == 0 else float(centre - half),
        1.0 if successes == n else float(centre + half),
    )


def bootstrap_interval(
    values: ArrayLike,
    generator: np.random.Generator,
    *,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    resamples: int = 2000,
    method: Literal["BCa", "percentile"] = "BCa",
) -> Interval:
    """Bootstrap interval of `statistic(values, axis=-1)` over resampled values.

    BCa corrects bias and skew and needs ≥ 2 values; where it is undefined (all values equal: there
    is no acceleration) the interval is the point itself.
    """
    x = _vector(values)
    if x.size < 2:
        return Interval(math.nan, math.nan)
    if np.ptp(x) == 0:
        point = float(statistic(x, axis=-1))
        return Interval(point, point)
    result = stats.bootstrap(
        (x,),
        statistic,
        n_resamples=resamples,
        confidence_level=level,
        method=method,
        vectorized=True,
        rng=generator,
        batch=max(1, 10_000_000 // x.size),
    )
    return Interval(*(float(end) for end in result.confidence_interval))


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Difference:
    """Mean of a − b over pairs (the same examples scored twice), with Student's t interval."""
    d = _pairs(a, b)
    mean, stderr = mean_and_stderr(d)
    half = stderr * float(stats.t.ppf(0.5 + level / 2, d.size - 1)) if d.size > 1 else math.nan
    return Difference(mean, stderr, mean - half, mean + half)


def paired_permutation_test(
    a: ArrayLike, b: ArrayLike, generator: np.random.Generator, *, resamples: int = 10_000
) -> float:
    """Two-sided p-value of "a and b are exchangeable within pairs", on |Σ(a − b)|.

    Under the null each difference's sign is a fair coin. Exact when all differences that are not 0
    have one size (right/wrong scores: the exact McNemar test) or 2^m sign patterns are at most
    EXACT_LIMIT; otherwise (1 + as extreme) / (1 + resamples) over sampled patterns.
    """
    d = _pairs(a, b)
    d = d[d != 0]  # the sign of 0 decides nothing
    return float(sign_flip_tests(d[:, None], generator, resamples=resamples)[0])


def sign_flip_tests(
    differences: NDArray[np.float64], generator: np.random.Generator, *, resamples: int = 10_000
) -> NDArray[np.float64]:
    """`paired_permutation_test` of every column of differences [pair, test] against 0.

    Columns that must be sampled share their sign patterns: each p-value is right on its own, and
    Holm's correction asks no more. With m tests, fewer than m/α resamples can call none.
    """
    p = np.ones(differences.shape[1])
    sampled = []
    for column, values in enumerate(differences.T):
        d = values[values != 0]
        if d.size == 0:
            continue
        size = np.abs(d)
        if np.ptp(size) <= 1e-12 * size[0]:
            p[column] = stats.binomtest(int((d > 0).sum()), d.size).pvalue
        elif 2**d.size <= EXACT_LIMIT:
            patterns = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
            sums = np.abs((1 - 2 * patterns) @ size)
            p[column] = (sums >= abs(d.sum()) * (1 - 1e-12)).mean()
        else:
            sampled.append(column)
    if sampled:
        table = differences[:, sampled]
        # Ties must not be lost to the order of summation.
        observed = np.abs(table.sum(axis=0)) * (1 - 1e-12)
        extreme = np.zeros(len(sampled), dtype=np.int64)
        chunk = max(1, 4_000_000 // max(table.shape))
        for start in range(0, resamples, chunk):
            rows = min(chunk, resamples - start)
            signs = 1 - 2.0 * generator.integers(0, 2, (rows, len(table)))
            extreme += (np.abs(signs @ table) >= observed).sum(axis=0)
        p[sampled] = (1 + extreme) / (1 + resamples)
    return p


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values, in the order given: all tests with a value ≤ α may be called.

    p̃_(k) = max_{j ≤ k} min(1, (m − j + 1) · p_(j)) over the sorted p-values; the chance of even
    one false call is at most α, whatever the dependence.
    """
    p = _vector(p_values)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


def band_over_seeds(
    frame: pd.DataFrame,
    by: Sequence[str],
    *,
    value: str = "value",
    seed: str = "seed",
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean over seeds and its spread, for each combination of the columns `by`.

    Rows of one seed are averaged first: seeds are the independent observations, however many
    examples each has. Columns: `by`, mean, stderr, low, high (Student's t over seeds), smallest,
    largest, seeds.
    """
    per_seed = frame.groupby([*by, seed], observed=True, sort=True)[value].mean()
    groups = per_seed.groupby(level=list(by), observed=True, sort=True)
    table = groups.agg(["mean", "sem", "min", "max", "size"]).reset_index()
    table.columns = [*by, "mean", "stderr", "smallest", "largest", "seeds"]
    quantile = stats.t.ppf(0.5 + level / 2, (table["seeds"] - 1).clip(lower=1))
    table["low"] = table["mean"] - quantile * table["stderr"]
    table["high"] = table["mean"] + quantile * table["stderr"]
    return table


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"values of shape {x.shape}: give one dimension with at least one value")
    return x


def _pairs(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    x, y = _vector(a), _vector(b)
    _same_length(x, y, "a", "b")
    return x - y


def _same_length(x: NDArray[Any], y: NDArray[Any], one: str, other: str) -> None:
    if x.size != y.size:
        raise ValueError(f"{x.size} {one} and {y.size} {other}: they go in pairs, give as many")
