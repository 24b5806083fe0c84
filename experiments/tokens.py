"""How does text become the rows of tokens a language model is trained on?

A byte-level BPE tokenizer is learned on the train side of a corpus; the documents become one
stream of ids, `</s>` between them; a training row is a window of that stream whose first token is
replaced by `</s>`, as OPT was trained. `Rows.at(step)` is a pure function of (seed, step): a run
that resumes at step 1,200 needs no stored cursor beyond that number.

A stated share of the rows is made of repeated spans, so that induction pays early: a span of
8 … row/2 tokens (log-uniform), half of them text and half uniformly random tokens without
replacement, repeated to the end of the row after a text prefix of random length. Lengths and
prefixes vary from row to row, so no fixed offset predicts them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from experiments.corpora import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, PAD, UNK = "</s>", "<pad>", "<unk>"
SPECIAL = ("<s>", PAD, BOS, UNK)
"""OPT's special tokens in OPT's order, so that its ids are pad 1, bos = eos 2."""
SHORTEST_SPAN = 8


def train_tokenizer(
    texts: Sequence[str], vocab: int, folder: Path, extra: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE of `vocab` entries on `texts`, save it in `folder`, load it back.

    Encoding prepends `</s>`, as OPT's own tokenizer does. `extra` special tokens (masks, sentinels)
    follow the usual four. An existing tokenizer.json is reused.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = [*SPECIAL, *extra]
    if vocab < 256 + len(special):
        raise ValueError(
            f"vocabulary of {vocab} asked for: bytes and {len(special)} special tokens need at "
            f"least {256 + len(special)} entries"
        )
    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        # `pre_tokenizers` and friends are compiled classes whose stubs pyright reads as modules.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        bos = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=BOS,
            pad_token=PAD,
            unk_token=UNK,
            clean_up_tokenization_spaces=False,
            **({"extra_special_tokens": list(extra)} if extra else {}),
        ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def token_stream(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Int[np.ndarray, "token"]:
    """All documents as one stream (uint16 where the ids fit), each opened as `tokenizer` opens it:
    by `</s>` for our own.

    The last few streams are kept, read-only, by the content of text and tokenizer: a grid of models
    reads one corpus many times.
    """
    key = _stream_key(documents, tokenizer)
    if key in _STREAMS:
        return _STREAMS[key]
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    stream = np.concatenate([np.asarray(ids, dtype=dtype) for ids in encoded])
    stream.flags.writeable = False
    if key:
        while len(_STREAMS) >= 6:
            del _STREAMS[next(iter(_STREAMS))]
        _STREAMS[key] = stream
    return stream


_STREAMS: dict[str, Int[np.ndarray, "token"]] = {}


def _stream_key(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a stream is made of, hashed; empty for a tokenizer that does not say what it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    content = hashlib.sha256(backend.to_str().encode())
    for document in documents:
        content.update(f"{len(document.text)}\0{document.text}".encode())
    return content.hexdigest()


def digest(stream: Int[np.ndarray, "token"]) -> str:
    """SHA-256 of a token stream."""
    return hashlib.sha256(stream.tobytes()).hexdigest()


@dataclass(frozen=True)
class Rows:
    """Training rows drawn from a stream, without replacement within an epoch.

    Attributes:
        stream: token ids of the train side.
        context: tokens a window; a batch always reads `batch` windows.
        batch: windows a step.
        seed: of the order, the epoch's shift and the repeated spans.
        repeated_share: share of rows made of repeated spans.
        bos: id that opens every row.
        ordinary: first id that is no special token.
        vocab: number of ids.
    """

    stream: Int[np.ndarray, "token"]
    context: int
    batch: int
    seed: int
    repeated_share: float
    bos: int
    ordinary: int
    vocab: int

    def __post_init__(self) -> None:
        if self.windows < self.batch:
            raise ValueError(
                f"{self.batch} windows of {self.context} tokens asked for a step: the corpus has "
                f"{len(self.stream)} tokens, {self.windows} windows; give a smaller batch"
            )

    @property
    def windows(self) -> int:
        """Windows in one epoch (one is given up to the epoch's random shift)."""
        return len(self.stream) // self.context - 1

    def epochs(self, steps: int) -> float:
        """Passes over the stream after `steps` steps."""
        return steps * self.batch / self.windows

    def at(self, step: int, row: int | None = None) -> Int[Tensor, "batch pos"]:
        """The rows of one step; `row` < context splits every window into shorter rows."""
        row = row or self.context
        draws = np.arange(step * self.batch, (step + 1) * self.batch)
        windows = np.stack([self._window(int(i)) for i in draws]).astype(np.int64)
        rows = windows[:, : self.context // row * row].reshape(-1, row)
        generator = np.random.default_rng([self.seed, 1, step])
        for i in np.flatnonzero(generator.random(len(rows)) < self.repeated_share):
            rows[i] = self._repeat_span(rows[i], generator)
        rows[:, 0] = self.bos
        return torch.from_numpy(rows)

    def _window(self, index: int) -> Int[np.ndarray, "token"]:
        epoch, index = divmod(index, self.windows)
        order, shift = _epoch_order(self.seed, epoch, self.windows, self.context)
        start = int(order[index]) * self.context + shift
        return self.stream[start : start + self.context]

    def _repeat_span(
        self, row: Int[np.ndarray, "token"], generator: np.random.Generator
    ) -> Int[np.ndarray, "token"]:
        length = int(math.exp(generator.uniform(math.log(SHORTEST_SPAN), math.log(len(row) // 2))))
        prefix = int(generator.integers(1, len(row) // 4))
        if generator.random() < 0.5:
            ids = np.arange(self.ordinary, self.vocab)
            span = generator.choice(ids, size=min(length, len(ids)), replace=False)
        else:
            span = row[prefix : prefix + length]
        return np.concatenate([row[:prefix], np.resize(span, len(row) - prefix)])


_ORDERS: dict[tuple[int, int, int, int], tuple[Int[np.ndarray, "window"], int]] = {}


def _epoch_order(
    seed: int, epoch: int, windows: int, context: int
) -> tuple[Int[np.ndarray, "window"], int]:
    """The order of an epoch's windows and its shift; the last one asked for is kept."""
    key = (seed, epoch, windows, context)
    if key not in _ORDERS:
        generator = np.random.default_rng([seed, 0, epoch])
        if len(_ORDERS) > 1:
            _ORDERS.clear()
        _ORDERS[key] = (generator.permutation(windows), int(generator.integers(context)))
    return _ORDERS[key]


def save_stream(stream: Int[np.ndarray, "token"], path: Path, **notes: str) -> None:
    """Keep a token stream as safetensors, with notes in its header."""
    from safetensors.numpy import save_file

    save_file({"tokens": stream}, path, metadata={**notes, "sha256": digest(stream)})


def load_stream(path: Path) -> tuple[Int[np.ndarray, "token"], dict[str, str]]:
    """The stream kept by `save_stream`, and its notes. ValueError when the file was altered."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        stream, notes = file.get_tensor("tokens"), dict(file.metadata() or {})
    if digest(stream) != notes.get("sha256"):
        raise ValueError(f"{path} does not match its own checksum: it was altered; fetch it again")
    return stream, notes


def dumps(value: object) -> str:
    """JSON as every artefact here is written: indented, keys in the order given."""
    return json.dumps(value, indent=2) + "\n"
