"""Does a difference follow the norm, the FFN, or where positions come from?

Where a function class was learned by architectures that are alike but for k factors of two levels
each, every combination once (`crossed`), x_f = −1 at the level of the first architecture and +1 at
the other. With m_c the mean over seeds of cell c's score, the effect of a set s of factors is

    E_s = Σ_c (Π_{f ∈ s} x_f(c)) · m_c / 2^(k−1)

of one factor: by how much its second level is better than its first, averaged over all levels of
the others; of two: half of what the second level of one adds to the effect of the other; and so on
(Box, Hunter & Hunter 2005, ch. 5). Seeds are the replicates and every cell is part of every effect:
V = V_p + Σ_c s_c² / (K_c · 4^(k−1)), V_p from prompts that are drawn again for all cells at once,
t with Welch's and Satterthwaite's degrees of freedom, Holm over all effects and function classes.

Of the steps to a threshold, log T = b + Σ_f β_f x_f / 2 + σe by maximum likelihood, where a seed
that never got there counts with T beyond its last step (one that diverged, beyond the group's
end): exp β_f is how many times as many steps the second level takes. Student's t with rows − terms
degrees of freedom.

Where it misleads. A factor's effect is a mean over the others' levels: read it beside its
interactions, where one of them is as large, it has no meaning of its own. Seeds of unequal spread
(some stuck, some not) make t rough. Factors that were not crossed, the learning rate first of all,
may turn any of it around.
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
from experiments.hybrids.measuring.scores import Drawn, chance, finite, spread, usable
from experiments.hybrids.measuring.waiting import times_on_the_way
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
    """

    levels: Mapping[str, tuple[str, str]]
    signs: Mapping[str, tuple[int, ...]]

    def name(self, of: Sequence[str]) -> str:
        """What an effect is called: `RMSNorm, not LayerNorm`; `norm × FFN`."""
        if len(of) > 1:
            return " × ".join(of)
        first, second = self.levels[of[0]]
        return f"{of[0]} {second}, not {first}"

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
    return Crossed(varied, signs) if whole and len(varied) > 1 else None


def score_effects(
    found: Drawn, baseline: str, crossing: Crossed, *, level: float = 0.95
) -> pd.DataFrame:
    """E_s of the scores against a baseline: task, shift, baseline, effect, order, metric
    (score_effect), value, stderr, low, high, p, seeds. None where a cell has fewer than two seeds
    with finite predictions."""
    if baseline not in found.denominators or not usable(found, baseline):
        return pd.DataFrame()
    below = found.denominators[baseline].mean(axis=1)
    cells = {n: finite(found.models[n]) / below[:, None] for n in crossing.signs}
    if min(gains.shape[1] for gains in cells.values()) < 2:
        return pd.DataFrame()
    scale = 2 ** (len(crossing.levels) - 1)
    rows = []
    for chosen in crossing.effects():
        at = [list(crossing.levels).index(factor) for factor in chosen]
        weights = {n: math.prod(signs[i] for i in at) for n, signs in crossing.signs.items()}
        draws = np.sum([w * cells[n].mean(axis=1) for n, w in weights.items()], axis=0) / scale
        trained = [spread(gains[0] / scale) for gains in cells.values()]
        stderr, half, freedom = chance(draws, len(found.sums.zero), trained, level)
        value = float(draws[0])
        p = float(2 * stats.t.sf(abs(value) / stderr, freedom)) if stderr > 0 else math.nan
        rows.append(
            {"task": found.sums.task, "shift": found.sums.shift, "baseline": baseline}
            | {"effect": crossing.name(chosen), "order": len(chosen), "metric": "score_effect"}
            | {"value": value, "stderr": stderr, "low": value - half, "high": value + half}
            | {"p": p, "seeds": sum(gains.shape[1] for gains in cells.values())}
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
        freedom = len(part) - design.shape[1]
        if 2 * arrived.sum() < len(part) or freedom < 1:
            continue
        steps = last + 1
        upper = np.where(arrived, steps * (1 + _EXACT), np.inf)
        fit = fit_log_normal(design, np.where(arrived, steps * (1 - _EXACT), steps), upper)
        if fit is None:
            continue
        wide = float(stats.t.ppf(0.5 + level / 2, freedom))
        for at, factor in enumerate(crossing.levels, start=1):
            beta, stderr = float(fit.coefficients[at]), float(fit.covariance[at, at] ** 0.5)
            ends = {"low": math.exp(beta - wide * stderr), "high": math.exp(beta + wide * stderr)}
            rows.append(
                {"task": key[0], "threshold": key[1], "effect": crossing.name((factor,))}
                | {"metric": "step_ratio", "value": math.exp(beta)}
                | ends
                | {"p": float(2 * stats.t.sf(abs(beta) / stderr, freedom))}
                | {"seeds": len(part), "arrived": int(arrived.sum())}
            )
    return pd.DataFrame(rows)


def with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `holm`: its p corrected over all rows."""
    return table.assign(holm=corrected(table["p"])) if len(table) else table


def _described(cell: Cell) -> dict[str, str] | None:
    """The levels of an architecture of one kind of block, without a Mamba; else None."""
    blocks = set(cell.config.parsed)
    if len(blocks) != 1 or (block := blocks.pop()).has_mamba or block.mixer != "attention":
        return None
    std = cell.config.position_std
    found = {"norm": block.norm, "FFN": block.ffn, "positions": block.position}
    named = {factor: WORDS.get(word, word) for factor, word in found.items()}
    return named | {"std of positions": "by the law" if std is None else f"{std:g}"}
