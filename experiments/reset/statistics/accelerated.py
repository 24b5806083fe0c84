"""What makes recovery longer: depth, width, base training, position, family?

An accelerated-failure-time model of the tokens T to cross a threshold, censored as they are:

    log T = a + b_N log N + b_D log D + b_T log T0 + position + factors + σe,   e ~ N(0, 1)

Slopes are exponents: T ∝ N^b_N. Position is first and last layer against the middle ones (relative
depth L/(N−1) in [⅓, ⅔]; what is neither is `between`), or depth and depth² around ½. The fit is
`experiments.lognormal.fit_log_normal`. Students of one base are no independent draws, so errors are
those of leaving out one cluster at a time (Student's t of G − 1 degrees): all students of a run
(one architecture, shape and base seed, its checkpoints together), or of a reset seed where there is
one run only. Then the interval is about this one base, and the column `over` says so. lifelines,
which fits the same law, has a sandwich over rows but none over clusters, and returns no fit with
left-censored rows. Where σ is below the distance of evaluations, T is taken as interpolated,
±2.5 %; `over` says so.

What cannot be estimated is nan, or infinite, with its reason: a covariate of one value, one that
others determine, a layer that never crossed while others did. Such a layer's own term takes its
students whole (+∞), and they say nothing on the other terms: the exact limit of the likelihood.
A diverged student is one that had not crossed by the tokens it was trained.

"No effect" of N, D or T0: the whole interval inside ±0.15 (doubling it changes T by at most 11 %).
Where it misleads: few clusters (t is wide, rightly), σ taken as the same everywhere, a floor in
g(t): then no finite T exists, and a log-normal law still promises one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import stats

from experiments.jackknife import MOST, jackknife_interval
from experiments.lognormal import SMALLEST, fit_log_normal

MARGIN = 0.15
"""A slope whose whole interval is nearer to 0 than this is no effect."""
READ = 0.025
"""How far, in log T, a crossing read between two evaluations is trusted."""
MIDDLE = (1 / 3, 2 / 3)
"""Relative depths of the middle layers."""
Position = Literal["zones", "quadratic", "none"]
COVARIATES = {"N": "n_layers", "D": "d_model", "T0": "base_tokens", "U0": "unique_tokens"}
"""Terms that enter as logarithms, and their columns; `parameters` and others go by their name."""
_VAGUE = 10.0
"""A standard error, in units of log T, that only a likelihood without a maximum has."""
COLUMNS = (
    *("term", "value", "stderr", "low", "high", "p", "stderr_model", "verdict"),
    *("students", "crossed", "clusters", "over", "reason"),
)


def accelerated(
    crossings: pd.DataFrame,
    covariates: Sequence[str] = ("N", "D", "T0"),
    factors: Sequence[str] = ("family",),
    position: Position = "zones",
    *,
    clusters: Sequence[str] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """One row a term of the model, for crossings of one kind of weights and one threshold.

    Columns: COLUMNS. value ± stderr and low … high over clusters, p of "0" from the same t;
    stderr_model takes students as independent (the likelihood's own). verdict: no effect, effect,
    undecided or not estimable. `factors` are columns (`run`: the base run) against their first
    level, with terms `column:level`. `clusters`: columns that name a cluster.
    """
    _one_threshold(crossings)
    rows = crossings.assign(run=runs(crossings))
    design, groups, reasons = _design(rows, covariates, factors, position)
    terms = list(design.columns)
    x = design.to_numpy(float)
    lower, upper = rows["lower"].to_numpy(float), rows["upper"].to_numpy(float)
    upper = np.where(upper > lower, upper, np.inf)  # one evaluation only: nothing is known
    labels, over = _clusters(rows, clusters)
    value, spread = np.full(len(terms), np.nan), np.full(len(terms), np.nan)
    replicates = np.full((0, len(terms)), np.nan)
    rest, general = np.zeros(len(rows), dtype=bool), ""
    if not np.isfinite(upper).any():
        general = f"none of {len(rows)} students crossed"
    elif (lower == 0).all():
        general = f"all of {len(rows)} students crossed before the first evaluation"
    else:
        rest = _set_aside(x, lower, upper, terms, groups, value, reasons)
    found = _fit(x[rest], lower[rest], upper[rest], value) if rest.any() else None
    inner = rest & np.isfinite(upper) & (lower > 0)
    width = np.median(np.log(upper[inner] / lower[inner])) if inner.any() else 0.0
    if rest.any() and (found is None or found[2] < width):
        # Seeds that cross between the same two evaluations: the intervals do not see their spread.
        tokens = rows["tokens"].to_numpy(float)
        lower = np.where(inner, np.fmax(lower, tokens * np.exp(-READ)), lower)
        upper = np.where(inner, np.fmin(upper, tokens * np.exp(READ)), upper)
        found = _fit(x[rest], lower[rest], upper[rest], value)
        over += ", T read between evaluations"
    if found is None:
        general = general or "the likelihood has no maximum: some students are told apart wholly"
    else:
        replicates = _left_out(x, lower, upper, labels, rest, value)
        fitted, spread, sigma = found
        for j, term in enumerate(terms):
            if np.isnan(value[j]) and np.isnan(fitted[j]):
                reasons.setdefault(term, "one value only, or tied to other terms")
            elif np.isnan(value[j]) and spread[j] > _VAGUE:
                reasons.setdefault(term, "bounded from one side only")
            elif np.isnan(value[j]) and term not in reasons:
                value[j] = fitted[j]
        over += ", their spread too small to see" if sigma <= SMALLEST else ""
    table = _table(terms, value, spread, replicates, reasons, general, level)
    crossed = int((rows["status"] == "recovered").sum())
    counts = {"students": len(rows), "crossed": crossed, "clusters": np.unique(labels).size}
    return table.assign(**counts, over=over).loc[:, list(COLUMNS)]


def length_exponent(
    crossings: pd.DataFrame, *, clusters: Sequence[str] | None = None, level: float = 0.95
) -> pd.DataFrame:
    """β of T_rec ∝ T0^β within base runs, from their checkpoints: one row as of `accelerated`.

    Each run has its own level, so that long-trained and other bases are not compared. β = 0: the
    same tokens however long the base was trained, so the share falls; β = 1: the same share.
    Runs with one checkpoint say nothing and are left to the count of `students`.
    """
    found = accelerated(crossings, ("T0",), ("run",), clusters=clusters, level=level)
    return found.loc[found["term"] == "T0"].reset_index(drop=True)


def runs(crossings: pd.DataFrame) -> pd.Series:
    """A name for each row's base run, its checkpoints together: architecture, shape and base seed;
    the base's own where no seed is known."""
    parts = ["family", "architecture", "n_layers", "d_model", "base_seed"]
    named = crossings[parts].astype(str).agg(" ".join, axis=1) if len(crossings) else ""
    named = pd.Series(named, index=crossings.index, dtype=str)
    return named.where(crossings["base_seed"].notna(), crossings["base"].astype(str)).rename("run")


def zones(crossings: pd.DataFrame) -> pd.Series:
    """Position of each row's layer: first, last, middle or between."""
    depth = relative_depth(crossings).to_numpy(float)
    middle = (depth >= MIDDLE[0] - 1e-9) & (depth <= MIDDLE[1] + 1e-9)
    named = np.select([middle, depth == 0, depth == 1], ["middle", "first", "last"], "between")
    return pd.Series(named, index=crossings.index, name="zone")


def relative_depth(crossings: pd.DataFrame) -> pd.Series:
    """L/(N−1): 0 for the first layer, 1 for the last; ½ where there is one layer only."""
    above = crossings["n_layers"].astype(float) - 1
    return (crossings["layer"].astype(float) / above.where(above > 0)).fillna(0.5)


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """What an interval says: no effect (inside ±margin; nan: no such margin), effect, undecided."""
    if not np.isfinite(low + high):
        return "not estimable"
    if -margin < low and high < margin:
        return "no effect"
    return "effect" if low > 0 or high < 0 else "undecided"


def _design(
    rows: pd.DataFrame, covariates: Sequence[str], factors: Sequence[str], position: Position
) -> tuple[pd.DataFrame, dict[str, list[str]], dict[str, str]]:
    """The matrix, the terms of each group of levels, and why some asked for are not in it."""
    columns: dict[str, NDArray[np.float64]] = {"intercept": np.ones(len(rows))}
    groups: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for term in covariates:
        values = rows[COVARIATES.get(term, term)].to_numpy(float)
        if not (values > 0).all():
            raise ValueError(
                f"log {term} of {int((~(values > 0)).sum())} students is not known: "
                f"give {COVARIATES.get(term, term)} of every base, or leave {term} out"
            )
        columns[term] = np.log(values)
    if position == "quadratic":
        depth = relative_depth(rows).to_numpy(float) - 0.5
        columns |= {"depth": depth, "depth²": depth**2}
    if position == "zones":
        zone = zones(rows)
        groups["zone"] = [name for name in ("first", "last", "between") if (zone == name).any()]
        columns |= {name: (zone == name).to_numpy(float) for name in groups["zone"]}
        for name in {"first", "last"} - set(groups["zone"]):
            columns[name] = np.zeros(len(rows))
            reasons[name] = f"no {name} layer among the students"
    for factor in factors:
        levels = sorted(rows[factor].astype(str).unique())
        groups[factor] = [f"{factor}:{name}" for name in levels[1:]]
        for name in levels[1:]:
            columns[f"{factor}:{name}"] = (rows[factor].astype(str) == name).to_numpy(float)
    return pd.DataFrame(columns), groups, reasons


def _set_aside(
    x: Float[np.ndarray, "row term"],
    lower: Float[np.ndarray, "row"],
    upper: Float[np.ndarray, "row"],
    terms: list[str],
    groups: dict[str, list[str]],
    value: Float[np.ndarray, "term"],
    reasons: dict[str, str],
) -> Bool[np.ndarray, "row"]:
    """Rows that bear on finite terms; writes ±∞ and nan, with reasons, for the others."""
    rest = np.ones(len(x), dtype=bool)
    while True:
        before = rest.sum()
        for members in groups.values():
            index = [terms.index(name) for name in members]
            for j in index:
                own = rest & (x[:, j] == 1)
                for whole, end, word in (
                    (np.isinf(upper), np.inf, "none of {} crossed"),
                    (lower == 0, -np.inf, "all of {} crossed before the first evaluation"),
                ):
                    if own.any() and whole[own].all():
                        value[j], reasons[terms[j]] = end, word.format(int(own.sum()))
                        rest &= ~own
                        own = rest & own
            reference = rest & (x[:, index] == 0).all(axis=1)
            whole = np.isinf(upper[reference]).all() or (lower[reference] == 0).all()
            if index and reference.any() and whole and (rest & ~reference).any():
                rest &= ~reference
                for j in index:
                    value[j] = np.nan
                    reasons[terms[j]] = (
                        f"none of the {int(reference.sum())} it is compared with crossed"
                        if np.isinf(upper[reference]).all()
                        else "all it is compared with crossed before the first evaluation"
                    )
        if rest.sum() == before:
            return rest


def _fit(
    x: Float[np.ndarray, "row term"],
    lower: Float[np.ndarray, "row"],
    upper: Float[np.ndarray, "row"],
    known: Float[np.ndarray, "term"],
) -> tuple[Float[np.ndarray, "term"], Float[np.ndarray, "term"], float] | None:
    """Coefficients, model errors and σ; nan where `known`, or where other columns say the same."""
    (asked,) = np.nonzero(np.isnan(known))
    scaled = x[:, asked] / np.maximum(np.abs(x[:, asked]).max(axis=0), 1e-300)
    kept: list[int] = []
    basis = np.zeros((len(x), 0))
    for j, column in enumerate(scaled.T):
        left = column - basis @ (basis.T @ column)
        left -= basis @ (basis.T @ left)
        if np.linalg.norm(left) > 1e-8 * np.sqrt(len(x)):
            kept.append(j)
            basis = np.c_[basis, left / np.linalg.norm(left)]
    found = fit_log_normal(x[:, asked[kept]], lower, upper)
    if found is None:
        return None
    # A column that others add up to is in the null space with them: none of them is told apart.
    _, sizes, directions = np.linalg.svd(scaled, full_matrices=True)
    null = directions[np.sum(sizes > 1e-8 * sizes.max()) :]
    told = np.all(np.abs(null) < 1e-6, axis=0)[kept]
    value, spread = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    value[asked[kept]] = np.where(told, found.coefficients, np.nan)
    spread[asked[kept]] = np.where(told, np.sqrt(np.diag(found.covariance)), np.nan)
    return value, spread, found.sigma


def _left_out(
    x: Float[np.ndarray, "row term"],
    lower: Float[np.ndarray, "row"],
    upper: Float[np.ndarray, "row"],
    labels: NDArray[np.int64],
    rest: Bool[np.ndarray, "row"],
    known: Float[np.ndarray, "term"],
) -> Float[np.ndarray, "replicate term"]:
    """Coefficients without each cluster in turn (several at once beyond MOST of them)."""
    blocks = labels % MOST
    replicates = []
    for block in np.unique(blocks):
        kept = rest & (blocks != block)
        some = np.isfinite(upper[kept]).any() and not (lower[kept] == 0).all()
        found = _fit(x[kept], lower[kept], upper[kept], known) if some else None
        # A term that this cluster alone tells of has no error to be known.
        vague = np.full(x.shape[1], np.nan)
        replicates.append(vague if found is None else np.where(found[1] > _VAGUE, vague, found[0]))
    return np.array(replicates)


def _clusters(rows: pd.DataFrame, named: Sequence[str] | None) -> tuple[NDArray[np.int64], str]:
    """A number for each row's cluster, and in words what the clusters are."""
    over = f"by {', '.join(named)}" if named else "base runs"
    if named is None:
        several = rows["run"].nunique() > 1
        named, over = (["run"], over) if several else (["seed"], "seeds of one base run")
    return rows.groupby(list(named), dropna=False, sort=False).ngroup().to_numpy(), over


def _table(
    terms: Sequence[str],
    value: Float[np.ndarray, "term"],
    spread: Float[np.ndarray, "term"],
    replicates: Float[np.ndarray, "replicate term"],
    reasons: dict[str, str],
    general: str,
    level: float,
) -> pd.DataFrame:
    count = len(replicates)
    rows: list[dict[str, Any]] = []
    for j, term in enumerate(terms):
        reason, stderr, low, high, p = general or reasons.get(term, ""), *[np.nan] * 4
        if np.isfinite(value[j]):
            # `jackknife_interval` gives the half-width; from it, the error and p of the same t.
            ends = jackknife_interval(
                value[j : j + 1], replicates[:, j : j + 1], np.zeros(count, int), level=level
            )
            low, high = float(ends[0][0]), float(ends[1][0])
            if high - low < 1e-12:  # no t from no spread
                low = high = np.nan
                reason = "the same whatever is left out"
            elif np.isfinite(low):
                stderr = (high - low) / 2 / stats.t.ppf((1 + level) / 2, count - 1)
                p = float(2 * stats.t.sf(abs(value[j]) / stderr, count - 1))
            else:
                reason = "one cluster" if count < 2 else "rests on one cluster"
        margin = MARGIN if term in COVARIATES else np.nan
        rows.append(
            {"term": term, "value": value[j], "stderr": stderr, "low": low, "high": high, "p": p}
            | {"stderr_model": spread[j] if np.isfinite(value[j]) else np.nan}
            | {"verdict": verdict(low, high, margin), "reason": reason}
        )
    return pd.DataFrame(rows)


def _one_threshold(crossings: pd.DataFrame) -> None:
    if crossings.empty:
        raise ValueError("a model of no crossings: give at least one student's")
    named = crossings[["weights", "kind", "threshold"]].drop_duplicates()
    if len(named) > 1:
        raise ValueError(
            f"crossings of {len(named)} kinds of weights and thresholds in one model: students "
            "would count several times; choose one weights, kind and threshold"
        )
