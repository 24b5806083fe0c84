"""A language to translate into, made from any text: can a decoder do without its source?

A row of text is the source. Its translation is made in two steps, both fixed by `seed`:

    words     every ordinary token becomes another one: a permutation of the vocabulary
    order     the row falls into phrases; a phrase ends at an ending token (a fifth of the
              vocabulary, drawn) or after `longest` tokens, and all but its last token turn round

The translation is as predictable from its own past as reordered text is, so a decoder gets far
without looking at its source, and no further: only the source says which words come next. How much
of a damage is due to that is the source use (`source_use`): 1 for the whole model, 0 for one that
does no better than with another row's source.

Where it misleads: the order is regular and the dictionary one to one. Nothing of a real language's
ambiguity is in it; it asks for alignment and a dictionary, and that is all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from experiments.corruption import shifted
from experiments.objectives import Batch

LEAST_USE = 0.02
"""Nat that a model has to gain from its source before shares of the gain are told."""
ENDING_SHARE = 0.2
"""Share of the vocabulary that ends a phrase."""


@dataclass(frozen=True)
class Translation:
    """Rows and their translations.

    Attributes:
        ordinary, vocab: ids in [ordinary, vocab) have a translation, others stay.
        eos: ends the translation.
        start: what the decoder begins with.
        longest: tokens a phrase at most.
        seed: of the dictionary and of the ending tokens.
    """

    ordinary: int
    vocab: int
    eos: int
    start: int
    longest: int = 6
    seed: int = 0
    name: str = "translation"

    def __call__(self, rows: Int[Tensor, "row pos"], generator: np.random.Generator) -> Batch:
        """The source is the row with its bos; the target is its translation and eos."""
        words, ends = _language(self.ordinary, self.vocab, self.seed)
        written = np.full(tuple(rows.shape), self.eos, dtype=np.int64)
        for i, row in enumerate(rows[:, 1:].numpy()):
            written[i, :-1] = words[row[_turned(ends[row], self.longest)]]
        targets = torch.from_numpy(written)
        inputs = {"input_ids": rows, "decoder_input_ids": shifted(targets, self.start)}
        return Batch(inputs, targets, rows.numel())


def no_source(batch: Batch) -> Batch:
    """The same batch with every row's source given to another row, half the batch further on.

    ValueError for a batch of one row, and for a batch without a decoder.
    """
    if "decoder_input_ids" not in batch.inputs:
        raise ValueError("sources swapped between rows asked for: this batch has no decoder")
    count = len(batch.targets)
    if count < 2:
        raise ValueError("sources swapped between rows asked for: there is one row; give two")
    source = ("input_ids", "attention_mask")
    inputs = {
        name: tensor.roll(count // 2, dims=0) if name in source else tensor
        for name, tensor in batch.inputs.items()
    }
    return Batch(inputs, batch.targets, batch.tokens)


def no_sources(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, every row's source given to a row half of all rows further on.

    Batches have rows of one length, as held-out ones do. ValueError for one row in all, and for
    batches without a decoder.
    """
    inputs = {
        name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs
    }
    targets = torch.cat([batch.targets for batch in batches])
    whole = no_source(Batch(inputs, targets, sum(batch.tokens for batch in batches)))
    rows = torch.arange(len(targets)).split([len(batch.targets) for batch in batches])
    return [whole.take(some) for some in rows]


def source_use(no_source_loss: float, loss: float, base_loss: float) -> float:
    """u = (ℓ_no-source − ℓ) / (ℓ_no-source − ℓ0): 1 as the base does, 0 as without a source.

    The first two are losses of one model, with another row's source and with its own: a decoder
    that ignores its source has 0, however well it does without. nan where the base itself gains
    less than LEAST_USE from its source: there is nothing to have a share of.
    """
    best = no_source_loss - base_loss
    return (no_source_loss - loss) / best if best >= LEAST_USE else float("nan")


def _turned(ends: Bool[np.ndarray, "pos"], longest: int) -> Int[np.ndarray, "pos"]:
    """Where each token of the translation stood: phrases turned round, but for their last token."""
    order: list[int] = []
    begin = 0
    for at, end in enumerate(ends):
        if end or at - begin == longest - 1 or at == len(ends) - 1:
            order += [*range(at - 1, begin - 1, -1), at]
            begin = at + 1
    return np.array(order, dtype=np.int64)


@cache
def _language(
    ordinary: int, vocab: int, seed: int
) -> tuple[Int[np.ndarray, "vocab"], Bool[np.ndarray, "vocab"]]:
    """The dictionary, and which tokens end a phrase."""
    draw = np.random.default_rng([seed, 5])
    words = np.arange(vocab)
    words[ordinary:] = draw.permutation(words[ordinary:])
    return words, draw.random(vocab) < ENDING_SHARE
