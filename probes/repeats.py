"""On which random tokens is a model scanned for induction?

Every seed draws, for every length, two rows of one shape: a block of distinct tokens `repeats`
times, and as many tokens that are all distinct. What a head does on the first and not on the second
it does because of the repetition; what it does on both comes from position. Rows of one length go
through the model together, so nothing is padded.

The copies stand back to back, as in the papers (``fixed``), or at distances that differ within a
row and between rows (``varied``): as many tokens as a block has, distinct and not in it, are cut at
random places and put in front of the copies. No head that looks a fixed distance back finds the
copies of such rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ablate.anatomy import base_path, find
from ablate.components import Stack
from ablate.hooked import HookedModel
from ablate.hooks import execution_device
from probes.sequences import repeated_random_tokens, spaced_random_tokens, spread_lengths
from probes.vocabulary import ordinary_ids

SHORTEST, LONGEST, LENGTHS = 25, 128, 4
"""Block lengths where none are given: so many, spread over this range as far as they fit."""

First = int | None | Literal["model"]
"""The token before the first block; none; or what the model has."""
Spacing = Literal["fixed", "varied"]


@dataclass(frozen=True, eq=False, repr=False)
class Drawn:
    """One batch of rows, one row for each seed."""

    length: int
    seeds: tuple[int, ...]
    repeated: dict[Stack, Int[Tensor, "batch pos"]]
    """What each stack of the model reads, on the device of its embeddings."""
    distinct: dict[Stack, Int[Tensor, "batch pos"]]
    """A decoder reads those of its encoder in another order."""
    shuffled: dict[Stack, Int[Tensor, "batch query entry"]]
    """For every query in copies 2 and later of `repeated` the keys that would be right for another
    token of the block, in all earlier copies; −1 elsewhere."""


def drawn(
    model: HookedModel,
    lengths: Sequence[int] | None,
    repeats: int,
    seeds: Sequence[int],
    batch: int,
    vocabulary: Int[Tensor, "vocab"] | None = None,
    bos: First = "model",
    spacing: Spacing = "fixed",
    dealt: bool = False,
) -> Iterator[Drawn]:
    """The rows of every length, `batch` seeds at a time; the same ones whatever the batch.

    With `dealt` seed s draws the length number s alone, counted round and round.

    Raises ValueError for rows that do not fit the model's positions or its vocabulary.
    """
    if repeats < 2:
        raise ValueError(f"{repeats} copies of a block asked for: induction needs at least 2")
    if not seeds or batch < 1 or (lengths is not None and (not lengths or min(lengths) < 1)):
        raise ValueError(
            f"lengths {lengths}, seeds {seeds}, batch {batch}: give at least one seed, and lengths "
            "and a batch of 1 or more"
        )
    ids = ordinary_ids(model) if vocabulary is None else vocabulary
    first = _first_token(model) if bos == "model" else bos
    blocks = repeats + (spacing == "varied")  # the tokens between the copies are one more
    fitting = _fitting(model, lengths, blocks, repeats, len(ids), first)
    dealt_to = {
        length: [s for s in seeds if not dealt or s % len(fitting) == place]
        for place, length in enumerate(fitting)
    }
    return _rows(model, ids, dealt_to, repeats, batch, first, spacing)


def _rows(
    model: HookedModel,
    ids: Int[Tensor, "vocab"],
    seeds: Mapping[int, Sequence[int]],
    repeats: int,
    batch: int,
    first: int | None,
    spacing: Spacing,
) -> Iterator[Drawn]:
    generators = {s: torch.Generator().manual_seed(s) for some in seeds.values() for s in some}
    # What the controls draw must not change the rows.
    others = {s: torch.Generator().manual_seed(s + 2**32) for s in generators}
    for length, all_numbers in seeds.items():
        for start in range(0, len(all_numbers), batch):
            numbers = tuple(all_numbers[start : start + batch])
            drawn = [
                _row(ids, length, repeats, first, spacing, generators[seed], others[seed])
                for seed in numbers
            ]
            repeated, distinct, reordered, shuffled = map(torch.cat, zip(*drawn, strict=True))
            yield Drawn(
                length,
                numbers,
                _by_stack(model, repeated, repeated, first),
                _by_stack(model, distinct, reordered, first),
                _by_stack_keys(model, shuffled, first),
            )


def _row(
    ids: Int[Tensor, "vocab"],
    length: int,
    repeats: int,
    first: int | None,
    spacing: Spacing,
    generator: torch.Generator,
    other: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row that repeats, one that does not, that one in another order, and shuffled keys."""
    if spacing == "fixed":
        gaps = [0] * repeats
        repeated = repeated_random_tokens(
            ids, length, repeats=repeats, bos=first, generator=generator
        )
    else:
        cuts = torch.randint(0, length + 1, (repeats - 1,), generator=generator).sort().values
        gaps = torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_tensor([length]))
        gaps = gaps.tolist()
        repeated = spaced_random_tokens(ids, length, gaps, bos=first, generator=generator)
    total = repeats * length + sum(gaps)
    distinct = repeated_random_tokens(ids, total, repeats=1, bos=first, generator=generator)
    head = distinct.shape[1] - total
    order = torch.randperm(total, generator=other)
    reordered = torch.cat([distinct[:, :head], distinct[:, head:][:, order]], dim=1)
    starts = [head + sum(gaps[: copy + 1]) + copy * length for copy in range(repeats)]
    return repeated, distinct, reordered, _shuffled_keys(starts, length, repeated.shape[1], other)


def _shuffled_keys(
    starts: Sequence[int], length: int, width: int, generator: torch.Generator
) -> Int[Tensor, "1 query entry"]:
    """Behind token π(i) of every earlier copy, for token i; π has no fixed point."""
    keys = torch.full((1, width, max(1, len(starts) - 1)), -1)
    cycle = torch.randperm(length, generator=generator)
    another = torch.empty_like(cycle).scatter(0, cycle, cycle.roll(1))
    for copy, start in enumerate(starts):
        for entry, earlier in enumerate(reversed(starts[:copy])):
            if length > 1:
                keys[0, start : start + length, entry] = earlier + another + 1
    return keys


def _by_stack(
    model: HookedModel, tokens: Tensor, decoded: Tensor, first: int | None
) -> dict[Stack, Tensor]:
    """What each stack reads: a decoder `decoded`, behind its own start token."""
    hf: Any = model.model
    device = execution_device(hf.get_input_embeddings())
    if not hf.config.is_encoder_decoder:
        return {"": tokens.to(device)}
    blocks = decoded if first is None else decoded[:, 1:]
    start = torch.full_like(blocks[:, :1], hf.config.decoder_start_token_id)
    return {"encoder": tokens.to(device), "decoder": torch.cat([start, blocks], 1).to(device)}


def _by_stack_keys(
    model: HookedModel, keys: Int[Tensor, "batch query entry"], first: int | None
) -> dict[Stack, Tensor]:
    """Keys in the rows of each stack: a decoder always has a token before its blocks."""
    hf: Any = model.model
    keys = keys.to(execution_device(hf.get_input_embeddings()))
    if not hf.config.is_encoder_decoder:
        return {"": keys}
    if first is not None:
        return {"encoder": keys, "decoder": keys}
    before = torch.full_like(keys[:, :1], -1)
    return {"encoder": keys, "decoder": torch.cat([before, keys + (keys >= 0).long()], dim=1)}


def _first_token(model: HookedModel) -> int | None:
    if model.tokenizer is not None:
        bos = model.tokenizer.bos_token_id
        return model.tokenizer.cls_token_id if bos is None else bos
    bos = getattr(model.model.config, "bos_token_id", None)
    return bos if isinstance(bos, int) else None


def _context(model: HookedModel) -> int | None:
    """Tokens that the model has positions for; None where there is no limit."""
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    for stack in model.anatomy.stacks:
        for path in stack.embeddings:
            module = find(model.model, base_path(model.model, path))
            padding = getattr(module, "padding_idx", None)
            if "position" in path and padding is not None:
                limit -= padding + 1  # RoBERTa counts from behind it
    return limit


def _fitting(
    model: HookedModel,
    lengths: Sequence[int] | None,
    blocks: int,
    repeats: int,
    vocabulary: int,
    first: int | None,
) -> Sequence[int]:
    """The lengths asked for, or the default ones. Raises ValueError for those that do not fit."""
    hf: Any = model.model
    context = _context(model)
    extra = int(first is not None or hf.config.is_encoder_decoder)
    by_context = None if context is None else (context - extra) // blocks
    by_vocabulary = vocabulary // blocks
    if lengths is None:
        longest = min(LONGEST, by_vocabulary, LONGEST if by_context is None else by_context)
        lengths = sorted(set(spread_lengths(min(SHORTEST, longest), longest, LENGTHS)))
    longest = max(max(lengths), 1)
    between = ", as many between them" if blocks > repeats else ""
    if by_context is not None and longest > by_context:
        raise ValueError(
            f"{repeats} copies of {longest} tokens asked for{between}: {model.name} has positions "
            f"for {context} tokens; give lengths up to {by_context}, or fewer copies"
        )
    if longest > by_vocabulary:
        raise ValueError(
            f"{blocks} · {longest} distinct tokens asked for: there are {vocabulary} ordinary "
            f"tokens; give lengths up to {by_vocabulary}, or fewer copies"
        )
    return lengths
