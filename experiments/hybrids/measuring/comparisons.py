"""Which architectures differ from a reference one, over all tasks at once?

For each architecture a and task, against the reference r (GPT-2 unless told) and the task's named
denominator: the difference of mean scores S_a − S_r over seeds, on the same prompts. Two tests:

    p               t of V = V_p + s_a²/K_a + s_r²/K_r, prompts drawn again for both at once
                    (`probes.regression.score_difference` for the whole table)
    p_permutation   all ways to deal the seeds' scores to the two architectures (exact up to 20 000
                    ways, sampled beyond): assumes no normal law

and Fisher's exact test of the two failure rates. Each of the three is corrected by Holm over the
whole table of architectures and tasks; a cell without a p counts as 1.

Where it misleads. Seeds are the replicates: with one there is no test, with two hardly one. The
permutation test cannot go below 1 / C(2K, K) · 2: five seeds against five give 0.008, which no
correction over 55 cells survives. Where some seeds fail and others do not, scores have two humps;
the t test is then rough, and failure rates are the better question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats

from experiments.hybrids.measuring.scores import Drawn, chance, finite, spread, usable
from experiments.hybrids.measuring.sums import ALL, KEYS
from experiments.statistics import holm

EXACT = 20_000
"""Deals of the permutation test that are gone through one by one."""


def compared(
    found: Sequence[Drawn],
    baselines: Mapping[str, str],
    generator: np.random.Generator,
    *,
    reference: str = "gpt2",
    level: float = 0.95,
) -> pd.DataFrame:
    """S_a − S_r of every architecture, task and shift that has both, with Holm over all rows.

    `baselines` names each task's denominator. Columns: KEYS (seed `ALL`), reference, metric
    (score_difference), value, stderr, low, high, p, p_permutation, holm, holm_permutation, seeds,
    reference_seeds.
    """
    rows = [
        row
        for one in found
        for row in _differences(one, baselines.get(one.sums.task, ""), reference, generator, level)
    ]
    names = [*KEYS, "reference", "metric", "value", "stderr", "low", "high", "p", "p_permutation"]
    table = pd.DataFrame(rows, columns=pd.Index([*names, "seeds", "reference_seeds"]))
    return table.assign(
        holm=corrected(table["p"]), holm_permutation=corrected(table["p_permutation"])
    )


def failures_compared(failures: pd.DataFrame, *, reference: str = "gpt2") -> pd.DataFrame:
    """Failure rates (`scores.failure_rows`) against the reference's, Fisher's exact test and Holm.

    Columns: KEYS, reference, metric (failure_difference), value, p, holm, failed, seeds,
    reference_failed, reference_seeds.
    """
    keys = ["task", "shift", "baseline"]
    theirs = failures.loc[failures["architecture"] == reference].set_index(keys)
    rows = []
    for row in failures.to_dict("records"):
        at = (row["task"], row["shift"], row["baseline"])
        if row["architecture"] == reference or at not in theirs.index:
            continue
        other = theirs.loc[at]
        bad, count = int(other["failed"]), int(other["seeds"])
        table = [[row["failed"], row["seeds"] - row["failed"]], [bad, count - bad]]
        exact: Any = stats.fisher_exact(table)
        rows.append(
            {key: row[key] for key in (*KEYS, "failed", "seeds")}
            | {"reference": reference, "metric": "failure_difference"}
            | {"value": row["value"] - bad / count, "p": float(exact.pvalue)}
            | {"reference_failed": bad, "reference_seeds": count}
        )
    names = [*KEYS, "reference", "metric", "value", "p", "failed", "seeds", "reference_failed"]
    made = pd.DataFrame(rows, columns=pd.Index([*names, "reference_seeds"]))
    return made.assign(holm=corrected(made["p"]))


def corrected(p: ArrayLike) -> Float[np.ndarray, "test"]:
    """Holm's p-values over all rows; those without a p count as tests and stay nan."""
    values = np.asarray(p, dtype=float)
    if not len(values):
        return values
    known = np.isfinite(values)
    return np.where(known, holm(np.where(known, values, 1.0)), np.nan)


def _differences(
    found: Drawn, baseline: str, reference: str, generator: np.random.Generator, level: float
) -> list[dict[str, Any]]:
    if baseline not in found.denominators or reference not in found.models:
        return []
    if not usable(found, baseline):
        return []
    sums = found.sums
    common = {"task": sums.task, "shift": sums.shift, "baseline": baseline, "seed": ALL}
    below = found.denominators[baseline].mean(axis=1)
    theirs = finite(found.models[reference]) / below[:, None]
    rows = []
    for name, gains in found.models.items():
        own = finite(gains) / below[:, None]
        if name == reference or not own.shape[1] or not theirs.shape[1]:
            continue
        draws = own.mean(axis=1) - theirs.mean(axis=1)
        value, stderr, half, p = float(draws[0]), math.nan, math.nan, math.nan
        if min(own.shape[1], theirs.shape[1]) > 1:
            trained = [spread(own[0]), spread(theirs[0])]
            stderr, half, freedom = chance(draws, len(sums.zero), trained, level)
            p = float(2 * stats.t.sf(abs(value) / stderr, freedom)) if stderr > 0 else math.nan
        rows.append(
            common
            | {"architecture": name, "reference": reference, "metric": "score_difference"}
            | {"value": value, "stderr": stderr, "low": value - half, "high": value + half}
            | {"p": p, "p_permutation": _permutation(own[0], theirs[0], generator)}
            | {"seeds": own.shape[1], "reference_seeds": theirs.shape[1]}
        )
    return rows


def _permutation(
    a: Float[np.ndarray, "seed"], b: Float[np.ndarray, "other"], generator: np.random.Generator
) -> float:
    if min(a.size, b.size) < 2:
        return math.nan
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        vectorized=True,
        n_resamples=EXACT,
        rng=generator,
    )
    return float(result.pvalue)
