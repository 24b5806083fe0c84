"""Which entries of a fused projection are queries and keys, and which are values?

A place `qk` or `vo` of GPT-2, NeoX, Bloom or Falcon is a part of one tensor [q k v]. The tensor as
a whole is in `weights_at`, and the entries that belong to the place are a mask over it:

    thirds     all q, all k, all v
    grouped    for each key/value head: its query heads, k, v

Only outputs are cut, so a mask is whole rows of an nn.Linear, whole columns of GPT-2's Conv1D.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Bool
from torch import Tensor, nn

from ablate.anatomy import Anatomy, Attention
from ablate.places import Part, Place, block_at, weights_at
from ablate.sites import Site, sites


def masks_at(
    hf_model: nn.Module, place: Place, anatomy: Anatomy | None = None
) -> dict[str, Bool[Tensor, "..."]]:
    """Which entries of a tensor are of `place`, for the tensors of which only some are.

    Those are the fused projections under `qk` and `vo`; the dict is empty anywhere else. Whoever
    trains such a place keeps the other entries: zero gradients are not enough with weight decay.
    """
    block = block_at(hf_model, place, anatomy)
    row = block.row.attention
    if place.part not in ("qk", "vo") or row is None or not row.qkv:
        return {}
    site = next(
        site
        for site in sites(hf_model, anatomy)
        if site.block == block.path and site.row == row and site.kind == "head"
    )
    outputs = _fused_outputs(site, row, place.part)
    fused = {
        name: weight
        for name, weight in weights_at(hf_model, place, anatomy).items()
        if name.startswith(f"{block.path}.{row.qkv}.")
    }
    return {name: _spread(outputs, weight) for name, weight in fused.items()}


def _spread(outputs: Bool[Tensor, "out"], weight: Tensor) -> Bool[Tensor, "..."]:
    """A mask of outputs as one of entries: nn.Linear is [out, in], GPT-2's Conv1D [in, out]."""
    at = outputs.to(weight.device)
    if weight.ndim == 1:
        return at
    if weight.shape[0] == len(at):
        return repeat(at, "out -> out width", width=weight.shape[1])
    return repeat(at, "out -> width out", width=weight.shape[0])


def _fused_outputs(site: Site, row: Attention, part: Part) -> Bool[Tensor, "out"]:
    """Which outputs of a fused projection are queries and keys (qk), or values (vo)."""
    if row.layout == "thirds":
        axes = "part width -> (part width)"
        values = torch.zeros(3, site.width * site.d_head, dtype=torch.bool)
        values[2] = True
    else:  # for each key/value head: its query heads, k, v
        axes = "group part width -> (group part width)"
        share = site.width // site.kv_groups
        values = torch.zeros(site.kv_groups, share + 2, site.d_head, dtype=torch.bool)
        values[:, -1] = True
    flat = rearrange(values, axes)
    return flat if part == "vo" else ~flat
