"""What does torch's fused attention know of its rows, beside the z it returns?

sdpa is given q, k and a mask; the kernel behind it forms the scores s = q·k·scale + mask of some
keys at a time, and with z returns lse = log Σ_k e^s of every query. With lse, an entry of the
pattern is e^(s − lse), and a score s is one product of two vectors: `Asked.entries` forms as many
as there are entries, by gathering keys. `Asked.scores` forms all of some queries.

`sdpa_seen` runs sdpa as it is and tells what it was asked and, if its kernel says so, lse. Where it
does not (another kernel, or the plain one that a gradient needs), lse comes from all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TELLING = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""Kernels whose second output is lse."""
GATHERED = 16
"""Keys of a query for which gathering is dearer than one score: with more than a GATHERED-th of
all keys, all scores are formed."""


@dataclass(frozen=True, eq=False, repr=False)
class Asked:
    """Some consecutive queries of one call of sdpa, its own arguments."""

    first: int
    """Position of the first of these queries."""
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch group key d_head"]
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None
    """Of these queries, broadcast as sdpa does."""
    causal: bool
    """Query q sees keys 0 … q: sdpa's is_causal is the upper left corner's."""
    factor: float
    lse: Float[Tensor, "batch head query"] | None

    @property
    def width(self) -> int:
        """Keys that some of these queries may see."""
        keys = self.key.shape[2]
        return min(self.first + self.query.shape[2], keys) if self.causal else keys

    def scores(self) -> Float[Tensor, "batch head query key"]:
        """s with −∞ where masked, fp32; keys beyond the last are seen by none."""
        groups, width = self.key.shape[1], self.width
        by_group = rearrange(
            self.query, "batch (group share) query d -> batch group share query d", group=groups
        )
        # In fp32 as the kernel accumulates: a score rounded to bf16 would not fit its lse.
        keys = rearrange(self.key[:, :, :width], "batch group key d -> batch group 1 d key")
        scores = self.factor * (by_group.float() @ keys.float())
        scores = rearrange(scores, "batch group share query key -> batch (group share) query key")
        if self.causal:
            position = torch.arange(self.first + scores.shape[2], device=scores.device)
            later = position[None, :width] > position[self.first :, None]
            scores = scores.masked_fill(later, -torch.inf)
        if self.mask is None:
            return scores
        return _masked(scores, self.mask[..., :width] if self.mask.shape[-1] > 1 else self.mask)

    def entries(
        self, keys: Int[Tensor, "batch query entry"]
    ) -> Float[Tensor, "batch head query entry"] | None:
        """The pattern at some keys of every query, 0 where a key is −1.

        None without lse, and where all scores are cheaper.
        """
        if self.lse is None or keys.shape[-1] * GATHERED > self.width:
            return None
        batch, groups, _, d_head = self.key.shape
        queries, entries = keys.shape[1:]
        row = torch.arange(batch, device=keys.device)[:, None]
        wanted = self.key.transpose(1, 2)[row, keys.clamp(min=0).flatten(1)]
        wanted = wanted.view(batch, queries, entries, groups, 1, d_head).float()
        by_group = self.query.transpose(1, 2).float()
        by_group = by_group.reshape(batch, queries, 1, groups, -1, d_head)
        scores = self.factor * (by_group * wanted).sum(-1)
        scores = rearrange(
            scores, "batch query entry group share -> batch (group share) query entry"
        )
        if self.mask is not None:
            scores = _masked(scores, self._mask_at(keys))
        seen = keys >= 0
        if self.causal:
            position = torch.arange(self.first, self.first + queries, device=keys.device)
            seen = seen & (keys <= position[:, None])
        return (scores - self.lse[..., None]).exp().masked_fill(~seen[:, None], 0)

    def _mask_at(self, keys: Tensor) -> Tensor:
        assert self.mask is not None
        mask = self.mask
        while mask.ndim < 4:
            mask = mask[None]
        mask = mask.expand(len(keys), -1, keys.shape[1], self.key.shape[2])
        return mask.gather(-1, keys.clamp(min=0)[:, None].expand(-1, mask.shape[1], -1, -1))


class sdpa_seen(TorchFunctionMode):  # noqa: N801 (used like a function)
    """Inside, `tell` hears of every call of torch's sdpa: its arguments and lse, or None."""

    def __init__(self, tell: Callable[[tuple[Any, ...], dict[str, Any], Tensor | None], None]):
        super().__init__()
        self.tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with _Kernel() as kernel:
            z = func(*args, **kwargs)
        self.tell(args, kwargs, kernel.lse)
        return z


class _Kernel(TorchDispatchMode):
    """Remembers lse of the kernel that sdpa chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.lse: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in TELLING:
            self.lse = out[1].detach()
        return out


def in_parts(
    chunk: int,
    lse: Tensor | None,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch group key d_head"],
    value: Tensor,
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Iterator[Asked]:
    """A call of sdpa, so many queries at a time that their scores are about `chunk` numbers."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if lse is not None and lse.shape != query.shape[:3]:  # empty, or padded
        lse = None
    step = max(1, chunk // (batch * heads * keys))
    for first in range(0, queries, step):
        part = slice(first, min(first + step, queries))
        mask = attn_mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., part, :]
        normaliser = None if lse is None else lse[..., part].float()
        yield Asked(first, query[..., part, :], key, mask, is_causal, factor, normaliser)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask
