"""Whose predictions does a model follow, and when does it change over?

Not how good a model is, but whom it agrees with. With f the model's predictions, g_b those of
baseline b, and D the squared distance summed over the counted points and averaged over prompts,

    r_b = D(f, g_b) / D(f, 0)            0: it says what b says;  1: no nearer to b than to 0
    m_bc = (D(f, g_c) − D(f, g_b)) / D(g_b, g_c)        1 at b, 0 half-way from b to c, −1 at c

m_bc is where f lies between two schemes; whatever f does off that line is the same in both
distances and cancels. The label is the nearest scheme b if r_b ≤ `CLOSE` and m_bc ≥ `MARGIN` for
every other c, the prediction 0 among them; else "none": far from all, or between two. Zero itself
is a label where D(f, 0) ≤ `CLOSE` · min_c D(g_c, 0). Schemes that say the same on these prompts (D
within `SAME` of what either says) are one, named a = b: on noise-free linear prompts the Bayes
optimum *is* least squares.

Where it misleads. Agreement is measured on prompts: two schemes that differ little in distribution
are told apart by shifted prompts only. A scheme that was not offered cannot be found; "none" may be
a good algorithm. `support` is the share of redrawn prompts with the same label: chance of prompts,
not of seeds. A label at one checkpoint alone may flicker, so a switch has to hold. Least squares on
noisy prompts is huge near as many examples as coordinates: a few prompts decide its distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.regression import squared_error_by_examples

CLOSE = 0.25
"""Largest r_b of a label: what is left of the model's predictions once b's are taken off."""
MARGIN = 0.5
"""How far from half-way: 0.5 is a quarter of the way from b to any other scheme, at most."""
SAME = 1e-3
"""Distance of two schemes, as a share of the smaller one's square, below which they are one."""
ZERO = "zero"
NONE = "none"


@dataclass(frozen=True, eq=False)
class Distances:
    """Squared distances per prompt: all that labels depend on. The first scheme is zero."""

    schemes: tuple[str, ...]
    to_model: Float[np.ndarray, "seed scheme prompt"]
    between: Float[np.ndarray, "scheme other prompt"]


def distances(
    predictions: Float[Tensor, "seed batch point y_dim"],
    schemes: Mapping[str, Float[Tensor, "batch point y_dim"]],
    counted: Bool[Tensor, "batch point"] | None = None,
) -> Distances:
    """Distances of the model of every seed to the schemes, and of the schemes to each other.

    ValueError where nothing but zero is offered.
    """
    given = {name: value for name, value in schemes.items() if name != ZERO}
    if not given:
        raise ValueError("no scheme to follow but zero: give the predictions of a baseline")
    first = next(iter(given.values()))
    named = merged({ZERO: first.new_zeros(first.shape), **given}, counted)
    to_model = [_apart(predictions, value, counted) for value in named.values()]
    between = [[_apart(a, b, counted) for b in named.values()] for a in named.values()]
    return Distances(tuple(named), np.stack(to_model, axis=1), np.array(between))


def merged(
    schemes: Mapping[str, Float[Tensor, "batch point y_dim"]],
    counted: Bool[Tensor, "batch point"] | None = None,
) -> dict[str, Float[Tensor, "batch point y_dim"]]:
    """Schemes that say the same joined under both names, the first one's predictions kept."""
    groups: list[list[str]] = []
    for name, value in schemes.items():
        for group in groups:
            other = schemes[group[0]]
            apart = _apart(value, other, counted).sum()
            sizes = [_apart(x, x.new_zeros(x.shape), counted).sum() for x in (value, other)]
            if apart <= SAME * min(sizes):
                group.append(name)
                break
        else:
            groups.append([name])
    return {" = ".join(group): schemes[group[0]] for group in groups}


def scheme_rows(found: Distances, seeds: Sequence[int]) -> pd.DataFrame:
    """r_b of every seed and scheme: seed, baseline, metric, value, stderr (over prompts)."""
    rows: list[dict[str, Any]] = []
    for seed, own in zip(seeds, found.to_model, strict=True):
        zero = own[0].sum()
        for scheme, sums in zip(found.schemes, own, strict=True):
            ratio = float(sums.sum() / zero) if zero > 0 else math.nan
            spread = float((sums - ratio * own[0]).std(ddof=1)) if sums.size > 1 else math.nan
            stderr = spread * math.sqrt(sums.size) / zero if zero > 0 else math.nan
            rows.append(
                {
                    "seed": seed,
                    "baseline": scheme,
                    "metric": "scheme_distance",
                    "value": ratio,
                    "stderr": 0.0 if scheme == found.schemes[0] else stderr,
                }
            )
    return pd.DataFrame(rows)


def labelled(
    found: Distances,
    seeds: Sequence[int],
    generator: np.random.Generator,
    *,
    close: float = CLOSE,
    margin: float = MARGIN,
    resamples: int = 200,
) -> pd.DataFrame:
    """The label of every seed.

    Columns: seed, label, nearest, distance (r of the nearest), margin (the smallest m against
    another), rival (whose it is), why ("", far, between, broken), support.
    """
    prompts = found.to_model.shape[-1]
    weights = np.vstack(
        [np.ones(prompts), generator.multinomial(prompts, np.full(prompts, 1 / prompts), resamples)]
    )
    # Not "@": prompts of a diverged model are not finite, and 0 · inf would spread to all draws.
    between = np.einsum("dp,bcp->dbc", weights, found.between)
    rows = []
    for seed, own in zip(seeds, found.to_model, strict=True):
        if not np.isfinite(own).all():
            rows.append((seed, NONE, "", math.nan, math.nan, "", "broken", math.nan))
            continue
        sums = weights @ own.T
        nearest, ratio, least, rival = _positions(sums, between)
        chosen = (ratio <= close) & (least >= margin)
        labels = np.where(chosen, nearest, -1)
        b = int(nearest[0])
        why = "" if chosen[0] else "far" if ratio[0] > close else "between"
        rows.append(
            (
                seed,
                found.schemes[b] if chosen[0] else NONE,
                found.schemes[b],
                float(ratio[0]),
                float(least[0]),
                found.schemes[int(rival[0])],
                why,
                float((labels[1:] == labels[0]).mean()) if resamples else math.nan,
            )
        )
    names = ["seed", "label", "nearest", "distance", "margin", "rival", "why", "support"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def switches(labels: pd.DataFrame, by: Sequence[str] = ("seed",), *, hold: int = 2) -> pd.DataFrame:
    """Changes of label over `step` that hold for `hold` checkpoints in a row.

    Columns: by, before, after, later than (the last step with another label), step (the first with
    the new one). A label that the last checkpoint alone has is not counted. The first label that
    holds has no row: nothing was left for it.
    """
    rows = []
    key: Any
    for key, part in labels.groupby(list(by), sort=False, dropna=False):
        part = part.sort_values("step")
        steps, names = part["step"].tolist(), part["label"].tolist()
        current: str | None = None
        for at in range(len(names) - hold + 1):
            if names[at] == current or set(names[at : at + hold]) != {names[at]}:
                continue
            if current is not None:
                change = {"before": current, "after": names[at]}
                times = {"later_than": steps[at - 1], "step": steps[at]}
                rows.append(dict(zip(by, key, strict=True)) | change | times)
            current = names[at]
    return pd.DataFrame(rows, columns=pd.Index([*by, "before", "after", "later_than", "step"]))


def adoptions(
    labels: pd.DataFrame, by: Sequence[str] = ("seed",), *, hold: int = 2
) -> pd.DataFrame:
    """When each seed first followed each scheme that the table has; censored ones are kept.

    Columns: by, scheme, arrived, step: of the first of `hold` checkpoints in a row, or the last
    step there is. Shaped as `arrivals`, so that `waiting.medians` reads it.
    """
    schemes = [name for name in labels["label"].unique() if name != NONE]
    rows = []
    key: Any
    for key, part in labels.groupby(list(by), sort=False, dropna=False):
        part = part.sort_values("step")
        steps, names = part["step"].tolist(), part["label"].tolist()
        for scheme in schemes:
            runs = (
                at for at in range(len(names) - hold + 1) if set(names[at : at + hold]) == {scheme}
            )
            first = next(runs, None)
            step = steps[-1] if first is None else steps[first]
            known = {"scheme": scheme, "arrived": first is not None, "step": float(step)}
            rows.append(dict(zip(by, key, strict=True)) | known)
    return pd.DataFrame(rows, columns=pd.Index([*by, "scheme", "arrived", "step"]))


def _apart(
    a: Float[Tensor, "*seed batch point y_dim"],
    b: Float[Tensor, "batch point y_dim"],
    counted: Bool[Tensor, "batch point"] | None,
) -> Float[np.ndarray, "*seed batch"]:
    """Squared distance of two predictions, summed over the counted points of each prompt."""
    by_point = squared_error_by_examples(a.double(), b.double().expand_as(a))
    if counted is not None:
        by_point = torch.where(counted, by_point, 0.0)
    return by_point.sum(-1).cpu().numpy()


def _positions(
    sums: Float[np.ndarray, "draw scheme"], between: Float[np.ndarray, "draw scheme other"]
) -> tuple[Any, Any, Any, Any]:
    """In each draw: the nearest scheme, its r, its smallest m, and against whom."""
    draws = np.arange(len(sums))
    nearest = sums.argmin(axis=1)
    best = sums[draws, nearest]
    smallest = between[:, 0, 1:].min(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = best / np.where(nearest == 0, smallest, sums[:, 0])
    gap = between[draws, nearest]
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = (sums - best[:, None]) / gap
    margins[draws, nearest] = np.inf
    margins = np.where(np.isnan(margins), 0.0, margins)
    rival = margins.argmin(axis=1)
    return nearest, ratio, margins[draws, rival], rival
