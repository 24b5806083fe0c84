"""How do the scores of several tasks become one, and where do equal scores stand?

Over tasks t, with s_t(c) the score of component c:

    mean   1/T · Σ_t s_t(c)                          (Bansal et al. 2023, eq. 10)
    rank   1/T · Σ_t r_t(c), r_t from 1 (lowest) to N, equal scores sharing their mean rank
    z      1/T · Σ_t (s_t(c) − mean_t) / sd_t        (sd over components, N in the denominator)

The mean lets the task with the largest numbers decide: with gradient scores that is the one with
short prompts and a high loss. Ranks and z-scores give every task one vote. A task that scores all
components alike says nothing and adds the same to each (z: 0).

Where ranks are asked for, ties stay ties. Where an order is needed they must be broken:
`ablate.pruning.ranked` keeps the model's order, which sends the lowest layers first;
`shuffled_ties` draws one, so that several seeds show what the ties leave open.

Activation magnitude knows the data but not the loss. Norms of z, mlp_out and ssm_out are in
different units: compare heads with heads only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from einops import rearrange
from scipy.stats import rankdata
from torch import Tensor

from ablate.components import Component
from ablate.fills import Batch, activations, kept_tokens
from ablate.pruning import Ranking, random_ranking, ranked

if TYPE_CHECKING:
    from ablate.hooked import HookedModel

Scores = Mapping[Component, float]
Combination = Literal["mean", "rank", "z"]


def combined(tables: Mapping[str, Scores], how: Combination = "mean") -> dict[Component, float]:
    """One score a component from those of several tasks, in the order of the first table.

    Raises ValueError for no tables, tables of different components, and scores that are not finite.
    """
    if not tables:
        raise ValueError("an aggregate of no scores asked for: give at least one task's")
    first = next(iter(tables))
    components = tuple(tables[first])
    for name, table in tables.items():
        if table.keys() != tables[first].keys():
            odd = min(table.keys() ^ tables[first].keys(), key=str)
            raise ValueError(
                f"{odd} is scored in one of {first!r} and {name!r} only: an aggregate needs the "
                "same components in all"
            )
        ranked(table)  # refuses what is not finite
    scores = np.array([[table[c] for c in components] for table in tables.values()])
    match how:
        case "mean":
            scaled = scores
        case "rank":
            scaled = rankdata(scores, axis=1)
        case "z":
            centred = scores - scores.mean(axis=1, keepdims=True)
            spread = scores.std(axis=1, keepdims=True)
            # Equal scores have a spread of rounding errors, not of 0.
            alike = spread <= 1e-12 * np.abs(scores).max(axis=1, keepdims=True)
            scaled = np.where(alike, 0.0, centred / np.where(alike, 1.0, spread))
    return dict(zip(components, scaled.mean(axis=0).tolist(), strict=True))


def average_ranks(scores: Scores) -> dict[Component, float]:
    """1 for the lowest score to N for the highest; equal scores share the mean of their ranks."""
    ranked(scores)
    ranks = rankdata(list(scores.values())).tolist()
    return dict(zip(scores, ranks, strict=True))


def ties(scores: Scores) -> list[Ranking]:
    """The groups of two or more components with one score, lowest score first."""
    groups: dict[float, list[Component]] = {}
    for component in ranked(scores):
        groups.setdefault(scores[component], []).append(component)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def shuffled_ties(scores: Scores, generator: torch.Generator) -> Ranking:
    """Components by ascending score; each order of equal scores is as likely as any other."""
    shuffled = random_ranking(tuple(scores), generator)
    return ranked({component: scores[component] for component in shuffled})


def activation_magnitudes(model: HookedModel, batches: Iterable[Batch]) -> dict[Component, float]:
    """Mean Euclidean norm of z, mlp_out or ssm_out over the tokens of `batches`.

    Padding does not count; batches go through one at a time, and masks in force count. Raises
    ValueError for no batches, or none but padding.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for batch in batches:
        for site, x in activations(model, batch).items():
            each = rearrange(x.float(), "batch pos (gate d) -> batch pos gate d", gate=site.width)
            keep = kept_tokens(batch, site, x).double()
            norms = (each.norm(dim=-1).double() * keep[..., None]).sum((0, 1)).cpu()
            sums[site.name] = sums.get(site.name, torch.zeros_like(norms)) + norms
            counts[site.name] = counts.get(site.name, 0.0) + float(keep.sum())
    if not sums or not all(counts.values()):
        raise ValueError("activation magnitude over no tokens: give batches that are not padding")
    return {
        component: norm
        for site in model.sites
        for component, norm in zip(
            site.components, (sums[site.name] / counts[site.name]).tolist(), strict=True
        )
    }
