"""What must a forward be given to score a packed batch, and which predictions are read from it?

The layouts of `probes.packing` as keyword tensors of a model's forward: a tree is an attention mask
and position ids, rows are padded, an encoder reads every context once for all choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ablate.hooks import execution_device
from ablate.sweep import Reading
from probes.packing import Batch, Layout

if TYPE_CHECKING:
    from ablate.hooked import HookedModel


def reading_of(model: HookedModel, batch: Batch, layout: Layout, *, shared: bool = True) -> Reading:
    """The forward of `batch` and its scored tokens, in the order of its entries.

    An encoder reads every context once for all its choices, unless not `shared`.
    """
    inputs, rows = inputs_of(model, batch, layout), None
    if layout == "encoder" and shared:
        inputs["input_ids"], inputs["attention_mask"] = _sources(batch, inputs["input_ids"].device)
        rows = torch.tensor(batch.source_row)
    slots = batch.slots[batch.entry_slot]
    width = batch.ids.shape[1]
    positions = torch.stack([slots // width, slots % width], 1)
    return Reading(inputs, positions, batch.entry_target, rows)


def inputs_of(model: HookedModel, batch: Batch, layout: Layout) -> dict[str, Tensor]:
    """Keyword tensors of the forward that runs `batch`, on the device of the embeddings.

    For an encoder-decoder there is one encoder row per decoder row.
    """
    hf_model: Any = model.model
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
