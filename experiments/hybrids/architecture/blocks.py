"""One block of a hybrid: x += mixer(norm x), x += ffn(norm x); each block owns its residuals.

Names are the same in every block that has the part: norm1, attn, norm2, mlp, and `mixer` for its
Mamba, whichever slot that stands in. `double_residual` is the reference's slip, kept as a switch:
its Mamba blocks have their input added twice, h ← 2h + mixer(norm h), so that the stream doubles at
every such block and early blocks outweigh late ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from experiments.hybrids.architecture.attention import Attention, Table
from experiments.hybrids.architecture.gelu import gelu
from experiments.hybrids.architecture.grammar import Block, NormKind
from experiments.hybrids.architecture.mamba import MambaMixer

if TYPE_CHECKING:
    from experiments.hybrids.architecture.config import HybridConfig


def norm(kind: NormKind, width: int) -> nn.Module:
    """LayerNorm (ε = 1e-5) or RMSNorm (ε = 1e-6)."""
    return nn.LayerNorm(width, eps=1e-5) if kind == "layer" else nn.RMSNorm(width, eps=1e-6)


class GeluMLP(nn.Module):
    """W_2 gelu(W_1 x + b_1) + b_2, with the tanh form of GELU, as in GPT-2."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff)
        self.down_proj = nn.Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.down_proj(gelu(self.up_proj(x), self.training))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) · W_up x), without biases, as in Llama."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Positions(nn.Module):
    """x + weight[position]: the model's one table of learned positions."""

    def __init__(self, n_positions: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_positions, d_model))

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], position_ids: Int[Tensor, "rows pos"] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        if position_ids is None:
            return x + self.weight[: x.shape[1]]
        return x + nn.functional.embedding(position_ids, self.weight)


class HybridBlock(GradientCheckpointingLayer):
    """The branches of one `Block`, each behind its norm, each added to the stream."""

    def __init__(self, config: HybridConfig, block: Block) -> None:
        super().__init__()
        d = config.d_model
        self.block = block
        self.doubled = bool(config.double_residual)
        self.dropout = nn.Dropout(config.dropout)
        if block.mixer != "none":
            self.norm1 = norm(block.norm, d)
        if block.mixer == "attention":
            self.attn = Attention(config, block.bias)
        if block.has_mamba:
            self.mixer = MambaMixer(
                d, d_state=config.d_state, d_conv=config.d_conv, expand=config.expand
            )
        if block.ffn != "none":
            self.norm2 = norm(block.norm, d)
        if block.ffn in ("gelu", "swiglu"):
            self.mlp = (GeluMLP if block.ffn == "gelu" else SwiGLU)(d, config.d_ff)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        position_embeddings: Table | None = None,
        attention_mask: Tensor | None = None,
        mamba_attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        x = hidden_states
        if self.block.mixer == "attention":
            turn = position_embeddings if self.block.position == "rope" else None
            x = x + self.dropout(self.attn(self.norm1(x), turn, attention_mask)[0])
        elif self.block.mixer == "mamba":
            x = self._mamba(x, self.norm1, mamba_attention_mask)
        if self.block.ffn == "mamba":
            return self._mamba(x, self.norm2, mamba_attention_mask)
        return x if self.block.ffn == "none" else x + self.dropout(self.mlp(self.norm2(x)))

    def _mamba(self, x: Tensor, before: nn.Module, kept: Tensor | None) -> Tensor:
        made = self.dropout(self.mixer(before(x), attention_mask=kept))
        return (2 * x if self.doubled else x) + made
