"""How is the tanh form of GELU trained on a CPU without waiting for tanh?

With u = √(2/π) (x + 0.044715 x³), ½ (1 + tanh u) is the logistic function of 2u, so

    gelu(x) = x σ(2u),    gelu'(x) = σ + x σ (1 − σ) · 2u',    2u' = 2 √(2/π) (1 + 3 · 0.044715 x²)

torch evaluates tanh on a CPU at a tenth of the rate of σ, and once more in the backward pass. Here
σ is taken once and the derivative kept in the place of x.

Where it misleads. It is torch's own function up to rounding (5e-7 at x near 4), used only where a
gradient is taken in training, in float32, on a CPU; it has no second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


def gelu(x: Float[Tensor, "*axes"], training: bool) -> Float[Tensor, "*axes"]:
    """The tanh form of GELU."""
    learning = training and x.requires_grad and not torch.compiler.is_compiling()
    if learning and x.device.type == "cpu" and x.dtype == torch.float32:
        return _Logistic.apply(x)  # pyright: ignore[reportReturnType]
    return nn.functional.gelu(x, approximate="tanh")


class _Logistic(torch.autograd.Function):
    """x σ(2u), in as few passes over memory as there can be without a kernel of our own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        gate = (square * CUBIC).add_(LINEAR).mul_(x).sigmoid_()
        out = x * gate
        slope = square.mul_(3 * CUBIC).add_(LINEAR).mul_(out)
        ctx.save_for_backward(slope.addcmul_(slope, gate, value=-1).add_(gate))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return slope * grad
