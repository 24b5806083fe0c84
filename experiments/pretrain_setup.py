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

from experiments import corpora, tokens, training
from experiments.pretrain_record import copy_tokenizer, earlier_record, load_weights

if TYPE_CHECKING:
    import numpy as np
    from transformers import OPTForCausalLM, PreTrainedTokenizerBase

    from experiments.pretrain import Pretraining

BF16_PROCESSORS = ("amx_bf16", "avx512_bf16", "bf16")
"""Capabilities (torch.cpu.get_capabilities) of CPUs that multiply in bf16; others emulate it, and
lose by it."""


@dataclass(frozen=True)
class Text:
    """A corpus and the tokens it is made of.

    Attributes:
        stream: the training side.
        held_out: the validation side.
    """

    corpus: corpora.Corpus
    tokenizer: PreTrainedTokenizerBase
    stream: Int[np.ndarray, "token"]
    held_out: Int[Tensor, "token"]


@dataclass(frozen=True)
class Setup:
    """All that training and its record need."""

    text: Text
    rows: tokens.Rows
    trainer: training.Trainer
    facts: dict[str, Any]
    """What training.json says of them."""


def prepare(study: Pretraining, path: Path) -> Setup:
    """Read, tokenise and build what `study` asks for; the tokenizer lands in `path`/model.

    Raises ValueError for a device that is not there and a corpus that is too small.
    """
    device = device_of(study.device)
    corpus = corpora.load_corpus(study.corpus, seed=0)
    earlier = earlier_record(study.start_from, corpus.digest) if study.start_from else None
    text = _text(study, corpus, path / "model")
    rows = _rows(study, text)
    torch.manual_seed(study.seed)
    model: Any = _model(study, text)
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
        "parameters": sum(p.numel() for p in model.parameters()),
        "earlier": earlier,
    }
    trainer = training.Trainer(
        model.to(device),
        lambda step: rows.at(step, study.row(step)),
        training.Schedule(study.rate, study.steps, study.warmup),
        path / "checkpoint.safetensors",
        _identity(study, facts["train_tokens_sha256"]),
        device,
        autocast=torch.bfloat16 if _precision(study, path, device) == "bfloat16" else None,
    )
    return Setup(text, rows, trainer, facts)


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


def _text(study: Pretraining, corpus: corpora.Corpus, folder: Path) -> Text:
    if study.start_from:
        copy_tokenizer(Path(study.start_from), folder)
    tokenizer = tokens.train_tokenizer([d.text for d in corpus.train], study.vocab, folder)
    held_out = tokens.token_stream(corpus.validation, tokenizer).astype("int64")
    if len(held_out) < study.context:
        raise ValueError(
            f"corpus {study.corpus} keeps {len(held_out)} tokens for validation: "
            f"give more text, or a --context below {study.context}"
        )
    stream = tokens.token_stream(corpus.train, tokenizer)
    return Text(corpus, tokenizer, stream, torch.from_numpy(held_out))


def _rows(study: Pretraining, text: Text) -> tokens.Rows:
    return tokens.Rows(
        text.stream,
        study.context,
        study.batch,
        study.seed,
        study.repeated_share,
        tokens.SPECIAL.index(tokens.BOS),
        len(tokens.SPECIAL),
        len(text.tokenizer),
    )


def _model(study: Pretraining, text: Text) -> OPTForCausalLM:
    """The model before its first step: drawn from torch's seed, or the weights to go on from."""
    from transformers import OPTConfig, OPTForCausalLM

    bos = tokens.SPECIAL.index(tokens.BOS)
    config = OPTConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=study.d_model,
        word_embed_proj_dim=study.d_model,
        ffn_dim=4 * study.d_model,
        num_hidden_layers=study.layers,
        num_attention_heads=study.heads,
        max_position_embeddings=study.context,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=tokens.SPECIAL.index(tokens.PAD),
    )
    model = OPTForCausalLM(config)
    if study.start_from:
        load_weights(model, Path(study.start_from))
    return model


def _identity(study: Pretraining, train_tokens: str) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    ignored = ("runs", "precision", "device", "save_every")
    options = {
        name: value
        for name, value in dataclasses.asdict(study).items()
        if name not in ignored and (name != "start_from" or value)
    }
    return {"study": options, "train_tokens_sha256": train_tokens}


def _precision(study: Pretraining, path: Path, device: torch.device) -> str:
    """The run's precision: auto is decided once and kept, as a resumed run must not change it."""
    kept = path / "precision.txt"
    if study.precision != "auto":
        return study.precision
    if not kept.exists():
        kept.write_text(_fit_precision(device))
    return kept.read_text()


def _fit_precision(device: torch.device) -> str:
    """bfloat16 where the device multiplies in it, float32 where it would be emulated."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    found = torch.cpu.get_capabilities()
    return "bfloat16" if any(found.get(name, False) for name in BF16_PROCESSORS) else "float32"
