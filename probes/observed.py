"""What do all heads of a model do in one forward on given tokens?

`observe` runs the blocks once and gives two kinds of numbers, for each row and head: masses of
attention on chosen keys, and whatever is computed from z and the most attended position. Both are
taken while the forward runs; neither pattern nor z outlives its layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from ablate.components import Stack
from ablate.gates import place_of
from ablate.hooked import HookedModel
from ablate.hooks import Edit, hooked
from ablate.sites import Site
from probes.circuits import has_direct_path
from probes.rows import Rows, watched

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
    scored: Scored,
) -> Found:
    """Masses: mean over the queries that have a key of the attention on their keys.

    Cross attention, whose keys are another stack's, has no relations.
    """
    totals: Found = {}
    reading = {site.name: site for site in model.sites if has_direct_path(model, site)}
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
            scored(site, z, torch.cat(attended.pop(site.name), dim=-1))

    def see(rows: Rows) -> None:
        _add(totals, relations, rows)
        if rows.site.name in reading:
            attended[rows.site.name].append(rows.most())
            complete(rows.site)

    def keep(site: Site) -> Edit:
        def edit(z: Tensor) -> None:
            mixed[site.name] = z
            complete(site)

        return edit

    edits = {place_of(site): keep(site) for site in reading.values()}
    with watched(model, see), hooked(model.model, edits):
        _forward(model, tokens)
    return _means(model, totals, relations)


def _add(totals: Found, relations: Mapping[Stack, Relations], rows: Rows) -> None:
    """Sum over some queries of the attention on their keys."""
    for score, keys in relations.get(rows.site.stack, {}).items():
        part = keys[:, rows.first : rows.first + rows.scores.shape[2]]
        mass = rows.at(part).sum((-2, -1))
        at = rows.site.name, score
        totals[at] = totals[at] + mass if at in totals else mass


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
