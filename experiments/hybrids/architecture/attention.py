"""Causal attention of a hybrid's block: softmax(q kᵀ / √d_head) v, with or without RoPE.

The implementation is the one that transformers sets on the model: `sdpa` (default) never forms the
pattern, `eager` returns it. RoPE turns queries and keys by their position (θ = 10⁴, over the whole
head, halves paired as in Llama); biases stand in all four projections or in none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from experiments.hybrids.architecture.config import HybridConfig

ROPE_THETA = 1e4

Table = tuple[Float[Tensor, "rows pos d_head"], Float[Tensor, "rows pos d_head"]]


class Attention(nn.Module):
    """Multi-head attention; returns (what is added to the stream, the pattern or None)."""

    is_causal = True

    def __init__(self, config: HybridConfig, bias: bool) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.head_dim = d // config.heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, d, bias=bias)
        self.v_proj = nn.Linear(d, d, bias=bias)
        self.o_proj = nn.Linear(d, d, bias=bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        position_embeddings: Table | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch head query key"] | None]:
        q, k, v = (
            rearrange(
                proj(hidden_states), "batch pos (head d) -> batch head pos d", d=self.head_dim
            )
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            q, k = turned(q, position_embeddings), turned(k, position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa",  # noqa: SLF001
            _eager,
        )
        dropout = self.config.dropout if self.training else 0.0
        z, pattern = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(rearrange(z, "batch pos head d -> batch pos (head d)")), pattern


def rope_table(position_ids: Int[Tensor, "rows pos"], d_head: int, dtype: torch.dtype) -> Table:
    """cos and sin of position times frequency, the frequencies twice: one for each half."""
    exponent = torch.arange(0, d_head, 2, device=position_ids.device, dtype=torch.float32) / d_head
    angle = position_ids[..., None].float() * ROPE_THETA**-exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x: Float[Tensor, "batch head pos d"], table: Table) -> Float[Tensor, "batch head pos d"]:
    """Every pair (x_i, x_{i+d/2}) turned by the angle of its position."""
    cos, sin = (rearrange(part, "rows pos d -> rows 1 pos d") for part in table)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _eager(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention in plain words, with its pattern."""
    scores = torch.einsum("bhqd, bhkd -> bhqk", q, k) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    mixed = nn.functional.dropout(pattern, dropout, training=module.training)
    z = torch.einsum("bhqk, bhkd -> bhqd", mixed, v)
    return rearrange(z, "b h q d -> b q h d").contiguous(), pattern
