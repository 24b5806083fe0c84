"""What does a model see of a function, and where does it answer?

A prompt is x₁, y₁, x₂, y₂, …: one token a value, all as wide as x, y in the first coordinates and
0 in the others. The answer to x_i is read where x_i stands, so it knows i − 1 pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Prompts:
    """Points of a batch of functions, and the functions themselves."""

    xs: Float[Tensor, "batch point x_dim"]
    ys: Float[Tensor, "batch point y_dim"]
    task: str
    hidden: Mapping[str, Tensor]
    """What the model is not shown (`functions` names it, class by class)."""
    scored: Literal["all", "last"] = "all"


def interleaved(prompts: Prompts) -> Float[Tensor, "batch token x_dim"]:
    """x₁, y₁, x₂, y₂, …, two tokens a point. ValueError where y is wider than x."""
    xs, ys = prompts.xs, prompts.ys
    spare = xs.shape[-1] - ys.shape[-1]
    if spare < 0:
        raise ValueError(
            f"y of {ys.shape[-1]} coordinates beside x of {xs.shape[-1]}: "
            "tokens are as wide as x, so take a task with y_dim ≤ x_dim"
        )
    pairs = torch.stack([xs, F.pad(ys, (0, spare))], dim=2)
    return rearrange(pairs, "batch point two x_dim -> batch (point two) x_dim")


def predictions_at(
    outputs: Float[Tensor, "*batch token y_dim"],
) -> Float[Tensor, "*batch point y_dim"]:
    """A model's outputs where an x stands: the prediction of every y from the pairs before it."""
    return outputs[..., ::2, :]


def counted(prompts: Prompts) -> Bool[Tensor, "batch point"]:
    """Which predictions enter a loss or a score: of mqar the last alone, and never an outlier's."""
    batch, points = prompts.xs.shape[:2]
    inside = torch.ones(batch, points, dtype=torch.bool, device=prompts.xs.device)
    if prompts.scored == "last":
        inside[:, :-1] = False
    if "outlier" in prompts.hidden:
        inside &= ~prompts.hidden["outlier"]
    return inside
