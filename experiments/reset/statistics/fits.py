"""Does the gap go to zero, and by which law?

    power       g(t) = c t^−α
    floored     g(t) = c t^−α + g∞
    stretched   g(t) = c exp(−(t/s)^β)

Each is fitted by least squares of (g − ĝ)/max(|g|, 0.01 nat): relative errors where the gap is
large, absolute ones below what counts as the same loss anyway; c and g∞ are solved for exactly, the
exponents searched. AIC = n log(RSS/n) + 2(k + 1) on those errors, all forms on the same points. The
last octave of t (t > T/2) is then held out: each form is fitted to the rest and its error there is
reported, in nat. c and s are positive, α and β within bounds that are named if reached.

Where it misleads: neighbouring evaluations share their noise, so AIC differences are too sure; at a
constant learning rate g∞ is a floor of the rate, not of the frozen neighbours (anneal, and read
`final_gap`); the first tokens, in warm-up, follow no power law (`start`). Nothing is said beyond
four times the longest run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import optimize

from experiments.reset.statistics.crossing import KEYS, SAME

Form = Literal["power", "floored", "stretched"]
FORMS: tuple[Form, ...] = ("power", "floored", "stretched")
PARAMETERS = {"power": 2, "floored": 3, "stretched": 3}
FURTHEST = 4.0
"""Times the longest run beyond which no fit is asked."""
EXPONENTS = (0.02, 5.0)
"""α and β are searched between these; a fit at an end says so."""
SCALES = (-15.0, 5.0)
"""log s is searched between these, from the middle of log t."""
_SMALLEST = 1e-250
_COLUMNS = (
    *("form", "c", "exponent", "floor", "scale", "points", "rss", "aic", "delta_aic", "best"),
    *("held_error", "held_bias", "held_points", "longest", "reason"),
)


@dataclass(frozen=True)
class Curve:
    """A fitted law; `floor` is g∞ and `scale` s, nan where the form has none."""

    form: Form
    c: float
    exponent: float
    floor: float
    scale: float
    rss: float
    longest: float
    """Tokens of the longest run it was fitted to."""

    def __call__(self, tokens: ArrayLike) -> Float[np.ndarray, "*tokens"]:
        """The gap at `tokens`, not beyond four times the longest run."""
        t = np.asarray(tokens, dtype=float)
        if (t > FURTHEST * self.longest).any() or (t <= 0).any():
            raise ValueError(
                f"the gap after {t.max():g} tokens from runs of {self.longest:g}: a fit is read "
                f"above 0 and up to {FURTHEST:g} times the longest run, train longer for more"
            )
        shape = _shape(self.form, t, self.exponent, self.scale)
        return self.c * shape + (0.0 if np.isnan(self.floor) else self.floor)

    def reaches(self, gap: float) -> float:
        """Tokens at which the fit comes down to `gap`; ∞ below its floor, nan out of reach."""
        left = gap - (0.0 if np.isnan(self.floor) else self.floor)
        if left <= 0:
            return np.inf
        if self.c <= left and self.form == "stretched":
            return 0.0
        if self.form == "stretched":
            tokens = self.scale * np.log(self.c / left) ** (1 / self.exponent)
        else:
            tokens = float(np.exp(min(np.log(self.c / left) / self.exponent, 700.0)))
        return tokens if tokens <= FURTHEST * self.longest else np.nan


def fit(
    tokens: Float[np.ndarray, "point"], gaps: Float[np.ndarray, "point"], form: Form
) -> Curve | None:
    """The law of one form; None with fewer points than its parameters and one to spare."""
    if tokens.size < PARAMETERS[form] + 1 or np.ptp(tokens) == 0:
        return None
    weights = 1 / np.maximum(np.abs(gaps), SAME)
    low, high = np.log(EXPONENTS)
    middle = float(np.exp(np.log(tokens).mean()))

    def solved(searched: Float[np.ndarray, "parameter"]) -> tuple[float, float, float]:
        scale = middle * np.exp(searched[1]) if form == "stretched" else 1.0
        # In units of the middle of t, t^−α neither over- nor underflows.
        units = tokens if form == "stretched" else tokens / middle
        return _linear(_shape(form, units, np.exp(searched[0]), scale), gaps, weights, form)

    grid = np.linspace(low, high, 60)
    if form == "stretched":
        starts = [np.array([a, s]) for a in grid[2:-1:4] for s in np.linspace(*SCALES, 24)[1:-1]]
        start = min(starts, key=lambda x: solved(x)[2])

        def residuals(x: Float[np.ndarray, "parameter"]) -> Float[np.ndarray, "point"]:
            shape = _shape(form, tokens, np.exp(x[0]), middle * np.exp(x[1]))
            return (solved(x)[0] * shape - gaps) * weights

        found = optimize.least_squares(
            residuals, start, bounds=((low, SCALES[0]), (high, SCALES[1])), xtol=1e-10
        ).x
    else:
        start = grid[int(np.argmin([solved(np.array([a]))[2] for a in grid]))]
        near = (max(low, start - (high - low) / 59), min(high, start + (high - low) / 59))
        best = optimize.minimize_scalar(
            lambda a: solved(np.array([a]))[2],
            bounds=near,
            method="bounded",
            options={"xatol": 1e-9},
        )
        found = np.array([best.x if best.fun <= solved(np.array([start]))[2] else start])
    c, floor, rss = solved(found)
    exponent = float(np.exp(found[0]))
    scale = np.nan
    if form == "stretched":
        scale = middle * float(np.exp(found[1]))
    else:
        c *= middle**exponent
    return Curve(form, c, exponent, floor, scale, rss, float(tokens.max()))


def compare_forms(tokens: ArrayLike, gaps: ArrayLike, *, start: float = 0.0) -> pd.DataFrame:
    """One row a form: parameters, AIC, and the error on the last octave when it is held out.

    Columns: form, c, exponent (α or β), floor (g∞), scale (s), points, rss, aic, delta_aic, best,
    held_error (root mean square of ĝ − g over the held-out points, nat), held_bias (their mean),
    held_points, longest, reason (why there is no fit, or which bound it sits at). Evaluations at
    tokens ≤ `start`, at 0 and without a gap are not used.
    """
    t, g = np.asarray(tokens, dtype=float), np.asarray(gaps, dtype=float)
    used = (t > max(start, 0.0)) & np.isfinite(g)
    order = np.argsort(t[used], kind="stable")
    t, g = t[used][order], g[used][order]
    rows = []
    held = t > t[-1] / 2 if t.size else np.zeros(0, dtype=bool)
    for form in FORMS:
        curve, part = fit(t, g, form), fit(t[~held], g[~held], form)
        row = {"form": form, "points": t.size, "held_points": int(held.sum()), "reason": ""}
        if curve is None:
            row["reason"] = f"{t.size} evaluations for {PARAMETERS[form]} parameters"
        else:
            row |= {"c": curve.c, "exponent": curve.exponent, "floor": curve.floor}
            row |= {"scale": curve.scale, "rss": curve.rss, "longest": curve.longest}
            row["aic"] = t.size * np.log(curve.rss / t.size + 1e-300) + 2 * (PARAMETERS[form] + 1)
            if not EXPONENTS[0] * 1.001 < curve.exponent < EXPONENTS[1] / 1.001:
                row["reason"] = f"exponent at its bound {curve.exponent:.2g}"
            if form == "stretched" and curve.scale < t[0] * 1e-3:
                row["reason"] = "s far below the first evaluation: a power law in disguise"
        if part is not None and held.any():
            errors = part(t[held]) - g[held]
            row |= {"held_error": np.sqrt(np.mean(errors**2)), "held_bias": errors.mean()}
        rows.append(row)
    table = pd.DataFrame(rows, columns=pd.Index(_COLUMNS))
    table["delta_aic"] = table["aic"] - table["aic"].min()
    table["best"] = table["delta_aic"] == 0
    return table


def fit_students(ledger: pd.DataFrame, *, weights: str = "raw", start: float = 0.0) -> pd.DataFrame:
    """`compare_forms` of every student's curve: KEYS and its columns. Diverged ones are named."""
    rows = ledger.loc[ledger["weights"] == weights]
    tables = []
    for _, own in rows.groupby(list(KEYS), dropna=False, sort=False):
        own = own.sort_values("tokens", kind="stable")
        table = compare_forms(own["tokens"].to_numpy(), own["gap"].to_numpy(), start=start)
        if own["status"].iloc[-1] == "diverged":
            table["reason"] = "diverged"
        tables.append(table.assign(**{name: own[name].iloc[0] for name in KEYS}))
    names = pd.Index([*KEYS, *_COLUMNS])
    if not tables:
        return pd.DataFrame(columns=names)
    return pd.concat(tables, ignore_index=True).loc[:, names]


def _shape(
    form: Form, t: Float[np.ndarray, "*point"], exponent: float, scale: float
) -> Float[np.ndarray, "*point"]:
    return np.exp(-((t / scale) ** exponent)) if form == "stretched" else t**-exponent


def _linear(
    shape: Float[np.ndarray, "point"],
    gaps: Float[np.ndarray, "point"],
    weights: Float[np.ndarray, "point"],
    form: Form,
) -> tuple[float, float, float]:
    """The best c ≥ 0, g∞ (nan where the form has none) and their sum of squares."""
    size = float(shape.max())
    if size < _SMALLEST:  # c beyond what a float holds
        return 0.0, np.nan, float(np.sum((gaps * weights) ** 2))
    square = weights**2
    unit, centre, floor = shape / size, 0.0, 0.0
    if form == "floored":  # c first, on what is left of both about their weighted means
        centre = float(np.average(unit, weights=square))
        floor = float(np.average(gaps, weights=square))
    moved = unit - centre
    spread = float(np.sum(square * moved**2))
    # A gap that rises has c < 0: no law here does, and a constant is the best each can do.
    c = max(0.0, float(np.sum(square * moved * (gaps - floor)))) / spread if spread else 0.0
    floor -= c * centre
    rss = float(np.sum(square * (gaps - floor - c * unit) ** 2))
    return c / size, floor if form == "floored" else np.nan, rss
