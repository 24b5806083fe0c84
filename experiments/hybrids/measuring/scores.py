"""How well does each architecture regress in context, against every baseline, and how sure is that?

With e = Σ_i ξ(i) of one prompt (squared error, mean over the coordinates of y, summed over the
scored points), 0 the prediction 0, and means over the same prompts above and below,

    S(model, base) = mean(e_0 − e_model) / mean(e_0 − e_base)

1 is as good as the baseline, 0 no better than predicting 0. A trained architecture can stand below
as well, as the mean of its seeds ("trained gpt2"; the paper does so on trees and parity).

Chance, as `probes.regression.score_interval` has it (the slow way of the tests), for a whole table
at once. Prompts are drawn again, the same ones for every model and baseline of a task, so that what
is common cancels: variance V_p. Seeds add s²/K each side of the ratio that is trained. An interval
is value ± t_ν √V, V the sum and ν Welch and Satterthwaite's. A row of one seed has an interval over
prompts. A row over seeds (seed = `ALL`) has one over both; of one seed it is nan, since one run
says nothing about the next.

Where it misleads. S of a baseline that hardly beats 0 is noise: below `BEATS` standard errors it is
nan and `note` says so. A seed whose predictions are not finite has no S; rows over seeds leave it
out and count it in `broken`: read them beside the failure rate, which counts it as failed. Against
a weak baseline all are alike; y² has heavy tails on sparse and tree prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from experiments.hybrids.measuring.sums import ALL, KEYS, Sums
from experiments.statistics import wilson_interval

BEATS = 2.0
"""Standard errors by which a denominator has to be above 0."""
FAILED = 0.5
"""S below which a seed counts as failed, unless told."""
TRAINED = "trained "
"""Before the name of an architecture that stands as a baseline."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Mean gains over predicting 0, as measured (draw 0) and on redrawn prompts.

    Attributes:
        models: nan for a seed whose predictions are not finite.
        denominators: one column for an algorithm, one a seed for a trained architecture.
    """

    sums: Sums
    models: Mapping[str, Float[np.ndarray, "draw seed"]]
    denominators: Mapping[str, Float[np.ndarray, "draw trained"]]


class Chance(NamedTuple):
    """A standard error, half an interval's width, and the degrees of freedom of its t."""

    stderr: float
    half: float
    freedom: float


def drawn(
    sums: Sums,
    generator: np.random.Generator,
    *,
    references: Iterable[str] = (),
    resamples: int = 2000,
) -> Drawn:
    """Redraw the prompts; `references` are architectures that stand as denominators too."""
    count = len(sums.zero)
    shares = np.full(count, 1 / count)
    weights = np.vstack([shares, generator.multinomial(count, shares, resamples) / count])
    models = {}
    for name, errors in sums.models.items():
        known = np.isfinite(errors).all(axis=1)
        models[name] = np.full((len(weights), len(errors)), np.nan)
        models[name][:, known] = weights @ (sums.zero - errors[known]).T
    denominators = {
        name: (weights @ (sums.zero - errors))[:, None] for name, errors in sums.baselines.items()
    }
    for name in references:
        if name in models and len(whole := finite(models[name]).T):
            denominators[TRAINED + name] = whole.T
    return Drawn(sums, models, denominators)


def drawn_all(
    tables: Iterable[Sums],
    generator: np.random.Generator,
    *,
    references: Sequence[str] = (),
    resamples: int = 2000,
) -> list[Drawn]:
    """`drawn` of every table; trained denominators on the largest set of prompts of each alone."""
    found, seen = [], set()
    for sums in tables:
        some = () if (sums.task, sums.shift) in seen else references
        seen.add((sums.task, sums.shift))
        found.append(drawn(sums, generator, references=some, resamples=resamples))
    return found


def score_rows(found: Drawn, *, level: float = 0.95) -> pd.DataFrame:
    """S of every seed and over seeds, against every denominator; and the denominators.

    Columns: KEYS, metric (icl_score; denominator), value, stderr, low, high, seeds, broken,
    prompts, note.
    """
    rows: list[dict[str, Any]] = []
    sums = found.sums
    common = {"task": sums.task, "shift": sums.shift, "prompts": len(sums.zero)}
    for baseline in found.denominators:
        kept = common | {"baseline": baseline}
        rows.append(kept | _denominator(found, baseline, level))
        note = "" if usable(found, baseline) else f"{baseline} does not beat zero here"
        for name, gains in found.models.items():
            whole = finite(gains)
            for at, seed in enumerate(sums.seeds[name]):
                own = gains[:, [at]]
                broken = not np.isfinite(own[0, 0])
                said = "predictions not finite" if broken else note
                about = {"architecture": name, "seed": seed, "seeds": 1, "broken": int(broken)}
                measured = _scored(found, own, baseline, level, alone=True, note=said)
                rows.append(kept | about | measured)
            few = whole.shape[1] < 2
            said = note or ("one seed: no interval over seeds" if whole.shape[1] == 1 else "")
            lost = gains.shape[1] - whole.shape[1]
            about = {"architecture": name, "seed": ALL, "seeds": whole.shape[1], "broken": lost}
            measured = _scored(found, whole, baseline, level, alone=False, note=said)
            if few:
                measured |= dict.fromkeys(("stderr", "low", "high"), math.nan)
            rows.append(kept | about | measured)
    names = [*KEYS, "metric", "value", "stderr", "low", "high", "seeds", "broken", "prompts"]
    return pd.DataFrame(rows, columns=pd.Index([*names, "note"]))


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


def finite(gains: Float[np.ndarray, "draw seed"]) -> Float[np.ndarray, "draw whole"]:
    """The seeds whose predictions are finite."""
    return gains[:, np.isfinite(gains[0])]


def usable(found: Drawn, baseline: str) -> bool:
    """Whether the baseline is known to beat 0 on these prompts."""
    below = found.denominators[baseline].mean(axis=1)
    # Not "<": a denominator whose spread nobody knows (one prompt) divides nothing either.
    return bool(below[0] > BEATS * below[1:].std(ddof=1))


def chance(
    prompts: Float[np.ndarray, "draw"],
    count: int,
    trained: Iterable[tuple[float, int]],
    level: float,
) -> Chance:
    """Of a number on redrawn prompts, of which there are `count`, and of trained seeds.

    `trained` are (variance of a mean over K seeds, K).
    """
    parts = [(float(prompts[1:].var(ddof=1)), count - 1)]
    parts += [(variance, seeds - 1) for variance, seeds in trained if seeds > 1]
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / freedom for variance, freedom in parts)
    if not below:
        return Chance(0.0, 0.0, math.inf)
    freedom = total**2 / below
    half = float(stats.t.ppf(0.5 + level / 2, freedom)) * math.sqrt(total)
    return Chance(math.sqrt(total), half, freedom)


def spread(values: Float[np.ndarray, "seed"]) -> tuple[float, int]:
    """Variance of the mean over K seeds, and K; 0 of one seed."""
    return (float(values.var(ddof=1) / values.size) if values.size > 1 else 0.0), values.size


def _scored(
    found: Drawn,
    gains: Float[np.ndarray, "draw seed"],
    baseline: str,
    level: float,
    *,
    alone: bool,
    note: str,
) -> dict[str, Any]:
    """S of these seeds; `alone`: of one model, so that no chance of its seed is meant."""
    row: dict[str, Any] = {"metric": "icl_score", "note": note}
    if not usable(found, baseline) or not gains.shape[1] or not np.isfinite(gains[0]).all():
        return row | dict.fromkeys(("value", "stderr", "low", "high"), math.nan)
    columns = found.denominators[baseline]
    above, below = gains.mean(axis=1), columns.mean(axis=1)
    draws = above / below
    value = float(draws[0])
    trained = [] if alone else [spread(gains[0] / below[0])]
    variance, seeds = spread(columns[0] / below[0])
    trained.append((value**2 * variance, seeds))
    if gains.shape == columns.shape and np.array_equal(gains, columns):
        trained = []  # an architecture over itself is 1, whatever its seeds do
    known = chance(draws, len(found.sums.zero), trained, level)
    ends = {"low": value - known.half, "high": value + known.half}
    return row | {"value": value, "stderr": known.stderr} | ends


def _denominator(found: Drawn, baseline: str, level: float) -> dict[str, Any]:
    columns = found.denominators[baseline]
    draws = columns.mean(axis=1)
    known = chance(draws, len(found.sums.zero), [spread(columns[0])], level)
    value = float(draws[0])
    about = {"architecture": "", "seed": ALL, "metric": "denominator", "seeds": 0, "broken": 0}
    ends = {"low": value - known.half, "high": value + known.half}
    return about | {"value": value, "stderr": known.stderr, "note": ""} | ends
