"""Which weights make a reset block the best linear map of what the old one did?

The block is fresh by the law init, but for its FFN. On a number of training batches, with x and y
the old block's input and output, u what the fresh block's FFN reads and o what the block gives with
a silent FFN, the FFN holds the ridge regression of what is missing,

    A, b = argmin Σ |y − o − A u − b|² + λ tr(Σ_uu) / d |A|²        λ = 1e-4

exactly, as φ(z) − φ(−z) = z for ReLU, GELU (both forms) and SiLU:

    W_in = [I; −I; init]    W_out = [A, −A, 0]    b_in = [0; 0; init]    b_out = b

An FFN without biases takes no b: it is fitted through the origin. Needs d_ff ≥ 2 d_model. The 2 d
hidden units that hold the map train like all others; the rest are silent until W_out moves.

The fit reads 64 tokens a coordinate of the residual stream, the first ones of the students' order,
which they read again afterwards: `tokens` of the ledger begin there. Moments add up over batches,
in fp64.

Where it misleads. The map is of each position alone: what the old attention moved between positions
is in it only as far as it can be guessed from one position. A ridge map of few tokens has learned
their noise too: 1/64 of what no linear map explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ablate.components import Stack
from ablate.places import Block, Place, block_at
from ablate.reset import fresh, has_identity
from ablate.students import Students
from experiments.objectives import Batch
from experiments.reset.learning.climb import Pass
from experiments.reset.learning.parallel import ALONE, Share
from experiments.reset.learning.treatments import Treatment

PENALTY = 1e-4
"""λ, in units of the mean variance of a coordinate of u. Where a norm makes them sum to 0, there is
no one answer without it."""
PER_COORDINATE = 64
"""Tokens of a fit, per coordinate of the residual stream."""
ERROR = 0.02
"""Share of the map that rounding may cost, in bfloat16 too; more is an FFN of another kind."""


@dataclass(frozen=True, eq=False)
class Products:
    """The two products of a plain FFN, W_out φ(W_in u), by their paths in the block."""

    inner: str
    outer: str
    has_bias: bool


@dataclass(frozen=True, eq=False)
class Sums:
    """Σ u uᵀ and Σ u rᵀ over tokens, in fp64; u ends in a 1."""

    squares: Float[Tensor, "a a"]
    crosses: Float[Tensor, "a b"]

    @classmethod
    def of(cls, u: Float[Tensor, "token d_in"], r: Float[Tensor, "token d_out"]) -> Sums:
        """Of these tokens."""
        u, r = nn.functional.pad(u.double(), (0, 1), value=1.0), r.double()
        return cls(einsum(u, u, "token a, token b -> a b"), einsum(u, r, "token a, token b -> a b"))

    def __add__(self, other: Sums) -> Sums:
        """Of the tokens of both."""
        return Sums(self.squares + other.squares, self.crosses + other.crosses)

    def total(self, share: Share) -> Sums:
        """Of the tokens of all processes."""
        return Sums(share.total(self.squares), share.total(self.crosses))

    def map(self, *, intercept: bool) -> tuple[Float[Tensor, "b a"], Float[Tensor, "b"]]:
        """A and b; without an intercept b is 0."""
        squares, crosses = self.squares[:-1, :-1], self.crosses[:-1]
        u, r = self.squares[-1, :-1] / self.squares[-1, -1], self.crosses[-1]
        r = r / self.squares[-1, -1]
        if intercept:
            squares = squares - self.squares[-1, -1] * torch.outer(u, u)
            crosses = crosses - self.squares[-1, -1] * torch.outer(u, r)
        added = PENALTY * squares.trace() / len(squares) + torch.finfo(squares.dtype).tiny
        eye = torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
        A = torch.linalg.solve(squares + added * eye, crosses).T
        return A, (r - A @ u if intercept else torch.zeros_like(r))


def refusal(model: nn.Module, place: Place) -> str:
    """Why `place` cannot begin as a linear map; empty where it can. Reads no weights."""
    try:
        _products(model, place)
    except ValueError as error:
        return str(error)
    return ""


def fitting_batches(model: nn.Module, at: Callable[[int], Batch], steps: int) -> Iterator[Batch]:
    """The first of at most `steps` batches, until they have enough tokens for a fit."""
    config: Any = getattr(model, "config")  # noqa: B009 (nn.Module's getattr is Tensor)
    left = PER_COORDINATE * config.get_text_config().hidden_size
    for step in range(steps):
        if left <= 0:
            return
        batch = at(step)
        left -= batch.tokens
        yield batch


@torch.no_grad()
def linear_starts(
    model: nn.Module,
    treatments: Sequence[Treatment],
    batches: Sequence[Batch],
    stack: Stack | None = None,
    share: Share = ALONE,
) -> list[dict[str, Tensor]]:
    """The weights that students of the law linear begin with, by name in the model.

    One pass over the batches for all of them; students of one place and seed are fitted once.
    Raises ValueError for what cannot be such a map (`refusal`) and for weights that cannot be
    reset alone.
    """
    asked = {(place, t.seed): None for t in treatments for place in t.resets}
    fits = {key: _Fit.of(model, *key) for key in asked}
    keep = {stream for place, _ in fits for stream in (place.layer, place.layer + 1)}
    sums: dict[tuple[Place, int], Sums] = {}
    passing: Pass | None = None
    for batch in batches:
        passing = Pass.of(model, share.of(batch), stack, keep, share)
        for key, fit in fits.items():
            found = Sums.of(*fit.read(passing)[:2])
            sums[key] = sums[key] + found if key in sums else found
    assert passing is not None
    begun = {
        key: fit.holding(passing, *sums[key].total(share).map(intercept=fit.ffn.has_bias))
        for key, fit in fits.items()
    }
    return [
        {name: w for place in t.resets for name, w in begun[place, t.seed].items()}
        for t in treatments
    ]


@dataclass(frozen=True, eq=False)
class _Fit:
    """One place of one seed, fresh and with a silent FFN.

    Attributes:
        weights: of the place, by name in the model.
        silent: the block with them.
    """

    place: Place
    block: Block
    ffn: Products
    weights: dict[str, Tensor]
    silent: Students

    @classmethod
    def of(cls, model: nn.Module, place: Place, seed: int) -> _Fit:
        ffn, block = _products(model, place), block_at(model, place)
        weights = fresh(model, place, "init", seed)
        outer = f"{block.path}.{ffn.outer}."
        for name, tensor in weights.items():
            if name.startswith(outer):
                tensor.zero_()
        return cls(place, block, ffn, weights, _students(block, weights))

    def read(
        self, passing: Pass, students: Students | None = None
    ) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"], Float[Tensor, "token d"]]:
        """u, y − o and o of every token that is no padding."""
        students = self.silent if students is None else students
        heard: list[Tensor] = []

        def hear(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            heard.append(given[0].flatten(0, -2))

        handle = students.body[0].get_submodule(self.ffn.inner).register_forward_pre_hook(hear)
        layer = self.place.layer
        try:
            out = passing.block(layer, passing.recorded.resid(layer), students)
        finally:
            handle.remove()
        y = passing.recorded.resid(layer + 1).to(out.device)
        name = "decoder_attention_mask" if self.place.stack == "decoder" else "attention_mask"
        mask = passing.batch.inputs.get(name)
        chosen = slice(None) if mask is None else mask.flatten().bool().to(out.device)
        (u,) = heard
        out = out.flatten(0, 1)[chosen].double()
        return u[chosen], y.flatten(0, 1)[chosen].double() - out, out

    def holding(
        self, passing: Pass, A: Float[Tensor, "d_out d_in"], b: Float[Tensor, "d_out"]
    ) -> dict[str, Tensor]:
        """The weights with A and b in the FFN. ValueError if it does not add A u + b then."""
        weights = {name: tensor.clone() for name, tensor in self.weights.items()}
        start, width = self.block.path, A.shape[1]
        eye = torch.eye(width, dtype=A.dtype, device=A.device)
        inner, outer = (
            self.block.module.get_submodule(p) for p in (self.ffn.inner, self.ffn.outer)
        )
        W_in = _as_linear(inner, weights[f"{start}.{self.ffn.inner}.weight"])
        W_out = _as_linear(outer, weights[f"{start}.{self.ffn.outer}.weight"])
        W_in[: 2 * width] = torch.cat([eye, -eye])
        W_out[:, : 2 * width] = torch.cat([A, -A], dim=1)
        if f"{start}.{self.ffn.inner}.bias" in weights:
            weights[f"{start}.{self.ffn.inner}.bias"][: 2 * width] = 0.0
        if self.ffn.has_bias:
            weights[f"{start}.{self.ffn.outer}.bias"].copy_(b)
        u, _, silent = self.read(passing)
        out = self.read(passing, _students(self.block, weights))[2]
        wanted = u.double() @ A.T + b
        if float((out - silent - wanted).norm()) > ERROR * float(wanted.norm() + 1e-6 * out.norm()):
            raise ValueError(
                f"the law linear for {self.place}: its FFN is not W_out φ(W_in u) with"
                " φ(z) − φ(−z) = z, so it holds no linear map; use another law"
            )
        return weights


def _students(block: Block, weights: dict[str, Tensor]) -> Students:
    start = f"{block.path}."
    mine = {name.removeprefix(start): tensor for name, tensor in weights.items()}
    return Students(block.module, [mine], ()).eval()


def _as_linear(module: nn.Module, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
    """A view of the weight as nn.Linear has it; Conv1D keeps Wᵀ."""
    return weight.T if isinstance(module, Conv1D) else weight


def _products(model: nn.Module, place: Place) -> Products:
    """ValueError, in a line, for an FFN that cannot hold a linear map."""
    block, asked = block_at(model, place), f"the law linear for {place}"
    row = block.row
    if place.part not in ("block", "ffn"):
        raise ValueError(f"{asked}: it is the FFN that is fitted; reset the block, or its ffn")
    if not has_identity(model, place):
        raise ValueError(
            f"{asked}: {type(model).__name__} norms the residual stream itself (post-norm), so an"
            " FFN adds no linear map to it; use another law"
        )
    modules = dict(block.module.named_modules())
    if row.mixer and row.mixer in modules:
        raise ValueError(f"{asked}: its block has an SSM ({row.mixer}); use another law")
    taken = {p for a in (row.attention, row.cross) if a for p in (a.module, a.out, a.q, a.k, a.v)}
    others = {
        path: module
        for path, module in modules.items()
        if path and not any(t and f"{path}.".startswith(f"{t}.") for t in taken)
    }
    found = {p: m for p, m in others.items() if isinstance(m, nn.Linear | Conv1D)}
    shapes = {p: _shape(module) for p, module in found.items()}
    if len(found) != 2 or list(shapes.values())[0] != list(shapes.values())[1][::-1]:
        raise ValueError(
            f"{asked}: its FFN is {', '.join(found) or 'none that is known'}, where two products"
            " are needed, W_out φ(W_in u) (not a gated FFN, not experts); use another law"
        )
    inner, outer = found
    hidden, width = shapes[inner]
    if hidden < 2 * width:
        raise ValueError(
            f"{asked}: its FFN is {hidden} wide, where a map of {width} coordinates takes"
            f" {2 * width}; use another law"
        )
    for path, module in others.items():
        if _is_activation(module) and not _keeps_odd(module):
            raise ValueError(
                f"{asked}: φ(z) − φ(−z) is not z for its {path} ({type(module).__name__}); use"
                " another law"
            )
    return Products(inner, outer, getattr(found[outer], "bias", None) is not None)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in)."""
    weight: Any = module.weight
    return tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)


def _is_activation(module: nn.Module) -> bool:
    bare = not list(module.children()) and not module.state_dict()
    return bare and not isinstance(module, nn.Dropout | nn.Identity)


def _keeps_odd(activation: nn.Module) -> bool:
    """φ(z) − φ(−z) = z, measured."""
    z = torch.linspace(-6.0, 6.0, 121, dtype=torch.float64)
    return math.isclose(float((activation(z) - activation(-z) - z).abs().max()), 0.0, abs_tol=1e-6)
