"""What do the points most like this one say?

    nearest neighbours   the mean of y over the k points before this one at the smallest ‖x − x_j‖
    retrieval            the y of the one point before this one of the largest xᵀx_j

Before k points there are fewer neighbours: the mean is over those there are, and before the first
point both predict 0. Of points equally far, the earlier count first. The reference's code adds the
neighbours up where its paper and ours take the mean (y = 1 everywhere gave 3).
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def nearest_neighbours(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    neighbours: int = 3,
) -> Float[Tensor, "batch point y_dim"]:
    """The mean of the `neighbours` nearest."""
    points = xs.shape[1]
    # Not torch.cdist: its fast way rounds, and gives a copy of a point a distance to it.
    sizes = xs.double().square().sum(-1)
    products = einsum(xs.double(), xs.double(), "batch i x_dim, batch j x_dim -> batch i j")
    far = rearrange(sizes, "batch j -> batch 1 j") - 2 * products  # less ‖x_i‖², the same for all j
    order = (
        far.masked_fill(~_before(points, xs.device), torch.inf).sort(dim=-1, stable=True).indices
    )
    nearest = order[..., :neighbours]
    before = torch.arange(points, device=xs.device)[:, None]
    counted = (before > torch.arange(nearest.shape[-1], device=xs.device)).to(ys.dtype)
    share = counted / counted.sum(-1, keepdim=True).clamp(min=1)
    found = ys[torch.arange(len(ys), device=ys.device)[:, None, None], nearest]
    return einsum(share, found, "i near, batch i near y_dim -> batch i y_dim")


def retrieval(
    xs: Float[Tensor, "batch point x_dim"], ys: Float[Tensor, "batch point y_dim"]
) -> Float[Tensor, "batch point y_dim"]:
    """The value beside the key most like x; for keys of one length that is the nearest."""
    return _most_alike(xs, ys)[0]


def exact_retrieval(
    xs: Float[Tensor, "batch point x_dim"], ys: Float[Tensor, "batch point y_dim"]
) -> Float[Tensor, "batch point y_dim"]:
    """The value of a key that x copies; 0, its mean, where x copies none.

    Bayes-optimal for associative recall with keys and values drawn apart: a key never seen says
    nothing of its value. A copy has a product within 10⁻⁴ of ‖x‖²; keys drawn apart do not.
    """
    found, likeness = _most_alike(xs, ys)
    copied = likeness >= (1 - 1e-4) * xs.square().sum(-1)
    return torch.where(rearrange(copied, "batch i -> batch i 1"), found, 0.0)


def _most_alike(
    xs: Float[Tensor, "batch point x_dim"], ys: Float[Tensor, "batch point y_dim"]
) -> tuple[Float[Tensor, "batch point y_dim"], Float[Tensor, "batch point"]]:
    products = einsum(xs, xs, "batch i x_dim, batch j x_dim -> batch i j")
    before = _before(xs.shape[1], xs.device)
    likeness, best = products.masked_fill(~before, -torch.inf).max(-1)
    found = ys[torch.arange(len(ys), device=ys.device)[:, None], best]
    return torch.where(before.any(-1)[None, :, None], found, 0.0), likeness


def _before(points: int, device: torch.device) -> Bool[Tensor, "i j"]:
    return torch.ones(points, points, dtype=torch.bool, device=device).tril(-1)
