"""How much does a head raise the token it attends to, in the logits that the model really makes?

At position j the model's logit of token v is s_j · (γ ∘ c(resid_j)) · W_U[v] + β · W_U[v], where
c centres (LayerNorm) or not (RMSNorm) and s_j is one number for the whole stream. It is linear in
what was added to the stream, so head h has a share of its own, bias of W_O left out:

    share[j, v] = s_j · z_h[j] · W_O[h] · Ŵ_U[v]        Ŵ_U = c(γ ∘ W_U)

The attribution to the attended token a_j (most attended) is share[j, a_j] minus its mean over the
tokens of the row up to j, in logits: what makes a_j likelier than the rest of the row. Unlike
`probes.copying` it is measured where the head does its work, on tokens that repeat, and has a size.

Where it misleads: direct effects only; later layers may undo them. A soft cap or a multiplier of
the logits is left out, and so are norms between the head and the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.anatomy import base_path, find
from ablate.components import Stack
from ablate.hooked import HookedModel
from probes.circuits import linear_part


def attended_shares(
    z: Float[Tensor, "batch pos head d_head"],
    attended: Int[Tensor, "batch head pos"],
    w_o: Float[Tensor, "head d_head d_model"],
    w_u: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch head pos"]:
    """share[j, a_j] − mean over k ≤ j of share[j, x_k], for s_j = 1; `w_u` is Ŵ_U of the row.

    T·d_model numbers are formed, never T²: the mean is that of the rows of Ŵ_U.
    """
    read = einsum(w_o, w_u, "head d_head d_model, batch key d_model -> batch head key d_head")
    counts = torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
    mean = read.cumsum(2) / counts
    own = read.gather(2, attended[..., None].expand(-1, -1, -1, read.shape[-1]))
    return einsum(
        z.float(), own - mean, "batch pos head d_head, batch head pos d_head -> batch head pos"
    )


@contextmanager
def final_scale(model: HookedModel, stack: Stack) -> Iterator[Callable[[], Float[Tensor, "..."]]]:
    """Yields what gives s_j of the last forward inside, [batch, pos], or 1 without a final norm."""
    row = next(r for r in model.anatomy.stacks if r.stack == stack)
    norm = find(model.model, base_path(model.model, row.final_norm))
    found: list[Tensor] = []
    if norm is None:
        yield lambda: torch.ones(1, 1)
        return

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found[:] = [_scale(*parts, args[0].detach().float(), output.detach().float())]

    parts = linear_part(norm, _width(norm))
    handle = norm.register_forward_hook(after)
    try:
        yield lambda: found[0]
    finally:
        handle.remove()


def _width(norm: nn.Module) -> int:
    return next(norm.parameters()).shape[-1]


def _scale(
    gains: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"],
    centred: bool,
    resid: Float[Tensor, "batch pos d_model"],
    output: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos"]:
    """The s in output = s · γ ∘ c(resid) + β, by least squares."""
    if centred:
        resid = resid - resid.mean(-1, keepdim=True)
    direction = gains.to(resid.device) * resid
    along = ((output - bias.to(resid.device)) * direction).sum(-1)
    return along / direction.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
