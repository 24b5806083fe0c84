"""How far is a student from the base, on the same held-out rows?

    gap    Σ (loss − base loss) over the targets of all rows / number of targets, nats
    its standard error over rows: the rows are the independent texts, their tokens are not

The base's residual streams of the held-out rows do not change, so they are kept from one
evaluation to the next, as far as there is room.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.components import Stack
from experiments.objectives import IGNORED, Batch
from experiments.reset.climb import Cohort, Pass, evaluate, evaluate_base

KEPT = 2**30
"""Bytes of held-out residual streams kept from one evaluation to the next."""


class Examiner:
    """The held-out rows, with what the base makes of them."""

    def __init__(
        self,
        model: nn.Module,
        held_out: Sequence[Batch],
        stack: Stack | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.held_out, self.stack, self.autocast = model, held_out, stack, autocast
        self.device = next(model.parameters()).device
        self.counts = torch.cat([(b.targets != IGNORED).sum(1) for b in held_out]).double()
        self.kept: dict[int, Pass] = {}
        self.room = KEPT
        with torch.no_grad(), self._precision():
            base = [evaluate_base(self._passing(i)).double().cpu() for i in range(len(held_out))]
        self.base = torch.cat(base)
        self.loss = float(self.base.sum() / self.counts.sum())

    def sums(self, cohorts: Sequence[Cohort]) -> list[Float[Tensor, "student row"]]:
        """Summed loss of every held-out row, for every student."""
        found: list[list[Tensor]] = [[] for _ in cohorts]
        for i in range(len(self.held_out)):
            passing = self._passing(i)
            with self._precision():
                for c, sums in enumerate(evaluate(passing, cohorts)):
                    found[c].append(sums.double().cpu())
        return [torch.cat(sums, dim=1) for sums in found]

    def gap(self, sums: Float[Tensor, "row"]) -> tuple[float, float]:
        """Loss minus the base's on the same rows, and its standard error over rows."""
        difference = sums - self.base
        gap = float(difference.sum() / self.counts.sum())
        if len(sums) < 2:
            return gap, math.nan
        residual = (difference - gap * self.counts) / self.counts.mean()
        return gap, float(residual.std() / math.sqrt(len(sums)))

    def skipped(self, layer: int) -> float:
        """Loss with the block replaced by the identity."""
        cohort = Cohort({layer: _Skipped()})  # pyright: ignore[reportArgumentType]
        return float(self.sums([cohort])[0].sum() / self.counts.sum())

    def _passing(self, i: int) -> Pass:
        if i in self.kept:
            return self.kept[i]
        with self._precision():
            passing = Pass.of(self.model, self.held_out[i].to(self.device), self.stack)
        size = sum(t.numel() * t.element_size() for t in passing.recorded.kept.values())
        if size <= self.room:
            self.kept[i] = passing
            self.room -= size
        return passing

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


class _Skipped(nn.Module):
    """A block that gives back its residual stream."""

    count = 1

    def forward(self, resid: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return resid
