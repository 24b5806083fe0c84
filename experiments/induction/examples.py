"""What do the heads that pass attend to, token by token?

Single rows to look at, on the page and in a figure: random tokens that repeat, and text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from ablate.components import Component, Head, Stack, parse_component
from probes.attention import induction_keys
from probes.behaviour import text_rows
from probes.patterns import patterns_of
from probes.repeats import drawn

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.induction.study import Induction

SHOWN = 8
"""Heads whose attention the page shows, at most: those that pass, then by prefix matching."""
SHOWN_LENGTH, SHOWN_COPIES, SHOWN_TEXT = 12, 3, 96
"""Block and copies of the row they are shown on; tokens of text."""


@dataclass(frozen=True, eq=False)
class Example:
    """One row of tokens, and what some heads attend to on it."""

    of: str
    tokens: Sequence[str]
    patterns: Mapping[Component, Float[Tensor, "query key"]]
    targets: Sequence[Sequence[int]]
    """The keys of every query that prefix matching counts."""


def examples_of(
    study: Induction,
    model: HookedModel,
    ids: Int[Tensor, "vocab"],
    text: Int[Tensor, "token"] | None,
    windows: Int[Tensor, "example pos"] | None,
    judgement: pd.DataFrame,
    heads: Sequence[Head],
) -> list[Example]:
    """How the heads that pass, or those nearest to it, attend on a short row, and on text."""
    if judgement.empty:
        return []
    nearest = judgement.sort_values("prefix_matching", ascending=False)["component"].tolist()
    chosen = list(dict.fromkeys([*heads, *map(parse_component, nearest)]))
    chosen = [component for component in chosen if component.stack == chosen[0].stack][:SHOWN]
    length = min(SHOWN_LENGTH, len(ids) // SHOWN_COPIES)
    (row,) = drawn(
        model,
        (length,),
        repeats=SHOWN_COPIES,
        seeds=[study.masking_seeds.stop],
        batch=1,
        vocabulary=ids,
        bos="model" if study.bos == "model" else None,
    )
    found = [_example("random tokens that repeat", model, row.repeated, chosen)]
    hf: Any = model.model
    if text is not None and windows is not None and not hf.config.is_encoder_decoder:
        shown = min(SHOWN_TEXT, windows.shape[1])
        tokens = text_rows(model, text, context=shown, limit=2)[-1:]
        found.append(_example("text", model, {"": tokens}, chosen))
    return found


def _example(
    of: str,
    model: HookedModel,
    rows: Mapping[Stack, Int[Tensor, "1 pos"]],
    chosen: Sequence[Component],
) -> Example:
    tokens = rows[chosen[0].stack]
    ids = tokens[0].tolist()
    names = (
        [str(token) for token in ids]
        if model.tokenizer is None
        else [model.tokenizer.decode([token]) for token in ids]
    )
    keys = induction_keys(tokens)[0].tolist()
    targets = [[key for key in own if key >= 0] for own in keys]
    return Example(of, names, patterns_of(model, rows, chosen), targets)
