"""On which random tokens is a model scanned for induction?

Every seed draws, for every length, two rows of one shape: a block of distinct tokens `repeats`
times, and as many tokens that are all distinct. What a head does on the first and not on the second
it does because of the repetition; what it does on both comes from position. Rows of one length go
through the model together, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ablate.anatomy import base_path, find
from ablate.components import Stack
from ablate.hooked import HookedModel
from ablate.hooks import execution_device
from probes.sequences import ordinary_tokens, repeated_random_tokens, spread_lengths

SHORTEST, LONGEST, LENGTHS = 25, 128, 4
"""Block lengths where none are given: so many, spread over this range as far as they fit."""

First = int | None | Literal["model"]
"""The token before the first block; none; or what the model has."""


@dataclass(frozen=True, eq=False, repr=False)
class Drawn:
    """One batch of rows, one row for each seed."""

    length: int
    seeds: tuple[int, ...]
    repeated: dict[Stack, Int[Tensor, "batch pos"]]
    """What each stack of the model reads, on the device of its embeddings."""
    distinct: dict[Stack, Int[Tensor, "batch pos"]]


def drawn(
    model: HookedModel,
    lengths: Sequence[int] | None,
    repeats: int,
    seeds: Sequence[int],
    batch: int,
    vocabulary: Int[Tensor, "vocab"] | None = None,
    bos: First = "model",
) -> Iterator[Drawn]:
    """The rows of every length, `batch` seeds at a time; the same ones whatever the batch.

    Raises ValueError for rows that do not fit the model's positions or its vocabulary.
    """
    if repeats < 2:
        raise ValueError(f"{repeats} copies of a block asked for: induction needs at least 2")
    if not seeds or batch < 1 or (lengths is not None and (not lengths or min(lengths) < 1)):
        raise ValueError(
            f"lengths {lengths}, seeds {seeds}, batch {batch}: give at least one seed, and lengths "
            "and a batch of 1 or more"
        )
    ids = _ordinary(model) if vocabulary is None else vocabulary
    first = _first_token(model) if bos == "model" else bos
    fitting = _fitting(model, lengths, repeats, len(ids), first)
    return _rows(model, ids, fitting, repeats, seeds, batch, first)


def _rows(
    model: HookedModel,
    ids: Int[Tensor, "vocab"],
    lengths: Sequence[int],
    repeats: int,
    seeds: Sequence[int],
    batch: int,
    first: int | None,
) -> Iterator[Drawn]:
    generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    for length in lengths:
        for start in range(0, len(generators), batch):
            numbers = tuple(generators)[start : start + batch]
            repeated, distinct = [], []
            for seed in numbers:
                for rows, block, copies in (
                    (repeated, length, repeats),
                    (distinct, length * repeats, 1),
                ):
                    rows.append(
                        repeated_random_tokens(
                            ids, block, repeats=copies, bos=first, generator=generators[seed]
                        )
                    )
            yield Drawn(
                length,
                numbers,
                _by_stack(model, torch.cat(repeated), first),
                _by_stack(model, torch.cat(distinct), first),
            )


def _by_stack(model: HookedModel, tokens: Tensor, first: int | None) -> dict[Stack, Tensor]:
    """What each stack reads: a decoder the encoder's blocks, behind its own start token."""
    hf: Any = model.model
    tokens = tokens.to(execution_device(hf.get_input_embeddings()))
    if not hf.config.is_encoder_decoder:
        return {"": tokens}
    blocks = tokens if first is None else tokens[:, 1:]
    start = torch.full_like(blocks[:, :1], hf.config.decoder_start_token_id)
    return {"encoder": tokens, "decoder": torch.cat([start, blocks], dim=1)}


def _ordinary(model: HookedModel) -> Int[Tensor, "vocab"]:
    """Ids that are no special tokens, of the tokenizer or, without one, of the config."""
    if model.tokenizer is not None:
        return ordinary_tokens(model.tokenizer)
    config: Any = model.model.config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special = {getattr(config, name, None) for name in names}
    return torch.tensor([i for i in range(config.vocab_size) if i not in special])


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
    repeats: int,
    vocabulary: int,
    first: int | None,
) -> Sequence[int]:
    """The lengths asked for, or the default ones. Raises ValueError for those that do not fit."""
    hf: Any = model.model
    context = _context(model)
    extra = int(first is not None or hf.config.is_encoder_decoder)
    by_context = None if context is None else (context - extra) // repeats
    by_vocabulary = vocabulary // repeats
    if lengths is None:
        longest = min(LONGEST, by_vocabulary, LONGEST if by_context is None else by_context)
        lengths = sorted(set(spread_lengths(min(SHORTEST, longest), longest, LENGTHS)))
    longest = max(max(lengths), 1)
    if by_context is not None and longest > by_context:
        raise ValueError(
            f"{repeats} copies of {longest} tokens asked for: {model.name} has positions for "
            f"{context} tokens; give lengths up to {by_context}, or fewer copies"
        )
    if longest > by_vocabulary:
        raise ValueError(
            f"{repeats} · {longest} distinct tokens asked for: there are {vocabulary} ordinary "
            f"tokens; give lengths up to {by_vocabulary}, or fewer copies"
        )
    return lengths
