"""What stands in for a removed activation?

Zero is the plainest answer and needs nothing (`fill="zero"`), but a component that writes a large
constant is then punished for its mean. Two others, collected from reference inputs in one pass:

    mean      E[a], over the reference tokens (pooled) or over the examples at each position
    resample  a of another example at the same position: right distribution, wrong example

Resampling keeps a component's variance and cuts its link to the input (Chan et al., causal
scrubbing, 2022); the mean removes both. Neither is right for inputs of another length or of another
kind than the reference: a fill with positions or examples refuses any other shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ablate.sites import Site

if TYPE_CHECKING:
    from ablate.hooked import HookedModel

Batch = Mapping[str, Tensor]
"""Keyword tensors of one forward of the model."""


@dataclass(frozen=True, eq=False)
class Fill:
    """Replacement activations by site name, each [width], [pos, width] or [batch, pos, width]."""

    kind: str
    values: Mapping[str, Tensor]

    def at(self, site: Site, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What stands in at `site`: a function of the activation [batch, pos, width].

        Raises ValueError if the site was not collected, or, when called, for another shape.
        """
        if site.name not in self.values:
            raise ValueError(
                f"no {self.kind} for {site.name}: collect the fill with this model, all sites"
            )
        value = self.values[site.name].to(device)

        def stand_in(x: Tensor) -> Tensor:
            fixed = x.shape[3 - value.ndim :]
            if fixed != value.shape:
                raise ValueError(
                    f"a {self.kind} fill of {tuple(value.shape)} at {site.name}, where the "
                    f"activation is {tuple(x.shape)}: run inputs of the reference's shape, without "
                    "a key/value cache, or use a pooled mean"
                )
            return value.to(device=x.device, dtype=x.dtype).expand_as(x)

        return stand_in


def mean_fill(model: HookedModel, batches: Iterable[Batch], *, per_position: bool = False) -> Fill:
    """Mean activation of every site over reference batches; padding does not count.

    Args:
        batches: keyword tensors of the model's forward, with `attention_mask` where padded.
        per_position: one mean per position (over examples) instead of one over all tokens; all
            batches must then have one length.

    Raises ValueError for no batches, unequal lengths, or a position that is padding everywhere.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    axes = (0,) if per_position else (0, 1)
    for batch in batches:
        for site, x in activations(model, batch).items():
            keep = kept_tokens(batch, site, x)
            total = (x * keep[..., None]).sum(axes, dtype=torch.promote_types(x.dtype, torch.float))
            if site.name in sums and sums[site.name].shape != total.shape:
                raise ValueError(
                    f"a mean per position over inputs of {len(sums[site.name])} and {len(total)} "
                    "positions: cut the reference batches to one length, or pool"
                )
            sums[site.name] = sums.get(site.name, 0) + total
            counts[site.name] = counts.get(site.name, 0) + keep.sum(axes)
    if not sums:
        raise ValueError("a mean over no batches: give at least one")
    for name, count in counts.items():
        if not count.all():
            raise ValueError(f"no mean at {name}: a position is padding in every example")
    return Fill("mean", {name: sums[name] / counts[name][..., None] for name in sums})


def resample_fill(model: HookedModel, batch: Batch, generator: torch.Generator) -> Fill:
    """Every site's activations on `batch`, each example's handed to another example.

    The donors are one random cycle through the batch, the same at all sites, so nobody keeps their
    own. Meant for forwards of the same `batch`.

    Raises ValueError for a batch of one or a padded batch.
    """
    for name, tensor in batch.items():
        if name.endswith("attention_mask") and not tensor.all():
            raise ValueError(
                "resampling over a padded batch: a donor has nothing to give at its padding; "
                "group examples of one length"
            )
    values = {site.name: x for site, x in activations(model, batch).items()}
    examples = len(next(iter(values.values())))
    if examples < 2:
        raise ValueError("resampling in a batch of one example: give at least two")
    donors = _cycle(examples, generator)
    return Fill("resample", {name: x[donors.to(x.device)] for name, x in values.items()})


def activations(model: HookedModel, batch: Batch) -> dict[Site, Float[Tensor, "batch pos width"]]:
    """What passes every site in one forward of `batch`, heads side by side."""
    names = [site.name for site in model.sites]
    with torch.no_grad(), model.capture(names) as cache:
        model.model(**batch)
    return {
        site: rearrange(cache[site.name], "batch pos ... -> batch pos (...)")
        for site in model.sites
    }


def kept_tokens(batch: Batch, site: Site, x: Tensor) -> Tensor:
    """1 at the tokens of x [batch, pos, width] that are not padding, in the stack of `site`."""
    decoder = site.stack in ("decoder", "cross")
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None:
        return torch.ones(x.shape[:2], device=x.device, dtype=x.dtype)
    return mask.to(device=x.device, dtype=x.dtype)


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly random cyclic permutation of 0…size−1 (Sattolo 1986): it has no fixed point."""
    order = torch.arange(size)
    for last in range(size - 1, 0, -1):
        other = int(torch.randint(last, (), generator=generator))
        order[[last, other]] = order[[other, last]]
    return order
