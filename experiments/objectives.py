"""What is a model asked to predict, and from what?

A task turns rows of text into a batch: what the forward takes, and a target for every position of
the logits. An objective is a task over an order of rows, with held-out rows beside it:

    lm            every token from those before it: NextToken, here
    mlm           some tokens from all others: Masking, in corruption.py
    denoising     the text from a damaged one: Spans and Infilling, in corruption.py
    translation   another language from this one: Translation, in translation.py
    regression    y from earlier pairs (x, y), targets that are vectors: prompted_data.py

Masks are a pure function of (seed, step); held-out masks are drawn once and are the same for every
seed, model and arm. `Batch.tokens` counts the positions of text that were read, predicted or not:
the unit of T0. Where it misleads: a masked model learns from 15 % of them, a causal one from all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from experiments.orders import Order

IGNORED = -100
"""The target that cross-entropy leaves out, as in torch."""
HELD_OUT_SEED = 0x68656C64
"""Of the held-out masks: one for all, so that losses of any two runs compare."""
PICK_EVERY = 4
"""Every fourth held-out row is for choosing (learning rates); the others are for reporting."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward takes, and what its logits are held against.

    Attributes:
        inputs: the Hugging Face forward's arguments (no labels).
        targets: aligned with the (decoder's) logits; IGNORED where nothing is predicted. Vectors
            where a model predicts vectors, nan where nothing is predicted.
        tokens: positions of text read, as T0 counts them.
        unit: what every loss is divided by.
    """

    inputs: dict[str, Tensor]
    targets: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos y_dim"]
    tokens: int
    unit: float = 1.0

    @property
    def predicted(self) -> Bool[Tensor, "batch pos"]:
        """Where something is predicted."""
        return is_predicted(self.targets)

    def take(self, rows: Int[Tensor, "row"]) -> Batch:
        """Some of the rows."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        tokens = self.tokens * len(rows) // len(self.targets)
        return Batch(inputs, self.targets[rows], tokens, self.unit)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.targets.to(device), self.tokens, self.unit)


class Task(Protocol):
    """Rows of text to a batch; masks are drawn from `generator`."""

    @property
    def name(self) -> str:
        """lm, mlm, denoising or translation."""
        ...

    def __call__(self, rows: Int[Tensor, "row pos"], generator: np.random.Generator) -> Batch:
        """The batch made of `rows`, in their order."""
        ...


@dataclass(frozen=True, eq=False)
class Objective:
    """A task over an order of rows.

    Attributes:
        order: which rows each step reads.
        rows: the held-out rows; never in the order.
        seed: of the training masks.
    """

    task: Task
    order: Order
    rows: Int[Tensor, "row pos"]
    seed: int = 0

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def at(self, step: int) -> Batch:
        """What step `step` trains on: a pure function of the step.

        A cycled order repeats its text; the masks are new each time.
        """
        return self.task(self.order.at(step), np.random.default_rng([self.seed, 2, step]))

    def reading(self, order: Order, *, seed: int | None = None) -> Self:
        """The same task on other training rows, perhaps with other masks."""
        return dataclasses.replace(self, order=order, seed=self.seed if seed is None else seed)

    def held_out(
        self,
        limit: int | None = None,
        *,
        batch: int = 16,
        split: Literal["all", "pick", "report"] = "all",
    ) -> list[Batch]:
        """The held-out rows, evenly spread if there are more than `limit` tokens, in batches.

        A row has the same masks whatever the limit, the batch size and the split.
        """
        whole = self.task(self.rows, np.random.default_rng([HELD_OUT_SEED, 3]))
        chosen = chosen_rows(len(self.rows), self.rows.shape[1], limit, split)
        return [whole.take(some) for some in chosen.split(batch)]


def chosen_rows(
    rows: int, length: int, limit: int | None, split: Literal["all", "pick", "report"]
) -> Int[Tensor, "row"]:
    """Which held-out rows of `length` tokens: those of the split, of which no more than `limit`
    tokens, evenly spread. ValueError where there are none."""
    chosen = torch.arange(rows)
    if split != "all":
        chosen = chosen[(chosen % PICK_EVERY == 0) == (split == "pick")]
    if limit is not None:  # spread over all files, so that it estimates what all rows give
        count = max(1, min(len(chosen), limit // length))
        chosen = chosen[torch.linspace(0, len(chosen) - 1, count).round().long()]
    if not len(chosen):
        raise ValueError(f"no held-out row to {split}: there are {rows} rows; give more text")
    return chosen


def is_predicted(
    targets: Int[Tensor, "*entry"] | Float[Tensor, "*entry y_dim"],
) -> Bool[Tensor, "*entry"]:
    """Which targets are something to be predicted."""
    if targets.is_floating_point():
        return ~targets[..., 0].isnan()
    return targets != IGNORED


def target_losses(
    logits: Float[Tensor, "entry output"],
    targets: Int[Tensor, "entry"] | Float[Tensor, "entry output"],
) -> Float[Tensor, "entry"]:
    """−log p of a token in nats, the squared error of a vector (mean over its coordinates); 0 where
    nothing is predicted."""
    if targets.is_floating_point():
        # Before the square: a gradient through an unused nan would be nan.
        known = targets.isnan().logical_not()
        errors = torch.where(known, logits.float() - targets.nan_to_num(), 0.0)
        return errors.square().mean(-1)
    return nn.functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, reduction="none"
    )


def losses(
    logits: Float[Tensor, "batch pos output"], batch: Batch
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """`target_losses` of every position, in the batch's unit; and where something is predicted."""
    flat = target_losses(logits.flatten(0, 1), batch.targets.flatten(0, 1)) / batch.unit
    return flat.unflatten(0, logits.shape[:2]), batch.predicted


def loss(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy over the predicted targets, in nats."""
    return nn.functional.cross_entropy(
        rearrange(logits, "batch pos vocab -> (batch pos) vocab").float(),
        rearrange(batch.targets, "batch pos -> (batch pos)"),
        ignore_index=IGNORED,
    )


@dataclass(frozen=True)
class NextToken:
    """Every token from those before it (a decoder)."""

    name: str = "lm"

    def __call__(self, rows: Int[Tensor, "row pos"], generator: np.random.Generator) -> Batch:
        """Targets are the rows shifted by one; the last position predicts nothing."""
        targets = torch.full_like(rows, IGNORED)
        targets[:, :-1] = rows[:, 1:]
        return Batch({"input_ids": rows}, targets, rows.numel())
