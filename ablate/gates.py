"""How is a gate applied to an activation?

Heads stand side by side in the activation of a site, [batch, pos, head·d_head]; a gate has one
number a head (or one a branch) and broadcasts over the rest. 1 keeps; 0 removes, and with a fill
something else stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """∂L/∂g of g·x: Σ_d x·∂L/∂(g·x), [batch, pos, width]; in fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    product = x.to(dtype) * gradient
    return rearrange(product, "batch pos (width d) -> batch pos width d", width=site.width).sum(-1)


def watched_gate(site: Site, x: Tensor, gate: float, found: list[Tensor]) -> Tensor:
    """gate · x; its backward puts ∂L/∂gate, [batch, pos, width], into `found`."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    return _Watched.apply(x, site, gate, found)


class _Watched(torch.autograd.Function):
    """A hook on the gradient of x would have to hold x; what a function saves is, under gradient
    checkpointing, forgotten and computed again like everything else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site, gate: float, found: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site, ctx.gate, ctx.found = site, gate, found
        if gate != 1:
            return x * gate
        # Falcon adds into its mlp_out in place.
        return x.clone() if site.where == "output" else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.found.append(gate_gradient(ctx.site, x, gradients[0]))
        return gradients[0] * ctx.gate, None, None, None


def edit_of(site: Site, gate: Tensor, stand_in: Callable[[Tensor], Tensor] | None = None) -> Edit:
    """Multiply by `gate`, or put `stand_in` where it is 0."""
    if stand_in is None:
        return lambda x: multiplied(site, x, gate)

    def replace(x: Tensor) -> Tensor:
        kept = multiplied(site, torch.ones_like(x), gate) != 0
        return torch.where(kept, x, stand_in(x))

    return replace
