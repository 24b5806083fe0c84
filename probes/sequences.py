"""Random tokens, repeated: text on which only in-context copying can help.

A block of `length` distinct tokens, drawn uniformly and without replacement from the ordinary
vocabulary, is repeated `repeats` times after the beginning-of-sequence token. From the second
copy on, every token is predictable from the first copy and from nothing else. Lengths should
vary: on repeats of one fixed length a head that attends a fixed distance back looks like an
induction head and is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "vocab"]:
    """Ids of every entry that is no special token, ascending."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special])


def repeated_random_tokens(
    vocabulary: Int[Tensor, "vocab"],
    length: int,
    *,
    repeats: int = 2,
    count: int = 1,
    bos: int | None = None,
    generator: torch.Generator,
) -> Int[Tensor, "batch pos"]:
    """`count` rows of BOS + the same block of `length` distinct tokens `repeats` times.

    Position 1 + c·length + i holds token i of copy c (0-based) when `bos` is given, one less
    when it is not. Raises ValueError when the vocabulary is smaller than a block.
    """
    if length > len(vocabulary):
        raise ValueError(
            f"blocks of {length} distinct tokens asked for: the vocabulary has {len(vocabulary)} "
            "ordinary tokens; give a shorter length"
        )
    draws = [torch.randperm(len(vocabulary), generator=generator)[:length] for _ in range(count)]
    rows = vocabulary[torch.stack(draws)].repeat(1, repeats)
    if bos is None:
        return rows
    return torch.cat([torch.full((count, 1), bos, dtype=rows.dtype), rows], dim=1)


def spaced_random_tokens(
    vocabulary: Int[Tensor, "vocab"],
    length: int,
    gaps: Sequence[int],
    *,
    bos: int | None = None,
    generator: torch.Generator,
) -> Int[Tensor, "1 pos"]:
    """BOS and a block of `length` distinct tokens once for every gap, behind as many others.

    The tokens in the gaps are distinct and not in the block. Raises ValueError when the vocabulary
    is smaller than all of them.
    """
    needed = length + sum(gaps)
    if needed > len(vocabulary):
        raise ValueError(
            f"{needed} distinct tokens asked for: the vocabulary has {len(vocabulary)} ordinary "
            "tokens; give a shorter length"
        )
    ids = vocabulary[torch.randperm(len(vocabulary), generator=generator)[:needed]]
    block, *others = ids.split([length, *gaps])
    parts = [part for gap in others for part in (gap, block)]
    if bos is not None:
        parts.insert(0, torch.tensor([bos], dtype=ids.dtype))
    return torch.cat(parts)[None]


def spread_lengths(shortest: int, longest: int, count: int) -> Sequence[int]:
    """`count` block lengths spread evenly over [shortest, longest], both included."""
    return [round(x) for x in torch.linspace(shortest, longest, count).tolist()]
