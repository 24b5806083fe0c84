"""What was the model at its start, and had its training been shorter?

`model/initial.safetensors` has the weights before the first step, in fp32. The folders
`model/checkpoints/0.125`, `0.25` and `0.5` are Hugging Face folders of the model at those shares of
its steps; the model folder itself is the share 1. Under a wsd schedule a checkpoint has had its own
decay, so it is the model that a run of so many steps would have left; under the others it is the
run's own model, at the rate it had there, which is higher than the last one's. `checkpoint.json`
says which it is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from experiments.pretrain_curve import as_saved, row
from experiments.tokens import dumps

if TYPE_CHECKING:
    from experiments.pretrain import Pretraining
    from experiments.pretrain_setup import Setup

SHARES = (0.125, 0.25, 0.5)
"""Of the steps; the last model, share 1, is the model folder."""
INITIAL = "initial.safetensors"


def keep_first(model: nn.Module, folder: Path) -> None:
    """Write the weights before the first step, once."""
    from safetensors.torch import save_file

    if not (folder / INITIAL).exists():
        half = folder / f"{INITIAL}.tmp"
        tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
        save_file(tensors, half, metadata={"format": "pt"})
        half.replace(folder / INITIAL)


def keep_waypoint(study: Pretraining, setup: Setup, folder: Path) -> None:
    """Write the checkpoint that is due at the trainer's step, if one is, once."""
    trainer = setup.trainer
    for share in SHARES:
        until = round(share * study.steps)
        annealed = study.schedule == "wsd"
        due = _fork(study, until) if annealed else until
        target = folder / "checkpoints" / f"{share:g}"
        if trainer.step != due or until < 1 or target.exists():
            continue
        model = trainer.ended_at(until) if annealed else trainer.model
        order = setup.objective.order
        tokens = sum(order.step_tokens(step) for step in range(until))
        measured = row(study, setup, model) | {"step": until, "tokens": tokens}
        del measured["seconds"]
        note = {"share": share, "annealed": annealed, **measured}
        half = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(half, ignore_errors=True)
        saved: Any = as_saved(model)
        saved.to(torch.bfloat16).save_pretrained(half)
        setup.text.tokenizer.save_pretrained(half)
        (half / "checkpoint.json").write_text(dumps(note))
        half.rename(target)


def waypoints(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints' own notes, by share."""
    files = folder.glob("checkpoints/*/checkpoint.json")
    return sorted((json.loads(f.read_text()) for f in files), key=lambda note: note["share"])


def _fork(study: Pretraining, until: int) -> int:
    """The step that a wsd run of `until` steps begins to decay at."""
    from experiments.training import Schedule

    return Schedule(study.rate, until, study.warmup, kind="wsd").stable
