"""How far is a student from the base, on the same held-out rows?

    gap    Σ (loss − base loss) over the targets of all rows / number of targets, nats
    its standard error over rows: the rows are the independent texts, their tokens are not

    source-use (`translation.source_use`), of encoder-decoders: how much of what the student gets
    right it owes to its source, against another row's source

The base's residual streams of the held-out rows do not change, so those that students begin at are
kept from one evaluation to the next, as far as there is room. Several processes deal the batches
out among them; every one knows the sums of all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.components import Stack
from ablate.hooks import execution_device
from experiments.objectives import Batch
from experiments.reset.learning.climb import Cohort, Pass, depth, evaluate, evaluate_base
from experiments.reset.learning.parallel import ALONE, Share
from experiments.translation import no_sources, source_use

KEPT = 2**30
"""Bytes of held-out residual streams kept from one evaluation to the next."""


class Examiner:
    """The held-out rows, with what the base makes of them; `first` are blocks that students will
    replace."""

    def __init__(
        self,
        model: nn.Module,
        held_out: Sequence[Batch],
        stack: Stack | None,
        autocast: torch.dtype | None,
        first: Collection[int] = (),
        share: Share = ALONE,
    ) -> None:
        self.model, self.held_out, self.autocast, self.share = model, held_out, autocast, share
        self.stack: Stack | None = stack
        self.needed = frozenset(first)
        self.device = execution_device(model)
        self.counts = torch.cat([b.predicted.sum(1) for b in held_out]).double()
        self.kept: dict[int, Pass] = {}
        self.room = KEPT
        self.base = self._all(None)[0][0]
        self.loss = float(self.base.sum() / self.counts.sum())
        if not math.isfinite(self.loss):
            raise ValueError(
                f"the base's held-out loss is {self.loss}: no gap can be measured from it; give a"
                " model whose weights are finite"
            )

    @cached_property
    def strangers(self) -> Examiner | None:
        """The same rows with each other's sources; None where there is no source to exchange."""
        if "decoder_input_ids" not in self.held_out[0].inputs or len(self.counts) < 2:
            return None
        swapped = no_sources(self.held_out)
        return Examiner(self.model, swapped, self.stack, self.autocast, self.needed, self.share)

    def strange_sums(
        self, cohorts: Sequence[Cohort]
    ) -> Sequence[Float[Tensor, "student row"] | None]:
        """`sums` with other rows' sources, None for every cohort where there are none."""
        return [None] * len(cohorts) if self.strangers is None else self.strangers.sums(cohorts)

    def source_use(self, sums: Float[Tensor, "row"], strange: Float[Tensor, "row"] | None) -> float:
        """Of a student with these sums; nan without sources."""
        if strange is None:
            return math.nan
        loss, other = (float(s.sum() / self.counts.sum()) for s in (sums, strange))
        return source_use(other, loss, self.loss)

    def sums(self, cohorts: Sequence[Cohort]) -> list[Float[Tensor, "student row"]]:
        """Summed loss of every held-out row, for every student."""
        return self._all(cohorts)

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

    def _all(self, cohorts: Sequence[Cohort] | None) -> list[Float[Tensor, "student row"]]:
        """`sums`, or those of the base itself: one student."""
        counts = [1] if cohorts is None else [cohort.count for cohort in cohorts]
        rows = [len(batch.targets) for batch in self.held_out]
        found = [torch.zeros(count, sum(rows), dtype=torch.float64) for count in counts]
        for i in filter(self.share.deals, range(len(rows))):
            here = slice(sum(rows[:i]), sum(rows[: i + 1]))
            with torch.no_grad(), self._precision():
                if cohorts is None:
                    parts = [evaluate_base(self._passing(i, None))[None]]
                else:
                    parts = evaluate(self._passing(i, cohorts), cohorts)
            for sums, part in zip(found, parts, strict=True):
                sums[:, here] = part.double().cpu()
        return [self.share.total(sums) for sums in found]

    def _passing(self, i: int, cohorts: Sequence[Cohort] | None) -> Pass:
        """The i-th batch with the streams that `cohorts` begin at, or the base's last one."""
        if cohorts is not None:
            self.needed |= {cohort.first for cohort in cohorts}
            if i in self.kept and self.needed <= set(self.kept[i].recorded.kept):
                return self.kept[i]
        last = {depth(self.model, self.stack)} if cohorts is None else set()
        batch = self.held_out[i].to(self.device)
        with self._precision():
            passing = Pass.of(self.model, batch, self.stack, self.needed | last)
        kept = {n: stream for n, stream in passing.recorded.kept.items() if n in self.needed}
        smaller = replace(passing, recorded=replace(passing.recorded, kept=kept))
        if i in self.kept:
            self.room += _size(self.kept.pop(i))
        if _size(smaller) <= self.room:
            self.kept[i] = smaller
            self.room -= _size(smaller)
        return passing

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def _size(passing: Pass) -> int:
    return sum(t.numel() * t.element_size() for t in passing.recorded.kept.values())


class _Skipped(nn.Module):
    """A block that gives back its residual stream."""

    count = 1

    def forward(self, resid: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return resid
