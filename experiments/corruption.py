"""How is text damaged for a model to repair it?

    Masking     15 % of the positions: 80 % <mask>, 10 % a random token, 10 % themselves
                (Devlin et al. 2018, "BERT")
    Spans       15 % in spans of 3 on average, each replaced by a sentinel; the decoder writes
                sentinel, span, sentinel, span, ... (Raffel et al. 2019, "T5")
    Infilling   30 % in spans of Poisson(3) length, each replaced by one <mask>; the decoder
                writes the whole text (Lewis et al. 2019, "BART")

All draw from the generator they are given, so the damage is as reproducible as its seed. Where they
mislead: losses of two tasks do not compare. A decoder that writes the whole text copies most of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from experiments.objectives import IGNORED, Batch


@dataclass(frozen=True)
class Masking:
    """A share of the positions from all others (an encoder).

    Attributes:
        mask: id of the mask token.
        ordinary, vocab: random replacements are drawn from [ordinary, vocab).
    """

    mask: int
    ordinary: int
    vocab: int
    share: float = 0.15
    name: str = "mlm"

    def __call__(self, rows: Int[Tensor, "row pos"], generator: np.random.Generator) -> Batch:
        """The same number of positions in every row; the first token (bos) is never one."""
        tokens = rows.numpy()
        count = max(1, round(self.share * tokens.shape[1]))
        keys = generator.random(tokens.shape)
        keys[:, 0] = 2.0
        chosen = np.argsort(keys, axis=1)[:, :count]
        row = np.arange(len(tokens))[:, None]
        fate = generator.random(chosen.shape)
        drawn = generator.integers(self.ordinary, self.vocab, chosen.shape)
        targets = np.full_like(tokens, IGNORED)
        targets[row, chosen] = tokens[row, chosen]
        inputs = tokens.copy()
        inputs[row, chosen] = np.where(
            fate < 0.8, self.mask, np.where(fate < 0.9, drawn, tokens[row, chosen])
        )
        return Batch(
            {"input_ids": torch.from_numpy(inputs)}, torch.from_numpy(targets), rows.numel()
        )


@dataclass(frozen=True)
class Spans:
    """T5's span corruption: sentinels stand for spans, the decoder writes what they stood for.

    Attributes:
        sentinels: ids, in the order they are used.
        eos: ends source and target.
        start: what the decoder begins with.
    """

    sentinels: tuple[int, ...]
    eos: int
    start: int
    share: float = 0.15
    mean_length: float = 3.0
    name: str = "denoising"

    def __call__(self, rows: Int[Tensor, "row pos"], generator: np.random.Generator) -> Batch:
        """Every row loses as many tokens in as many spans, so nothing is padded."""
        tokens, length = rows.numpy(), rows.shape[1]
        lost = min(max(1, round(self.share * length)), length - 1)
        count = span_count(length, self.share, self.mean_length)
        if count > len(self.sentinels):
            raise ValueError(
                f"rows of {length} tokens have {count} spans: the vocabulary has "
                f"{len(self.sentinels)} sentinels; give shorter rows"
            )
        sources, written = [], []
        for row in tokens:
            keeps = _parts(length - lost, count, generator)
            drops = _parts(lost, count, generator)
            source, target, at = [], [], 0
            for sentinel, keep, drop in zip(self.sentinels[:count], keeps, drops, strict=True):
                source += [*row[at : at + keep], sentinel]
                target += [sentinel, *row[at + keep : at + keep + drop]]
                at += keep + drop
            sources.append([*source, self.eos])
            written.append([*target, self.eos])
        targets = torch.from_numpy(np.array(written, dtype=np.int64))
        inputs = {
            "input_ids": torch.from_numpy(np.array(sources, dtype=np.int64)),
            "decoder_input_ids": shifted(targets, self.start),
        }
        return Batch(inputs, targets, rows.numel())


def span_count(length: int, share: float = 0.15, mean_length: float = 3.0) -> int:
    """How many spans a row of `length` tokens loses, and so the sentinels it needs."""
    lost = min(max(1, round(share * length)), length - 1)
    return min(max(1, round(lost / mean_length)), lost, length - lost)


@dataclass(frozen=True)
class Infilling:
    """BART's text infilling: one mask stands for a span, the decoder writes the whole text.

    Attributes:
        mask, pad: ids; a source with more words than another is padded to it.
        start: what the decoder begins with.
    """

    mask: int
    pad: int
    start: int
    share: float = 0.3
    mean_length: float = 3.0
    name: str = "denoising"

    def __call__(self, rows: Int[Tensor, "row pos"], generator: np.random.Generator) -> Batch:
        """Spans of length 0 put a mask where nothing was, as in the paper."""
        tokens = rows.numpy()
        sources = [self._source(row, generator) for row in tokens]
        longest = max(map(len, sources))
        inputs = np.full((len(sources), longest), self.pad, dtype=np.int64)
        seen = np.zeros((len(sources), longest), dtype=np.int64)
        for i, source in enumerate(sources):
            inputs[i, : len(source)] = source
            seen[i, : len(source)] = 1
        given = {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(seen),
            "decoder_input_ids": shifted(rows, self.start),
        }
        return Batch(given, rows.clone(), rows.numel())

    def _source(
        self, row: Int[np.ndarray, "pos"], generator: np.random.Generator
    ) -> Int[np.ndarray, "source"]:
        lost = max(1, round(self.share * len(row)))
        spans: list[int] = []
        while sum(spans) < lost:
            spans.append(min(int(generator.poisson(self.mean_length)), lost - sum(spans)))
        # Gaps may be empty, so two masks may meet.
        cuts = np.sort(generator.integers(0, len(row) - lost + 1, len(spans)))
        gaps = np.diff(cuts, prepend=0)
        source: list[int] = []
        at = 0
        for gap, span in zip(gaps, spans, strict=True):
            source += [*row[at : at + gap], self.mask]
            at += gap + span
        return np.array([*source, *row[at:]], dtype=np.int64)


def shifted(targets: Int[Tensor, "batch pos"], start: int) -> Int[Tensor, "batch pos"]:
    """What the decoder has read when it predicts `targets`: the start token, then all but the
    last."""
    inputs = torch.full_like(targets, start)
    inputs[:, 1:] = targets[:, :-1]
    return inputs


def _parts(total: int, count: int, generator: np.random.Generator) -> Int[np.ndarray, "part"]:
    """`total` as an ordered sum of `count` parts of at least 1, every such sum as likely."""
    cuts = np.sort(generator.choice(total - 1, count - 1, replace=False) + 1) if count > 1 else []
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))
