"""What a sweep must say: a whole forward for each mask, and a plain log-softmax of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ablate.components import FFN, Head
from ablate.fills import Fill
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.sweep import Reading
from tests.families import inputs_for

BATCH, POS = 3, 9


def logits_under(
    model: HookedModel, masks: Sequence[Mask], reading: Reading, fill: Fill | str = "zero"
) -> Tensor:
    """[mask, batch, pos, vocab]"""
    inputs = dict(reading.inputs)
    if reading.source_rows is not None:
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][reading.source_rows]
    found = []
    for mask in masks:
        with torch.no_grad(), model.ablated(mask, fill):
            found.append(model.model(**inputs).logits)
    return torch.stack(found)


def read_off(logits: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """(log p, arg-max) at the entries of `reading`, from `logits_under`."""
    row, position = reading.positions.unbind(1)
    there = logits[:, row, position].float()
    entries = torch.arange(len(row))
    log_p = there.log_softmax(-1)[:, entries, reading.targets]
    return log_p, there.argmax(-1) == reading.targets


def padded(model: Any, padding: str) -> dict[str, Tensor]:
    """Three rows; two positions of the first (left) or three of the second (right) are padding."""
    inputs = inputs_for(model, BATCH, POS)
    if padding == "left":
        inputs["attention_mask"][0, :2] = 0
    elif padding == "right":
        inputs["attention_mask"][1, -3:] = 0
    else:
        del inputs["attention_mask"]
    return inputs


def everywhere(inputs: dict[str, Tensor], seed: int = 0) -> Reading:
    """Every position once, in a shuffled order."""
    batch, pos = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cartesian_prod(torch.arange(batch), torch.arange(pos))
    positions = positions[torch.randperm(len(positions), generator=generator)]
    return Reading(inputs, positions, torch.randint(0, 61, (len(positions),), generator=generator))


def few(inputs: dict[str, Tensor]) -> Reading:
    """Two, one and three predictions of the three rows, unsorted; one place is asked twice."""
    last = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] - 1
    places = [[2, last], [0, 2], [1, 4], [2, 3], [0, last], [2, last]]
    return Reading(inputs, torch.tensor(places), torch.tensor([5, 6, 7, 8, 9, 11]))


def many_masks(model: HookedModel) -> list[Mask]:
    """The empty one, each component, pairs across layers, nested ones, everything, duplicates."""
    components = model.components
    singles = [Mask([component]) for component in components]
    apart = [Mask([components[i], components[-1 - i]]) for i in range(min(3, len(components)))]
    steps = range(2, len(components), max(1, len(components) // 4))
    nested = [Mask(components[i] for i in _shuffled(len(components))[:step]) for step in steps]
    kinds = [Mask(c for c in components if isinstance(c, kind)) for kind in (Head, FFN)]
    masks = [*singles, Mask(), *apart, *nested, *kinds, Mask(components)]
    return [*masks, masks[0], Mask(), masks[-1]]


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
