"""After how many tokens is a reset block back, and is it back at all?

With ℓ0 the loss of the base, ℓ_R right after the reset and g(t) = ℓ(t) − ℓ0 after t tokens:

    damage Δ = ℓ_R − ℓ0        recovery R(t) = 1 − g(t)/Δ
    absolute threshold τ: g ≤ τ nat        relative threshold ρ: R ≥ ρ, so g ≤ (1 − ρ)Δ
    h_i = max(g_i, g_{i+1})        M_i = min_{j ≤ i} h_j        crossed: first i with M_i ≤ level

h is what held for two evaluations; M, its running minimum, is a curve that only falls. One dip does
not count, a bump before the crossing does not move it, and M = g where g itself falls.
T_rec is read off M between evaluations i − 1 and i, linear in log t (linear in t before the first
evaluation, where log 0 ends); the interval (lower, upper] are those two evaluations.

- A last evaluation below the level has none after it: it counts only if the run stopped because it
  had recovered (status `recovered`). Otherwise the student is censored at the evaluation before.
- Not crossed: censored, lower = the last evaluation above the level, upper = ∞, tokens = nan.
- Damage below τ from the start, and still below at the next evaluation: tokens = 0 in the interval
  (0, first evaluation]. Where log T is taken this is left-censored: "sooner than we looked".
- A student that was fitted to data (law linear) begins at the tokens of the fit, not at 0.
- Loss above ℓ_R + 0.5 nat at the end, or not finite: diverged, a class of its own, from the last
  evaluation that was neither. A loss that rises so far on its way and comes back has not: towards
  the old block's output the first layer does. A level that was crossed and held before that stays
  crossed (T_rec is a first passage); levels not crossed are `diverged`.
- Damage of 0 or less (nothing was reset): R is not defined, there are no relative rows.
- `annealed` evaluations make a curve only if a student has two or more; one is a final gap.

Where it misleads: M errs late where noise is as large as the fall between two evaluations; coarse
evaluations hide where in the interval it crossed; a threshold below the noise floor measures luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

KEYS = (
    *("base", "family", "architecture", "n_layers", "d_model", "base_seed", "base_share"),
    *("base_tokens", "unique_tokens", "parameters"),
    *("arm", "stack", "layer", "layers", "part", "law", "target"),
    *("variant", "origin"),
    *("unique", "seed", "rate"),
)
"""What tells one student from another, in the ledger and in all that is made from it."""
ABSOLUTE = (0.1, 0.05, 0.02, 0.01)
RELATIVE = (0.5, 0.9, 0.95, 0.99)
DIVERGED = 0.5
"""Nat above the loss right after the reset from which on a run counts as diverged."""
SAME = 0.01
"""Nat: a gap as small as this is "approximately the same", whatever the noise."""
_VALUES = ("tokens", "weights", "loss", "gap", "stderr", "loss_base", "loss_reset", "status")


def crossings(
    ledger: pd.DataFrame,
    absolute: Sequence[float] = ABSOLUTE,
    relative: Sequence[float] = RELATIVE,
) -> pd.DataFrame:
    """One row per student, kind of weights and threshold; nobody is left out for not crossing.

    Columns: KEYS, weights, damage, skip (ℓ_skip − ℓ0; nan where the ledger has none), kind,
    threshold, lower, upper, tokens, status (recovered | censored | diverged), share (tokens/T0),
    at_budget (tokens trained).
    """
    rows = []
    for known, curve in _curves(ledger):
        for kind, threshold, level in _levels(known["damage"], absolute, relative):
            held = _held(curve.gaps[None], curve.confirmed)
            index, tokens = _first(curve.tokens, held, np.array([level]))
            rows.append(
                known
                | {"kind": kind, "threshold": threshold}
                | _outcome(curve, int(index[0]), float(tokens[0]), level)
            )
    names = [*KEYS, "weights", "damage", "skip", "kind", "threshold", "lower", "upper", "tokens"]
    frame = pd.DataFrame(rows, columns=pd.Index([*names, "status", "at_budget"]))
    frame["share"] = frame["tokens"] / frame["base_tokens"].astype(float)
    return frame


def crossing_noise(
    ledger: pd.DataFrame,
    generator: np.random.Generator,
    *,
    absolute: Sequence[float] = ABSOLUTE,
    relative: Sequence[float] = RELATIVE,
    correlation: float = 1.0,
    resamples: int = 200,
    level: float = 0.95,
) -> pd.DataFrame:
    """How far evaluation noise alone may move a crossing: percentiles of a parametric bootstrap.

    Each draw adds stderr · z to the gaps. The held-out rows are the same at every evaluation, so
    their noise is too: `correlation` 1 draws one z a curve, 0 one an evaluation. Columns: as
    `crossings` names the student and threshold, then low, high (∞: not crossed in that draw; nan:
    no standard error) and recovered, the share of draws that crossed.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation {correlation} of evaluations: give one from 0 to 1")
    rows = []
    for known, curve in _curves(ledger):
        common = generator.standard_normal((resamples, 1))
        own = generator.standard_normal((resamples, curve.gaps.size))
        noise = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own
        shift = curve.stderr * noise
        held = _held(curve.gaps + shift, curve.confirmed)
        damage = known["damage"] + shift[:, 0]
        for kind, threshold, at in _levels(known["damage"], absolute, relative):
            levels = np.full(resamples, at) if kind == "absolute" else (1 - threshold) * damage
            low = high = recovered = np.nan
            if np.isfinite(curve.stderr).all():
                tokens = _first(curve.tokens, held, levels)[1]
                tokens = np.where(np.isnan(tokens), np.inf, tokens)
                # No interpolation: between a crossing and ∞ there is nothing to average.
                ends = [(1 - level) / 2, (1 + level) / 2]
                low, high = np.quantile(tokens, ends, method="inverted_cdf")
                recovered = np.isfinite(tokens).mean()
            found = {"low": low, "high": high, "recovered": recovered}
            rows.append(known | {"kind": kind, "threshold": threshold} | found)
    names = [*KEYS, "weights", "kind", "threshold", "low", "high", "recovered"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def equivalent_progress(
    loss: ArrayLike, curve: pd.DataFrame, total: float | None = None
) -> Float[np.ndarray, "*loss"]:
    """q: the share of the base's own training after which the base itself had this loss.

    `curve` has the base's evaluations (tokens, loss); its running minimum is read at `loss`, linear
    in log t, and divided by `total` (default: its last tokens). ∞ for a loss the base never
    reached; 0 at or above its loss at 0 tokens, nan above its first evaluation if that is later.
    """
    ordered = curve.sort_values("tokens")
    tokens = ordered["tokens"].to_numpy(float)
    falling = np.minimum.accumulate(ordered["loss"].to_numpy(float))
    if tokens.size == 0 or not np.isfinite(falling).all():
        raise ValueError(
            f"equivalent progress on a base curve of {tokens.size} evaluations, "
            "of which some may have no loss: give finite tokens and losses"
        )
    wanted = np.asarray(loss, dtype=float)
    held = np.broadcast_to(falling, (wanted.size, falling.size))
    index, found = _first(tokens, held, wanted.ravel())
    found = np.where(index == 0, 0.0 if tokens[0] == 0 else np.nan, found)
    found = np.where((index == tokens.size) & ~np.isnan(wanted.ravel()), np.inf, found)
    return (found / (tokens[-1] if total is None else total)).reshape(wanted.shape)


def noise_floor(
    ledger: pd.DataFrame, by: Sequence[str] = ("base", "base_share"), arm: str = "A1"
) -> pd.DataFrame:
    """What training that has nothing to repair does to the loss: the no-op arm, per `by`.

    Columns: by, mean (of the gap, students first averaged over their evaluations after tokens 0),
    stderr, band (the largest mean over students of |gap| at any evaluation), students. stderr is
    the larger of two: the spread over students, and the evaluation's own error, which comes from
    the same rows for all students and does not shrink with more of them.
    """
    _needs(ledger, (*KEYS, *_VALUES))
    quiet = ledger.loc[(ledger["arm"] == arm) & (ledger["tokens"] > 0)]
    rows = []
    group: Any
    for group, part in quiet.groupby(list(by), dropna=False):
        gaps = part.groupby(list(KEYS), dropna=False)["gap"].mean()
        spread = float(gaps.sem()) if len(gaps) > 1 else 0.0
        evaluation = float(part["stderr"].mean())  # nan where no evaluation has one
        sizes = part.assign(size=np.abs(part["gap"].to_numpy(float)))
        band = float(sizes.groupby("tokens")["size"].mean().max())
        stderr = float(np.fmax(spread, evaluation))
        named = dict(zip(by, group, strict=True))
        known = len(gaps) > 1 or np.isfinite(evaluation)
        rows.append(
            named
            | {"mean": float(gaps.mean()), "stderr": stderr if known else np.nan}
            | {"band": band, "students": len(gaps)}
        )
    return pd.DataFrame(rows, columns=pd.Index([*by, "mean", "stderr", "band", "students"]))


def final_gap(ledger: pd.DataFrame) -> pd.DataFrame:
    """g∞ of every student whose learning rate was annealed to 0: its last `annealed` evaluation.

    Columns: KEYS, tokens, gap, stderr, damage, recovery (1 − gap/damage), status. Students without
    an annealed evaluation have no row: a raw end at a constant rate is not a final gap.
    """
    _needs(ledger, (*KEYS, *_VALUES))
    annealed = ledger.loc[ledger["weights"] == "annealed"].sort_values("tokens", kind="stable")
    last = annealed.groupby(list(KEYS), dropna=False).tail(1).reset_index(drop=True)
    damage = last["loss_reset"] - last["loss_base"]
    last = last.assign(damage=damage, recovery=1 - last["gap"] / damage.where(damage > 0))
    names = [*KEYS, "tokens", "gap", "stderr", "damage", "recovery", "status"]
    return last.loc[:, names]


def recovered_within(
    gaps: pd.DataFrame,
    floor: pd.DataFrame,
    *,
    by: Sequence[str] = ("base", "base_share"),
    smallest: float = SAME,
) -> pd.DataFrame:
    """Is the loss approximately the same: g ≤ max(0.01 nat, 2 standard errors of the no-op arm)?

    `gaps` are rows with a gap (`final_gap`), `floor` comes from `noise_floor` with the same `by`.
    Adds tolerance and same. Where there was no no-op arm, or it has no standard error, the
    tolerance is `smallest`.
    """
    errors = floor.loc[:, [*by, "stderr"]].rename(columns={"stderr": "noise"})
    joined = gaps.merge(errors, on=list(by), how="left", validate="many_to_one")
    tolerance = np.fmax(smallest, 2 * joined["noise"].to_numpy(float))
    joined = joined.assign(tolerance=tolerance, same=joined["gap"] <= tolerance)
    return joined.drop(columns="noise")


@dataclass(frozen=True, eq=False)
class _Curve:
    """One student's evaluations up to where it diverged, if it did; the first is right after the
    reset."""

    tokens: Float[np.ndarray, "evaluation"]
    gaps: Float[np.ndarray, "evaluation"]
    stderr: Float[np.ndarray, "evaluation"]
    trained: float
    second: float
    diverged: bool
    confirmed: bool


def _curve(rows: pd.DataFrame, start: float) -> _Curve:
    rows = rows.sort_values("tokens", kind="stable")
    tokens, gaps = rows["tokens"].to_numpy(float), rows["gap"].to_numpy(float)
    losses, stderr = rows["loss"].to_numpy(float), rows["stderr"].to_numpy(float)
    reset, status = float(rows["loss_reset"].iloc[0]), rows["status"].iloc[-1]
    if tokens[0] > start:  # annealed and averaged curves begin at the same reset
        damage = reset - float(rows["loss_base"].iloc[0])
        tokens, gaps = np.r_[start, tokens], np.r_[damage, gaps]
        losses, stderr = np.r_[reset, losses], np.r_[stderr[0], stderr]
    sane = np.isfinite(losses) & np.isfinite(gaps) & ~(losses > reset + DIVERGED)
    until = int(np.flatnonzero(sane)[-1]) + 1 if sane.any() else 1
    diverged = until < sane.size or status == "diverged"
    return _Curve(
        tokens[:until],
        np.where(np.isfinite(gaps[:until]), gaps[:until], np.inf),
        stderr[:until],
        trained=float(tokens[-1]),
        second=float(tokens[min(1, tokens.size - 1)]),
        diverged=diverged,
        confirmed=not diverged and status == "recovered",
    )


def _curves(ledger: pd.DataFrame) -> Iterator[tuple[dict[str, Any], _Curve]]:
    """Every student and kind of weights that makes a curve, with what is known of it."""
    _needs(ledger, (*KEYS, *_VALUES))
    # A student that was fitted to data begins with the tokens of the fit, others with none.
    fitted = ledger["tokens"].where(ledger["law"] == "linear", 0.0)
    ledger = ledger.assign(begun=fitted)
    ledger["begun"] = ledger.groupby(list(KEYS), dropna=False)["begun"].transform("min")
    names: Any
    for names, rows in ledger.groupby([*KEYS, "weights"], dropna=False, sort=False):
        known: dict[str, Any] = dict(zip([*KEYS, "weights"], names, strict=True))
        twice = rows["tokens"].duplicated()
        if twice.any():
            raise ValueError(
                f"two evaluations of one student at {rows.loc[twice, 'tokens'].iloc[0]:g} tokens "
                f"({', '.join(f'{k}={v}' for k, v in known.items())}): a column that tells "
                "students apart is not among the keys, or rows were joined twice"
            )
        if known["weights"] == "annealed" and (rows["tokens"] > 0).sum() < 2:
            continue
        first = rows.iloc[0]
        known["damage"] = float(first["loss_reset"] - first["loss_base"])
        known["skip"] = float(first.get("loss_skip", np.nan) - first["loss_base"])
        yield known, _curve(rows, float(rows["begun"].iloc[0]))


def _levels(
    damage: float, absolute: Sequence[float], relative: Sequence[float]
) -> Iterator[tuple[str, float, float]]:
    yield from (("absolute", threshold, threshold) for threshold in absolute)
    if damage > 0:
        yield from (("relative", share, (1 - share) * damage) for share in relative)


def _held(
    gaps: Float[np.ndarray, "draw evaluation"], confirmed: bool
) -> Float[np.ndarray, "draw evaluation"]:
    """M: the running minimum of what held for two evaluations."""
    last = gaps[:, -1:] if confirmed else np.full_like(gaps[:, -1:], np.inf)
    held = np.concatenate([np.maximum(gaps[:, :-1], gaps[:, 1:]), last], axis=1)
    return np.minimum.accumulate(held, axis=1)


def _first(
    tokens: Float[np.ndarray, "evaluation"],
    falling: Float[np.ndarray, "draw evaluation"],
    level: Float[np.ndarray, "draw"],
) -> tuple[Int[np.ndarray, "draw"], Float[np.ndarray, "draw"]]:
    """First evaluation at or below the level (their number where none is) and the tokens there."""
    below = falling <= level[:, None]
    index = np.where(below.any(axis=1), below.argmax(axis=1), tokens.size)
    found = np.full(level.size, np.nan)
    found[index == 0] = tokens[0]
    (some,) = np.nonzero((index > 0) & (index < tokens.size))
    right = index[some]
    t0, t1 = tokens[right - 1], tokens[right]
    v0, v1 = falling[some, right - 1], falling[some, right]
    with np.errstate(divide="ignore", invalid="ignore"):
        way = np.where(np.isfinite(v0), (v0 - level[some]) / (v0 - v1), 1.0)
        logarithmic = t0 * (t1 / t0) ** way
    found[some] = np.where(t0 > 0, logarithmic, way * t1)
    return index, found


def _outcome(curve: _Curve, index: int, tokens: float, level: float) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": tokens, "status": "recovered"}
    if index == 0:
        found |= {"lower": 0.0, "upper": curve.second}
    elif index < curve.tokens.size:
        found |= {"lower": curve.tokens[index - 1], "upper": curve.tokens[index]}
    else:
        above = curve.tokens[curve.gaps > level]
        found |= {"lower": above[-1] if above.size else 0.0, "upper": np.inf}
        found["status"] = "diverged" if curve.diverged else "censored"
    return found | {"at_budget": curve.trained}


def _needs(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ValueError(f"the ledger has no column {', '.join(missing)}: it needs them all")
