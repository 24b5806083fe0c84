"""Does a difference follow the norm, the FFN, or where positions come from?

Where a function class was learned by architectures that are alike but for k factors of two levels
each, every combination once (`crossed`), x_f = −1 at the level of the first architecture and +1 at
the other. With m_c the mean over seeds of cell c's score, the effect of a set s of factors is

    E_s = Σ_c (Π_{f ∈ s} x_f(c)) · m_c / 2^(k−1)

of one factor: by how much its second level is better than its first, averaged over all levels of
the others; of two: half of what the second level of one adds to the effect of the other; and so on
(Box, Hunter & Hunter 2005, ch. 5). Seeds are blocks, not replicates of each cell: seed k has the
same prompts in all cells, and the same initial weights wherever shapes agree, so cells of one seed
go up and down together. So E_s is taken of every seed alone, and V = V_p + s²/K with s the spread
of these K numbers and V_p from prompts that are drawn again for all cells at once; t with Welch's
and Satterthwaite's degrees of freedom, Holm over all effects and function classes. A seed that
diverged in one cell is left out of all.

Of the steps to a threshold, log T = b + Σ_f β_f x_f / 2 + σe by maximum likelihood, where a seed
that never got there counts with T beyond its last step (one that diverged, beyond the group's
end): exp β_f is how many times as many steps the second level takes. Its interval leaves out one
seed, of all cells, at a time (jackknife, t of K − 1).

Where it misleads. A factor's effect is a mean over the others' levels: read it beside its
interactions, where one of them is as large, it has no meaning of its own. An effect holds for the
sizes it was measured at: SwiGLU of the same width has half as many weights again as a GELU MLP.
With few seeds t is wide, and rough where some are stuck and others not. Factors that were not
crossed, the learning rate first of all, may turn any of it around.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.hybrids.measuring.comparisons import corrected
from experiments.hybrids.measuring.scores import Drawn, chance, spread, usable
from experiments.hybrids.measuring.waiting import times_on_the_way
from experiments.jackknife import jackknife_interval
from experiments.lognormal import fit_log_normal

if TYPE_CHECKING:
    from experiments.hybrids.cells import Cell

WORDS: Mapping[str, str] = {
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "gelu": "GELU MLP",
    "swiglu": "SwiGLU",
    "rope": "RoPE",
}
"""What a word of the grammar is called on a page, where it is not called as it is."""
_EXACT = 1e-3
"""Half the width, as a share, of the interval that an interpolated step stands for."""


@dataclass(frozen=True)
class Crossed:
    """Architectures that are every combination of the levels of some factors.

    Attributes:
        levels: factor -> (the first architecture's level, the other one).
        signs: architecture -> −1 or +1 for each factor, in the order of `levels`.
        parameters: architecture -> how many its model has.
    """

    levels: Mapping[str, tuple[str, str]]
    signs: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, int]

    def name(self, of: Sequence[str]) -> str:
        """What an effect is called: `RMSNorm, not LayerNorm`; `norm × FFN`."""
        if len(of) > 1:
            return " × ".join(of)
        first, second = self.levels[of[0]]
        return f"{of[0]} {second}, not {first}"

    def growth(self, factor: str) -> float:
        """How many times as many parameters models have at its second level, geometric mean."""
        at = list(self.levels).index(factor)
        logs = [signs[at] * math.log(self.parameters[n]) for n, signs in self.signs.items()]
        return math.exp(2 * math.fsum(logs) / len(logs))

    def effects(self) -> list[tuple[str, ...]]:
        """All sets of factors, small ones first."""
        sizes = range(1, len(self.levels) + 1)
        return [s for size in sizes for s in itertools.combinations(self.levels, size)]


def crossed(cells: Sequence[Cell]) -> Crossed | None:
    """The factors of these cells, of one function class; None where nothing is crossed.

    Looked at are architectures of attention and dense FFNs that have one kind of block.
    """
    described = {cell.architecture: found for cell in cells if (found := _described(cell))}
    if len(described) < 4:
        return None
    first = next(iter(described.values()))
    varied: dict[str, tuple[str, str]] = {}
    for factor in first:
        seen = list(dict.fromkeys(each[factor] for each in described.values()))
        if len(seen) > 2:
            return None
        if len(seen) == 2:
            varied[factor] = (seen[0], seen[1])
    signs = {
        name: tuple(1 if each[f] == levels[1] else -1 for f, levels in varied.items())
        for name, each in described.items()
    }
    whole = len(set(signs.values())) == len(signs) == 2 ** len(varied)
    parameters = {cell.architecture: cell.parameters for cell in cells}
    return Crossed(varied, signs, parameters) if whole and len(varied) > 1 else None


def score_effects(
    found: Drawn, baseline: str, crossing: Crossed, *, level: float = 0.95
) -> pd.DataFrame:
    """E_s of the scores against a baseline: task, shift, baseline, effect, order, metric
    (score_effect), value, stderr, low, high, p, seeds, prompts, parameters (`growth` of a factor
    alone). None where fewer than two seeds have finite
    predictions in all cells."""
    if baseline not in found.denominators or not usable(found, baseline):
        return pd.DataFrame()
    below = found.denominators[baseline].mean(axis=1)
    seeds = _everywhere(found, crossing)
    if len(seeds) < 2:
        return pd.DataFrame()
    cells = {
        name: found.models[name][:, [found.sums.seeds[name].index(seed) for seed in seeds]]
        / below[:, None]
        for name in crossing.signs
    }
    scale = 2 ** (len(crossing.levels) - 1)
    rows = []
    for chosen in crossing.effects():
        at = [list(crossing.levels).index(factor) for factor in chosen]
        weights = {n: math.prod(signs[i] for i in at) for n, signs in crossing.signs.items()}
        contrasts = np.sum([w * cells[n] for n, w in weights.items()], axis=0) / scale
        draws, trained = contrasts.mean(axis=1), [spread(contrasts[0])]
        stderr, half, freedom = chance(draws, len(found.sums.zero), trained, level)
        value = float(draws[0])
        p = float(2 * stats.t.sf(abs(value) / stderr, freedom)) if stderr > 0 else math.nan
        rows.append(
            {"task": found.sums.task, "shift": found.sums.shift, "baseline": baseline}
            | {"effect": crossing.name(chosen), "order": len(chosen), "metric": "score_effect"}
            | {"value": value, "stderr": stderr, "low": value - half, "high": value + half}
            | {"p": p, "seeds": len(seeds), "prompts": len(found.sums.zero)}
            | {"parameters": crossing.growth(chosen[0]) if len(chosen) == 1 else math.nan}
        )
    return pd.DataFrame(rows)


def step_effects(arrivals: pd.DataFrame, crossing: Crossed, *, level: float = 0.95) -> pd.DataFrame:
    """exp β_f of every factor, for each function class and threshold: task, threshold, effect,
    metric (step_ratio), value, low, high, p, seeds, arrived.

    Thresholds that fewer than half of the seeds reached, or whose likelihood has no maximum, have
    no row.
    """
    rows: list[dict[str, Any]] = []
    own = arrivals.loc[arrivals["architecture"].isin(list(crossing.signs))]
    key: Any
    for key, part in own.groupby(["task", "threshold"], sort=False):
        last, arrived = times_on_the_way(part)
        signs = np.array([crossing.signs[name] for name in part["architecture"]], dtype=float)
        design = np.c_[np.ones(len(part)), signs / 2]
        steps, of_seed = last + 1, part["seed"].to_numpy()
        seeds = np.unique(of_seed)
        if 2 * arrived.sum() < len(part) or len(seeds) < 2:
            continue
        lower = np.where(arrived, steps * (1 - _EXACT), steps)
        upper = np.where(arrived, steps * (1 + _EXACT), np.inf)
        some = [np.ones(len(part), bool), *(of_seed != seed for seed in seeds)]
        fits = [fit_log_normal(design[rows], lower[rows], upper[rows]) for rows in some]
        betas = [fit.coefficients for fit in fits if fit is not None]
        if len(betas) < len(fits):
            continue
        beta, without = betas[0], np.array(betas[1:])
        low, high = jackknife_interval(beta, without, np.zeros(len(seeds), int), level=level)
        wide = float(stats.t.ppf(0.5 + level / 2, len(seeds) - 1))
        for at, factor in enumerate(crossing.levels, start=1):
            stderr = float(high[at] - low[at]) / 2 / wide
            rows.append(
                {"task": key[0], "threshold": key[1], "effect": crossing.name((factor,))}
                | {"metric": "step_ratio", "value": math.exp(beta[at])}
                | {"low": math.exp(low[at]), "high": math.exp(high[at])}
                | {"p": float(2 * stats.t.sf(abs(beta[at]) / stderr, len(seeds) - 1))}
                | {"seeds": len(seeds), "models": len(part), "arrived": int(arrived.sum())}
            )
    return pd.DataFrame(rows)


def with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `holm`: its p corrected over all rows."""
    return table.assign(holm=corrected(table["p"])) if len(table) else table


def _everywhere(found: Drawn, crossing: Crossed) -> list[int]:
    """The seeds whose predictions are finite in every cell."""
    whole = [
        {
            s
            for s, gain in zip(found.sums.seeds[n], found.models[n][0], strict=True)
            if math.isfinite(gain)
        }
        for n in crossing.signs
    ]
    return sorted(set.intersection(*whole))


def _described(cell: Cell) -> dict[str, str] | None:
    """The levels of an architecture of one kind of block, without a Mamba; else None."""
    blocks = set(cell.config.parsed)
    if len(blocks) != 1 or (block := blocks.pop()).has_mamba or block.mixer != "attention":
        return None
    std = cell.config.position_std
    found = {"norm": block.norm, "FFN": block.ffn, "positions": block.position}
    found["layers"] = str(len(cell.config.parsed))
    named = {factor: WORDS.get(word, word) for factor, word in found.items()}
    return named | {"std of positions": "by the law" if std is None else f"{std:g}"}
