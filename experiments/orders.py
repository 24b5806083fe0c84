"""Which rows does a training step read: the base's own, the same reshuffled, or others?

A base reads its rows in legs: some steps of short rows, then some of long ones, perhaps with
another seed. An order is such a list of legs, and a pure function step → tokens [batch, pos]. Four
origins of data come from one base's order:

    same         order                       step s reads what step s of the base read
    reshuffled   order.reshuffled(seed)      the base's own batches in another order
    held out     order.over(stream, seed)    with a stream the base never read
    other        order.over(stream, seed)    with a stream of another domain

`order.cycled(tokens)` begins again after so many tokens: unique tokens and steps are two axes.
Where it misleads: a reshuffled order permutes whole batches, so rows that stood together still do;
and "same" beyond the base's last step is text that the base may never have read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from jaxtyping import Int
from torch import Tensor

from experiments.tokens import Rows


@dataclass(frozen=True, eq=False)
class Leg:
    """Some steps that read rows of one length.

    Attributes:
        rows: where the tokens come from.
        first: the step of `rows` that the leg begins with.
        steps: how many steps it lasts.
        length: tokens a row; windows of `rows.context` tokens are split into such rows.
    """

    rows: Rows
    first: int
    steps: int
    length: int

    @property
    def step_tokens(self) -> int:
        """Tokens that one step reads."""
        return self.rows.batch * (self.rows.context // self.length) * self.length


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of every step: a list of legs, perhaps shuffled, perhaps cycled.

    Attributes:
        legs: in the order read; the last one goes on for as long as it is asked.
        shuffled: seed of the steps' permutation; None leaves them in order.
        cycle: begin again after this many steps; None reads on.
    """

    legs: tuple[Leg, ...]
    shuffled: int | None = None
    cycle: int | None = None

    @property
    def steps(self) -> int:
        """Steps of all legs together."""
        return sum(leg.steps for leg in self.legs)

    @property
    def tokens(self) -> int:
        """Tokens of all legs together."""
        return sum(leg.steps * leg.step_tokens for leg in self.legs)

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """The rows that step `step` reads."""
        leg, inside = self._place(step)
        return leg.rows.at(leg.first + inside, leg.length)

    def step_tokens(self, step: int) -> int:
        """Tokens that step `step` reads."""
        return self._place(step)[0].step_tokens

    def steps_for(self, tokens: float) -> int:
        """The fewest steps (at least one) that read `tokens` tokens."""
        steps, read = 1, self.step_tokens(0)
        while read < tokens:
            read += self.step_tokens(steps)
            steps += 1
        return steps

    def reshuffled(self, seed: int) -> Self:
        """The same batches in an order drawn from `seed`; past the last step, drawn again."""
        return dataclasses.replace(self, shuffled=seed)

    def cycled(self, tokens: float) -> Self:
        """Begin again once `tokens` tokens were read (rounded up to whole steps)."""
        if not tokens > 0:
            raise ValueError(f"{tokens} unique tokens asked for: give a number above 0")
        return dataclasses.replace(
            self, cycle=dataclasses.replace(self, cycle=None).steps_for(tokens)
        )

    def over(self, stream: Int[np.ndarray, "token"], seed: int) -> Self:
        """The same row lengths over another stream, from its first step, drawn from `seed`.

        Raises ValueError when the stream is shorter than one step's windows.
        """
        legs, first = [], 0
        for leg in self.legs:
            rows = dataclasses.replace(leg.rows, stream=stream, seed=seed)
            legs.append(dataclasses.replace(leg, rows=rows, first=first))
            first += leg.steps
        return dataclasses.replace(self, legs=tuple(legs))

    def _place(self, step: int) -> tuple[Leg, int]:
        """The leg of a step, and how far into the leg it is."""
        if self.cycle is not None:
            step %= self.cycle
        if self.shuffled is not None:
            again, step = divmod(step, self.steps)
            step = int(self._permutation(again)[step])
        for leg in self.legs[:-1]:
            if step < leg.steps:
                return leg, step
            step -= leg.steps
        return self.legs[-1], step

    def _permutation(self, again: int) -> Int[np.ndarray, "step"]:
        kept = self._permutations
        if again not in kept:
            kept[again] = np.random.default_rng([self.shuffled or 0, 4, again]).permutation(
                self.steps
            )
        return kept[again]

    @cached_property
    def _permutations(self) -> dict[int, Int[np.ndarray, "step"]]:
        return {}


def two_lengths(rows: Rows, steps: int, short: int, short_share: float) -> Order:
    """Short rows for a share of the steps, whole windows after, as the pretraining study reads."""
    # ceil: step s is short where s < short_share · steps.
    early = min(steps, int(np.ceil(short_share * steps)))
    legs = (Leg(rows, 0, early, short), Leg(rows, early, steps - early, rows.context))
    return Order(tuple(leg for leg in legs if leg.steps))
