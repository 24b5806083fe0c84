"""How good is the model along the way, on the weights as they will be saved?

Held-out loss, always on the same rows; of a decoder also what in-context copying there is, of a
translator also the loss when it is given another row's source. Measured ten times a decade of the
tokens from 1 % to 10 %, then every fortieth: another study reads off when a loss was first reached.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from experiments.families import KINDS
from experiments.objectives import Batch, losses
from experiments.pretrain_setup import BOS_ID
from experiments.translation import no_source
from probes.in_context import held_out_losses, in_context_measurements

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from experiments.pretrain import Pretraining
    from experiments.pretrain_setup import Setup


def measured_steps(steps: int) -> frozenset[int]:
    """The steps after which the curve has a row."""
    early = {round(steps * 10 ** (-2 + i / 10)) for i in range(11)}
    every = max(1, steps // 40)
    return frozenset(early - {0} | set(range(every, steps + 1, every)))


def row(study: Pretraining, setup: Setup, model: nn.Module | None = None) -> dict[str, float]:
    """One row of the curve: of the trainer's model now, or of another one at the same step."""
    trainer = setup.trainer
    kept = as_saved(trainer.model if model is None else model)
    return {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        **_measurements(study, setup, kept),
    }


def whole(study: Pretraining, setup: Setup, model: PreTrainedModel) -> dict[str, float]:
    """The losses of `model` on all held-out tokens."""
    if KINDS[study.family] == "decoder":
        return held_out_losses(model, setup.text.held_out, study.context, BOS_ID)
    return _losses(model, setup.objective.held_out())


def held_out_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss over all predicted targets of some batches, nats."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            each, predicted = losses(model(**batch.inputs).logits, batch)
            total += float(each.double().sum())
            count += int(predicted.sum())
    return total / count


def as_saved(model: Any) -> PreTrainedModel:
    """A copy in evaluation mode whose weights went through bf16, as the saved ones do."""
    return copy.deepcopy(model).to(torch.bfloat16).to(torch.float32).eval()


def _measurements(study: Pretraining, setup: Setup, model: PreTrainedModel) -> dict[str, float]:
    text = setup.text
    if KINDS[study.family] == "decoder":
        return in_context_measurements(
            model, text.tokenizer, text.held_out, study.context, study.curve_tokens
        )
    return _losses(model, setup.objective.held_out(study.curve_tokens))


def _losses(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    found = {"validation_loss": held_out_loss(model, batches)}
    if "decoder_input_ids" in batches[0].inputs:
        swapped = [no_source(batch) for batch in batches if len(batch.targets) > 1]
        found["no_source_loss"] = held_out_loss(model, swapped)
    return found
