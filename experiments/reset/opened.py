"""Which bases are there to reset a layer of, and what do students of them read?

Opening a base reads its record, its text and its tokens, not its weights: what cannot be done is
refused before anything is loaded or written. `loaded` loads the weights; a process keeps the base
it used last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.base_data import BaseData, Origin, data_of
from experiments.bases import Base, base_at
from experiments.objectives import Batch
from experiments.prompted_data import PromptData, prompted_data

if TYPE_CHECKING:
    from ablate.components import Stack
    from experiments.reset.study import Resetting

USUAL: tuple[Origin, ...] = ("reshuffled", "other", "held-out", "same")
"""Origins, the one that `auto` prefers first: text that the base's loss was made of, in an order
that its own order does not favour."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A base with its text.

    Attributes:
        name: as it was asked for.
        steps_in: how many steps a batch of the base is cut into.
    """

    name: str
    base: Base
    data: BaseData | PromptData
    origin: Origin
    steps_in: int

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of blocks."""
        return ("encoder", "decoder") if self.base.kind == "encoder-decoder" else ("",)

    @property
    def keys(self) -> dict[str, Any]:
        """Its columns in the ledger."""
        base = self.base
        return {
            "base": self.name,
            "family": base.kind,
            "architecture": base.family,
            "objective": base.objective,
            "n_layers": base.n_layers,
            "d_model": base.d_model,
            "base_seed": -1 if base.seed is None else base.seed,
            "base_share": base.share,
            "base_tokens": math.nan if base.tokens is None else float(base.tokens),
            "unique_tokens": math.nan if base.unique_tokens is None else float(base.unique_tokens),
            "exact_text": self.data.exact,
        }

    def amount(self, value: float, option: str) -> float:
        """Tokens, of a number of tokens or of a share of T0.

        Raises ValueError for a share of an unknown T0.
        """
        if value == 0 or value >= 1:
            return value
        if self.base.tokens is None:
            raise ValueError(
                f"--{option} {value:g}, a share of the training tokens of {self.name}: nobody knows"
                " how many they were; give a number of tokens, or --base-tokens"
            )
        return value * self.base.tokens

    def steps(self, tokens: float) -> int:
        """The fewest steps that read so many tokens."""
        order = self.data.objective.order
        whole = order.steps_for(tokens)
        over = sum(order.step_tokens(s) for s in range(whole)) - tokens
        spare = int(over // (order.step_tokens(whole - 1) / self.steps_in))
        return max(1, whole * self.steps_in - spare)


def opened(study: Resetting) -> tuple[Opened, ...]:
    """Every base of the study at every share of its training.

    Raises ValueError for a base, a share or a text that is not there.
    """
    return tuple(opened_at(study, i) for i in range(len(study.models) * len(study.shares)))


def opened_at(study: Resetting, index: int) -> Opened:
    """One of them: a process that does one job reads the text of no other base."""
    name, share = divmod(index, len(study.shares))
    return open_base(
        study.models[name],
        study.shares[share],
        study.base_tokens,
        study.corpus,
        study.context,
        study.origin,
        study.step,
        study.row,
    )


@cache  # a study holds all its bases as long as it runs
def open_base(
    name: str,
    share: float,
    base_tokens: int | None,
    corpus: str,
    context: int | None,
    origin: str,
    step: int,
    row: int | None,
) -> Opened:
    """One base with its text."""
    base = base_at(name, share=share, tokens=base_tokens)
    data = _data_of(base, corpus, context, row)
    chosen = next(o for o in USUAL if o in data.origins) if origin == "auto" else origin
    if chosen not in (*data.origins, "other"):
        data.reading(chosen, seed=0)  # its refusal says why  # pyright: ignore[reportArgumentType]
    order = data.objective.order
    rows = len(order.at(0))
    per_row = order.step_tokens(0) / rows
    steps_in = max(1, min(rows, round(rows * per_row / step)))
    while rows % steps_in:
        steps_in -= 1
    return Opened(name, base, data, chosen, steps_in)  # pyright: ignore[reportArgumentType]


def _data_of(
    base: Base, corpus: str, context: int | None, row: int | None
) -> BaseData | PromptData:
    if base.objective != "regression":
        return _of_one_length(data_of(base, corpus=corpus or None, context=context), row)
    if corpus or context or row:
        raise ValueError(
            f"--corpus, --context or --row given for {base.name}, which reads prompts of its task "
            "and no text: leave them out"
        )
    return prompted_data(base)


def _of_one_length(data: BaseData, row: int | None) -> BaseData:
    """Training and held-out rows of one length: what is trained on is what is measured.

    A base that read short rows and then long ones is not the same on both, and a layer trained on
    the one forgets some of the other, reset or not.
    """
    order, rows = data.objective.order, data.objective.rows
    read: dict[int, int] = {}
    for leg in order.legs:
        read[leg.length] = read.get(leg.length, 0) + leg.steps * leg.step_tokens
    length = max(read, key=lambda each: read[each]) if row is None else row
    if length not in read:
        known = " or ".join(map(str, sorted(read)))
        raise ValueError(
            f"--row {length} asked for: {data.base.name} read rows of {known} tokens; give that"
        )
    if length < rows.shape[1]:
        rows = rows[:, : rows.shape[1] // length * length].reshape(-1, length).clone()
        rows[:, 0] = order.legs[0].rows.bos
    order = replace(order, legs=tuple(leg for leg in order.legs if leg.length == length))
    return replace(data, objective=replace(data.objective, order=order, rows=rows))


@lru_cache(maxsize=1)
def loaded(weights: str, dtype: str, device_map: str | None) -> nn.Module:
    """The base's model, frozen and in evaluation mode; the last one is kept."""
    from ablate import HookedModel

    kept = None if dtype == "checkpoint" else dtype
    model = HookedModel.from_pretrained(weights, dtype=kept, device_map=device_map).model
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def initial_weights(path: str) -> dict[str, Tensor]:
    """The weights before the first step."""
    from safetensors.torch import load_file

    return load_file(path)


def held_out(base: Opened, tokens: int, split: str) -> list[Batch]:
    """Held-out batches for choosing ("pick") or for reporting ("report").

    Raises ValueError where fewer than two rows are there.
    """
    found = base.data.objective.held_out(tokens, split=split)  # pyright: ignore[reportArgumentType]
    rows = sum(len(b.targets) for b in found)
    if rows < 2:
        raise ValueError(
            f"{rows} held-out row of {base.name} to {split}: give more text, or more tokens with"
            " --evaluate"
        )
    assert all(b.predicted.any() for b in found)
    return found


def precision_of(study: Resetting, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products, None for the weights' own."""
    from experiments.pretrain_setup import fit_precision

    chosen = fit_precision(device) if study.precision == "auto" else study.precision
    return torch.bfloat16 if chosen == "bfloat16" and study.dtype == "float32" else None
