"""How well does each architecture regress in context, against every baseline, and how sure is that?

With e = Σ_i ξ(i) of one prompt (squared error, mean over the coordinates of y, summed over the
scored points), 0 the prediction 0, and means over the same prompts above and below,

    S(model, base) = mean(e_0 − e_model) / mean(e_0 − e_base)

1 is as good as the baseline, 0 no better than predicting 0. A trained architecture can stand below
as well, as the mean of its seeds ("trained gpt2"; the paper does so on trees and parity).

Chance. Prompts are drawn again, the same ones for every model and baseline of a task, so that what
is common cancels; seeds are drawn again within each architecture, K − 1 of K, which makes the
variance right for few seeds (Rao and Wu 1988). A row of one seed has an interval over prompts. A
row over seeds (seed = `ALL`) has one over both: value ± t · stderr, Student's t of K − 1 degrees of
freedom; of one seed it is nan, since one run says nothing about the next.

Where it misleads. S of a baseline that hardly beats 0 is noise: below `BEATS` standard errors it is
nan and `note` says so. A seed whose predictions are not finite has no S; rows over seeds leave it
out and count it in `broken`: read them beside the failure rate, which counts it as failed. Against
a weak baseline all are alike; y² has heavy tails on sparse and tree prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from experiments.statistics import wilson_interval
from probes.regression import squared_error_by_examples

ALL = -1
"""The seed of a row over seeds, and of a baseline's."""
BEATS = 2.0
"""Standard errors by which a denominator has to be above 0."""
FAILED = 0.5
"""S below which a seed counts as failed, unless told."""
TRAINED = "trained "
"""Before the name of an architecture that stands as a baseline."""
KEYS = ("architecture", "task", "seed", "shift", "baseline")
SUMS = ("architecture", "task", "seed", "shift", "baseline", "prompt", "value")


@dataclass(frozen=True, eq=False)
class Sums:
    """Σ_i ξ(i) of each prompt, of all that was measured on one task under one shift."""

    task: str
    shift: str
    zero: Float[np.ndarray, "prompt"]
    baselines: Mapping[str, Float[np.ndarray, "prompt"]]
    models: Mapping[str, Float[np.ndarray, "seed prompt"]]
    seeds: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Mean gains over predicting 0, as measured (draw 0) and on redrawn prompts."""

    sums: Sums
    models: Mapping[str, Float[np.ndarray, "draw seed"]]
    over_seeds: Mapping[str, Float[np.ndarray, "draw"]]
    """The same with seeds drawn again too; broken ones left out."""
    denominators: Mapping[str, Float[np.ndarray, "draw"]]


def error_rows(
    predictions: Float[Tensor, "seed batch point y_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    seeds: Sequence[int],
    scored: Literal["all", "last"] = "all",
) -> pd.DataFrame:
    """Squared error by number of examples: seed, examples, metric, value, stderr over prompts."""
    errors = squared_error_by_examples(predictions, ys.expand_as(predictions)).double()
    table = errors.cpu().numpy()
    points = range(table.shape[2])[-1 if scored == "last" else 0 :]
    count = table.shape[1]
    rows = [
        {
            "seed": seed,
            "examples": point,
            "metric": "squared_error",
            "value": float(own[:, point].mean()),
            "stderr": float(own[:, point].std(ddof=1)) / math.sqrt(count)
            if count > 1
            else math.nan,
        }
        for seed, own in zip(seeds, table, strict=True)
        for point in points
    ]
    return pd.DataFrame(rows)


def prompt_sums(
    predictions: Float[Tensor, "seed batch point y_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    scored: Literal["all", "last"] = "all",
) -> Float[np.ndarray, "seed batch"]:
    """Σ_i ξ(i) of every prompt; of the last point alone where only that is scored."""
    errors = squared_error_by_examples(predictions, ys.expand_as(predictions)).double()
    some = errors[..., -1:] if scored == "last" else errors
    return some.sum(-1).cpu().numpy()


def gathered(frame: pd.DataFrame) -> list[Sums]:
    """Rows of `SUMS`, of one or many cells, as one `Sums` for each task and shift.

    A baseline's rows have no architecture and seed `ALL`; "zero" is among them. Rows of one
    baseline from several cells have to agree: ValueError where they do not, for then the cells
    were measured on other prompts.
    """
    found = []
    key: Any
    for key, part in frame.groupby(["task", "shift"], sort=False, observed=True):
        task, shift = key
        where = f"task {task}, shift {shift}"
        given = part.loc[part["architecture"] == ""]
        span = given.groupby(["baseline", "prompt"], observed=True)["value"].agg(["min", "max"])
        if not np.allclose(span["min"], span["max"], rtol=1e-6, atol=1e-9, equal_nan=True):
            raise ValueError(f"{where}: cells were measured on different prompts; draw them alike")
        yardsticks = {
            str(name): own.droplevel("baseline").sort_index()["min"]
            for name, own in span.groupby(level="baseline", observed=True, sort=False)
        }
        if "zero" not in yardsticks:
            raise ValueError(f"{where}: no rows of the baseline zero, which every score needs")
        prompts = yardsticks["zero"].index
        models, seeds = {}, {}
        own = part.loc[part["architecture"] != ""]
        for name, rows in own.groupby("architecture", sort=False, observed=True):
            table = rows.pivot(index="seed", columns="prompt", values="value").sort_index()
            if list(table.columns) != list(prompts):
                raise ValueError(
                    f"{where}: {name} has {len(table.columns)} prompts, zero {len(prompts)}"
                )
            models[str(name)] = table.to_numpy(float)
            seeds[str(name)] = tuple(int(seed) for seed in table.index)
        zero = yardsticks.pop("zero").to_numpy(float)
        others = {name: values.to_numpy(float) for name, values in yardsticks.items()}
        found.append(Sums(str(task), str(shift), zero, others, models, seeds))
    return found


def drawn(
    sums: Sums,
    generator: np.random.Generator,
    *,
    references: Iterable[str] = (),
    resamples: int = 2000,
) -> Drawn:
    """Redraw prompts and seeds; `references` are architectures that stand as denominators too."""
    count = len(sums.zero)
    shares = np.full(count, 1 / count)
    weights = np.vstack([shares, generator.multinomial(count, shares, resamples) / count])
    models, over_seeds = {}, {}
    for name, errors in sums.models.items():
        known = np.isfinite(errors).all(axis=1)
        gains = np.full((len(weights), len(errors)), np.nan)
        gains[:, known] = weights @ (sums.zero - errors[known]).T
        models[name] = gains
        over_seeds[name] = _over_seeds(gains[:, known], generator)
    denominators = {name: weights @ (sums.zero - errors) for name, errors in sums.baselines.items()}
    denominators |= {TRAINED + name: over_seeds[name] for name in references if name in over_seeds}
    return Drawn(sums, models, over_seeds, denominators)


def score_rows(found: Drawn, *, level: float = 0.95) -> pd.DataFrame:
    """S of every seed and over seeds, against every denominator; and the denominators.

    Columns: KEYS, metric (icl_score; denominator), value, stderr, low, high, seeds, broken,
    prompts, note.
    """
    rows: list[dict[str, Any]] = []
    sums = found.sums
    common = {"task": sums.task, "shift": sums.shift, "prompts": len(sums.zero)}
    z = float(stats.norm.ppf(0.5 + level / 2))
    for baseline, below in found.denominators.items():
        spread = float(below[1:].std(ddof=1))
        kept = common | {"baseline": baseline}
        ends = {"low": below[0] - z * spread, "high": below[0] + z * spread}
        about = {"architecture": "", "seed": ALL, "metric": "denominator", "value": below[0]}
        rows.append(kept | about | {"stderr": spread} | ends | {"seeds": 0, "broken": 0})
        # Not "<": a denominator whose spread nobody knows (one prompt) divides nothing either.
        usable = below[0] > BEATS * spread
        note = "" if usable else f"{baseline} does not beat zero here"
        for name, gains in found.models.items():
            known = np.isfinite(gains[0])
            counts = {"seeds": int(known.sum()), "broken": int((~known).sum())}
            above = np.column_stack([gains, found.over_seeds[name]])
            ratios = above / below[:, None] if usable else np.full_like(above, np.nan)
            spreads = ratios[1:].std(axis=0, ddof=1)
            tail = 0.5 + level / 2
            wide = float(stats.t.ppf(tail, counts["seeds"] - 1)) if counts["seeds"] > 1 else np.nan
            lone = not note and counts["seeds"] == 1
            for at, seed in enumerate((*sums.seeds[name], ALL)):
                width = wide if seed == ALL else z
                stderr = spreads[at] if seed != ALL or counts["seeds"] > 1 else math.nan
                value = ratios[0, at]
                said = "one seed: no interval over seeds" if seed == ALL and lone else note
                if seed != ALL and not known[at]:
                    said = "predictions not finite"
                rows.append(
                    kept
                    | {"architecture": name, "seed": seed, "metric": "icl_score", "value": value}
                    | {"stderr": stderr, "low": value - width * stderr}
                    | {"high": value + width * stderr, "note": said}
                    | (counts if seed == ALL else {"seeds": 1, "broken": int(not known[at])})
                )
    names = [*KEYS, "metric", "value", "stderr", "low", "high", "seeds", "broken", "prompts"]
    table = pd.DataFrame(rows, columns=pd.Index([*names, "note"]))
    return table.assign(note=table["note"].fillna(""))


def over_seeds(scores: pd.DataFrame, baselines: Mapping[str, str], shift: str) -> pd.DataFrame:
    """One row for each architecture and task: S over seeds against the task's named baseline."""
    rows = scores.loc[
        (scores["metric"] == "icl_score") & (scores["seed"] == ALL) & (scores["shift"] == shift)
    ]
    return rows.loc[rows["baseline"] == rows["task"].map(baselines)].reset_index(drop=True)


def failure_rows(
    scores: pd.DataFrame,
    baselines: Mapping[str, str],
    *,
    below: float = FAILED,
    level: float = 0.95,
) -> pd.DataFrame:
    """Share of seeds with S below `below`, or none, against each task's baseline, after Wilson.

    Columns: KEYS (seed `ALL`), metric failure_rate, value, low, high, failed, seeds. Cells whose
    denominator is not usable have no row.
    """
    seeds = scores.loc[(scores["metric"] == "icl_score") & (scores["seed"] != ALL)]
    seeds = seeds.loc[seeds["baseline"] == seeds["task"].map(baselines)]
    seeds = seeds.loc[seeds["value"].notna() | (seeds["broken"] > 0)]
    rows = []
    keys = ["architecture", "task", "shift", "baseline"]
    key: Any
    for key, part in seeds.groupby(keys, sort=False, observed=True):
        bad = int((part["value"].isna() | (part["value"] < below)).sum())
        low, high = wilson_interval(bad, len(part), level)
        named = dict(zip(keys, key, strict=True))
        measured = {"value": bad / len(part), "low": low, "high": high}
        counts = {"failed": bad, "seeds": len(part)}
        rows.append(named | {"seed": ALL, "metric": "failure_rate"} | measured | counts)
    names = [*KEYS, "metric", "value", "low", "high", "failed", "seeds"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def _over_seeds(
    gains: Float[np.ndarray, "draw seed"], generator: np.random.Generator
) -> Float[np.ndarray, "draw"]:
    """Means over seeds, as they are and K − 1 of K drawn again; of one seed, it itself."""
    draws, count = gains.shape
    if count == 0:
        return np.full(draws, np.nan)
    if count == 1:
        return gains[:, 0]
    picks = generator.multinomial(count - 1, np.full(count, 1 / count), draws) / (count - 1)
    picks[0] = 1 / count
    return (picks * gains).sum(axis=1)
