"""How much attention does each head pay to a chosen set of earlier positions?

For a pattern A[head, query, key] and a Boolean relation R[query, key] the attention mass of a
head is the mean over the queries that have a target of Σ_key A·R. Prefix matching is the mass on
the token that followed each earlier occurrence of the query's token (Olsson et al. 2022; Bansal
et al. 2023, Algorithm 1). Targets come from token equality, never from index arithmetic.

R is given as a Boolean, or, where few keys are targets, as a list of keys for every query, filled
up with −1: the same relation in T·m numbers instead of T².
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor


def induction_targets(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """R[q, k] is true where k ≤ q and token k−1 equals token q with k−1 < q."""
    same = tokens[:, :, None] == tokens[:, None, :]
    earlier = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril(-1)
    occurred = same & earlier.to(tokens.device)
    return torch.nn.functional.pad(occurred, (1, 0))[:, :, :-1]


def attention_mass(
    pattern: Float[Tensor, "batch head query key"], targets: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head"]:
    """Mean over the queries with at least one target of the attention on their targets."""
    mass = einsum(
        pattern.float(), targets.float(), "batch head query key, batch query key -> batch head"
    )
    queries = targets.any(-1).sum(-1)
    return mass / queries.clamp(min=1)[:, None]


def earlier_occurrences(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch query entry"]:
    """The positions before q that hold the same token as q, latest first; −1 where there is none.

    As many entries as the most frequent token has earlier occurrences.
    """
    order = tokens.argsort(dim=-1, stable=True)  # equal tokens side by side, by position
    ordered = tokens.gather(-1, order)
    none = torch.full_like(order[:, :1], -1)
    before = torch.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], -1)
    latest = torch.empty_like(order).scatter(-1, order, torch.cat([none, before], dim=-1))
    entries = []
    occurrence = latest
    while (occurrence >= 0).any():
        entries.append(occurrence)
        again = latest.gather(-1, occurrence.clamp(min=0))
        occurrence = torch.where(occurrence >= 0, again, -1)
    return torch.stack(entries, dim=-1) if entries else none[..., None].expand(*tokens.shape, 1)


def induction_keys(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch query entry"]:
    """`induction_targets` as a list of keys for every query."""
    occurred = earlier_occurrences(tokens)
    return torch.where(occurred >= 0, occurred + 1, -1)


def occurrences(
    queries: Int[Tensor, "batch query"], keys: Int[Tensor, "batch key"]
) -> Int[Tensor, "batch query entry"]:
    """The positions of another sequence that hold the same token, first ones first; −1 for none."""
    order = keys.argsort(dim=-1, stable=True)
    ordered = keys.gather(-1, order)
    left = torch.searchsorted(ordered, queries.contiguous())
    right = torch.searchsorted(ordered, queries.contiguous(), right=True)
    most = int((right - left).max().clamp(min=1))
    at = left[..., None] + torch.arange(most, device=keys.device)
    entries = order[:, None].expand(-1, queries.shape[1], -1)
    found = entries.gather(-1, at.clamp(max=keys.shape[1] - 1))
    return torch.where(at < right[..., None], found, -1)
