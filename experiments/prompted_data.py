"""What does a regressor that `ablate hybrid` trained read, as a study of its training sees it?

A regressor has no text: it reads prompts x₁, y₁, x₂, … of functions that are drawn anew for each.
Beside its folder stands the record of its run, with the task, the batch and the seed; so more
prompts of the same kind can be drawn, none of which it was trained on. Rows of an order are whole
prompts, tokens are their tokens (two a point), and the loss is

    mean over scored points of (prediction − y)² / E y²       E y² on held-out prompts

so that predicting 0 costs 1, as in the curve that the record keeps. T0 is all that it read: batch
times tokens, prompts that a curriculum kept small counted as small.

Where it misleads: prompts never repeat, so no share of T0 is a share of unique data.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.hybrids.learning.curriculum import Curriculum
from experiments.hybrids.learning.streams import HELD_OUT, held_out
from experiments.hybrids.regression.prompts import counted, interleaved
from experiments.hybrids.regression.task_table import Task
from experiments.hybrids.regression.tasks import sample
from experiments.objectives import Batch, chosen_rows

if TYPE_CHECKING:
    from experiments.bases import Base

FRESH = 0x66726573
"""With a seed and a step, what a generator is seeded with whose prompts no training reads."""
PROMPTS = 2048
"""Held-out prompts, for choosing and for reporting."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class NextVector:
    """y_i from the pairs before it and x_i: of every second token, the first coordinates of the
    next one."""

    y_dim: int
    unit: float
    """E y²."""
    last: bool = False
    """Only the last point is scored."""

    def __call__(self, rows: Float[Tensor, "row pos x_dim"]) -> Batch:
        """The batch made of whole prompts."""
        count, length, _ = rows.shape
        targets = rows.new_full((count, length, self.y_dim), math.nan)
        targets[:, ::2] = rows[:, 1::2, : self.y_dim]
        if self.last:
            targets[:, :-2] = math.nan
        return Batch({"prompts": rows}, targets, count * length, self.unit)


@dataclass(frozen=True)
class PromptOrder:
    """Fresh prompts: those of step s are a pure function of (seed, s).

    Attributes:
        cycle: begin again after this many steps; None reads on.
    """

    task: Task
    batch: int
    seed: int
    cycle: int | None = None

    def at(self, step: int) -> Float[Tensor, "batch pos x_dim"]:
        """The prompts that step `step` reads."""
        if self.cycle is not None:
            step %= self.cycle
        hashed = int(np.random.SeedSequence([FRESH, self.seed, step]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(hashed % HELD_OUT)
        return interleaved(sample(self.task, self.batch, generator))

    def step_tokens(self, step: int) -> int:
        """Tokens that any step reads."""
        return 2 * self.batch * self.task.points

    def steps_for(self, tokens: float) -> int:
        """The fewest steps (at least one) that read `tokens` tokens."""
        return max(1, math.ceil(tokens / self.step_tokens(0)))


@dataclass(frozen=True, eq=False)
class PromptObjective:
    """The task over fresh prompts, with held-out ones beside it (`objectives.Objective`)."""

    task: NextVector
    order: PromptOrder
    rows: Float[Tensor, "row pos x_dim"]

    def at(self, step: int) -> Batch:
        """What step `step` trains on: a pure function of the step."""
        return self.task(self.order.at(step))

    def held_out(
        self,
        limit: int | None = None,
        *,
        batch: int = 64,
        split: Literal["all", "pick", "report"] = "all",
    ) -> list[Batch]:
        """The held-out prompts, no more than `limit` tokens of them, in batches."""
        chosen = chosen_rows(len(self.rows), self.rows.shape[1], limit, split)
        whole = self.task(self.rows)
        return [whole.take(some) for some in chosen.split(batch)]


@dataclass(frozen=True, eq=False)
class PromptData:
    """The prompts of a base, where `base_data.BaseData` has text."""

    base: Base
    objective: PromptObjective
    exact: bool = False
    origins: tuple[str, ...] = ("held-out",)

    def reading(
        self,
        origin: str,
        *,
        seed: int,
        unique: float | None = None,
        other: str | None = None,
    ) -> PromptObjective:
        """The task on fresh prompts, drawn from `seed`.

        Raises ValueError for another origin: there is no text to read again or to exchange.
        """
        if origin != "held-out":
            raise ValueError(
                f"rows of origin {origin} asked for {self.base.name}: a regressor reads prompts, "
                "new ones at every step; give held-out, or leave the origin out"
            )
        order = dataclasses.replace(self.objective.order, seed=seed)
        if unique is not None:
            order = dataclasses.replace(order, cycle=order.steps_for(unique))
        return dataclasses.replace(self.objective, order=order)


def prompted_base(
    name: str, weights: str, config: Any, *, share: float, tokens: int | None
) -> Base:
    """The base of a regressor's folder.

    Raises ValueError for a folder without a record, for a share of the training, and for a T0
    against the record's.
    """
    from experiments.bases import Base

    folder = Path(weights)
    run, record, seed, steps = _record(name, folder)
    task, regime = Task(**record["task"]), record["regime"]
    if share != 1:
        raise ValueError(
            f"share {share:g} of the training of {name} asked for: a regressor's checkpoints are "
            "folders of their own; give one as --model"
        )
    read = _tokens(task, regime)
    seen = read(steps)
    if tokens not in (None, seen):
        raise ValueError(
            f"{tokens:,} training tokens given for {name}: its record says {seen:,}; leave the "
            "number out"
        )
    initial = run / "checkpoints" / f"s{seed}" / f"{0:07d}" / "model.safetensors"
    return Base(
        name=name,
        weights=weights,
        kind="decoder",
        family=config.model_type,
        objective="regression",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        share=1.0,
        tokens=seen,
        unique_tokens=seen,
        curve=tuple((read(s), v) for s, v in _curve(run, seed) if s <= steps),
        annealed=(),
        initial=initial if initial.exists() else None,
        seed=seed,
        record=record,
        folder=folder,
    )


def prompted_data(base: Base) -> PromptData:
    """Its task, on prompts that it was not trained on."""
    assert base.record is not None
    task = Task(**base.record["task"])
    prompts = held_out(task, PROMPTS, CPU)
    scored = counted(prompts)
    if not bool((scored == scored[0]).all()):
        raise ValueError(
            f"{base.name} was trained on prompts of which some points do not count (shift "
            f"{task.shift}): its layers cannot be retrained on them; give a base without the shift"
        )
    unit = float(prompts.ys.square().mean(-1)[scored].mean())
    objective = PromptObjective(
        NextVector(task.y_dim, unit, task.scored == "last"),
        PromptOrder(task, base.record["regime"]["batch"], seed=0),
        interleaved(prompts),
    )
    return PromptData(base, objective)


def _record(name: str, folder: Path) -> tuple[Path, Mapping[str, Any], int, int]:
    """(the run, what it was, the seed of this model, its last step).

    A run keeps its models as model-s0 and checkpoints/s0/0000100.
    """
    kept = folder.resolve()
    ended = kept.name.startswith("model-s")
    run = kept.parent if ended or len(kept.parents) < 3 else kept.parents[2]
    note = run / "trained.json"
    if not note.is_file():
        raise ValueError(
            f"{name} is a regressor without a record of its task: {note} is not there; give a "
            "model folder of a finished `ablate hybrid` run, where it was written"
        )
    found = json.loads(note.read_text())
    if ended:
        seed = int(kept.name.removeprefix("model-s"))
        steps = next(row["step"] for row in found["ended"] if row["seed"] == seed)
    else:
        seed, steps = int(kept.parent.name.removeprefix("s")), int(kept.name)
    return run, found["identity"], seed, steps


def _tokens(task: Task, regime: Mapping[str, Any]) -> Any:
    """steps -> tokens read by then."""
    until = round(regime["curriculum"] * regime["steps"])
    growth = Curriculum(task.d, task.points, until, max(1, task.k))

    def read(steps: int) -> int:
        small = sum(growth.at(step)[1] for step in range(min(steps, until)))
        return 2 * regime["batch"] * (small + max(0, steps - until) * task.points)

    return read


def _curve(run: Path, seed: int) -> list[tuple[int, float]]:
    """(step, held-out error as a share of predicting 0)."""
    import pandas as pd

    rows = pd.read_parquet(run / "curve.parquet")
    mine = rows.loc[rows["seed"] == seed].sort_values("step")
    return [(int(s), float(v)) for s, v in zip(mine["step"], mine["share"], strict=True) if s]
