"""What does a small network say that was trained on the points before this one?

    f(x) = W_2 ReLU(W_1 x + b_1) + b_2,  100 hidden units, 100 steps of Adam at rate 0.005 on the
    mean squared error over all points before, anew for every point of every prompt (Garg et al.)

All networks of a few prompts are trained at once as one batched product; each has its own loss and
Adam is elementwise, so each is what it would be alone. W and b start as torch's Linear does,
uniform within 1/√inputs; one start a prompt, the same for all its points, from `seed`. Before the
first point the answer is 0.

The reference never trains the first network of a batch, and takes the mean over networks in its
loss, which divides steps of plain gradient descent by their number; neither is repeated here.

Where it misleads: 100 steps of 0.005 move a weight by about 0.5 at most, whatever the size of y;
the paper's two-layer task has outputs of standard deviation 32. `scaled=True` divides y by its root
mean square over the points before; what it predicts is then in proportion to y.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Generator, Tensor

HIDDEN = 100
STEPS = 100
RATE = 5e-3
_TOGETHER = 16
"""Prefixes that share the points of their longest: at most this many are multiplied in vain."""
_NETWORKS = {"cpu": 512, "cuda": 65536}


def network(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    *,
    scaled: bool = False,
    hidden: int = HIDDEN,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
) -> Float[Tensor, "batch point y_dim"]:
    """The prediction of every point by a network trained on those before it."""
    points = xs.shape[1]
    generator = torch.Generator(xs.device).manual_seed(seed)
    start = initial_weights(len(xs), xs.shape[2], hidden, ys.shape[2], generator)
    predictions = torch.zeros_like(ys)
    # Float32 whatever the prompts are: thousands of small networks are a matter of memory traffic.
    inputs, targets = xs.float(), ys.float()
    for some in torch.arange(len(xs), device=xs.device).split(
        max(1, _NETWORKS.get(xs.device.type, 512) // _TOGETHER)
    ):
        for first in range(1, points, _TOGETHER):
            lengths = torch.arange(first, min(first + _TOGETHER, points), device=xs.device)
            answers = _trained(
                inputs[some], targets[some], lengths, [w[some] for w in start], scaled, steps, rate
            )
            predictions[some[:, None], lengths] = answers.to(ys.dtype)
    return predictions


def initial_weights(
    networks: int, inputs: int, hidden: int, outputs: int, generator: Generator
) -> list[Float[Tensor, "network row column"]]:
    """W_1, b_1, W_2, b_2 as torch's Linear has them, rows on the input's side."""

    def uniform(rows: int, columns: int, fan_in: int) -> Tensor:
        shape = (networks, rows, columns)
        drawn = torch.rand(shape, generator=generator, device=generator.device)
        return (2 * drawn - 1) / math.sqrt(fan_in)

    return [
        uniform(inputs, hidden, inputs),
        uniform(1, hidden, inputs),
        uniform(hidden, outputs, hidden),
        uniform(1, outputs, hidden),
    ]


def _trained(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    lengths: Float[Tensor, "prefix"],
    start: list[Float[Tensor, "batch row column"]],
    scaled: bool,
    steps: int,
    rate: float,
) -> Float[Tensor, "batch prefix y_dim"]:
    """A network for each prompt and prefix length, and what it says of the point that follows."""
    longest, prefixes = int(lengths[-1]), len(lengths)
    inputs = repeat(xs[:, :longest], "batch point x -> (batch prefix) point x", prefix=prefixes)
    targets = repeat(ys[:, :longest], "batch point y -> (batch prefix) point y", prefix=prefixes)
    shown = torch.arange(longest, device=xs.device) < lengths[:, None]
    share = repeat(shown / lengths[:, None], "prefix point -> (b prefix) point 1", b=len(xs))
    scale = (share * targets.square()).sum(1, keepdim=True).mean(2, keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, 1.0) if scaled else torch.ones_like(scale)
    targets = targets / scale

    weights = [repeat(w, "batch r c -> (batch prefix) r c", prefix=prefixes).clone() for w in start]
    with torch.enable_grad():
        for w in weights:
            w.requires_grad_()
        adam = torch.optim.Adam(weights, lr=rate)
        for _ in range(steps):
            error = _said(weights, inputs) - targets
            loss = (share * error.square()).sum() / ys.shape[2]  # a mean for each network, summed
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        asked = rearrange(xs[:, lengths], "batch prefix x -> (batch prefix) 1 x")
        answers = _said(weights, asked) * scale
    return rearrange(answers, "(batch prefix) 1 y -> batch prefix y", prefix=prefixes)


def _said(
    weights: list[Float[Tensor, "network row column"]],
    xs: Float[Tensor, "network point x_dim"],
) -> Float[Tensor, "network point y_dim"]:
    w_1, b_1, w_2, b_2 = weights
    return torch.baddbmm(b_2, torch.baddbmm(b_1, xs, w_1).relu(), w_2)
