"""What would a linear fit to the points before this one have said of it?

    zero           0
    averaging      ŵ = 1/i Σ_j x_j y_j,  j < i  (the first step of gradient descent, scaled)
    least squares  the ŵ of smallest norm among those of smallest Σ_j (y_j − ŵᵀx_j)²
    ridge          the ŵ of smallest Σ_j (y_j − ŵᵀx_j)² + λ ‖ŵ‖²

No intercept anywhere, and all predict 0 before the first point. Least squares and ridge run over
the points once and carry ŵ and C with them (recursive least squares; Greville 1960 for the smallest
norm):

    ŵ ← ŵ + g (y − ŵᵀx)        C ← (I − g xᵀ) C (I − x gᵀ) + g gᵀ
    g = r / rᵀr                 where x has a part r outside all x before it (least squares only)
    g = C x / (1 + xᵀ C x)      elsewhere,  C = (XᵀX)⁺  or  (XᵀX + λI)⁻¹

so a prompt costs n·d² and not n fits. C is a sum of squares (Joseph's form), and all is in float64:
near i = d, where XᵀX is almost singular, float32 would lose every digit.

Where it misleads: which r counts as 0 is a matter of precision. Here it is ‖r‖ ≤ ε·max(n, d)·‖x‖
with ε that of the prompts' own dtype, as in numpy's lstsq, so that a rounded copy of a point counts
as a copy.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


def zero(
    xs: Float[Tensor, "batch point x_dim"], ys: Float[Tensor, "batch point y_dim"]
) -> Float[Tensor, "batch point y_dim"]:
    """Zero for every point: the error every score is measured from."""
    return torch.zeros_like(ys)


def averaging(
    xs: Float[Tensor, "batch point x_dim"], ys: Float[Tensor, "batch point y_dim"]
) -> Float[Tensor, "batch point y_dim"]:
    """ŵ is the mean of x·y: right in the limit where the coordinates of x are independent."""
    # Σ_j (x_i·x_j) y_j / i, j < i: n² products a prompt, and no [point x_dim y_dim] in memory.
    likeness = einsum(xs, xs, "batch i x_dim, batch j x_dim -> batch i j").tril(-1)
    sums = einsum(likeness, ys, "batch i j, batch j y_dim -> batch i y_dim")
    before = torch.arange(xs.shape[1], device=xs.device).clamp(min=1)
    return sums / before[None, :, None]


def least_squares(
    xs: Float[Tensor, "batch point x_dim"], ys: Float[Tensor, "batch point y_dim"]
) -> Float[Tensor, "batch point y_dim"]:
    """Least squares, the smallest ŵ where the points leave it open."""
    width = xs.shape[2]
    outside = torch.eye(width, dtype=torch.float64, device=xs.device)
    return _recursion(xs, ys, torch.zeros_like(outside), outside)


def ridge(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    penalty: float,
) -> Float[Tensor, "batch point y_dim"]:
    """Ridge regression: the posterior mean of w ~ N(0, I) if y has noise of variance `penalty`."""
    if penalty <= 0:
        raise ValueError(f"ridge of penalty {penalty}: give one > 0, or ask for least squares")
    start = torch.eye(xs.shape[2], dtype=torch.float64, device=xs.device)
    return _recursion(xs, ys, start / penalty, torch.zeros_like(start))


def _recursion(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    spread: Float[Tensor, "x_dim x_dim"],
    outside: Float[Tensor, "x_dim x_dim"],
) -> Float[Tensor, "batch point y_dim"]:
    """One pass over the points. `outside` projects on what no x has reached, `spread` is C."""
    batch, points, width = xs.shape
    near = (torch.finfo(xs.dtype).eps * max(points, width)) ** 2
    inputs, targets = xs.double(), ys.double()
    spread, outside = spread.repeat(batch, 1, 1), outside.repeat(batch, 1, 1)
    weights = targets.new_zeros(batch, width, ys.shape[2])
    predictions = torch.empty_like(targets)
    for i in range(points):
        x = inputs[:, i]
        predictions[:, i] = einsum(x, weights, "batch x_dim, batch x_dim y_dim -> batch y_dim")
        # Twice, or what is left of x after d − 1 projections is no longer orthogonal to the rest.
        rest = _times(outside, _times(outside, x))
        size = rest.square().sum(-1, keepdim=True)
        fresh = size > near * x.square().sum(-1, keepdim=True)
        unit = torch.where(fresh, rest / size.sqrt().clamp(min=1e-300), 0.0)
        moved = _times(spread, x)
        known = moved / (1 + (moved * x).sum(-1, keepdim=True))
        gain = torch.where(fresh, rest / size.clamp(min=1e-300), known)

        weights = weights + _outer(gain, targets[:, i] - predictions[:, i])
        # (I − g xᵀ) C (I − x gᵀ) + g gᵀ, one side at a time.
        left = spread - _outer(gain, moved)
        spread = left - _outer(_times(left, x), gain) + _outer(gain, gain)
        outside = outside - _outer(unit, unit)
    return predictions.to(ys.dtype)


def _times(
    matrix: Float[Tensor, "batch row column"], vector: Float[Tensor, "batch column"]
) -> Float[Tensor, "batch row"]:
    return einsum(matrix, vector, "batch row column, batch column -> batch row")


def _outer(
    left: Float[Tensor, "batch row"], right: Float[Tensor, "batch column"]
) -> Float[Tensor, "batch row column"]:
    return einsum(left, right, "batch row, batch column -> batch row column")
