"""What does each head attend to, seen while the model runs and kept nowhere?

`watched(model, see)` calls see(Rows) for some query rows at a time of every attention, in the
middle of the model's own forward. From the scores s = q·k·scale + mask of these rows and their
normaliser lse = log Σ_k e^s any entry of the pattern is e^(s − lse), so a measure that needs few
entries never forms the pattern: T·heads numbers are kept where the pattern has T²·heads.

Under sdpa torch's fused kernel computes what it always does, and says lse (`probes.fused`); scores
are computed beside it from the arguments it was given, after rotary, norms, position biases and
windows, whatever the family does, and only those that are asked for. Under eager attention the
model forms the pattern of one layer; it is seen and dropped. Nothing of the model is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ablate.hooked import HookedModel
from ablate.hooks import Edit, Place, hooked
from ablate.sites import Site
from probes.fused import Asked, in_parts, sdpa_seen

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
    formed: Float[Tensor, "batch head query key"] | None
    """The pattern itself, or s where it is there already."""
    normaliser: Float[Tensor, "batch head query"] | None
    """lse of every row; None where `formed` is the pattern."""
    asked: Asked | None = None
    """What sdpa was asked for these queries, where it was."""

    @property
    def queries(self) -> int:
        """How many rows these are."""
        if self.formed is not None:
            return self.formed.shape[2]
        assert self.asked is not None
        return self.asked.query.shape[2]

    @cached_property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """s with −∞ where masked, or the pattern; keys beyond the last are attended by none."""
        if self.formed is not None:
            return self.formed
        assert self.asked is not None
        return self.asked.scores()

    def at(self, keys: Int[Tensor, "batch query entry"]) -> Float[Tensor, "batch head query entry"]:
        """The pattern at some keys of every query, fp32; 0 where a key is −1 (none)."""
        if self.asked is not None and "scores" not in vars(self):
            entries = self.asked.entries(keys.to(self.asked.key.device))
            if entries is not None:
                return entries
        scores = self.scores
        keys = keys[:, None].to(scores.device)
        inside = (keys >= 0) & (keys < scores.shape[-1])
        some = keys.clamp(0, scores.shape[-1] - 1).expand(-1, scores.shape[1], -1, -1)
        entries = scores.gather(-1, some).float()
        if self.normaliser is not None:
            entries = (entries - self.normaliser[..., None]).exp()
        return entries.masked_fill(~inside, 0)

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

    def called(args: tuple[Any, ...], kwargs: dict[str, Any], lse: Tensor | None) -> None:
        if inside:
            seen[inside[0].name] += 1
            chunk = CHUNK.get(args[0].device.type, CHUNK_ELSEWHERE)
            with torch.no_grad():
                for asked in in_parts(chunk, lse, *args, **kwargs):
                    see(_rows(inside[0], asked))

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
        with sdpa_seen(called):
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


def _rows(site: Site, asked: Asked) -> Rows:
    if asked.lse is not None:
        return Rows(site, asked.first, None, asked.lse, asked)
    scores = asked.scores()
    return Rows(site, asked.first, scores, scores.logsumexp(-1))
