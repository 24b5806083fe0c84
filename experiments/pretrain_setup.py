"""What does a pretraining run start from: which text, cut into which rows, which model, and where?

Everything here is a function of the study's options, the corpus and the machine. What the machine
decides (device, dtype of the matrix products) is decided by what it has, not by a stopwatch, so the
same command on the same machine does the same; the dtype is kept in the run folder besides, since a
run that goes on elsewhere must not change it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from experiments import corpora, shapes, tokens, training
from experiments.config import options_of
from experiments.objectives import Objective
from experiments.orders import Order, two_lengths
from experiments.pretrain_record import copy_tokenizer, earlier_record, load_weights
from probes.loss import windows

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from experiments.pretrain import Pretraining

BOS_ID = tokens.SPECIAL.index(tokens.BOS)
VALIDATION_SHARE = 0.05
"""Of the corpus's files, by cluster of near-duplicates."""
BF16_PROCESSORS = ("amx_bf16", "avx512_bf16", "bf16")
"""Capabilities (torch.cpu.get_capabilities) of CPUs that multiply in bf16; others emulate it, and
lose by it."""


@dataclass(frozen=True, eq=False)
class Text:
    """A corpus and the tokens it is made of.

    Attributes:
        stream: the training side.
        held_out: the validation side.
        reserved: files that neither training nor validation reads, as many as were asked for.
    """

    corpus: corpora.Corpus
    tokenizer: PreTrainedTokenizerBase
    stream: Int[np.ndarray, "token"]
    held_out: Int[Tensor, "token"]
    reserved: Int[np.ndarray, "token"]


@dataclass(frozen=True, eq=False)
class Setup:
    """All that training and its record need."""

    text: Text
    objective: Objective
    trainer: training.Trainer
    facts: dict[str, Any]
    """What training.json says of them."""


def prepare(study: Pretraining, path: Path) -> Setup:
    """Read, tokenise and build what `study` asks for; the tokenizer lands in `path`/model.

    Raises ValueError for a device that is not there and a corpus that is too small.
    """
    device = device_of(study.device)
    corpus, reserved = split(study)
    earlier = earlier_record(study.start_from, corpus.digest) if study.start_from else None
    if study.start_from:
        copy_tokenizer(Path(study.start_from), path / "model")
    tokenizer = tokens.train_tokenizer(
        [d.text for d in corpus.train], study.vocab, path / "model", extra_tokens(study)
    )
    text = text_of(study, corpus, reserved, tokenizer)
    objective = objective_of(study, text)
    torch.manual_seed(study.seed)
    shape = shapes.Shape(
        study.layers,
        study.d_model,
        study.heads,
        study.context,
        len(text.tokenizer),
        study.blocks or "mambaformer",
    )
    model = shapes.build(study.family, shape)
    if study.start_from:
        load_weights(model, Path(study.start_from))
    facts = {
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.digest,
            "train_files": len(corpus.train),
            "validation_files": [d.path for d in corpus.validation],
            "characters": corpus.characters,
        },
        "train_tokens_sha256": tokens.digest(text.stream),
        "unique_tokens_in_corpus": len(text.stream),
        "reserved_tokens": len(text.reserved),
        "parameters": sum(p.numel() for p in model.parameters()),
        "earlier": earlier,
    }
    trainer = training.Trainer(
        model.to(device),
        objective.at,
        training.Schedule(study.rate, study.steps, study.warmup, kind=study.schedule),
        path / "checkpoint.safetensors",
        _identity(study, facts["train_tokens_sha256"]),
        device,
        autocast=torch.bfloat16 if _precision(study, path, device) == "bfloat16" else None,
    )
    return Setup(text, objective, trainer, facts)


def device_of(name: str) -> torch.device:
    """The device called `name` (auto: CUDA, else the CPU). ValueError if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator is not None else "cpu"
    if name == "auto":
        return torch.device(found if found == "cuda" else "cpu")
    device = torch.device(name)
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.type not in ("cpu", found) or (device.index or 0) >= count:
        has = ["cpu", *(f"{found}:{i}" for i in range(torch.accelerator.device_count()))]
        raise ValueError(
            f"--device {name}: this machine has {', '.join(has)}; give one of them, or auto"
        )
    return device


def split(study: Pretraining) -> tuple[corpora.Corpus, tuple[corpora.Document, ...]]:
    """The corpus, and the files kept from its training side.

    The validation side is the same whatever share is reserved.
    """
    corpus = corpora.load_corpus(study.corpus, validation_share=VALIDATION_SHARE, seed=0)
    if not study.reserved_share:
        return corpus, ()
    wider = VALIDATION_SHARE + study.reserved_share
    kept = corpora.load_corpus(study.corpus, validation_share=wider, seed=0)
    validation = {document.path for document in corpus.validation}
    reserved = tuple(d for d in kept.validation if d.path not in validation)
    return dataclasses.replace(corpus, train=kept.train), reserved


def text_of(
    study: Pretraining,
    corpus: corpora.Corpus,
    reserved: tuple[corpora.Document, ...],
    tokenizer: PreTrainedTokenizerBase,
) -> Text:
    """The three sides in tokens. ValueError where the held-out side has not one window."""
    held_out = tokens.token_stream(corpus.validation, tokenizer).astype("int64")
    if len(held_out) < study.context:
        raise ValueError(
            f"corpus {study.corpus} keeps {len(held_out)} tokens for validation: "
            f"give more text, or a --context below {study.context}"
        )
    stream = tokens.token_stream(corpus.train, tokenizer)
    kept = tokens.token_stream(reserved, tokenizer) if reserved else stream[:0]
    return Text(corpus, tokenizer, stream, torch.from_numpy(held_out), kept)


def objective_of(study: Pretraining, text: Text) -> Objective:
    """What `study` trains on and is measured by."""
    task = shapes.task_of(study.family, study.task, study.context, len(text.tokenizer))
    rows = windows(text.held_out, study.context, bos=BOS_ID)
    return Objective(task, order_of(study, text), rows, study.seed)


def order_of(study: Pretraining, text: Text) -> Order:
    """The rows of every step: short ones for a share of the steps, whole windows after."""
    rows = tokens.Rows(
        text.stream,
        study.context,
        study.batch,
        study.seed,
        study.repeated_share,
        BOS_ID,
        len(tokens.SPECIAL) + len(extra_tokens(study)),
        len(text.tokenizer),
    )
    return two_lengths(rows, study.steps, study.short_rows, study.short_share)


def extra_tokens(study: Pretraining) -> tuple[str, ...]:
    """The special tokens of the study's tokenizer besides the usual four."""
    return shapes.extra_tokens(study.family, study.task, study.context)


def _identity(study: Pretraining, train_tokens: str) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    options = {
        name: value
        for name, value in options_of(study).items()
        if name not in ("precision", "device") and (name != "start_from" or value)
    }
    return {"study": options, "train_tokens_sha256": train_tokens}


def _precision(study: Pretraining, path: Path, device: torch.device) -> str:
    """The run's precision: auto is decided once and kept, as a resumed run must not change it."""
    kept = path / "precision.txt"
    if study.precision != "auto":
        return study.precision
    if not kept.exists():
        kept.write_text(fit_precision(device))
    return kept.read_text()


def fit_precision(device: torch.device) -> str:
    """bfloat16 where the device multiplies in it, float32 where it would be emulated."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    found = torch.cpu.get_capabilities()
    return "bfloat16" if any(found.get(name, False) for name in BF16_PROCESSORS) else "float32"
