"""How near is what a block does to a linear map of its input?

From the second moments of x = resid_in and y = resid_out alone, centred over tokens:

    linear_cka   ‖Σ x yᵀ‖² / (‖Σ x xᵀ‖ ‖Σ y yᵀ‖)       (Kornblith et al. 2019, linear kernel)
    linear_r2    1 − Σ|u − ridge(x)|² / Σ|u − ū|²  for the update u = y − x, on rows of text that
                 the ridge map has not seen; its penalty is chosen on rows of its own

Moments add up over batches, so nothing grows with the number of tokens. They are kept in fp64: a
residual stream has coordinates a thousand times the others.

Where it misleads. CKA of a block that adds little is near 1 by the skip alone; R² is of the update,
so it is not. R² from fewer tokens than d_model says that there were too few tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-8, 3))
"""Of the ridge map, in units of the mean variance of an input coordinate."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens: of every residual stream of a stack, and of every block's in and out.

    Attributes:
        squares: Σ x xᵀ of each stream.
        crosses: Σ x yᵀ of each block's input x and output y.
    """

    tokens: int
    sums: Float[Tensor, "stream d_model"]
    squares: Float[Tensor, "stream d_model d_model"]
    crosses: Float[Tensor, "layer d_model d_model"]

    @classmethod
    def of(
        cls, streams: Float[Tensor, "stream batch pos d_model"], chosen: Bool[Tensor, "batch pos"]
    ) -> Moments:
        """Of the chosen tokens."""
        x = streams[:, chosen].double()
        return cls(
            tokens=x.shape[1],
            sums=x.sum(1),
            squares=einsum(x, x, "stream token a, stream token b -> stream a b"),
            crosses=einsum(x[:-1], x[1:], "layer token a, layer token b -> layer a b"),
        )

    def __add__(self, other: Moments) -> Moments:
        """Of the tokens of both."""
        return Moments(
            self.tokens + other.tokens,
            self.sums + other.sums,
            self.squares + other.squares,
            self.crosses + other.crosses,
        )

    def about(
        self, layer: int, centre: Moments
    ) -> tuple[
        Float[Tensor, "d_model d_model"],
        Float[Tensor, "d_model d_model"],
        Float[Tensor, "d_model d_model"],
    ]:
        """Σ x xᵀ, Σ x yᵀ, Σ y yᵀ of one block, about the means of the tokens of `centre`."""
        means = centre.sums[layer : layer + 2] / centre.tokens
        (a, b), (s, t) = means, self.sums[layer : layer + 2]
        n = self.tokens
        return (
            self.squares[layer] - torch.outer(s, a) - torch.outer(a, s) + n * torch.outer(a, a),
            self.crosses[layer] - torch.outer(s, b) - torch.outer(a, t) + n * torch.outer(a, b),
            self.squares[layer + 1] - torch.outer(t, b) - torch.outer(b, t) + n * torch.outer(b, b),
        )


def linear_cka(moments: Moments, layer: int) -> float:
    """Linear CKA of a block's input and output; nan where one of them does not vary."""
    xx, xy, yy = moments.about(layer, moments)
    scale = float(xx.norm() * yy.norm())
    return float(xy.norm() ** 2) / scale if scale > 0 else math.nan


def linear_r2(fit: Moments, choose: Moments, test: Moments, layer: int) -> float:
    """R² on `test` of the update that a ridge map makes of the input.

    Fitted on `fit`, its penalty chosen on `choose`, fitted again on both. nan where the update of
    the test tokens does not vary.
    """
    penalty = min(PENALTIES, key=lambda p: _missed(_ridge(fit, layer, p), choose, fit, layer))
    both = fit + choose
    missed = _missed(_ridge(both, layer, penalty), test, both, layer)
    xx, xy, yy = test.about(layer, test)
    spread = float(yy.trace() - 2 * xy.trace() + xx.trace())
    return 1 - missed / spread if spread > 0 else math.nan


def _ridge(moments: Moments, layer: int, penalty: float) -> Float[Tensor, "a b"]:
    """W of u − ū ≈ Wᵀ(x − x̄)."""
    xx, xy, _ = moments.about(layer, moments)
    added = penalty * xx.trace() / len(xx) + torch.finfo(xx.dtype).tiny
    return torch.linalg.solve(xx + added * torch.eye(len(xx), dtype=xx.dtype), xy - xx)


def _missed(weights: Float[Tensor, "a b"], on: Moments, centre: Moments, layer: int) -> float:
    """Σ|u − ū − Wᵀ(x − x̄)|² of the tokens `on`, about the means of `centre`."""
    xx, xy, yy = on.about(layer, centre)
    spread = yy.trace() - 2 * xy.trace() + xx.trace()
    shared = einsum(weights, xy - xx, "a b, a b ->")
    own = einsum(weights, xx, weights, "a b, a c, c b ->")
    return float(spread - 2 * shared + own)
