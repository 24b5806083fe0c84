"""What stands in a model where weights were removed?

    Absent       a projection, or a whole FFN, of which nothing is left but perhaps the bias
    Spread       a projection of fewer heads whose output repeats some: key/value heads that are
                 read by unequal numbers of query heads
    for_heads    what the model computes once for all heads (ALiBi, T5's position bias), cut to the
                 heads that are left in one attention

They keep the code of the architecture as it is: an attention without heads runs with one head that
has no weights, so that its cache still counts tokens, and nothing it computes is read. That head's
cache is the price: d_head numbers a token, of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Absent(nn.Module):
    """Zeros [..., out_features], or the bias alone, whatever comes in."""

    def __init__(self, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features = 0
        self.out_features = out_features
        self.weight = torch.empty(0, device="cpu")  # some families initialise it by name
        self.bias = bias

    def forward(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes out"]:
        shape = (*x.shape[:-1], self.out_features)
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class Spread(nn.Linear):
    """A linear map whose output [..., head·d_head] is read head by head in `order`, with repeats.

    `out_features` is the width of what comes out; the weight has one row for each output once.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, order: Sequence[int], d_head: int
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight, self.bias = weight, bias
        self.order, self.d_head = tuple(order), d_head
        self.out_features = len(self.order) * d_head

    def forward(self, input: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes out"]:
        heads = super().forward(input).unflatten(-1, (-1, self.d_head)).unbind(-2)
        return torch.cat([heads[head] for head in self.order], dim=-1)


def picked(x: Tensor, axis: int, kept: Sequence[int]) -> Tensor:
    """`x` at the indices `kept` of one axis, without an index tensor that lives on a device."""
    return torch.stack([x.select(axis, index) for index in kept], dim=axis)


class _PerHead:
    """Cuts ALiBi [batch·head, 1, key] and a mask that has heads [batch, head, query, key]."""

    def __init__(self, heads: int, kept: Sequence[int]) -> None:
        self.heads, self.kept = heads, tuple(kept)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        alibi, mask = kwargs.get("alibi"), kwargs.get("attention_mask")
        changed: dict[str, Tensor] = {}
        if alibi is not None:
            # Falcon hands it on as [batch, head, 1, key] where it is part of the mask as well.
            by_head = alibi if alibi.ndim == 4 else alibi.unflatten(0, (-1, self.heads))
            cut = picked(by_head, 1, self.kept)
            changed["alibi"] = cut if alibi.ndim == 4 else cut.flatten(0, 1)
        if mask is not None and mask.ndim == 4 and mask.shape[1] == self.heads > 1:
            changed["attention_mask"] = picked(mask, 1, self.kept)
        return args, kwargs | changed


class _PositionBias:
    """Cuts T5's position bias [1, head, query, key] on the way in and hands the whole one on: it is
    computed by the first layer and shared by the stack. Cross-attention's is zero for all heads."""

    def __init__(self, kept: Sequence[int], attention: Any) -> None:
        self.kept, self.cross = tuple(kept), False
        self.whole: Tensor | None = None
        self.computes = bool(attention.has_relative_attention_bias)
        self.compute = attention.compute_bias

    def compute_bias(
        self, query: int, key: int, device: torch.device | None = None, past_seen_tokens: Any = 0
    ) -> Tensor:
        whole = self.compute(query, key, device=device, past_seen_tokens=past_seen_tokens)
        self.whole = whole
        return picked(whole, 1, self.kept)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.whole, self.cross = kwargs.get("position_bias"), "key_value_states" in kwargs
        if self.whole is None:
            return args, kwargs
        cut = self.whole[:, :1] if self.cross else picked(self.whole, 1, self.kept)
        return args, kwargs | {"position_bias": cut}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        whole, self.whole = self.whole, None
        z, own, *rest = output
        return (z, own[:, :1] if self.cross or whole is None else whole, *rest)


def for_heads(attention: Any, heads: int, kept: Sequence[int]) -> None:
    """Cut what `attention` is handed for all `heads` of the original to those `kept`, for good."""
    if hasattr(attention, "compute_bias"):
        bias = _PositionBias(kept, attention)
        if bias.computes:
            attention.compute_bias = bias.compute_bias
        attention.register_forward_pre_hook(bias.before, with_kwargs=True)
        attention.register_forward_hook(bias.after)
    else:
        attention.register_forward_pre_hook(_PerHead(heads, kept).before, with_kwargs=True)
