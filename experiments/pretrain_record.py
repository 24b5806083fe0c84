"""What exactly was done to make this model, and what was it made from?

A model folder without its history is a rumour. `training.json` says with which command, on which
text (by hash), for how many tokens, on which machine, and how losses and induction went; a model
that goes on from an earlier one carries the earlier record whole. The held-out tokens lie beside
the weights, so that every installation measures the same base loss.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config import command_line, options_of
from experiments.families import KINDS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from experiments.pretrain import Pretraining
    from experiments.pretrain_setup import Setup

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def training_record(
    study: Pretraining, setup: Setup, held_out: Mapping[str, float], folder: Path
) -> dict[str, Any]:
    """What goes into training.json; tokens, epochs and curve count an earlier model's too.

    tokens_seen is T0, unique_tokens is U0 (no more than the corpus holds). `held_out` are the
    losses on all held-out tokens; every row of the curve was measured on the same part of them.
    `options`, the corpus's digest and the earlier record are enough to read the same rows again.
    """
    import torch

    from experiments.waypoints import waypoints

    trainer, facts = setup.trainer, setup.facts
    rows = setup.objective.order.legs[0].rows
    earlier = facts["earlier"] or {"tokens_seen": 0, "epochs": 0.0, "curve": [], "seconds": 0.0}
    seen = earlier["tokens_seen"] + trainer.tokens
    step = earlier["curve"][-1]["step"] if earlier["curve"] else 0
    curve = [
        row | {"step": row["step"] + step, "tokens": row["tokens"] + earlier["tokens_seen"]}
        for row in trainer.rows
    ]
    return {
        "command": command_line("pretrain", study),
        "options": options_of(study),
        "kind": KINDS[study.family],
        "objective": study.task,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {p: version(p) for p in ("torch", "transformers", "tokenizers", "numpy")},
        "threads": torch.get_num_threads(),
        "device": str(trainer.device),
        "precision": "bfloat16" if trainer.autocast is not None else "float32",
        "saved_dtype": "bfloat16",
        "seed": study.seed,
        "tokens_seen": seen,
        "unique_tokens": min(facts["unique_tokens_in_corpus"], seen),
        "epochs": earlier["epochs"] + rows.epochs(study.steps),
        "seconds": earlier["seconds"] + trainer.seconds,
        "training_mix": (
            f"{1 - study.repeated_share:.0%} windows of the corpus, {study.repeated_share:.0%} "
            "rows of one repeated span of 8 to row/2 tokens (half corpus text, half uniformly "
            f"random tokens); rows of {study.short_rows} tokens for the first "
            f"{study.short_share:.0%} of the steps, {study.context} after"
        ),
        **facts,
        "held_out": {"tokens": len(setup.text.held_out), **held_out},
        "curve": [*earlier["curve"], *curve],
        "checkpoints": [] if study.start_from else waypoints(folder),
    }


def earlier_record(folder: str, corpus_digest: str) -> dict[str, Any]:
    """The training record of the model to go on from.

    Raises ValueError for a folder without one, and for a model of another corpus: its held-out
    files may be this corpus's training files.
    """
    path = Path(folder) / "training.json"
    if not path.is_file():
        raise ValueError(
            f"--start-from {folder}: no training.json there; give the model folder of a finished "
            "`ablate pretrain` run"
        )
    record = json.loads(path.read_text())
    if record["corpus"]["sha256"] != corpus_digest:
        raise ValueError(
            f"--start-from {folder}: that model was trained on another corpus "
            f"(SHA-256 {record['corpus']['sha256'][:12]}, here {corpus_digest[:12]}), so what is "
            "held out here it may have seen; start from scratch, or on its own corpus"
        )
    return record


def copy_tokenizer(source: Path, target: Path) -> None:
    """Take over the earlier model's tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, target / name)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights in `folder` into `model`, in its dtype. ValueError where shapes differ."""
    import torch
    from safetensors.torch import load_file

    kept = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in kept or kept[name].shape != parameter.shape:
                found = tuple(kept[name].shape) if name in kept else "none"
                raise ValueError(
                    f"--start-from {folder}: {name} is {found} there and "
                    f"{tuple(parameter.shape)} here; give the same shape options as its command"
                )
            parameter.copy_(kept[name])


def write_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    folder: Path,
    held_out: Tensor,
) -> None:
    """The Hugging Face folder, in bf16, with its record and its held-out tokens."""
    import torch

    from experiments.tokens import dumps, save_stream

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_stream(
        held_out.numpy().astype("uint16"),
        folder / "validation.safetensors",
        corpus_sha256=record["corpus"]["sha256"],
    )
    (folder / "training.json").write_text(dumps(record))
