"""Awkward prompts, and a fit anew for every prefix: the slow way that the baselines avoid."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from experiments.hybrids.regression.tasks import Prompts


def drawn(batch: int, points: int, width: int, outputs: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(batch, points, width, generator=generator, dtype=torch.float64)
    return xs, torch.randn(batch, points, outputs, generator=generator, dtype=torch.float64)


def degenerate() -> dict[str, tuple[Tensor, Tensor]]:
    """Points whose XᵀX is singular in every way that tasks and shifts make it so."""
    xs, ys = drawn(6, 14, 5, 2)
    switched_off = xs.clone()
    switched_off[..., 3:] = 0
    twice = torch.cat([xs[:, :4], xs[:, :4], xs[:, :6]], dim=1)
    plane = xs @ torch.diag(torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64)) @ xs[:, :5]
    nothing = xs.clone()
    nothing[:, 2] = 0
    return {
        "plain": (xs, ys),
        "signs": (xs.sign(), ys),
        "coordinates off": (switched_off, ys),
        "each point twice": (twice, ys),
        "a random plane": (plane, ys),
        "a point at 0": (nothing, ys),
    }


def by_prefix(xs: Tensor, ys: Tensor, fit) -> np.ndarray:
    """x_i · fit(x before, y before), point by point."""
    answer = np.zeros(ys.shape)
    for b in range(len(xs)):
        for i in range(1, xs.shape[1]):
            answer[b, i] = xs[b, i].numpy() @ fit(xs[b, :i].numpy(), ys[b, :i].numpy())
    return answer


def gain(prompts: Prompts, predictions: Tensor) -> tuple[float, float]:
    """Σ_i (ξ₀ − ξ), the denominator of the score, and its standard error over prompts."""
    each = (prompts.ys.square() - (predictions - prompts.ys).square()).double().sum((1, 2))
    return float(each.mean()), float(each.std() / math.sqrt(len(each)))
