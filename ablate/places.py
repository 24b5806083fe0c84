"""Which weights are a block, its attention, its FFN, its norms?

A `Place` names a part of one block; its weights are parameters of the loaded model, by their names:

    block       all of it; it is exactly attention + cross + mixer + ffn + norms, none twice
    attention   self-attention: q, k, v, o, biases and what else the module holds (norms of q, k)
    cross       the same of the decoder's attention to the encoder
    mixer       the SSM with its own parameters and inner norms
    norms       gains and biases of the norms on the residual stream, wherever the module tree
                keeps them (BERT has one inside `attention.output`); the cross-attention's norm too
    ffn         all matrices that are left: gates, experts and the router among them
    qk, vo      the query and key, the value and output projections of the self-attention, with
                their biases. Of a fused projection only some entries: `masks_at` says which
    position_bias   T5's relative position bias. It is stored in block 0 and added in every block
                of its stack, so it is no part of block 0: resetting it would reset all blocks

Where it misleads: a module that no row of `ablate.anatomy` knows, say a gain on a branch, counts as
ffn. Norms inside an attention or a mixer stay with those, so `norms` is not every gain there is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ablate.anatomy import Anatomy, Attention, Blocks, anatomy_of, base_path, find
from ablate.components import STACKS, Stack

Part = Literal["block", "attention", "ffn", "norms", "qk", "vo", "cross", "mixer", "position_bias"]
PARTS: tuple[Part, ...] = get_args(Part)

_NAMED: dict[str, Part] = {part: part for part in PARTS}
_STACK: dict[str, Stack] = {stack: stack for stack in STACKS[:3]}
_WRITTEN = re.compile(r"(?:(encoder|decoder)\.)?(\d+)(?:\.(\w+))?", re.ASCII)
_POSITION_BIAS = "relative_attention_bias"


@dataclass(frozen=True, order=True)
class Place:
    """A part of block `layer`, counted from 0; `stack` where the model has two."""

    layer: int
    part: Part = "block"
    stack: Stack = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", operator.index(self.layer))
        if self.layer < 0:
            raise ValueError(f"layer {self.layer} of a Place: layers count from 0")
        if self.part not in PARTS:
            raise ValueError(f"no part {self.part!r} of a block: use one of {', '.join(PARTS)}")
        if self.stack not in _STACK:
            raise ValueError(f"stack {self.stack!r} of a Place: use '', 'encoder' or 'decoder'")

    def __str__(self) -> str:
        names = (self.stack, str(self.layer), "" if self.part == "block" else self.part)
        return ".".join(name for name in names if name)

    @classmethod
    def parse(cls, text: str) -> Place:
        """Inverse of `str`: `3`, `3.ffn`, `encoder.1`, `decoder.1.cross`. ValueError otherwise."""
        found = _WRITTEN.fullmatch(text.strip())
        if found is None or (found[3] or "block") not in _NAMED:
            raise ValueError(
                f"no place is written {text!r}: use 3 (block 3), 3.ffn or decoder.1.cross; "
                f"parts are {', '.join(PARTS)}"
            )
        return cls(int(found[2]), _NAMED[found[3] or "block"], _STACK[found[1] or ""])


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a loaded model."""

    module: nn.Module
    path: str
    row: Blocks
    layer: int
    paths: tuple[str, ...]
    """Of all blocks of its stack, in order."""


def block_at(hf_model: nn.Module, place: Place, anatomy: Anatomy | None = None) -> Block:
    """The block that `place` is in. ValueError where the model has no such stack or layer."""
    rows: dict[str, tuple[Blocks, tuple[str, ...]]] = {}
    for row in (anatomy or anatomy_of(hf_model)).stacks:
        path = base_path(hf_model, row.path)
        if (blocks := find(hf_model, path)) is not None:
            names = (name for name, _ in blocks.named_children())
            rows[row.stack] = row, tuple(f"{path}.{name}" for name in names)
    name = type(hf_model).__name__
    if place.stack not in rows:
        there = ", ".join(map(repr, rows)) or "no blocks where its anatomy looks"
        raise ValueError(f"stack {place.stack!r} of {name} asked for: it has {there}")
    row, paths = rows[place.stack]
    if place.layer >= len(paths):
        raise ValueError(f"no block {place} in {name}: layers run 0–{len(paths) - 1}")
    path = paths[place.layer]
    return Block(hf_model.get_submodule(path), path, row, place.layer, paths)


def places_of(
    hf_model: nn.Module, part: Part = "block", anatomy: Anatomy | None = None
) -> tuple[Place, ...]:
    """Every place of this kind that the model has, stack by stack."""
    return tuple(_places(hf_model, part, anatomy or anatomy_of(hf_model)))


def _places(hf_model: nn.Module, part: Part, anatomy: Anatomy) -> Iterator[Place]:
    for row in anatomy.stacks:
        blocks = find(hf_model, base_path(hf_model, row.path))
        for layer in range(0 if blocks is None else len(list(blocks.children()))):
            place = Place(layer, part, row.stack)
            if any(_names_of(block_at(hf_model, place, anatomy), part)):
                yield place


def weights_at(
    hf_model: nn.Module, place: Place, anatomy: Anatomy | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of `place`, by their names in the model, in its order; no buffers.

    Raises ValueError for a place this model does not have, and for weights that cannot be reset
    alone: offloaded by accelerate, quantised, or shared with another part of the model.
    """
    block = block_at(hf_model, place, anatomy)
    found = {
        f"{block.path}.{name}": block.module.get_parameter(name)
        for name in _names_of(block, place.part)
    }
    if not found:
        parts = [part for part in PARTS[1:] if any(_names_of(block, part))]
        raise ValueError(
            f"no {place.part} in block {place.layer} of {type(hf_model).__name__}: "
            f"it has {', '.join(parts)}"
        )
    _require_own(hf_model, found)
    return found


def _names_of(block: Block, part: Part) -> list[str]:
    """Names, from the block, of the parameters of one of its parts."""
    names = [name for name, _ in block.module.named_parameters(remove_duplicate=False)]
    row = block.row.attention
    if part == "position_bias":
        return [name for name in names if _POSITION_BIAS in name]
    names = [name for name in names if _POSITION_BIAS not in name]
    if part == "block":
        return names
    if part in ("qk", "vo"):
        projections = ()
        if row is not None:
            projections = (row.qkv, row.q, row.k) if part == "qk" else (row.qkv, row.v, row.out)
        return [name for name in names if _within(name, projections)]
    return [name for name in names if _part_of(block, name) == part]


def _part_of(block: Block, name: str) -> Part:
    """Which of the parts that make up a block the parameter `name` is of."""
    row = block.row
    if row.attention is not None and _of_attention(name, row.attention):
        return "attention"
    if row.cross is not None and _of_attention(name, row.cross):
        return "cross"
    if _within(name, (row.mixer.rpartition(".")[0] or row.mixer,)):
        return "mixer"
    owner = block.module.get_submodule(name.rpartition(".")[0])
    return "norms" if "norm" in type(owner).__name__.lower() else "ffn"


def _of_attention(name: str, row: Attention) -> bool:
    return _within(name, (row.module, row.out, row.q, row.k, row.v, row.qkv))


def _within(name: str, paths: tuple[str, ...]) -> bool:
    return any(path and name.startswith(f"{path}.") for path in paths)


def _require_own(hf_model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """ValueError, by name, for weights that are elsewhere, packed, or used twice."""
    model = type(hf_model).__name__
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(
                f"{name} of {model} is offloaded: load the model with a device_map that keeps "
                f"{name.rpartition('.')[0]} on a device"
            )
        if not weight.is_floating_point():
            raise ValueError(f"{name} of {model} is {weight.dtype}: load it without quantisation")
    storages = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
    for other, weight in hf_model.named_parameters(remove_duplicate=False):
        if weight.is_meta or other == storages.get(weight.untyped_storage().data_ptr(), other):
            continue
        name = storages[weight.untyped_storage().data_ptr()]
        raise ValueError(
            f"{name} of {model} is tied to {other}: resetting one resets both; untie them first"
        )
