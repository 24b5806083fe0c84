"""With which weights does a reset place start again?

    init        as the model's own initialiser draws them (`ablate.initialisers`)
    rewind      the true initial weights, where they were kept (Zhang et al. 2022; Frankle et al.)
    torch       as torch's own modules start
    identity    init with the output projections of the branches zero, so that a branch adds nothing
    copy-below, copy-above, copy-mean    the neighbours' trained weights
    moments     normal, each tensor with the mean and the standard deviation of the trained one
    permuted    the trained entries, each tensor in a random order

`fresh` computes them and leaves the model alone. The same seed gives the same weights, whatever
else is reset: those of `3.ffn` are the FFN's of `3`. Different blocks draw different weights.

Where it misleads. Under post-norm (BERT, BART, OPT-350m) a block whose branches are zero is a norm,
not the identity, so `identity` is refused, but for a single branch (`attention`, `cross`, `ffn`).
Under pre-norm and a small initialiser, init is nearly the identity. `moments` and `permuted` keep
what the sizes of the trained tensors know, gains too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ablate.anatomy import Anatomy
from ablate.fused import masks_at
from ablate.identity import require_identity, without_branches
from ablate.initialisers import initial_weights, torch_weights
from ablate.law_names import Law
from ablate.places import Block, Place, block_at, weights_at

LAWS: tuple[Law, ...] = get_args(Law)

Initial = Mapping[str, Tensor] | str | Path
"""The true initial weights: tensors by name, or a safetensors file, or a checkpoint's folder."""


def fresh(
    hf_model: nn.Module,
    place: Place,
    law: Law = "init",
    seed: int = 0,
    *,
    initial: Initial | None = None,
    anatomy: Anatomy | None = None,
) -> dict[str, Tensor]:
    """New weights for `place`, by name, with the shape, dtype and device of the old ones.

    Entries of a fused projection that are not of the place are the old ones. `initial` is read by
    the law rewind alone. Raises ValueError for a place the model does not have, for weights that
    cannot be reset alone (`weights_at`), and where the law has nothing to give.
    """
    if law not in LAWS:
        raise ValueError(f"no law {law!r}: use one of {', '.join(LAWS)}")
    old = weights_at(hf_model, place, anatomy)
    masks = masks_at(hf_model, place, anatomy)
    block = block_at(hf_model, place, anatomy)
    label = f"{place.stack}.{place.layer}"  # not the part: a part's weights are the block's
    with torch.no_grad():
        match law:
            case "init":
                new = initial_weights(hf_model, block.path, _seed(seed, label))
            case "torch":
                new = torch_weights(hf_model, block.path, _seed(seed, label))
            case "identity":
                require_identity(hf_model, place, anatomy)
                new = initial_weights(hf_model, block.path, _seed(seed, label))
                new = without_branches(block, new)
            case "rewind":
                new = _read(initial, tuple(old))
            case "moments":
                new = _each(block, old, masks, (seed, label), _moments)
            case "permuted":
                new = _each(block, old, masks, (seed, label), _permuted)
            case _:
                new = _neighbours(hf_model, place, block, law, tuple(old))
        return {name: _fitted(name, new, weight, masks, law) for name, weight in old.items()}


def _fitted(
    name: str, new: Mapping[str, Tensor], old: Tensor, masks: Mapping[str, Tensor], law: Law
) -> Tensor:
    """The new tensor as the old one is kept; the old entries where the place has none."""
    if name not in new:
        raise ValueError(f"the law {law} needs {name}, which is not there")
    value = new[name]
    if value.shape != old.shape:
        raise ValueError(
            f"the law {law} gives {name} the shape {list(value.shape)}, the model has "
            f"{list(old.shape)}"
        )
    value = value.to(old.device, old.dtype)
    if name in masks:
        value = torch.where(masks[name], value, old.detach())
    return value.clone()


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each block or tensor; Python's hash() differs between processes."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _each(
    block: Block,
    old: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    seed: tuple[int, str],
    law: Callable[[Tensor, torch.Generator], Tensor],
) -> dict[str, Tensor]:
    """A law of single tensors, on the entries of the place, each with its own generator."""
    new = {}
    for name, weight in old.items():
        label = seed[1] + name.removeprefix(block.path)
        generator = torch.Generator().manual_seed(_seed(seed[0], label))
        value = weight.detach().cpu().clone()
        mask = masks[name].cpu() if name in masks else torch.ones_like(value, dtype=torch.bool)
        value[mask] = law(value[mask].double(), generator).to(value.dtype)
        new[name] = value
    return new


def _moments(entries: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(entries.shape, generator=generator, dtype=entries.dtype)
    return entries.mean() + entries.std(correction=0) * noise


def _permuted(entries: Tensor, generator: torch.Generator) -> Tensor:
    return entries[torch.randperm(len(entries), generator=generator)]


def _neighbours(
    hf_model: nn.Module, place: Place, block: Block, law: Law, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The weights of the same names in the block below, the one above, or their mean."""
    steps = {"copy-below": (-1,), "copy-above": (1,), "copy-mean": (-1, 1)}[law]
    there = dict(hf_model.named_parameters(remove_duplicate=False))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for layer in (block.layer + step for step in steps):
        if not 0 <= layer < len(block.paths):
            side = "below" if layer < 0 else "above"
            raise ValueError(f"the law {law} for {place}: there is no block {side} it")
        for name in names:
            other = block.paths[layer] + name.removeprefix(block.path)
            if other not in there:
                raise ValueError(f"the law {law} for {place}: block {layer} has no {other}")
            if there[other].is_meta:
                raise ValueError(
                    f"the law {law} for {place}: {other} is offloaded; load the model with a "
                    f"device_map that keeps block {layer} on a device"
                )
            found[name].append(there[other].detach().cpu())
    for name, values in found.items():
        if len({value.shape for value in values}) > 1:
            raise ValueError(f"the law {law} for {place}: the neighbours of {name} differ in shape")
    return {name: torch.stack([*map(_exact, values)]).mean(0) for name, values in found.items()}


def _exact(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _read(initial: Initial | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The named tensors of `initial`; of a file no others are read."""
    if initial is None:
        raise ValueError("the law rewind needs initial=: the true initial weights, or their file")
    if isinstance(initial, Mapping):
        missing = [name for name in names if name not in initial]
        source = "the initial weights given"
        found = {name: initial[name] for name in names if name in initial}
    else:
        found, source = {}, str(initial)
        path = Path(initial).expanduser()
        files = [path]
        if path.is_dir():  # a checkpoint's own files, not others that lie beside them
            files = sorted([*path.glob("model.safetensors"), *path.glob("model-*.safetensors")])
        if not files or not all(file.is_file() for file in files):
            raise ValueError(
                f"no initial weights at {initial}: give a safetensors file or a folder"
            )
        for file in files:
            found |= _stored(file, names)
        missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{source} lack {missing[0]} ({len(missing)} of {len(names)} are missing): give the "
            "weights of this very model before its first step"
        )
    return found


def _stored(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            there = set(tensors.keys())
            return {name: tensors.get_tensor(name) for name in names if name in there}
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error
