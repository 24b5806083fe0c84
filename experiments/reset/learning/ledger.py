"""What is written down of every student at every evaluation?

One row a student, evaluation and kind of weights: first which base and which data, then what was
done to the student (`treatments`), then what came of it. `status` is running, recovered, budget or
diverged; only rows of the last evaluations of a student have another than running.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from experiments.reset.learning.examiner import Examiner
from experiments.reset.learning.treatments import Treatment

DIVERGED = 0.5
"""Nats above the loss at the reset."""
HELD = 3
"""Evaluations in a row below `enough` that make a student stop."""


@dataclass(eq=False)
class Ledger:
    """Rows so far, and what the next ones need of the first.

    Attributes:
        keys: columns that are the same for all rows.
        enough: gap, in nats, at which a student has recovered; nan never stops one.
        steps: of the trunk, at whose end the budget is spent.
    """

    keys: Mapping[str, Any]
    enough: float
    steps: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    """Student -> loss right after its reset."""
    skipped: dict[str, float] = field(default_factory=dict)
    """Layer -> loss without that block."""
    held: dict[str, int] = field(default_factory=dict)
    """Student -> evaluations in a row with a gap of at most `enough`."""

    def write(
        self,
        member: Treatment,
        sums: Float[Tensor, "row"],
        kind: str,
        examiner: Examiner,
        *,
        strange: Float[Tensor, "row"] | None = None,
        step: int,
        tokens: int,
        seconds: float,
        parameters: int,
    ) -> bool:
        """Add a student's row, `strange` being its sums with other rows' sources; whether the
        student is done."""
        name = member.name
        gap, stderr = examiner.gap(sums)
        loss = examiner.loss + gap
        if step == 0:
            self.first[name] = loss
        row = {
            **self.keys,
            **member.columns(),
            "parameters": parameters,
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
            "weights": kind,
            "loss": loss,
            "gap": gap,
            "stderr": stderr,
            "loss_base": examiner.loss,
            "loss_reset": self.first[name],
            "loss_skip": self._skip(member, examiner),
            "source_use": examiner.source_use(sums, strange),
            "status": "running",
        }
        self.rows.append(row)
        return self._judge(row, name)

    def state(self) -> list[Any]:
        """Everything later rows depend on, as JSON."""
        return [self.rows, self.first, self.skipped, self.held]

    def load(self, state: Sequence[Any]) -> None:
        """Take up a `state`."""
        self.rows, self.first, self.skipped, self.held = state

    def _skip(self, member: Treatment, examiner: Examiner) -> float:
        if len(member.layers) != 1:
            return math.nan
        layer = member.layers[0]
        if str(layer) not in self.skipped:
            self.skipped[str(layer)] = examiner.skipped(layer)
        return self.skipped[str(layer)]

    def _judge(self, row: dict[str, Any], name: str) -> bool:
        if not math.isfinite(row["loss"]):
            row["status"] = "diverged"
            return True
        if not row["parameters"]:
            row["status"] = "budget"  # nothing is trained: this is all there is to see
            return True
        if row["weights"] == "averaged":
            below = row["gap"] <= self.enough
            self.held[name] = self.held.get(name, 0) + 1 if below else 0
            if self.held[name] >= HELD and not goes_on(name) and row["step"] < self.steps:
                row["status"] = "recovered"
                return True
        if row["step"] >= self.steps:
            above = row["loss"] > row["loss_reset"] + DIVERGED
            row["status"] = "diverged" if above else "budget"
        return False


def goes_on(name: str) -> bool:
    """One student in ten trains to the end whatever becomes of it, to check the stopping rule."""
    return hashlib.sha256(name.encode()).digest()[0] < 26
