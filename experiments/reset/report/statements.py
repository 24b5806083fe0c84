"""Which sentences do the tests of a study of resets allow?

Fixed before any run: first and last layer against the middle ones and the quadratic in depth, and
local regression against the LM loss, Holm over all of them. Beside them, without a test: what the
last stretch takes (0.01 against 0.1 nat), equivalent progress, gaps against the no-op arm, and the
curve's form with its error on the last octave, which it was not fitted on. A tested sentence says
what was estimated, its interval, and how many students it rests on, or why it is not estimable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.reset.result import TARGETS, THRESHOLD, asked, finished, main, near
from experiments.reset.statistics.contrasts import position_contrasts, target_contrast
from experiments.reset.statistics.crossing import KEYS, final_gap, noise_floor, recovered_within
from experiments.reset.statistics.fits import fit_students
from experiments.statistics import holm

if TYPE_CHECKING:
    from experiments.reset.opened import Opened

SEED = 0
"""Of the sign flips."""
PAIRED = ("base", "base_share", "stack", "layer", "seed", "weights")
NAMES = {"first": "the first layer", "last": "the last layer", "depth²": "an end of the stack"}


def statements(
    ledger: pd.DataFrame, crossings: pd.DataFrame, bases: Sequence[Opened]
) -> tuple[str, ...]:
    """All of them, most general first."""
    own = main(crossings)
    own = finished(own.loc[own["kind"] == "absolute"]) if len(own) else own
    if own.empty:
        return ()
    close = own.loc[near(own, THRESHOLD)]
    return (
        *_positions(close),
        *_tail(own),
        *_progress(ledger, bases),
        *_within_noise(ledger),
        *_forms(ledger),
    )


def _positions(close: pd.DataFrame) -> Iterator[str]:
    """Contrasts of depth for every target, and the targets against each other."""
    found = []
    for target in ("lm", "hidden"):  # named beforehand; what one arm adds takes no part in Holm
        rows = close.loc[close["target"] == target]
        if rows["layer"].nunique() > 2:
            table = position_contrasts(rows, np.random.default_rng(SEED))
            found += [(target, row) for row in table.to_dict("records")]
    targets: list[dict[str, object]] = []
    if {"lm", "hidden"} <= set(close["target"]):
        targets = target_contrast(close).to_dict("records")
    p = [row["p"] for _, row in found] + [row["p"] for row in targets]
    adjusted = holm([1.0 if not np.isfinite(v) else v for v in p]) if p else []
    for (target, row), holm_p in zip(found, adjusted, strict=False):
        name = f"{_begun(target)}: {NAMES[row['contrast']]} against the middle"
        if not np.isfinite(row["value"]):
            yield (
                f"{name}: not estimable ({row['reason']})."
                if row["reason"]
                else f"{name}: not estimable."
            )
            continue
        yield (
            f"{name} takes {_times(row['ratio'])} the tokens to come within {THRESHOLD:g} nat "
            f"({_interval(row['ratio_low'], row['ratio_high'])}; Holm's p "
            f"{_p(float(holm_p))} over {len(p)} "
            f"tests; {row['crossed']} of {row['students']} students crossed; {row['over']})."
        )
    for row, holm_p in zip(targets, adjusted[len(found) :], strict=True):
        value = float(row["value"])  # pyright: ignore[reportArgumentType]
        if not math.isfinite(value):
            yield f"Local regression against the LM loss: not estimable ({row['reason']})."
            continue
        low, high = (math.exp(float(row[end])) for end in ("low", "high"))  # pyright: ignore
        yield (
            f"Local regression takes {_times(math.exp(value))} the tokens of the LM loss to come "
            f"within {THRESHOLD:g} nat, place by place ({_interval(low, high)}; Holm's p "
            f"{_p(float(holm_p))}; {row['over']})."
        )


def _tail(own: pd.DataFrame) -> Iterator[str]:
    """How much longer the last stretch takes than the first."""
    pair = [own.loc[near(own, level)] for level in (0.1, 0.01)]
    both = pair[0].merge(pair[1], on=[*PAIRED, "target"], suffixes=("", "_fine"))
    both = both.loc[np.isfinite(both["tokens"].to_numpy(float)) & (both["tokens"] > 0)]
    for target, rows in both.groupby("target"):
        fine = rows["tokens_fine"].to_numpy(float)
        least = np.where(np.isfinite(fine), fine, rows["at_budget_fine"]) / rows["tokens"]
        yield (
            f"{_begun(str(target))}: of {len(rows)} students that came within 0.1 nat "
            f"{int(np.isfinite(fine).sum())} came within 0.01 nat; the median one takes at least "
            f"{_times(float(np.median(least)))} the tokens (those that did not come count with all "
            "they were given)."
        )


def _progress(ledger: pd.DataFrame, bases: Sequence[Opened]) -> Iterator[str]:
    """Equivalent progress at the end of the budget: where the base's own curve had that loss."""
    rows = main(ledger)
    if rows.empty:
        return
    last = rows.sort_values("tokens").groupby(list(KEYS), dropna=False).tail(1)
    known = {(o.name, o.base.share): o.base for o in bases if o.base.curve}
    for target, some in last.groupby("target"):
        ends = zip(some["base"], some["base_share"], some["gap"], strict=True)
        q = [known[base, at].reached(gap) for base, at, gap in ends if (base, at) in known]
        if q and all(map(math.isfinite, q)):
            yield (
                f"{_begun(str(target))}: at the end of the budget the losses are those that the "
                f"base itself had after {min(q):.0%} to {max(q):.0%} of its training (median "
                f"{float(np.median(q)):.0%}; the base's curve is that of its own schedule)."
            )


def _within_noise(ledger: pd.DataFrame) -> Iterator[str]:
    """Annealed ends against the no-op band."""
    gaps, floor = final_gap(asked(ledger)), noise_floor(ledger)
    if gaps.empty or floor.empty:
        return
    same = recovered_within(gaps, floor)
    yield (
        f"After the rate had gone to 0, {int(same['same'].sum())} of {len(same)} students "
        "were within max(0.01 nat, two standard errors of the no-op arm) of the base; those that "
        "stopped because they were back are not among them."
    )


def _forms(ledger: pd.DataFrame) -> Iterator[str]:
    """Which law the curves follow, by the last octave held out."""
    rows = asked(ledger)
    if rows.empty:
        return
    best = fit_students(rows).query("best")
    held = best["held_error"].abs().dropna()
    if held.empty:
        return
    counts = ", ".join(f"{count} {form}" for form, count in best["form"].value_counts().items())
    yield (
        f"Curves: by AIC {counts}; the last octave, held out, is missed by {held.median():.3f} nat "
        "in the median. Nothing is extrapolated beyond four times the longest run."
    )


def _times(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "an unknown multiple of"
    return f"{ratio:.2g} times"


def _begun(target: str) -> str:
    """A target as a sentence begins."""
    return TARGETS[target][0].upper() + TARGETS[target][1:]


def _interval(low: float, high: float) -> str:
    """Of a ratio."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "too few base runs for an interval"
    return f"95 % interval {low:.2g} to {high:.2g} times"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
