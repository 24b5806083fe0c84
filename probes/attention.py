"""How much attention does each head pay to a chosen set of earlier positions?

For a pattern A[head, query, key] and a Boolean relation R[query, key] the attention mass of a
head is the mean over the queries that have a target of Σ_key A·R. Prefix matching is the mass on
the token that followed each earlier occurrence of the query's token (Olsson et al. 2022; Bansal
et al. 2023, Algorithm 1). Targets come from token equality, never from index arithmetic.
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
