"""What is the loss of each row of a reading, and how are many rows taken through a backward?

    L_e = −(1/T) Σ_t log p(y_t | …)        over the T predictions read from row e

As many rows go through together as fit, by the measured peak of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ablate.budget import SHARE, free_bytes, rows_that_fit, with_peak
from ablate.hooks import execution_device
from ablate.readout import log_p_of

if TYPE_CHECKING:
    from ablate.hooked import HookedModel
    from ablate.sweep import Reading

GRADIENTS = 2**27
"""Bytes that activations kept for a backward may take on a CPU: more together are no faster."""


def row_losses(
    model: HookedModel, reading: Reading, *, checkpointing: bool = False
) -> Float[Tensor, "example"]:
    """Mean −log p of what is read from each row, in nats, differentiable.

    `checkpointing` keeps one residual stream a block and computes the rest again in the backward.
    """
    log_p = log_p_of(
        model.model,
        reading.inputs,
        reading.positions,
        reading.targets,
        model.anatomy,
        checkpointing=checkpointing,
    )
    row = reading.positions[:, 0].to(log_p.device)
    counts = torch.bincount(row, minlength=reading.batch)
    return -log_p.new_zeros(reading.batch).index_add(0, row, log_p) / counts


def pieces(
    model: HookedModel,
    readings: Iterable[Reading],
    memory: int | None,
    run: Callable[[Reading], object],
    *,
    checkpointing: bool,
) -> Iterator[Reading]:
    """The readings in pieces of rows that fit into `memory` (None: half of what is free), by the
    measured peak of `run` on the first row of each greater length.

    Rows that share a source get one each. Raises ValueError for a row of which nothing is read.
    """
    device = execution_device(model.model)
    config, weight = getattr(model.model, "config", None), next(model.model.parameters())
    attention = getattr(config, "_attn_implementation", None)
    key = "backward", attention, weight.dtype, checkpointing
    for number, shared in enumerate(readings):
        reading = _unshared(shared)
        _require_all_read(reading, number)
        room = memory if memory is not None else int(SHARE * free_bytes(device))
        length, per_row = model.measured.get(key, (0, 0))
        if reading.length > length and reading.batch > 1:
            one = reading.rows(0, 1)
            _, per_row = with_peak(lambda one=one: run(one), device)
            model.measured[key] = reading.length, per_row
        size = rows_that_fit(per_row, room, device, cache=GRADIENTS)
        for first in range(0, reading.batch, size):
            yield reading.rows(first, min(first + size, reading.batch))


def counts(reading: Reading) -> tuple[Int[Tensor, "example"], Int[Tensor, "example"]]:
    """(real tokens, predictions read) of each row; of the decoder, where there are two stacks."""
    decoder = "decoder_input_ids" in reading.inputs
    mask = reading.inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is not None and mask.ndim == 2:
        tokens = mask.bool().cpu().sum(1).expand(reading.batch)
    else:
        ids = reading.inputs.get("decoder_input_ids" if decoder else "input_ids")
        length = (ids if ids is not None else reading.inputs["inputs_embeds"]).shape[1]
        tokens = torch.full((reading.batch,), length)
    return tokens, torch.bincount(reading.positions[:, 0].cpu(), minlength=reading.batch)


def _unshared(reading: Reading) -> Reading:
    """The same rows, each with its own copy of the source that it shared."""
    if reading.source_rows is None:
        return reading
    rows = reading.source_rows
    inputs = {
        name: value[rows.to(value.device)] if name in ("input_ids", "attention_mask") else value
        for name, value in reading.inputs.items()
    }
    return replace(reading, inputs=inputs, source_rows=None)


def _require_all_read(reading: Reading, number: int) -> None:
    read = torch.bincount(reading.positions[:, 0].cpu(), minlength=reading.batch)
    if not read.all():
        raise ValueError(
            f"nothing is read of row {int((read == 0).nonzero()[0])} of reading {number}: "
            "name a position of every row"
        )
