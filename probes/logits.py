"""What must a forward be given, and where are its logits needed?

The logits of a row of 400 tokens are 400 times the vocabulary, and a question needs ten of them. A
hook on the output head lets it see the needed positions only; everything else is the model's own
forward, so scalings and soft caps of the logits are applied as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ablate.hooks import execution_device
from probes.packing import Batch, Layout

CHUNK = 2**24
"""Logits turned to fp32 at a time."""


@runtime_checkable
class Model(Protocol):
    """A loaded model and its tokenizer: a HookedModel, or anything with these two."""

    model: Any
    tokenizer: Any


def inputs_of(model: Model, batch: Batch, layout: Layout) -> dict[str, Tensor]:
    """Keyword tensors of the forward that runs `batch`, on the device of the embeddings.

    For an encoder-decoder there is one encoder row per decoder row.
    """
    hf_model = model.model
    device = execution_device(hf_model.get_input_embeddings())
    ids = batch.ids.to(device)
    at = torch.arange(ids.shape[1], device=device)
    if layout == "tree":
        ends = batch.ends.to(device)
        seen = (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < ends[:, None, :])
        # Additive, as eager attention needs it; sdpa takes it as well.
        dtype = _float_dtype(hf_model)
        mask = torch.zeros(seen.shape, device=device, dtype=dtype)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        positions = batch.positions.to(device)
        return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
    mask = _padding_mask(batch.lengths, ids.shape[1]).to(device)
    if layout == "rows":
        return {"input_ids": ids, "attention_mask": mask}
    sources, source_mask = _sources(batch, device)
    rows = torch.tensor(batch.source_row, device=device)
    return {
        "input_ids": sources[rows],
        "attention_mask": source_mask[rows],
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }


def slot_logits(
    model: Model, batch: Batch, layout: Layout, *, shared: bool = True
) -> Float[Tensor, "slot vocab"]:
    """The model's logits at `batch.slots` only.

    An encoder reads every context once for all its choices, unless not `shared`.
    """
    hf_model = model.model
    inputs: dict[str, Any] = inputs_of(model, batch, layout)
    if layout == "encoder" and shared:
        inputs |= _encoded(hf_model, batch, inputs.pop("input_ids").device)
    with _only(hf_model.get_output_embeddings(), batch.slots):
        logits = hf_model(**inputs, use_cache=False).logits
    if logits.numel() // logits.shape[-1] != len(batch.slots):
        raise RuntimeError(
            f"{type(hf_model).__name__} gave logits of shape {tuple(logits.shape)} for "
            f"{len(batch.slots)} slots: its get_output_embeddings() is not what makes them"
        )
    return logits.flatten(0, -2)


def token_log_p(
    logits: Float[Tensor, "slot vocab"], batch: Batch
) -> tuple[Float[Tensor, "entry"], Bool[Tensor, "entry"]]:
    """(log p of every scored token, whether it is the arg-max), normalised in fp32 chunks."""
    parts = logits.split(max(1, CHUNK // logits.shape[-1]))
    total = torch.cat([part.float().logsumexp(-1) for part in parts])
    top = torch.cat([part.argmax(-1) for part in parts])
    slot, target = batch.entry_slot.to(logits.device), batch.entry_target.to(logits.device)
    return logits[slot, target].float() - total[slot], top[slot] == target


def _encoded(hf_model: Any, batch: Batch, device: torch.device) -> dict[str, Any]:
    """What the encoder says of every context, read once, repeated for every row."""
    from transformers.modeling_outputs import BaseModelOutput

    sources, mask = _sources(batch, device)
    states = hf_model.get_encoder()(input_ids=sources, attention_mask=mask).last_hidden_state
    rows = torch.tensor(batch.source_row, device=states.device)
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states[rows])}


def _sources(
    batch: Batch, device: torch.device
) -> tuple[Int[Tensor, "source pos"], Int[Tensor, "source pos"]]:
    """What the encoder reads, padded on the right, and its mask."""
    lengths = torch.tensor([len(source) for source in batch.sources])
    width = int(lengths.max())
    ids = torch.tensor([[*source, *[0] * (width - len(source))] for source in batch.sources])
    return ids.to(device), _padding_mask(lengths, width).to(device)


def _padding_mask(lengths: Int[Tensor, "batch"], width: int) -> Int[Tensor, "batch pos"]:
    return (torch.arange(width) < lengths[:, None]).long()


def _float_dtype(hf_model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in hf_model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _only(head: nn.Module, slots: Int[Tensor, "slot"]) -> Iterator[None]:
    """Let the output head see the chosen slots only, as [1, slot, d_model]."""

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0].flatten(0, 1)
        return (states[slots.to(states.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
