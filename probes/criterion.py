"""Which heads are induction heads, by an explicit criterion?

A head is one if, over rows of random tokens (a row is a seed and a length of `induction_scan`),

    matches   mean prefix matching ≥ a threshold, and more than under every null: q ≤ level
    copies    the copying score (which one is an argument) lies above a threshold, and so does the
              lower end of its interval over rows
    and its score is neither `positional` nor `unspecific`, nor is it reached at `one_length` only

Nulls, on the same rows: `prefix_matching_control`, the same keys on tokens that do not repeat (what
a position alone gives); `prefix_matching_shuffled`, the keys that would be right for another token
of the block (what looking at earlier copies alone gives). Under a null the sign of a row's
difference is a fair coin: p is the share of sign patterns whose sum is at least the one seen, all
2^n of n rows where n ≤ 16, else sampled as (1 + as many)/(1 + all) (Phipson & Smyth 2010). A head
has to beat every null: its p is the largest (Berger 1982). q is p corrected over all heads of the
scan (Benjamini & Hochberg 1995): at most `level` of the heads called are expected to be false.

`positional`: the control reaches half of the prefix matching, so half of it needs no repetition, as
in a head that looks a fixed distance back. `unspecific`: another null reaches half of it.
`one_length`: of several lengths of blocks the threshold is reached at one alone.

Where it misleads: n rows cannot say less than p = 2^−n, and of H heads a lone one needs p no larger
than level/H (`rows_needed`). q says that a head matches better than its nulls, however little; how
much is called induction the thresholds say, and they are a convention. Heads are tested on the same
tokens, so their p-values depend on each other, mostly in the way that Benjamini & Hochberg allow;
`correction="by"` allows any. Rows are random tokens; what a head does on text is another question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from ablate.components import Component, parse_component

if TYPE_CHECKING:
    import pandas as pd

MATCHING = "prefix_matching"
CONTROL = "prefix_matching_control"
NULLS = (CONTROL, "prefix_matching_shuffled")
CONFIDENCE = 0.95
"""Of the intervals over rows."""
EXACT_ROWS = 16
"""Rows up to which all sign patterns are tried."""
SUMS = 4_000_000
"""Sums over sign patterns formed at a time."""
TIE = 1e-9
"""Sums that differ by less, as a share of the largest possible one, are equal: the order of
summation must not decide."""


@dataclass(frozen=True)
class Criterion:
    """What is asked of an induction head."""

    matching: float = 0.3
    """Least mean prefix matching, as a share of the head's attention."""
    copying: float = 0.0
    """What the copying score must exceed: 0 logits, or 0 on a scale from −1 to 1."""
    by: str = "attribution"
    """The copying score: attribution (logits), copying (Olsson et al.), ov (eigenvalues) …"""
    nulls: tuple[str, ...] = NULLS
    """Scores that prefix matching must beat."""
    level: float = 0.05
    """Largest q."""
    correction: Literal["bh", "by"] = "bh"
    """Benjamini–Hochberg, or Benjamini–Yekutieli, which holds under any dependence."""
    share: float = 0.5
    """Share of a head's prefix matching that no null must reach, whatever its q."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.share <= 0 or not self.nulls:
            raise ValueError(
                f"level {self.level}, share {self.share}, nulls {self.nulls}: give a "
                "level between 0 and 1, a share above 0 and at least one null"
            )


def rows_needed(
    heads: int, level: float = 0.05, found: int = 1, correction: Literal["bh", "by"] = "bh"
) -> int:
    """Rows (seeds × lengths) with which `found` of `heads` heads can be called at all.

    The smallest p of n rows is 2^−n and Benjamini–Hochberg asks for p ≤ level·found/heads:
    n ≥ log2(heads/(level·found)). A lone head takes 9 rows among 24, 12 among 144, 17 among 4608.
    """
    if heads < 1 or not 1 <= found <= heads or not 0 < level < 1:
        raise ValueError(
            f"{found} of {heads} heads at level {level}: give 1 ≤ found ≤ heads and a level between"
            " 0 and 1"
        )
    largest = _largest_p(heads, level, found, correction)
    rows = 1
    while 2.0**-rows > largest:
        rows += 1
    return rows


def _largest_p(heads: int, level: float, found: int, correction: str) -> float:
    """With which `found` heads of equal p are called while all others have p = 1."""
    largest = level * found / heads
    return largest / sum(1 / n for n in range(1, heads + 1)) if correction == "by" else largest


def judged(
    frame: pd.DataFrame,
    criterion: Criterion = Criterion(),  # noqa: B008  a frozen value
    *,
    seed: int = 0,
    resamples: int | None = None,
) -> pd.DataFrame:
    """One row per head of a scan: its scores, what was tested, and whether it is an induction head.

    Args:
        frame: as `induction_scan` gives it: component, seed, length, score, value.
        seed: of the sampled sign patterns, where there are too many to try all.
        resamples: how many of them; by default twice what a lone head takes to be called, and at
            least 9,999.

    Columns: component; for prefix matching, every null and the copying score its mean and the ends
    of Student's 95 % interval over rows (`<score>`, `<score>_low`, `<score>_high`); `p_<null>`, p,
    q; lengths_matched; matches, copies, positional, unspecific, one_length, induction; rows,
    lengths.

    A head without the copying score (in an encoder, which no logits are read from) has nan there
    and is no induction head. Raises ValueError for a score that the frame lacks, for heads that
    were not all measured on the same rows, and for too few rows or sign patterns to call a lone
    head.
    """
    import pandas as pd

    matching = _table(frame, MATCHING)
    others = {name: _table(frame, name, like=matching) for name in (CONTROL, *criterion.nulls)}
    heads, rows = matching.shape
    sampled = _sign_patterns(heads, rows, criterion, resamples)
    columns = _intervals(MATCHING, matching)
    for name, table in others.items():
        columns |= _intervals(name, table)
    columns |= _intervals(criterion.by, _copying(frame, criterion.by, matching))
    for null in criterion.nulls:
        differences = (matching - others[null]).to_numpy().T
        columns[f"p_{null}"] = sign_flip_p(
            differences, np.random.default_rng(seed), resamples=sampled
        )
    p = np.max([columns[f"p_{null}"] for null in criterion.nulls], axis=0)
    q = stats.false_discovery_control(p, method=criterion.correction)
    at_length = matching.T.groupby(level="length").mean()
    reached = (at_length.to_numpy() >= criterion.matching).sum(axis=0)
    judgement = pd.DataFrame({"component": matching.index, **columns})
    judgement["p"], judgement["q"] = p, q
    judgement["lengths_matched"] = reached
    judgement["matches"] = (columns[MATCHING] >= criterion.matching) & (q <= criterion.level)
    judgement["copies"] = columns[f"{criterion.by}_low"] > criterion.copying
    too_much = criterion.share * columns[MATCHING]
    judgement["positional"] = columns[CONTROL] >= too_much
    judgement["unspecific"] = np.any(
        [columns[null] >= too_much for null in criterion.nulls if null != CONTROL] or [False],
        axis=0,
    )
    judgement["one_length"] = (reached == 1) & (len(at_length) > 1)
    rejected = judgement[["positional", "unspecific", "one_length"]].any(axis=1)
    judgement["induction"] = judgement["matches"] & judgement["copies"] & ~rejected
    judgement["rows"], judgement["lengths"] = rows, len(at_length)
    return judgement


def passing(judgement: pd.DataFrame) -> tuple[Component, ...]:
    """The induction heads among those judged, strongest prefix matching first."""
    chosen = judgement.loc[judgement["induction"]]
    order = np.argsort(-chosen[MATCHING].to_numpy(), kind="stable")
    return tuple(parse_component(str(name)) for name in chosen["component"].to_numpy()[order])


def sign_flip_p(
    differences: Float[np.ndarray, "row head"],
    generator: np.random.Generator,
    *,
    resamples: int = 9_999,
) -> Float[np.ndarray, "head"]:
    """P(Σ ±d ≥ Σ d) of every column over fair signs: small where differences are above 0.

    Over all sign patterns for up to EXACT_ROWS rows, else (1 + as many)/(1 + resamples) of sampled
    ones, which all columns share.
    """
    rows, heads = differences.shape
    least = differences.sum(0) - TIE * np.abs(differences).sum(0)
    patterns = 2**rows if rows <= EXACT_ROWS else resamples
    at_once = max(1, SUMS // max(rows, heads))
    as_large = np.zeros(heads, dtype=np.int64)
    for first in range(0, patterns, at_once):
        count = min(at_once, patterns - first)
        if rows <= EXACT_ROWS:
            bits = (np.arange(first, first + count)[:, None] >> np.arange(rows)) & 1
        else:
            bits = generator.integers(0, 2, (count, rows))
        as_large += ((1.0 - 2.0 * bits) @ differences >= least).sum(0)
    if rows <= EXACT_ROWS:
        return as_large / patterns
    return (1 + as_large) / (1 + patterns)


def _sign_patterns(heads: int, rows: int, criterion: Criterion, resamples: int | None) -> int:
    """Sign patterns to sample, where that is done. Raises ValueError where none could be enough."""
    needed = rows_needed(heads, criterion.level, 1, criterion.correction)
    if rows < needed:
        raise ValueError(
            f"{rows} rows (seeds × lengths) to judge {heads} heads at level {criterion.level}: the "
            f"smallest p is 2^−{rows}, so no lone head could pass; scan {needed} rows or more"
        )
    least = math.ceil(1 / _largest_p(heads, criterion.level, 1, criterion.correction))
    if rows > EXACT_ROWS and resamples is not None and resamples < least:
        raise ValueError(
            f"{resamples} sign patterns to judge {heads} heads at level {criterion.level}: no lone "
            f"head could pass; sample {least} or more"
        )
    return resamples or max(9_999, 2 * least)


def _table(frame: pd.DataFrame, score: str, like: pd.DataFrame | None = None) -> pd.DataFrame:
    """One score, [component, (seed, length)], in the frame's order."""
    chosen = frame.loc[frame["score"] == score]
    if chosen.empty:
        there = ", ".join(map(str, frame["score"].unique()))
        raise ValueError(f"no score {score!r} in this scan: it has {there}")
    if chosen.duplicated(["component", "seed", "length"]).any():
        raise ValueError(f"{score} was measured twice in a row: give one scan, not several")
    table = chosen.pivot(index="component", columns=["seed", "length"], values="value")
    if like is None:
        table = table.reindex(index=list(dict.fromkeys(chosen["component"])))
    else:
        table = table.reindex(index=like.index, columns=like.columns)
    missing = table.isna().any(axis=1).to_numpy()
    if missing.any():
        raise ValueError(
            f"{score} of {table.index[missing][0]} was not measured on every row that has "
            f"{MATCHING}: scan both on the same seeds and lengths"
        )
    return table


def _copying(frame: pd.DataFrame, score: str, like: pd.DataFrame) -> pd.DataFrame:
    """The copying score of every head; nan where it has none. One value a head, of its weights, is
    the same on every row."""
    import pandas as pd

    chosen = frame.loc[frame["score"] == score]
    if len(chosen) and not chosen.duplicated(["component"]).any():
        values = chosen.set_index("component")["value"].reindex(like.index)
        return pd.DataFrame(dict.fromkeys(like.columns, values), columns=like.columns)
    heads = like.index[like.index.isin(chosen["component"])]
    return _table(frame, score, like.loc[heads]).reindex(like.index)


def _intervals(score: str, table: pd.DataFrame) -> dict[str, Float[np.ndarray, "head"]]:
    """Mean over rows with the ends of Student's interval."""
    values = table.to_numpy()
    rows = values.shape[1]
    mean = values.mean(1)
    spread = values.std(1, ddof=1) / math.sqrt(rows)
    half = spread * float(stats.t.ppf(0.5 + CONFIDENCE / 2, rows - 1))
    return {score: mean, f"{score}_low": mean - half, f"{score}_high": mean + half}
