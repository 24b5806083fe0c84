"""What do all heads of a model do in one forward on given tokens?

`observe` runs the blocks once and gives numbers for each row and head: masses of attention on
chosen keys, whatever is computed from z and the most attended position, and, if asked, what needs
whole rows of the pattern:

    entropy     −Σ_k A[q, k] log A[q, k], nats, mean over all queries
    distance_d  Σ A[q, q−d] over the distances of one bin (0, 1, 2–3, 4–7, …), mean over all queries
    later       Σ A[q, k] over k > q, mean over all queries

Cross attention has no distances: its queries and keys are places in different rows.

All are taken while the forward runs; neither pattern nor z outlives its layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ablate.components import Stack
from ablate.gates import place_of
from ablate.hooked import HookedModel
from ablate.hooks import Edit, hooked
from ablate.sites import Site
from probes.circuits import has_direct_path
from probes.implicit import watched_mixers
from probes.rows import Rows, watched

Whole = Literal["entropy", "distance"]

Relations = dict[str, Int[Tensor, "batch query entry"]]
"""Score -> the keys that count for every query, −1 for none."""
Found = dict[tuple[str, str], Tensor]
"""(site, score) -> one value for each row and head, [batch, head], on the CPU."""
Scored = Callable[[Site, Tensor, Tensor], None]
"""Told of z [batch, pos, head, d_head] and the position that each query attends to most
[batch, head, pos], for every attention with a direct path to the logits."""


@torch.no_grad()
def observe(
    model: HookedModel,
    tokens: Mapping[Stack, Int[Tensor, "batch pos"]],
    relations: Mapping[Stack, Relations],
    scored: Scored | None = None,
    *,
    whole: Collection[Whole] = (),
    mixers: bool = False,
) -> Found:
    """Masses: mean over the queries that have a key of the attention on their keys.

    Stacks that `relations` does not name are left out, and with them what needs whole rows; with
    `mixers` the implicit attention of SSM mixers (`probes.implicit`) is measured as well.
    """
    totals: Found = {}
    wholes: Found = {}
    reading = {site.name: site for site in model.sites if scored and has_direct_path(model, site)}
    attended: defaultdict[str, list[Tensor]] = defaultdict(list)
    mixed: dict[str, Tensor] = {}

    def complete(site: Site) -> None:
        """As soon as both are there: a fused kernel shows its rows before z, eager after it."""
        if site.name in mixed and site.name in attended:
            z = rearrange(
                mixed.pop(site.name),
                "batch pos (head d_head) -> batch pos head d_head",
                head=site.width,
            )
            assert scored is not None
            scored(site, z, torch.cat(attended.pop(site.name), dim=-1))

    def see(rows: Rows) -> None:
        _add(totals, relations, rows)
        if whole and rows.site.stack in relations:
            _add_whole(wholes, whole, rows)
        if rows.site.name in reading:
            attended[rows.site.name].append(rows.most())
            complete(rows.site)

    def keep(site: Site) -> Edit:
        def edit(z: Tensor) -> None:
            mixed[site.name] = z
            complete(site)

        return edit

    edits = {place_of(site): keep(site) for site in reading.values()}
    kinds = {site.kind for site in model.sites}
    with ExitStack() as seeing:
        if "head" in kinds or not mixers:
            seeing.enter_context(watched(model, see))
        if mixers and "mixer" in kinds:
            seeing.enter_context(watched_mixers(model, see))
        seeing.enter_context(hooked(model.model, edits))
        _forward(model, tokens)
    asking: dict[str, Stack] = {
        site.name: "decoder" if site.stack == "cross" else site.stack for site in model.sites
    }
    means = {
        (name, score): total.cpu() / tokens[asking[name]].shape[1]
        for (name, score), total in wholes.items()
    }
    return _means(model, totals, relations) | means


def _add(totals: Found, relations: Mapping[Stack, Relations], rows: Rows) -> None:
    """Sum over some queries of the attention on their keys."""
    for score, keys in relations.get(rows.site.stack, {}).items():
        part = keys[:, rows.first : rows.first + rows.queries]
        mass = rows.at(part).sum((-2, -1))
        at = rows.site.name, score
        totals[at] = totals[at] + mass if at in totals else mass


def _add_whole(wholes: Found, whole: Collection[Whole], rows: Rows) -> None:
    """Sum over some queries of what needs all of their keys."""
    pattern = rows.pattern()
    found: dict[str, Tensor] = {}
    if "entropy" in whole:
        found["entropy"] = torch.special.entr(pattern).sum((-2, -1))
    if "distance" in whole and rows.site.stack != "cross":
        found |= _by_distance(pattern, rows.first)
    for score, total in found.items():
        at = rows.site.name, score
        wholes[at] = wholes[at] + total if at in wholes else total


def _by_distance(
    pattern: Float[Tensor, "batch head query key"], first: int
) -> dict[str, Float[Tensor, "batch head"]]:
    """Sums over queries of the attention at distances q − k, and at keys behind the query."""
    queries, keys = pattern.shape[-2:]
    up_to = torch.nn.functional.pad(pattern.cumsum(-1), (1, 0))  # [..., k]: keys before k
    query = first + torch.arange(queries, device=pattern.device)

    def before(bound: Tensor) -> Tensor:
        index = bound.clamp(0, keys).expand(*pattern.shape[:2], -1)
        return up_to.gather(-1, index[..., None])[..., 0]

    found: dict[str, Tensor] = {}
    for name, nearest, farthest in distance_bins(first + queries):
        mass = before(query - nearest + 1) - before(query - farthest)
        found[name] = mass.sum(-1)
    found["later"] = (up_to[..., -1] - before(query + 1)).sum(-1)
    return found


def distance_bins(length: int) -> list[tuple[str, int, int]]:
    """(score, nearest, farthest) of every bin of distances in a row of so many tokens."""
    bins = [("distance_0", 0, 0), ("distance_1", 1, 1)]
    nearest = 2
    while nearest < length:
        bins.append((f"distance_{nearest}_{2 * nearest - 1}", nearest, 2 * nearest - 1))
        nearest *= 2
    return bins[: max(1, length)]


def _means(model: HookedModel, totals: Found, relations: Mapping[Stack, Relations]) -> Found:
    """Sums over queries -> means over the queries that have a key."""
    stack_of: dict[str, Stack] = {site.name: site.stack for site in model.sites}
    found: Found = {}
    for (name, score), total in totals.items():
        queries = (relations[stack_of[name]][score] >= 0).any(-1).sum(-1)
        found[name, score] = total.cpu() / queries.cpu().clamp(min=1)[:, None]
    return found


def _forward(model: HookedModel, tokens: Mapping[Stack, Tensor]) -> None:
    """The blocks alone: nobody reads the logits."""
    hf: Any = model.model
    if "decoder" in tokens:
        hf.base_model(
            input_ids=tokens["encoder"], decoder_input_ids=tokens["decoder"], use_cache=False
        )
    else:
        hf.base_model(input_ids=tokens[""], use_cache=False)
