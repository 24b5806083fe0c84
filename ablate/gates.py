"""How is a gate applied to an activation?

Heads stand side by side in the activation of a site, [batch, pos, head·d_head]; a gate has one
number a head (or one a branch) and broadcasts over the rest. 1 keeps; 0 removes, and with a fill
something else stands in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ablate.hooks import Edit, Place
from ablate.sites import Site


def place_of(site: Site) -> Place:
    """Where the hook of a site goes."""
    return Place(site.name, site.path, site.where, site.block)


def multiplied(site: Site, x: Tensor, gate: Tensor) -> Tensor:
    """x [batch, pos, width·d_head] times gate, broadcast over each head's (branch's) width."""
    gate = gate.to(device=x.device, dtype=x.dtype)[..., None]
    if site.kind != "head":
        return x * gate
    z = rearrange(x, "batch pos (head d_head) -> batch pos head d_head", head=site.width)
    return rearrange(z * gate, "batch pos head d_head -> batch pos (head d_head)")


def gate_gradient(site: Site, x: Tensor, gradient: Tensor) -> Tensor:
    """∂L/∂g at g = 1 of g·x: Σ_d x·∂L/∂x, [batch, pos, width]; in fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    product = x.to(dtype) * gradient
    return rearrange(product, "batch pos (width d) -> batch pos width d", width=site.width).sum(-1)


def edit_of(site: Site, gate: Tensor, stand_in: Callable[[Tensor], Tensor] | None = None) -> Edit:
    """Multiply by `gate`, or put `stand_in` where it is 0."""
    if stand_in is None:
        return lambda x: multiplied(site, x, gate)

    def replace(x: Tensor) -> Tensor:
        kept = multiplied(site, torch.ones_like(x), gate) != 0
        return torch.where(kept, x, stand_in(x))

    return replace
