"""How is a batch of prompts moved out of its distribution, stage by stage?

`shifted_xs` before f is asked, `scaled` for f itself, `noisy` and `outliers` on what is then shown;
names and strengths are those of `shift_table`. Everything stays within the coordinates that a
curriculum has switched on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

from experiments.hybrids.regression.shift_table import Shift

Points = Float[Tensor, "batch point x_dim"]


def shifted_xs(xs: Points, shift: Shift, dims: int, generator: Generator) -> Points:
    """The x that f is asked about; as they are where the shift does not concern x."""
    if shift.name not in _OF_XS:
        return xs
    moved = _OF_XS[shift.name](xs[..., :dims], shift.strength, generator)
    return F.pad(moved, (0, xs.shape[-1] - dims))


def _skewed(xs: Points, power: float, generator: Generator) -> Points:
    scale = torch.arange(1, xs.shape[-1] + 1, device=xs.device) ** -power
    return _stretched(xs, scale, generator)


def _half_subspace(xs: Points, share: float, generator: Generator) -> Points:
    dims = xs.shape[-1]
    inside = torch.arange(dims, device=xs.device) < max(1, int(share * dims))
    return _stretched(xs, inside.to(xs.dtype), generator)


def _stretched(xs: Points, scale: Float[Tensor, "x_dim"], generator: Generator) -> Points:
    """x with standard deviations ∝ scale in a random basis of each prompt, E |x|² kept."""
    batch, _, dims = xs.shape
    basis = _orthogonal_rows(_normal_like(xs, generator, batch, dims, dims))
    scale = scale * (math.sqrt(dims) / torch.linalg.vector_norm(scale))
    return einsum(xs * scale, basis, "batch point row, batch row x_dim -> batch point x_dim")


def _orthogonal(xs: Points, strength: float, generator: Generator) -> Points:
    batch, points, dims = xs.shape
    runs = math.ceil(points / dims)
    spare = _normal_like(xs, generator, batch, runs * dims - points, dims)
    rows = rearrange(torch.cat([xs, spare], dim=1), "b (run row) x -> (b run) row x", run=runs)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    frames = _orthogonal_rows(rows) * lengths
    return rearrange(frames, "(b run) row x -> b (run row) x", run=runs)[:, :points]


def _orthogonal_rows(rows: Float[Tensor, "n row x_dim"]) -> Float[Tensor, "n row x_dim"]:
    """Gram–Schmidt from the first row on; uniform over the orthogonal group for normal rows."""
    columns = rearrange(rows, "n row x -> n x row")
    q, r = torch.linalg.qr(columns)
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None]
    return rearrange(q, "n x row -> n row x")


def _quadrant(xs: Points, strength: float, generator: Generator) -> Points:
    return torch.cat([_in_corner(xs, generator)[:, :-1], xs[:, -1:]], dim=1)


def _opposite_quadrant(xs: Points, strength: float, generator: Generator) -> Points:
    inside = _in_corner(xs, generator)
    return torch.cat([inside[:, :-1], -inside[:, -1:]], dim=1)


def _in_corner(xs: Points, generator: Generator) -> Points:
    corner = torch.where(_normal_like(xs, generator, len(xs), 1, xs.shape[-1]) < 0, -1.0, 1.0)
    return xs.abs() * corner


def _seen(xs: Points, strength: float, generator: Generator) -> Points:
    batch, points, dims = xs.shape
    if points < 2:
        raise ValueError("shift seen with 1 point: the last x repeats another, give points ≥ 2")
    at = torch.randint(points - 1, (batch, 1, 1), generator=generator, device=xs.device)
    return torch.cat([xs[:, :-1], xs.gather(1, at.expand(-1, 1, dims))], dim=1)


def _scaled_x(xs: Points, factor: float, generator: Generator) -> Points:
    return factor * xs


_OF_XS: Mapping[str, Callable[[Points, float, Generator], Points]] = {
    "skewed": _skewed,
    "half-subspace": _half_subspace,
    "orthogonal": _orthogonal,
    "quadrant": _quadrant,
    "opposite-quadrant": _opposite_quadrant,
    "seen": _seen,
    "scaled-x": _scaled_x,
}


def noisy(values: Tensor, std: float, dims: int, generator: Generator) -> Tensor:
    """Normal noise in the first `dims` coordinates."""
    noise = _normal_like(values, generator, *values.shape[:-1], dims)
    return values + std * F.pad(noise, (0, values.shape[-1] - dims))


def outliers(
    xs: Points,
    ys: Float[Tensor, "batch point y_dim"],
    w: Float[Tensor, "batch x_dim y_dim"] | None,
    shift: Shift,
    dims: int,
    generator: Generator,
) -> tuple[Points, Float[Tensor, "batch point y_dim"], Bool[Tensor, "batch point"]]:
    """Points replaced at random, and which; orthogonal to `w` where it is given, else all ones."""
    batch, points, x_dim = xs.shape
    chosen = torch.rand(batch, points, generator=generator, device=xs.device) < shift.strength
    if w is None:
        odd = xs.new_ones(batch, 1, dims)
        odd_y = ys.new_ones(batch, 1, ys.shape[-1])
    else:
        odd = _orthogonal_to(w[:, :dims], generator)
        odd_y = F.pad(odd, (0, x_dim - dims))[..., : ys.shape[-1]]
    odd = F.pad(odd, (0, x_dim - dims))
    here = chosen[..., None]
    return torch.where(here, odd, xs), torch.where(here, odd_y, ys), chosen


def _orthogonal_to(
    w: Float[Tensor, "batch x_dim y_dim"], generator: Generator
) -> Float[Tensor, "batch 1 x_dim"]:
    """A random direction at right angles to every column of w, of length √x_dim."""
    batch, dims, y_dim = w.shape
    if y_dim >= dims:
        raise ValueError(
            f"nothing is orthogonal to {y_dim} weight vectors in {dims} coordinates: "
            "take y_dim < dims or the shift outlier"
        )
    basis, _ = torch.linalg.qr(w)
    odd = _normal_like(w, generator, batch, 1, dims)
    odd = odd - odd @ basis @ basis.mT
    return odd * (math.sqrt(dims) / torch.linalg.vector_norm(odd, dim=-1, keepdim=True))


def _normal_like(values: Tensor, generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=values.device, dtype=values.dtype)
