"""Does masking the induction heads remove the skill, and would any other heads do?

For k = 1, 2, 4, 8 … the k strongest of the heads given are removed, and so are, in several draws,
k heads of the others: from anywhere (``random``), and from the same layers (``layer_matched``),
for a head that sits low in a model or high costs more or less whatever it does. All are measured on
the same rows (`probes.behaviour`):

    first_copy_loss, second_copy_loss   mean ℓ over a copy of a block of random tokens, nats
    copy_gain                           first − second: what repetition is worth
    icl_score                           late − early loss on text, below 0 where context helps

`effects` compares them row by row. With rows r and random sets d the mean of x_rd has variance
s²(x̄_r)/R + s²(x̄_d)/D: the set that was drawn is as much chance as the row, so the interval is over
both, Student's with Satterthwaite's degrees of freedom. That counts what is left of x_rd without
row and set twice, so it is rather too wide than too narrow. The heads given are no draw.

Where it misleads: where the heads' own layers have too few others, the rest of a layer-matched set
is drawn from the nearest layers (`same_layer` counts). Removing heads also hurts what is built on
them. Choose the heads on other rows than these (other seeds), or the choice fits the rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from ablate.components import Component
from ablate.hooked import HookedModel
from ablate.masks import Mask
from probes.behaviour import context_scores, copy_losses

if TYPE_CHECKING:
    import pandas as pd

    from ablate.fills import Fill
    from probes.repeats import Drawn

RANDOM = ("random", "layer_matched")
SKILLS = ("copy_gain", "icl_score")
"""Measures of which a share can be left."""


class Removed(NamedTuple):
    """One set of heads to remove: how it was chosen, how many, and which draw."""

    set: str
    k: int
    draw: int
    heads: tuple[Component, ...]


class Spread(NamedTuple):
    """A mean over rows and draws, its standard error and its interval."""

    mean: float
    stderr: float
    low: float
    high: float


def masking_effects(
    model: HookedModel,
    heads: Sequence[Component],
    batches: Iterable[Drawn],
    text: Int[Tensor, "example pos"] | None = None,
    *,
    ks: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> pd.DataFrame:
    """What is left without the k strongest heads, and without as many others.

    Args:
        heads: strongest first, as `probes.criterion.passing` gives them; mixers are as good.
        batches: rows that repeat, from `probes.repeats.drawn`.
        text: rows of text, from `probes.behaviour.text_rows`; None for no icl_score.
        ks: how many are removed; by default 1, 2, 4 … and all.
        draws: random sets of each kind; those of larger k contain those of smaller k.
        seed: of the draws.

    Columns: set (whole, induction, random, layer_matched), k, draw, removed, same_layer (heads of
    the set that match one of the k given ones by layer), row (seed and length, or window), measure,
    value. Raises ValueError for no heads, for fewer others than the largest k, and what
    `behaviour.losses` raises.
    """
    import pandas as pd

    sets = removed_sets(model, heads, ks=ks, draws=draws, seed=seed)
    masks = [Mask(one.heads) for one in sets]
    parts = [_copy_measures(copy_losses(model, batches, masks, fill=fill, memory=memory))]
    if text is not None:
        scores = context_scores(model, text, masks, fill=fill, memory=memory)
        scores = scores.loc[scores["measure"] == "icl_score"]
        parts.append(scores.assign(row=[f"window {w}" for w in scores["window"]]))
    found = pd.concat(parts, ignore_index=True)
    layers = {one.k: [h.layer for h in one.heads] for one in sets if one.set == "induction"}
    table = pd.DataFrame(
        {
            "set": [one.set for one in sets],
            "k": [one.k for one in sets],
            "draw": [one.draw for one in sets],
            "removed": [str(mask) for mask in masks],
            "same_layer": [
                (Counter(layers.get(one.k, ())) & Counter(h.layer for h in one.heads)).total()
                for one in sets
            ],
        }
    )
    rows = table.loc[found["mask"].to_numpy()].reset_index(drop=True)
    return rows.join(found[["row", "measure", "value"]])


def removed_sets(
    model: HookedModel,
    heads: Sequence[Component],
    *,
    ks: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
) -> list[Removed]:
    """The whole model, the strongest k of `heads`, and random sets of the others, for every k.

    Others are those of the same stacks (and kind) that are not among `heads`. Raises ValueError for
    no heads, a head twice or in an encoder, and for a k that there are not enough heads for.
    """
    chosen = [*model.expand(Mask(heads))]
    if not heads or len(chosen) != len(heads):
        raise ValueError(f"masking {len(heads)} heads asked for: give one or more, each once")
    if any(head.stack == "encoder" for head in heads):
        raise ValueError(
            "masking heads of an encoder asked for: losses are read from the decoder, and its "
            "encoder sees no text here; give heads of the decoder"
        )
    if ks is None:
        ks = sorted({*(2**i for i in range(len(heads).bit_length())), len(heads)})
    kinds = {(type(head), head.stack) for head in heads}
    others = [c for c in model.components if (type(c), c.stack) in kinds and c not in chosen]
    if min(ks) < 1 or max(ks) > min(len(heads), len(others)) or draws < 1:
        raise ValueError(
            f"k of {list(ks)} in {draws} draws asked for: {len(heads)} heads are given and "
            f"{len(others)} others are left; give at least one draw and k up to "
            f"{min(len(heads), len(others))}"
        )
    generator = torch.Generator().manual_seed(seed)
    sets = [Removed("whole", 0, 0, ())]
    sets += [Removed("induction", k, 0, tuple(heads[:k])) for k in ks]
    for draw in range(draws):
        order = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        sets += [Removed("random", k, draw, tuple(order[:k])) for k in ks]
        order = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        matched = _matched(heads[: max(ks)], order)
        sets += [Removed("layer_matched", k, draw, matched[:k]) for k in ks]
    return sets


def _matched(heads: Sequence[Component], order: Sequence[Component]) -> tuple[Component, ...]:
    """For each head one of its layer, the first in `order` that is left, else of a near layer."""
    left = list(order)
    partners: dict[Component, Component] = {}
    # Own layers first, so that nobody takes what would match another head.
    for farthest in (0, math.inf):
        for head in [h for h in heads if h not in partners]:
            distances = [_distance(head, other) for other in left]
            if distances and min(distances) <= farthest:
                partners[head] = left.pop(distances.index(min(distances)))
    return tuple(partners[head] for head in heads)


def _distance(a: Component, b: Component) -> float:
    """Layers between two heads; infinitely many between stacks."""
    return float(abs(a.layer - b.layer)) if a.stack == b.stack else math.inf


def effects(frame: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Differences of sets, paired by row: k, measure, set, against, and what is found.

    Every set against the whole model, and the induction heads against each kind of random set.
    value and baseline (means of both), difference with stderr, low and high; for a skill against
    the whole model `left`, its share that remains, with left_low and left_high (nan where the whole
    model has no skill beyond chance); rows, draws (different sets), lowest and
    highest (means of single sets). A spread over one row is nan; one set alone is a given one.
    """
    import pandas as pd

    found = []
    for measure in frame["measure"].unique():
        of = frame.loc[frame["measure"] == measure]
        whole = _by_row(of, "whole", 0)
        has_skill = _has_skill(measure, whole, level)
        for k in sorted(set(of["k"]) - {0}):
            values = {name: _by_row(of, name, k) for name in ("induction", *RANDOM)}
            pairs = [(name, "whole", whole) for name in values]
            pairs += [("induction", name, values[name]) for name in RANDOM]
            for name, against, baseline in pairs:
                x = values[name]
                spread = over_rows_and_draws(x - baseline, level)
                row = {"k": k, "measure": measure, "set": name, "against": against}
                row |= {"value": x.mean(), "baseline": baseline.mean(), "difference": spread.mean}
                row |= {"stderr": spread.stderr, "low": spread.low, "high": spread.high}
                share = (
                    _share(x, whole, level)
                    if against == "whole" and has_skill
                    else Spread(*[math.nan] * 4)
                )
                row |= {"left": share.mean, "left_low": share.low, "left_high": share.high}
                of_sets = x.mean(0)
                row |= {"lowest": of_sets.min(), "highest": of_sets.max()}
                found.append(row | {"rows": len(x), "draws": max(x.shape[1], baseline.shape[1])})
    return pd.DataFrame(found)


def over_rows_and_draws(x: Float[np.ndarray, "row draw"], level: float = 0.95) -> Spread:
    """Mean of a crossed sample and its interval; a single column is no draw but a given set."""
    rows, draws = x.shape
    mean = float(x.mean())
    parts = [(x.mean(1).var(ddof=1) / rows, rows - 1)] if rows > 1 else [(math.nan, 1)]
    if draws > 1:
        parts.append((x.mean(0).var(ddof=1) / draws, draws - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Spread(mean, 0.0, mean, mean)
    # In shares of the variance, whose square may be too small for a float.
    freedom = 1 / sum((part / variance) ** 2 / n for part, n in parts)
    stderr = float(np.sqrt(variance))
    half = stderr * float(stats.t.ppf(0.5 + level / 2, freedom))
    return Spread(mean, stderr, mean - half, mean + half)


def _share(
    x: Float[np.ndarray, "row draw"], whole: Float[np.ndarray, "row 1"], level: float
) -> Spread:
    """mean x / mean whole, with the interval of the linearised ratio."""
    share = float(x.mean() / whole.mean())
    about = over_rows_and_draws((x - share * whole) / whole.mean(), level)
    return Spread(share, about.stderr, share + about.low, share + about.high)


def _has_skill(measure: str, whole: Float[np.ndarray, "row 1"], level: float) -> bool:
    """Does the interval of the whole model leave 0 out?"""
    spread = over_rows_and_draws(whole, level)
    return measure in SKILLS and (spread.low > 0 or spread.high < 0)


def _by_row(frame: pd.DataFrame, name: str, k: int) -> Float[np.ndarray, "row draw"]:
    """Values of one set; a pivot sorts its rows, so they are in the same order for all sets."""
    chosen = frame.loc[(frame["set"] == name) & (frame["k"] == k)]
    # A set that was drawn twice is one set: where few heads are left, draws repeat.
    chosen = chosen.loc[chosen["draw"].isin(chosen.drop_duplicates("removed")["draw"])]
    return chosen.pivot(index="row", columns="draw", values="value").to_numpy()


def _copy_measures(losses: pd.DataFrame) -> pd.DataFrame:
    """Means over the first and the second copy of every row, and what lies between."""
    two = losses.loc[losses["copy"] < 2]
    means = two.groupby(["mask", "seed", "length", "copy"])["loss"].mean().unstack("copy")
    means.columns = ["first_copy_loss", "second_copy_loss"]
    means["copy_gain"] = means["first_copy_loss"] - means["second_copy_loss"]
    tidy = means.melt(var_name="measure", ignore_index=False).reset_index()
    names = [f"seed {s}, length {n}" for s, n in zip(tidy["seed"], tidy["length"], strict=True)]
    return tidy.assign(row=names)
