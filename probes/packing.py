"""How is a beginning that many prompts share read only once?

One by one, the four choices of a question read its context four times, and five questions under
the same demonstrations read those twenty times. Here the sequences of a row form a tree over token
ids, laid out in preorder: a slot counts its position from the root, and sees the slots above it and
itself (tree attention, as in Miao et al. 2023, "SpecInfer"). So the keys and values of a shared
beginning are computed once, in the same forward as everything that needs them, and none is copied.

    tree          branches share their beginning; slot i sees slot j iff j ≤ i < end_j
    rows          one sequence a row, padded on the right
    encoder       the context in the encoder, once per context; a choice in the decoder

A tree is exact for a model that knows where a token stands by position ids and the attention mask
alone. ALiBi, recurrent mixers and flash attention do not qualify; `layout_of` says who does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ablate.anatomy import BY_POSITION_IDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal["tree", "rows", "encoder"]

ROW_SLOTS = 1024
"""A tree grows no longer than this: attention costs the square of a row."""
SHARED = 0.25
"""A sequence joins a tree that holds at least this share of it."""


@dataclass(frozen=True)
class Tokens:
    """A sequence to score: `ids`, of which the last `scored` are the continuation.

    `source` is what an encoder reads; empty where there is none.
    """

    ids: tuple[int, ...]
    scored: int
    source: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward: rows of slots, and which logits of them score which token of which sequence.

    Attributes:
        ids: token of every slot, padded on the right.
        positions: its distance from the root.
        ends: one past the last slot below it; a padded slot has nothing below it.
        lengths: slots of each row that are no padding.
        slots: flat (row · pos) indices of the slots whose logits are needed, ascending.
        entry_slot: for every scored token, where in `slots` its logits are.
        entry_target: its id.
        entry_owner: the number of its sequence.
        sources: what the encoder reads, one tuple of ids per encoder row.
        source_row: the encoder row of every row.
    """

    ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    ends: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, "batch"]
    slots: Int[Tensor, "slot"]
    entry_slot: Int[Tensor, "entry"]
    entry_target: Int[Tensor, "entry"]
    entry_owner: Int[Tensor, "entry"]
    sources: tuple[tuple[int, ...], ...] = ()
    source_row: tuple[int, ...] = ()


def layout_of(hf_model: PreTrainedModel, longest: int) -> Layout:
    """How sequences of up to `longest` tokens can be laid out for this model.

    Raises ValueError for a model that is no left-to-right language model.
    """
    config: Any = hf_model.config
    if not hf_model.can_generate() or hf_model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(hf_model).__name__} gives no log-likelihood of a continuation: scoring needs "
            "a causal or encoder-decoder language model (…ForCausalLM, …ForConditionalGeneration)"
        )
    if config.is_encoder_decoder:
        return "encoder"
    window = getattr(config, "sliding_window", None)
    plain = config._attn_implementation in ("eager", "sdpa")
    if config.model_type in BY_POSITION_IDS and plain and (window is None or longest <= window):
        return "tree"
    return "rows"


@dataclass
class _Row:
    """A tree under construction; `path` is the branch that ends in the newest slot."""

    source: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    entries: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, owner: int, tokens: Tokens, shared: int) -> None:
        """Branch off after `shared` tokens of the newest branch."""
        self.close(shared)
        for token in tokens.ids[shared:-1]:
            self.path.append(len(self.ids))
            self.ids.append(token)
            self.positions.append(len(self.path) - 1)
            self.ends.append(0)
        first = len(tokens.ids) - tokens.scored
        self.entries += [
            (self.path[i - 1], tokens.ids[i], owner) for i in range(first, len(tokens.ids))
        ]

    def close(self, shared: int = 0) -> None:
        """Nothing more will stand below the newest branch, but for its first `shared` slots."""
        for slot in self.path[shared:]:
            self.ends[slot] = len(self.ids)
        del self.path[shared:]


def pack(
    sequences: Sequence[Tokens],
    layout: Layout,
    *,
    batch_tokens: int,
    vocab: int,
    alone: bool = False,
) -> tuple[Batch, ...]:
    """Lay sequences out in batches of at most `batch_tokens` slots (one row at least).

    Rows of a batch are alike in length, longest first, so that memory runs out at once or never.
    `vocab` bounds the logits of a batch. The same sequence asked for twice is read once, unless
    every sequence is to stand `alone` in its row.
    """
    rows = sorted(_rows(sequences, layout, alone), key=lambda row: -len(row.ids) - len(row.source))
    batches: list[list[_Row]] = []
    slots = 0
    for row in rows:
        needed = len({slot for slot, _, _ in row.entries})
        width = len(batches[-1][0].ids) + len(batches[-1][0].source) if batches else 0
        full = batches and (len(batches[-1]) + 1) * width > batch_tokens
        if not batches or full or (slots + needed) * vocab > 2**28:
            batches.append([])
            slots = 0
        batches[-1].append(row)
        slots += needed
    return tuple(_batch(rows) for rows in batches)


def _rows(sequences: Sequence[Tokens], layout: Layout, alone: bool) -> Iterator[_Row]:
    """In the order of their tokens, neighbours share as much as they can: that is preorder."""
    row, last = _Row(()), ()
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].source, sequences[i].ids))
    for owner in order:
        tokens = sequences[owner]
        ids = tokens.ids[:-1]
        shared = _shared(last, ids) if row.ids and row.source == tokens.source else 0
        if alone:
            joins = False
        elif layout == "tree":
            fits = len(row.ids) + len(ids) - shared <= ROW_SLOTS
            joins = fits and shared >= SHARED * len(ids)
        else:
            joins = shared == len(row.ids)  # it goes on where the row ends: no branch
        if not joins or not shared:
            if row.ids:
                row.close()
                yield row
            row, shared = _Row(tokens.source), 0
        row.add(owner, tokens, shared)
        last = ids
    if row.ids:
        row.close()
        yield row


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _batch(rows: Sequence[_Row]) -> Batch:
    width = max(len(row.ids) for row in rows)

    def table(values: Callable[[_Row], list[int]], padding: Callable[[int], int]) -> Tensor:
        return torch.tensor(
            [values(row) + [padding(i) for i in range(len(row.ids), width)] for row in rows]
        )

    entries = [
        (r * width + slot, target, owner)
        for r, row in enumerate(rows)
        for slot, target, owner in row.entries
    ]
    at, targets, owners = torch.tensor(entries).unbind(1)
    slots, entry_slot = at.unique(return_inverse=True)
    sources = tuple(dict.fromkeys(row.source for row in rows))
    place: Mapping[tuple[int, ...], int] = {source: i for i, source in enumerate(sources)}
    return Batch(
        ids=table(lambda row: row.ids, lambda _: 0),
        positions=table(lambda row: row.positions, lambda _: 0),
        ends=table(lambda row: row.ends, lambda i: i + 1),
        lengths=torch.tensor([len(row.ids) for row in rows]),
        slots=slots,
        entry_slot=entry_slot,
        entry_target=targets,
        entry_owner=owners,
        sources=sources if sources != ((),) else (),
        source_row=tuple(place[row.source] for row in rows),
    )
