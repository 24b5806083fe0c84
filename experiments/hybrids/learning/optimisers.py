"""How are the stacked weights of K seeds stepped as if each were alone?

The weights are stacks W [student, ...] (`ablate.students`). Adam, AdamW and SGD with momentum are
elementwise, so one fused call over the stacks is K separate optimisers, as long as nothing in it
joins seeds. Two things would, and are kept apart:

    clip      g_k ← g_k · min(1, clip / ‖g_k‖),  the norm over all tensors of seed k alone
    rate      seeds of several rates are stepped as views W[k], one parameter group a rate

Weight decay is for matrices only: gains and biases have no scale to shrink, and the logarithms of
an SSM's decay rates no origin to shrink to.

Where it misleads. Nothing waits for the device: a seed whose gradient is not finite becomes not
finite itself, in its own slice of every stack, and is found at the next evaluation. torch's `adam`
adds its weight decay to the gradient, where the division by its own size mostly undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.hybrids.learning.regimes import Regime
from experiments.training import is_decayed


class SeedOptimiser:
    """The optimiser of all seeds' weights, holding its moments.

    `rates` are the seeds' peak rates; `step` takes the share of them to use.
    """

    def __init__(
        self,
        stacks: Mapping[str, Tensor],
        rates: Sequence[float],
        regime: Regime,
    ) -> None:
        self.stacks = dict(stacks)
        self.clip = regime.clip
        self._one_rate = len(set(rates)) == 1
        self._views: list[tuple[str, int, nn.Parameter]] = []
        groups: list[dict[str, Any]] = []
        self._peaks: list[float] = []
        for decayed in (True, False):
            names = [n for n, s in self.stacks.items() if is_decayed(n, s.ndim - 1) is decayed]
            decay = regime.weight_decay if decayed else 0.0
            if self._one_rate and names:
                groups.append({"params": [self.stacks[n] for n in names], "weight_decay": decay})
                self._peaks.append(rates[0])
            elif names:
                for k, rate in enumerate(rates):
                    views = [(n, k, nn.Parameter(self.stacks[n].data[k])) for n in names]
                    self._views += views
                    groups.append({"params": [v for _, _, v in views], "weight_decay": decay})
                    self._peaks.append(rate)
        self.optimiser = _made(groups, regime)

    def step(self, rate_share: float) -> None:
        """One update from the stacks' gradients, which are gone afterwards."""
        if self.clip:
            clip_each_(self.stacks.values(), self.clip)
        for name, k, view in self._views:
            grad = self.stacks[name].grad
            view.grad = None if grad is None else grad[k]
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate_share
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for stack in self.stacks.values() if self._views else ():
            stack.grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments, [student, ...] each, and how many steps they have seen."""
        found: dict[str, Tensor] = {}
        for name, stack in self.stacks.items():
            states = [self.optimiser.state.get(p, {}) for p in self._parameters(name, stack)]
            for key in states[0]:
                values = [state[key] for state in states]
                if key == "step":
                    found["step"] = values[0].cpu()
                elif values[0] is not None:
                    found[f"{name}/{key}"] = (
                        values[0] if len(values) == 1 and self._one_rate else torch.stack(values)
                    )
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the moments of as many students."""
        for name, stack in self.stacks.items():
            keys = [k.removeprefix(f"{name}/") for k in state if k.rpartition("/")[0] == name]
            for k, parameter in enumerate(self._parameters(name, stack)):
                mine: dict[str, Tensor] = {}
                for key in keys:
                    tensor = state[f"{name}/{key}"].to(stack.device)
                    mine[key] = (tensor if self._one_rate else tensor[k]).clone()
                if keys and "step" in state:
                    mine["step"] = state["step"].clone().to(stack.device)
                if mine:
                    self.optimiser.state[parameter] = mine

    def _parameters(self, name: str, stack: Tensor) -> list[Tensor]:
        if self._one_rate:
            return [stack]
        return [view for n, _, view in self._views if n == name]


def clip_each_(stacks: Any, clip: float) -> Float[Tensor, "student"]:
    """Scale the gradients of every student to a norm of at most `clip`; the norms as they were."""
    gradients = [stack.grad for stack in stacks if stack.grad is not None]
    norms = seed_norms(gradients)
    scale = (clip / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))
    return norms


def seed_norms(gradients: Sequence[Float[Tensor, "student ..."]]) -> Float[Tensor, "student"]:
    """‖g_k‖ over all tensors of every student."""
    return torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)


def _made(groups: list[dict[str, Any]], regime: Regime) -> torch.optim.Optimizer:
    match regime.optimiser:
        case "adam":
            return torch.optim.Adam(groups, lr=regime.rate, betas=regime.betas, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=regime.rate, betas=regime.betas, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=regime.rate, momentum=regime.momentum, fused=True)
