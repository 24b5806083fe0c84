"""A tiny base of any family, with a session over it, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from experiments.corruption import Masking, Spans
from experiments.objectives import NextToken, Objective
from experiments.orders import Leg, Order
from experiments.reset.learning.parallel import ALONE, Share
from experiments.reset.learning.session import Session
from experiments.reset.learning.treatments import Treatment
from experiments.tokens import Rows
from tests.families import ENCODERS, TWO_STACKS, VOCAB, tiny

LENGTH = 12


def objective(family: str, batch: int = 4) -> Objective:
    """The objective of that family over random tokens."""
    generator = np.random.default_rng(0)
    stream = generator.integers(4, VOCAB - 8, 4000).astype(np.uint16)
    rows = Rows(stream, LENGTH, batch, 0, 0.0, 2, 4, VOCAB)
    held = torch.from_numpy(stream[: 6 * LENGTH].astype(np.int64).reshape(6, LENGTH))
    if family in TWO_STACKS:
        task = Spans(tuple(range(VOCAB - 8, VOCAB)), eos=2, start=0)
    elif family in ENCODERS:
        task = Masking(mask=3, ordinary=4, vocab=VOCAB)
    else:
        task = NextToken()
    return Objective(task, Order((Leg(rows, 0, 1000, LENGTH),)), held)


def session(
    family: str,
    treatments: Sequence[Treatment] = (),
    *,
    stack: str | None = None,
    steps: int = 6,
    model: nn.Module | None = None,
    enough: float = float("nan"),
    anneal: float = 0.34,
    parts: int = 1,
    save_every: float = 1e9,
    batch: int = 4,
    share: Share = ALONE,
) -> Session:
    """Six steps, evaluated at 0, 2, 4 and 6, and two steps more."""
    asked = objective(family, batch)
    return Session(
        tiny(family) if model is None else model,
        asked,
        asked.held_out(batch=4),
        treatments,
        {"base": family},
        steps,
        [0, 2, 4, steps],
        stack=stack,  # pyright: ignore[reportArgumentType]
        warmup=2,
        anneal=anneal,
        enough=enough,
        parts=parts,
        save_every=save_every,
        share=share,
    )
