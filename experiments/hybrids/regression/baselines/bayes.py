"""What is the best that can be said of this point, from the points before it?

The posterior mean of y under the task's own law, which no predictor beats in mean squared error on
prompts drawn from it:

    linear      w ~ N(0, I): least squares of the smallest norm; with label noise σ², ridge, λ = σ²
    quadratic   the same on x²
    sparse      a mixture over all C(d, k) supports S, each with w_S ~ N(0, I_k):
                p(S | y) ∝ N(y; 0, X_S X_Sᵀ + σ²I),  E y = Σ_S p(S | y) x_Sᵀ E(w_S | y, S)
    chebyshev   the same mixture over the top degrees, on T_3(x), T_4(x), …
    parity      a mixture over all C(d, k) supports, each right on every point or out
    recall      the value beside a copy of the key; 0, its mean, for a key never seen

Every support carries its posterior mean and covariance, k + k² numbers, from point to point: one
pass over the points, 1140 supports at d = 20, k = 3 at once. Without noise the limit σ → 0 is taken
at σ = 10⁻⁶ of y's scale, about the rounding of float32: a support that misses a y by a hundredth
of that scale has then a likelihood of e^(−5·10⁷), one that meets it keeps its own.

Where it misleads: it knows the law (k, σ, the coordinates in use) and no other. Under a shift it is
the answer of one who still believes in that law, and may be beaten; noise in x and outliers are in
none of these laws. `parity_pooled` reads the earlier points of *all* prompts, which a model of one
prompt cannot: it bounds what one could know that had seen one support behind many prompts.
"""

from __future__ import annotations

from itertools import combinations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROUNDING = 1e-6
"""Standard deviation that stands for no noise, as a share of y's root mean square."""
_BYTES = {True: 3_000_000, False: 500_000_000}
"""Of all L over prompts and supports, on a CPU (what its cache holds) and elsewhere."""


def supports(
    width: int, k: int, device: torch.device, used: Bool[Tensor, "x_dim"] | None = None
) -> Int[Tensor, "support k"]:
    """All sets of k of the coordinates (of the `used` ones), in lexicographic order."""
    allowed = range(width) if used is None else used.nonzero().flatten().tolist()
    if not 1 <= k <= len(allowed):
        raise ValueError(f"{k} relevant coordinates of {len(allowed)} in use: give 1 ≤ k ≤ that")
    return torch.tensor(list(combinations(allowed, k)), device=device)


def sparse_posterior_mean(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    k: int,
    noise: float = 0.0,
) -> Float[Tensor, "batch point y_dim"]:
    """Sparse linear functions: k weights N(0, 1), the rest 0, label noise of deviation `noise`.

    Coordinates that are 0 in every prompt are out of use, as under a curriculum, and in no support.
    Outputs of y have weights of their own and one support.
    """
    chosen = supports(xs.shape[2], k, xs.device, used=(xs != 0).flatten(0, 1).any(0))
    scale = float(ys.double().square().mean().sqrt()) or 1.0
    deviation = max(noise, ROUNDING * scale)
    together = max(1, _BYTES[xs.device.type == "cpu"] // (8 * len(chosen) * k * k))
    parts = [
        _mixture(some, answers, chosen, deviation)
        for some, answers in zip(
            xs.double().split(together), ys.double().split(together), strict=True
        )
    ]
    return torch.cat(parts).to(ys.dtype)


def chebyshev_posterior_mean(
    xs: Float[Tensor, "batch point 1"],
    ys: Float[Tensor, "batch point y_dim"],
    top: int,
    noise: float = 0.0,
) -> Float[Tensor, "batch point y_dim"]:
    """Σ_{3 ≤ n ≤ N} c_n T_n(x) with c_n ~ N(0, 1) and N uniform in 3 … top."""
    orders = torch.arange(3, top + 1, device=xs.device)
    terms = torch.cos(orders * torch.acos(xs.double().clamp(-1, 1)))  # T_n(cos θ) = cos nθ
    degrees = (orders <= orders[:, None]).double()
    everything = (orders - 3).expand(len(orders), -1)
    # Next to ±1 float32 knows T_n to n² of its roundings only.
    scale = float(ys.double().square().mean().sqrt()) or 1.0
    deviation = max(noise, top**2 * torch.finfo(torch.float32).eps * scale)
    return _mixture(terms, ys.double(), everything, deviation, degrees).to(ys.dtype)


def _mixture(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    chosen: Int[Tensor, "support k"],
    deviation: float,
    counted: Float[Tensor, "support k"] | None = None,
) -> Float[Tensor, "batch point y_dim"]:
    """One pass over the points, all supports of all prompts at once (Kalman's update in each).

    `counted` is 0 at the coordinates of `chosen` that a support does without.
    """
    batch, (count, k) = len(xs), chosen.shape
    # What a support carries stands first, so that each of its numbers is one long row in memory.
    root = torch.eye(k, dtype=xs.dtype, device=xs.device)[..., None, None].repeat(
        1, 1, batch, count
    )
    means = [xs.new_zeros(k, batch, count) for _ in range(ys.shape[2])]
    evidence = xs.new_zeros(batch, count)
    predictions = torch.empty_like(ys)
    for i in range(xs.shape[1]):
        x = rearrange(xs[:, i][:, chosen], "batch s row -> row batch s")
        x = x if counted is None else x * rearrange(counted, "s row -> row 1 s")
        # Covariance LLᵀ, carried as L (Potter): 10⁻¹² would drown in the rounding of 1.
        along = (root * x[:, None]).sum(0)
        variance = along.square().sum(0) + deviation**2
        moved = (root * along).sum(1)
        belief = evidence.softmax(-1)
        for output, mean in enumerate(means):
            said = (x * mean).sum(0)
            predictions[:, i, output] = (belief * said).sum(-1)
            error = ys[:, i, output, None] - said
            evidence -= (error.square() / variance + variance.log()) / 2
            mean += moved * (error / variance)
        root -= moved[:, None] * (along / (variance + deviation * variance.sqrt()))
    return predictions


def parity_posterior_mean(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point 1"],
    k: int,
    noise: float = 0.0,
) -> Float[Tensor, "batch point 1"]:
    """Mean parity over the supports that every point before agrees with."""
    parities = _parities(xs, k)
    return _vote(ys, parities, _misses(parities, ys), noise)


def parity_pooled(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point 1"],
    k: int,
    noise: float = 0.0,
) -> Float[Tensor, "batch point 1"]:
    """The same where one support is behind all prompts, and point i sees the first i of each."""
    parities = _parities(xs, k)
    return _vote(ys, parities, _misses(parities, ys).sum(0, keepdim=True), noise)


def _parities(
    xs: Float[Tensor, "batch point x_dim"], k: int
) -> Float[Tensor, "batch point support"]:
    return xs[:, :, supports(xs.shape[2], k, xs.device)].prod(-1)


def _misses(
    parities: Float[Tensor, "batch point support"], ys: Float[Tensor, "batch point 1"]
) -> Float[Tensor, "batch point support"]:
    """Σ (y_j − parity_j)² over the points before."""
    squares = (parities - ys).double().square()
    return squares.cumsum(1) - squares


def _vote(
    ys: Float[Tensor, "batch point 1"],
    parities: Float[Tensor, "batch point support"],
    misses: Float[Tensor, "some point support"],
    noise: float,
) -> Float[Tensor, "batch point 1"]:
    # One point missed costs 2/σ² nats: at 10⁻³, that stands for no noise, two million.
    belief = (misses / (-2 * max(noise, 1e-3) ** 2)).softmax(-1)
    votes = (parities * belief).sum(-1, keepdim=True)
    return votes.to(ys.dtype)
