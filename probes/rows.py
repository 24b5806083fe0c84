"""What does each head attend to, seen while the model runs and kept nowhere?

`watched(model, see)` calls see(Rows) for some query rows at a time of every attention, in the
middle of the model's own forward. From the scores s = q·k·scale + mask of these rows and their
normaliser lse = log Σ_k e^s any entry of the pattern is e^(s − lse), so a measure that needs few
entries never forms the pattern: T·heads numbers are kept where the pattern has T²·heads.

Under sdpa torch's fused kernel computes what it always does, and the scores are computed beside it
from the arguments it was given: after rotary, norms, position biases and windows, whatever the
family does. Under eager attention the model forms the pattern of one layer; it is seen and dropped.
Nothing of the model is changed either way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ablate.hooked import HookedModel
from ablate.hooks import Edit, Place, hooked
from ablate.sites import Site

CHUNK = {"cpu": 2**20}
"""Scores formed at once: as many as a cache holds."""
CHUNK_ELSEWHERE = 2**26
"""On an accelerator fewer launches matter more; 256 MiB in fp32."""


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """Consecutive query rows of one attention, for all examples of the batch."""

    site: Site
    first: int
    """Position of the first of these queries."""
    scores: Float[Tensor, "batch head query key"]
    """s with −∞ where masked, or the pattern itself; keys beyond the last are attended by none."""
    normaliser: Float[Tensor, "batch head query"] | None
    """lse of every row; None where `scores` is the pattern."""

    def at(self, keys: Int[Tensor, "batch query entry"]) -> Float[Tensor, "batch head query entry"]:
        """The pattern at some keys of every query, fp32; 0 where a key is −1 (none)."""
        keys = keys[:, None].to(self.scores.device)
        heads = self.scores.shape[1]
        entries = self.scores.gather(-1, keys.clamp(min=0).expand(-1, heads, -1, -1)).float()
        if self.normaliser is not None:
            entries = (entries - self.normaliser[..., None]).exp()
        return entries.masked_fill(keys < 0, 0)

    def most(self) -> Int[Tensor, "batch head query"]:
        """The key that every query attends to most; the first of equals."""
        return self.scores.argmax(-1)

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """These rows of the pattern, fp32."""
        if self.normaliser is None:
            return self.scores.float()
        return (self.scores - self.normaliser[..., None]).exp()


@contextmanager
def watched(model: HookedModel, see: Callable[[Rows], None]) -> Iterator[None]:
    """Show `see` every row of every attention of the forwards inside, queries in order.

    A layer's rows come before its z passes. Raises ValueError for a model without attention and
    for an implementation that shows nothing (flash, flex), RuntimeError on exit where an attention
    was not seen in every forward of its block.
    """
    attentions = [site for site in model.sites if site.kind == "head"]
    if not attentions:
        raise ValueError(f"{model.name} has no attention: its mixers have no pattern to look at")
    fused: list[Site] = []
    formed: dict[Place, Edit] = {}
    for site in attentions:
        module = model.model.get_submodule(site.attention)
        config = getattr(module, "config", None) or getattr(model.model, "config", None)
        name = getattr(config, "_attn_implementation", None) or "eager"
        if name == "sdpa":
            fused.append(site)
        elif name == "eager":
            formed[_pattern(site)] = _show(site, see)
        else:
            raise ValueError(
                f"{site.name} runs under attn_implementation={name!r}, which cannot be watched: "
                "call model.model.set_attn_implementation('sdpa')"
            )
    with hooked(model.model, formed), _beside_sdpa(model, fused, see):
        yield


def _pattern(site: Site) -> Place:
    assert site.row is not None
    name, element = site.name.replace("hook_z", "hook_pattern"), site.row.pattern
    return Place(name, site.attention, "output", site.block, element=element, per_token=False)


def _show(site: Site, see: Callable[[Rows], None]) -> Edit:
    def edit(pattern: Tensor) -> None:
        see(Rows(site, 0, pattern.detach(), None))

    return edit


class _Beside(TorchFunctionMode):
    """Sees the arguments of every call of torch's sdpa, and lets it run."""

    def __init__(self, called: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self.called = called

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.called(args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def _beside_sdpa(
    model: HookedModel, sites: list[Site], see: Callable[[Rows], None]
) -> Iterator[None]:
    """Show the rows of what runs inside the attention modules of `sites`."""
    if not sites:
        yield
        return
    inside: list[Site] = []  # at most one: the attention that is running
    seen: Counter[str] = Counter()
    expected: Counter[str] = Counter()

    def called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if inside:
            seen[inside[0].name] += 1
            with torch.no_grad():
                for rows in _rows(inside[0], *args, **kwargs):
                    see(rows)

    handles = []
    try:
        for site in sites:
            attention = model.model.get_submodule(site.attention)
            block = model.model.get_submodule(site.block)
            handles += [
                attention.register_forward_pre_hook(
                    lambda *_, s=site: inside.__setitem__(slice(None), [s])
                ),
                attention.register_forward_hook(lambda *_: inside.clear()),
                block.register_forward_hook(lambda *_, s=site: expected.update([s.name])),
            ]
        with _Beside(called):
            yield
        for name, forwards in expected.items():
            if seen[name] != forwards:
                raise RuntimeError(
                    f"the attention of {name} was seen {seen[name]} times, expected {forwards}: it "
                    "does not call torch's sdpa; load with attn_implementation='eager'"
                )
    finally:
        for handle in handles:
            handle.remove()


def _rows(
    site: Site,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch group key d_head"],
    value: Tensor,
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Iterator[Rows]:
    """The scores that sdpa forms in its kernel, some queries at a time; its own arguments."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    by_group = rearrange(
        query, "batch (group share) query d_head -> batch group share query d_head", group=groups
    )
    transposed = rearrange(key, "batch group key d_head -> batch group 1 d_head key")
    chunk = CHUNK.get(query.device.type, CHUNK_ELSEWHERE)
    step = max(1, chunk // (batch * heads * keys))
    position = torch.arange(max(queries, keys), device=query.device)
    for first in range(0, queries, step):
        last = min(first + step, queries)
        width = min(last, keys) if is_causal else keys
        scores = by_group[..., first:last, :] @ transposed[..., :width]
        scores = rearrange(scores, "batch group share query key -> batch (group share) query key")
        scores = factor * scores.float()
        if is_causal:  # sdpa's is the upper left corner's
            later = position[None, :width] > position[first:last, None]
            scores = scores.masked_fill(later, -torch.inf)
        if attn_mask is not None:
            part = attn_mask[..., first:last, :] if attn_mask.shape[-2] > 1 else attn_mask
            part = part[..., :width] if part.shape[-1] > 1 else part
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, -torch.inf)
            else:
                scores = scores + part
        yield Rows(site, first, scores, scores.logsumexp(-1))
