"""How is a part of a trained model reset, alone trainable, and put back?

    with restored(model):                                   # everything returns on exit
        new = reset_(model, [Place(3)], law="init", seed=0)   # block 3 anew, all else frozen
        optimiser = torch.optim.AdamW(new.values())

`reset_` writes what `ablate.laws.fresh` computes. `train_only_` alone resets nothing: the no-op
arm.

Where it misleads. A place that is a part of a fused tensor (`qk` and `vo` of GPT-2, NeoX, Bloom,
Falcon) makes the whole tensor trainable; which entries are the place's is in `masks_all`, and who
trains has to put the others back after each step. Only requires_grad is changed, not the mode:
with dropout, call eval() on what is frozen yourself. Buffers (rotary tables) are never reset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ablate.anatomy import Anatomy
from ablate.fused import masks_at
from ablate.identity import has_identity
from ablate.laws import LAWS, Initial, Law, fresh
from ablate.places import PARTS, Part, Place, places_of, weights_at

__all__ = [
    "LAWS",
    "PARTS",
    "Initial",
    "Law",
    "Part",
    "Place",
    "fingerprints",
    "fresh",
    "fresh_all",
    "has_identity",
    "masks_all",
    "masks_at",
    "places_of",
    "reset_",
    "restored",
    "train_only_",
    "weights_at",
]


def reset_(
    hf_model: nn.Module,
    places: Place | Iterable[Place],
    law: Law = "init",
    seed: int = 0,
    *,
    initial: Initial | None = None,
    anatomy: Anatomy | None = None,
) -> dict[str, nn.Parameter]:
    """Give `places` fresh weights and freeze everything else; returns the reset parameters.

    All new weights are computed before the first is written, so a neighbour is copied as it was.
    Raises ValueError as `fresh` does, without having changed anything, and where the law gives a
    place the weights it has already.
    """
    asked = _listed(places)
    new = fresh_all(hf_model, asked, law, seed, initial=initial, anatomy=anatomy)
    for place in asked:
        old = weights_at(hf_model, place, anatomy)
        if all(torch.equal(new[name], old[name]) for name in old):
            raise ValueError(
                f"the law {law} gives {place} of {type(hf_model).__name__} the weights it has: "
                "nothing would be reset; to train it as it is, use train_only_"
            )
    trained = train_only_(hf_model, asked, anatomy)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(new[name])
    return trained


def fresh_all(
    hf_model: nn.Module,
    places: Place | Iterable[Place],
    law: Law = "init",
    seed: int = 0,
    *,
    initial: Initial | None = None,
    anatomy: Anatomy | None = None,
) -> dict[str, Tensor]:
    """`fresh` of several places, of which two may have entries of one tensor (`qk` and `vo`)."""
    new: dict[str, Tensor] = {}
    for place in _listed(places):
        values = fresh(hf_model, place, law, seed, initial=initial, anatomy=anatomy)
        for name, mask in masks_at(hf_model, place, anatomy).items():
            if name in new:
                values[name] = torch.where(mask, values[name], new[name])
        new |= values
    return new


def masks_all(
    hf_model: nn.Module, places: Place | Iterable[Place], anatomy: Anatomy | None = None
) -> dict[str, Bool[Tensor, "..."]]:
    """`masks_at` of several places: tensors of which some entries are in none of them."""
    masks: dict[str, Tensor] = {}
    whole: set[str] = set()
    for place in _listed(places):
        here = masks_at(hf_model, place, anatomy)
        whole |= weights_at(hf_model, place, anatomy).keys() - here.keys()
        for name, mask in here.items():
            masks[name] = masks[name] | mask if name in masks else mask
    return {n: mask for n, mask in masks.items() if n not in whole and not bool(mask.all())}


def train_only_(
    hf_model: nn.Module, places: Place | Iterable[Place], anatomy: Anatomy | None = None
) -> dict[str, nn.Parameter]:
    """Only the weights of `places` require a gradient afterwards; returns them. None is changed."""
    trained: dict[str, nn.Parameter] = {}
    for place in _listed(places):
        trained |= weights_at(hf_model, place, anatomy)
    hf_model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _listed(places: Place | Iterable[Place]) -> list[Place]:
    listed = [places] if isinstance(places, Place) else list(places)
    if not listed or not all(isinstance(place, Place) for place in listed):
        raise ValueError(
            f"{places!r} are no places: give at least one, Place(3) or Place.parse('3.ffn')"
        )
    return listed


def fingerprints(
    hf_model: nn.Module, without: Sequence[Place] = (), anatomy: Anatomy | None = None
) -> dict[str, str]:
    """A hash of the bytes of every parameter and buffer that is on a device, by name.

    Weights of the places `without` are left out; of a fused tensor, their entries. Equal before and
    after training: what was frozen is bitwise what it was. Reads every weight once.
    """
    skipped = {name for place in without for name in weights_at(hf_model, place, anatomy)}
    masks = masks_all(hf_model, without, anatomy) if without else {}
    found: dict[str, str] = {}
    for name, tensor in [*hf_model.named_parameters(), *hf_model.named_buffers()]:
        if name in skipped and name not in masks:
            continue
        kept = tensor.detach()[~masks[name]] if name in masks else tensor.detach()
        if kept.numel() and not kept.is_meta:
            raw = kept.cpu().contiguous().flatten().view(torch.uint8).numpy()
            found[name] = hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()
    return found


@contextmanager
def restored(hf_model: nn.Module) -> Iterator[nn.Module]:
    """On exit, exceptions included, the model is bitwise what it was.

    Every parameter and buffer (value, object, dtype, device, gradient), requires_grad and training
    flag, and every submodule that was replaced, added or taken away. Costs a copy of all weights
    that are on a device. Offloaded weights are accelerate's and are not copied. Hooks stay.
    """
    modules = [(module, _state(module)) for module in hf_model.modules()]
    tensors = [*hf_model.parameters(), *(b for b in hf_model.buffers() if b is not None)]
    kept = [(tensor, *_copied(tensor)) for tensor in tensors if not tensor.is_meta]
    flags = [(parameter, parameter.requires_grad) for parameter in hf_model.parameters()]
    try:
        yield hf_model
    finally:
        for module, (parameters, buffers, children, training) in modules:
            module.__dict__["_parameters"] = dict(parameters)
            module.__dict__["_buffers"] = dict(buffers)
            module.__dict__["_modules"] = dict(children)
            module.training = training
        for tensor, value, gradient in kept:
            _put_back(tensor, value, gradient)
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)


def _state(
    module: nn.Module,
) -> tuple[dict[str, object], dict[str, object], dict[str, object], bool]:
    return (
        dict(module._parameters),
        dict(module._buffers),
        dict(module._modules),
        module.training,
    )


def _copied(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    gradient = tensor.grad if tensor.is_leaf else None
    return tensor.detach().clone(), None if gradient is None else gradient.detach().clone()


def _put_back(tensor: Tensor, value: Tensor, gradient: Tensor | None) -> None:
    same = (tensor.shape, tensor.dtype, tensor.device) == (value.shape, value.dtype, value.device)
    with torch.no_grad():
        if same:
            tensor.copy_(value)
        else:
            tensor.data = value
    if tensor.is_leaf:
        tensor.grad = gradient
