"""Does the position matter, what foretells it, and is another target sooner?

Fixed before any run: the first layer against the middle ones (relative depth in [⅓, ⅔]), the last
against them, and a quadratic in depth; Holm over what is asked together. Effects are differences of
log T from the accelerated-failure-time model, within base runs: it takes censored students as such,
with unequal budgets, and gives a size (e^effect times the tokens). Where a layer never crosses
there is no size; then the sign-flip test on ranks stands in, censored and diverged students above
all that crossed, one mean difference of ranks a cluster. Both p-values are always shown.

Predictors: Spearman's ρ of a layer's number with its median T over seeds, within each base and then
averaged; layers that did not cross rank last, together. Its p shuffles the layers of each base. Its
interval leaves out one base at a time from three bases on, else one layer at a time, which is about
those bases; where nothing changes ρ there is none.

Where it misleads: sign flips of k clusters have no p below 2^(1−k): three bases call nothing;
students censored early rank with those censored late; ρ of six layers is hardly ever sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from experiments.jackknife import jackknife_interval
from experiments.reset.statistics.accelerated import Position, accelerated, runs, zones
from experiments.reset.statistics.crossing import KEYS
from experiments.statistics import holm, sign_flip_tests

CONTRASTS = ("first", "last", "depth²")
PLACE = ("base", "base_share", "stack", "layer", "part")


def position_contrasts(
    crossings: pd.DataFrame, generator: np.random.Generator, *, level: float = 0.95
) -> pd.DataFrame:
    """First − middle, last − middle and the quadratic in depth, for crossings of one threshold.

    Columns: contrast, value (of log T), ratio (e^value; for the quadratic: an end against the
    middle) with ratio_low and ratio_high, low, high, p_model (of the model), p_ranks (of the sign
    flips), p (the model's, or the ranks' where it has none), holm, method, students, crossed,
    clusters, over, reason. A contrast without any p counts as 1 in Holm's family.
    """
    rows = []
    several = runs(crossings).nunique() > 1
    factors = ("run",) if several else ()
    asked: tuple[tuple[str, Position], ...] = (
        ("first", "zones"),
        ("last", "zones"),
        ("depth²", "quadratic"),
    )
    for name, position in asked:
        table = accelerated(crossings, (), factors, position, level=level).set_index("term")
        found: dict[str, Any] = table.loc[name].to_dict()
        differences = _rank_differences(crossings, name)
        p_ranks = np.nan
        if len(differences) > 1:
            p_ranks = float(sign_flip_tests(differences[:, None], generator)[0])
        by_model = np.isfinite(found["p"])
        method = "model" if by_model else "ranks" if np.isfinite(p_ranks) else "none"
        kept = ("value", "low", "high", "students", "crossed", "clusters", "over", "reason")
        share = 0.25 if name == "depth²" else 1.0  # (½)²: an end is half a depth from the middle
        ratios = {"ratio": "value", "ratio_low": "low", "ratio_high": "high"}
        rows.append(
            {"contrast": name}
            | {ratio: float(np.exp(share * found[key])) for ratio, key in ratios.items()}
            | {key: found[key] for key in kept}
            | {"p_model": found["p"], "p_ranks": p_ranks, "method": method}
            | {"p": found["p"] if by_model else p_ranks}
        )
    table = pd.DataFrame(rows)
    table["holm"] = np.where(table["p"].isna(), np.nan, holm(table["p"].fillna(1.0)))
    names = ["contrast", "value", "ratio", "ratio_low", "ratio_high", "low", "high"]
    names += ["p_model", "p_ranks", "p", "holm"]
    return table.loc[:, [*names, "method", "students", "crossed", "clusters", "over", "reason"]]


def target_contrast(
    crossings: pd.DataFrame, one: str = "lm", other: str = "hidden", *, level: float = 0.95
) -> pd.DataFrame:
    """log T of target `other` minus that of `one`: a row of `accelerated`, below 0 if sooner.

    Runs and positions have their own levels, so students are compared at the same place.
    """
    rows = crossings.loc[crossings["target"].isin([one, other])]
    present = set(rows["target"])
    if present != {one, other}:
        raise ValueError(f"{other} against {one}: there are only {sorted(present) or 'none'}")
    rows = rows.assign(**{other: np.where(rows["target"] == other, "yes", "no")})
    factors = (other, "run") if runs(rows).nunique() > 1 else (other,)
    table = accelerated(rows, (), factors, level=level)
    found = table.loc[table["term"] == f"{other}:yes"]
    return found.assign(term=f"{other} against {one}").reset_index(drop=True)


def target_crossovers(ledger: pd.DataFrame, one: str = "lm", other: str = "hidden") -> pd.DataFrame:
    """Where target `other` goes below `one` and stays there, for pairs of the same place and seed.

    Columns: what the pair shares of KEYS, weights, gap_one and gap_other (at the last tokens both
    were trained), lower, upper, tokens (log-interpolated), share, status: crosses, ahead (below
    at every evaluation), behind (not below at the end; lower = those last tokens). Each pair may
    have had a rate of its own. Curves are read at the evaluations of both, linear in log t.
    """
    paired = [name for name in KEYS if name not in ("target", "arm", "rate")]
    names = [*paired, "weights"]
    rows = []
    keys: Any
    for keys, part in ledger.groupby(names, dropna=False, sort=False):
        curves = {}
        for target in (one, other):
            own = part.loc[(part["target"] == target) & (part["tokens"] > 0)]
            if own["tokens"].duplicated().any():
                raise ValueError(
                    f"several students of target {target} at one place and seed: choose one arm "
                    "and rate before they are paired"
                )
            curves[target] = own.loc[np.isfinite(own["gap"])].sort_values("tokens")
        if any(curve.empty for curve in curves.values()):
            continue
        known: dict[str, Any] = dict(zip(names, keys, strict=True))
        rows.append(known | _crossover(*(curves[target] for target in (one, other))))
    found = [*names, "gap_one", "gap_other", "lower", "upper", "tokens", "status"]
    table = pd.DataFrame(rows, columns=pd.Index(found))
    table["share"] = table["tokens"] / table["base_tokens"].astype(float)
    return table


def predictor_ranks(
    crossings: pd.DataFrame,
    measured: pd.DataFrame,
    names: Sequence[str],
    generator: np.random.Generator,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
) -> pd.DataFrame:
    """Spearman's ρ of each of `names` with T of the places, with Holm over them.

    `measured` has a row a place: columns of PLACE that it needs to be told apart (at least layer)
    and `names`; `damage` and `skip` may come from the crossings. Columns: predictor, value, low,
    high, p, holm, bases, places, crossed, over, reason.
    """
    keys = [name for name in PLACE if name in measured.columns]
    if measured.duplicated(keys).any():
        raise ValueError(
            f"several rows of measurements at one place: one for each {', '.join(keys)}"
        )
    own = [name for name in ("damage", "skip") if name not in measured.columns]
    ranked = crossings.assign(
        time=np.where(crossings["status"] == "recovered", crossings["tokens"], np.inf)
    )
    # A plain median: half of ∞ and a number is ∞, which is "not yet".
    places = ranked.groupby(list(PLACE), dropna=False, as_index=False).agg(
        time=("time", "median"), **{name: (name, "mean") for name in own}
    )
    checkpoint = places["base"].astype(str) + " " + places["base_share"].astype(str)
    places = places.assign(run=checkpoint).merge(
        measured, on=keys, how="left", validate="many_to_one"
    )
    rows = []
    for name in names:
        if name not in places.columns:
            raise ValueError(f"no predictor {name}: there are {', '.join(map(str, measured))}")
        known = places.loc[places[name].notna()]
        rows.append({"predictor": name} | _correlation(known, name, generator, resamples, level))
    table = pd.DataFrame(rows)
    if len(table):
        table["holm"] = np.where(table["p"].isna(), np.nan, holm(table["p"].fillna(1.0)))
    names = ["predictor", "value", "low", "high", "p", "holm", "bases", "places", "crossed"]
    return table.reindex(columns=pd.Index([*names, "over", "reason"]))


def _rank_differences(crossings: pd.DataFrame, contrast: str) -> Float[np.ndarray, "cluster"]:
    """One mean difference of ranks a cluster: base runs, or seeds of the one there is.

    For the quadratic: the two thirds of layers away from the middle against the middle.
    """
    run = runs(crossings)
    cluster = run if run.nunique() > 1 else crossings["seed"]
    times = np.where(crossings["status"] == "recovered", crossings["tokens"], np.inf)
    frame = pd.DataFrame({"cluster": cluster, "time": times, "zone": zones(crossings)})
    frame["rank"] = frame.groupby("cluster", dropna=False)["time"].rank()
    if contrast == "depth²":
        frame["zone"] = np.where(frame["zone"] == "middle", "middle", "depth²")
    means = frame.groupby(["cluster", "zone"], dropna=False)["rank"].mean().unstack()
    if not {contrast, "middle"} <= set(means.columns):
        return np.zeros(0)
    own, middle = (np.asarray(means[name], dtype=float) for name in (contrast, "middle"))
    differences = own - middle
    return differences[np.isfinite(differences)]


def _crossover(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    t1, t2 = one["tokens"].to_numpy(float), other["tokens"].to_numpy(float)
    tokens = np.union1d(t1, t2)
    tokens = tokens[(tokens >= max(t1[0], t2[0])) & (tokens <= min(t1[-1], t2[-1]))]
    nothing = {"lower": np.nan, "upper": np.nan, "tokens": np.nan}
    if tokens.size == 0:
        return nothing | {"gap_one": np.nan, "gap_other": np.nan, "status": "apart"}
    log = np.log(tokens)
    first = np.interp(log, np.log(t1), one["gap"].to_numpy(float))
    second = np.interp(log, np.log(t2), other["gap"].to_numpy(float))
    ahead = second < first
    ends = {"gap_one": float(first[-1]), "gap_other": float(second[-1])}
    if not ahead[-1]:
        return nothing | ends | {"lower": tokens[-1], "upper": np.inf, "status": "behind"}
    if ahead.all():
        return nothing | ends | {"lower": 0.0, "upper": tokens[0], "status": "ahead"}
    last = int(np.flatnonzero(~ahead)[-1])
    lead = (first - second)[last : last + 2]
    way = lead[0] / (lead[0] - lead[1])
    crossed = float(np.exp(log[last] + way * (log[last + 1] - log[last])))
    interval = {"lower": tokens[last], "upper": tokens[last + 1], "tokens": crossed}
    return ends | interval | {"status": "crosses"}


def _correlation(
    places: pd.DataFrame,
    name: str,
    generator: np.random.Generator,
    resamples: int,
    level: float,
) -> dict[str, Any]:
    """ρ within bases, averaged, and its interval."""
    bases = [own for _, own in places.groupby("run", sort=False) if _ranked(own, name)]
    found: dict[str, Any] = {
        "value": np.nan,
        "low": np.nan,
        "high": np.nan,
        "p": np.nan,
        "bases": len(bases),
        "places": sum(len(own) for own in bases),
        "crossed": int(sum(np.isfinite(own["time"]).sum() for own in bases)),
        "over": "bases" if len(bases) > 2 else "layers of these bases",
        "reason": "",
    }
    if not bases:
        return found | {"reason": "no base with three layers of different times and values"}
    each = np.array([_spearman(own, name) for own in bases])
    value = each.mean()
    if len(bases) > 2:
        replicates = np.array([np.delete(each, i).mean() for i in range(each.size)])
        strata = np.zeros(each.size, dtype=int)
    else:
        pairs = [(b, own, i) for b, own in enumerate(bases) for i in range(len(own))]
        left = [own.loc[own.index != own.index[i]] for _, own, i in pairs]
        without = np.array([_spearman(own, name) if _ranked(own, name) else np.nan for own in left])
        strata = np.array([b for b, _, _ in pairs])
        replicates = value + (without - each[strata]) / each.size
    low, high = jackknife_interval(
        np.array([value]), replicates[:, None], strata, level=level, limits=(-1.0, 1.0)
    )
    shuffled = np.zeros(resamples)
    for own in bases:
        a, b = (_ranks(own[column]) for column in (name, "time"))
        shuffled += generator.permuted(np.tile(b, (resamples, 1)), axis=1) @ a / len(own)
    extreme = np.abs(shuffled / len(bases)) >= abs(value) - 1e-9
    found |= {"value": float(value), "p": float((1 + extreme.sum()) / (1 + resamples))}
    if not np.isfinite(low[0]):
        return found | {"reason": "rests on one layer"}
    if np.ptp(replicates) < 1e-12:
        return found | {"reason": "the same whatever is left out"}
    return found | {"low": float(low[0]), "high": float(high[0])}


def _ranked(places: pd.DataFrame, name: str) -> bool:
    return len(places) > 2 and places["time"].nunique() > 1 and places[name].nunique() > 1


def _spearman(places: pd.DataFrame, name: str) -> float:
    """ρ with ties at their mean rank; places that did not cross tie at the top."""
    return float(np.mean(_ranks(places[name]) * _ranks(places["time"])))


def _ranks(values: ArrayLike) -> Float[np.ndarray, "row"]:
    """Ranks with mean 0 and variance 1."""
    ranks = np.asarray(stats.rankdata(np.asarray(values, dtype=float)))
    return (ranks - ranks.mean()) / ranks.std()
