"""What does the code of Bansal et al. (2023) itself report as prefix matching and copying?

Their appendix (A.4, Algorithms 1 and 2) says one thing, their script computes another. These are
the script's numbers; `probes.attention` and `probes.copying` have the scores as defined.

    prefix_matching_reference   r copies of L tokens; over the rL − L queries of copies 2 and later
                                the mean of Σ A[q, k], k behind every earlier copy of token q. The
                                last token of each of these copies also counts the first token of
                                the first copy.

    copying_reference           rL tokens that do not repeat. In every layer attention and values
                                are those of the embeddings with their positions, through that
                                layer's own norm: the stream is never advanced. For head h

        p_j = softmax over the vocabulary of (x_j · W_V[h] · W_O[h] + b_O) · W_U
        raised_j[k] = max(0, p_j[token k] − mean over k ≤ j of p_j[token k])
        score = mean over j ≥ 1 of raised_j[a_j] / Σ_k raised_j[k], 0 where nothing is raised

with a_j the position that j attends to most. In [0, 1], not rescaled. No final norm, the whole of
b_O for every head, and the bias of the output projection if it has one. The denominator of the
softmax is one number for all k: it cancels in the share, and the vocabulary is never gone through.
In the script's fp32 a position scores 0 where all its p_j[token k] underflow; here it does not.

Where it misleads: p_j is made of token j alone, not of what the head attends to, so a head scores
high only if it attends to its own position and copies that. Heads of later layers are shown a
stream that they were not trained on. The extra entries are 3 of 150 for 4 copies of 25 tokens. A
mask in force changes the patterns of later layers, and copying not at all.

Other decoders than OPT are taken by the same steps with their own parts (rotary positions inside
the attention, shared key and value heads); multipliers behind W_O and soft caps are left out. In
OPT-350m, where the script stops at matrices that do not fit, the stream is the projected one, no
norm stands in front of the attention, and logits are read through the projection out of the stream.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import align_module_device
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from ablate.hooked import HookedModel
from ablate.hooks import Edit, Place, hooked
from ablate.sites import Site
from ablate.stack import record
from probes.attention import induction_keys
from probes.circuits import has_direct_path, output_weights, unembedding
from probes.observed import Found, observe
from probes.repeats import Drawn
from probes.rows import Rows, watched


def prefix_matching_reference(model: HookedModel, rows: Drawn) -> Found:
    """`prefix_matching_reference` of every head on the rows that repeat.

    Raises ValueError for a model that is no decoder, and for copies that are not back to back.
    """
    _decoder_sites(model)
    keys = reference_keys(rows.repeated[""], rows.length)
    relations = {"prefix_matching_reference": keys}
    return observe(model, rows.repeated, {"": relations}, lambda *_: None)


@torch.no_grad()
def copying_reference(model: HookedModel, rows: Drawn) -> Found:
    """`copying_reference` of every head on the rows that do not repeat.

    Raises ValueError for a model that is no decoder.
    """
    sites = _decoder_sites(model)
    tokens = rows.distinct[""]
    recorded = record(model.model, {"input_ids": tokens}, keep=[0], anatomy=model.anatomy)
    w_u, offset = unembedding(model, tokens), _logit_bias(model, tokens)
    attended: defaultdict[str, list[Tensor]] = defaultdict(list)
    values: dict[str, Tensor] = {}

    def see(queries: Rows) -> None:
        attended[queries.site.name].append(queries.most())

    def keep(site: Site) -> Edit:
        return lambda projected: values.__setitem__(site.name, _values(site, projected))

    found: Found = {}
    with watched(model, see), hooked(model.model, {_projection(s): keep(s) for s in sites}):
        for site in sites:
            recorded.run_blocks(site.layer, site.layer + 1, recorded.resid(0))
            value = values.pop(site.name)
            w_o, b_o = output_weights(model, site)
            device = value.device
            found[site.name, "copying_reference"] = copying_shares(
                value,
                torch.cat(attended.pop(site.name), dim=-1).to(device),
                w_o.to(device),
                None if b_o is None else b_o.to(device),
                w_u.to(device),
                offset.to(device),
            ).cpu()
    return found


def reference_keys(
    tokens: Int[Tensor, "batch pos"], length: int
) -> Int[Tensor, "batch query entry"]:
    """`induction_keys` and what the script's index counts besides, −1 for none.

    A relation for `observe`. Raises ValueError where copies of `length` are not back to back.
    """
    for first in (0, 1):
        block = tokens[:, first:]
        if block.shape[1] % length == 0 and torch.equal(block[:, :-length], block[:, length:]):
            place = torch.arange(tokens.shape[1], device=tokens.device) - first
            last = (place % length == length - 1) & (place >= length)
            extra = torch.where(last, first, -1).expand(len(tokens), -1)
            return torch.cat([induction_keys(tokens), extra[..., None]], dim=-1)
    raise ValueError(
        f"the reference's prefix matching of rows without back-to-back copies of {length} tokens "
        "asked for: its index knows no others; draw rows of fixed spacing"
    )


def copying_shares(
    values: Float[Tensor, "batch pos head d_head"],
    attended: Int[Tensor, "batch head pos"],
    w_o: Float[Tensor, "head d_head d_model"],
    b_o: Float[Tensor, "d_model"] | None,
    w_u: Float[Tensor, "batch pos d_model"],
    offset: Float[Tensor, "batch pos"],
    *,
    chunk: int = 2**20,
) -> Float[Tensor, "batch head"]:
    """`copying_reference` of every head on every row.

    Args:
        attended: the position that each query attends to most.
        w_u: of the tokens of the row; `offset` the biases of their logits.
        chunk: how many logits are formed at once.
    """
    batch, length, heads, _ = values.shape
    read = einsum(w_o, w_u, "head d_head d_model, batch key d_model -> batch head d_head key")
    if b_o is not None:
        offset = offset + einsum(b_o, w_u, "d_model, batch key d_model -> batch key")
    by_head = rearrange(values, "batch pos head d_head -> batch head pos d_head")
    position = torch.arange(length, device=values.device)
    total = torch.zeros(batch, heads, device=values.device)
    step = max(1, chunk // (batch * heads * length))
    for first in range(1, length, step):
        last = min(first + step, length)
        hidden = position[None, :last] > position[first:last, None]
        seen = position[first:last, None] + 1
        logits = by_head[:, :, first:last] @ read[..., :last] + offset[:, None, None, :last]
        top = logits.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)
        # p / p_top − 1: small differences between nearly equal p survive, and nothing overflows.
        p = torch.expm1((logits - top).masked_fill(hidden, 0))
        raised = (p - p.sum(-1, keepdim=True) / seen).clamp(min=0).masked_fill(hidden, 0)
        own = raised.gather(-1, attended[:, :, first:last, None])[..., 0]
        everything = raised.sum(-1)
        total += torch.where(everything > 0, own / everything, 0).sum(-1)
    return total / max(1, length - 1)


def _decoder_sites(model: HookedModel) -> list[Site]:
    """Its attentions. Raises ValueError for what has none that writes towards logits."""
    sites = [s for s in model.sites if s.stack == "" and has_direct_path(model, s)]
    if not sites:
        raise ValueError(
            f"the reference's scores of {model.name} asked for: they are defined for decoders with "
            "attention and an output projection; use the scan's own convention"
        )
    return sites


def _projection(site: Site) -> Place:
    """What comes out of the projection that makes the values, alone or fused."""
    assert site.row is not None
    path = f"{site.block}.{site.row.qkv or site.row.v}"
    return Place(site.name.replace("hook_z", "hook_v"), path, "output", site.block)


def _values(
    site: Site, projected: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos head d_head"]:
    """The values of every query head, bias and all, fp32."""
    assert site.row is not None
    if site.row.layout == "thirds":
        projected = projected.chunk(3, dim=-1)[-1]
    parts = rearrange(
        projected.float(),
        "batch pos (group part d_head) -> batch pos group part d_head",
        group=site.kv_groups,
        d_head=site.d_head,
    )  # one part where the values are alone; they are the last of q k v
    return repeat(
        parts[..., -1, :],
        "batch pos group d_head -> batch pos (group share) d_head",
        share=site.width // site.kv_groups,
    )


def _logit_bias(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """The bias of the output projection at every token; 0 where it has none."""
    hf: Any = model.model
    head = hf.get_output_embeddings()
    with align_module_device(head):
        bias = getattr(head, "bias", None)
        if bias is None:
            return torch.zeros(tokens.shape, device=tokens.device)
        return bias.detach()[tokens.to(bias.device)].float()
