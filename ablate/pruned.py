"""How does a loaded model lose components for good?

`remove(model, mask)` takes the weights of every removed component out of the modules, in place:

    head       its rows of W_Q, its columns of W_O; W_O's bias stays, since it belongs to no head
    key/value  the rows of W_K and W_V of a head that no query head reads any more
    FFN        all its weights and biases

Query heads left in unequal numbers on each key/value head: with g their greatest common divisor,
each key/value head is computed once and read by its n_i heads as n_i/g groups of g, so the stock
attention runs unchanged. Parameters are exact then; the cache is that of Σ n_i/g key/value heads.

`pruned_class(OPTForCausalLM)` is that architecture with `remove` at the end of its constructor, so
`from_pretrained` and `save_pretrained` work as usual. Its checkpoints name what was removed in
config.json and keep their weights in `model.pruned.safetensors`: a stock class, which would draw a
removed FFN at random, finds no weights there and says so. `ablate.placement.load` reads both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ablate.anatomy import UnknownArchitecture
from ablate.components import KVGroup, Mixer
from ablate.masks import Mask
from ablate.remains import Absent, Spread, for_heads
from ablate.sites import Site, sites

VARIANT = "pruned"
"""Between `model` and `safetensors` in the names of the weight files."""
KEY = "ablate_removed"
"""Under which config.json names the removed components."""

_BEFORE_FFN = {
    "fc2": "fc1",
    "output.dense": "intermediate.dense",
    "mlp.dense_4h_to_h": "mlp.dense_h_to_4h",
}
"""Last module of an FFN, where that is not the whole of it -> the projection before it."""
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KV_HEADS = ("num_kv_heads", "num_key_value_heads")
_WIDTHS = ("all_head_size", "inner_dim", "split_size")
_HANDED_BY_HEAD = ("bloom", "falcon", "t5")
"""Families that compute something once for the heads of all layers."""


def require_removable(hf_model: Any, removed: Mask) -> None:
    """ValueError, in one line, for what `remove` cannot take out exactly."""
    mixers = [component for component in removed if isinstance(component, Mixer)]
    if mixers:
        raise ValueError(
            f"export without mixer {mixers[0]}: an SSM's weights cannot be taken out, only heads' "
            "and FFNs'; leave mixers out of the mask"
        )
    if hasattr(hf_model.config, KEY):
        raise ValueError(
            f"export of a model that is already pruned ({getattr(hf_model.config, KEY)[0]}, …): "
            "export the model it came from, with both masks joined: a | b"
        )
    if getattr(hf_model.config, "slow_but_exact", False):
        raise ValueError(
            "export of a Bloom that computes its projections in slices (slow_but_exact): set "
            "model.config.slow_but_exact = False when loading"
        )
    for name, parameter in hf_model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is offloaded (meta), and its weights cannot be cut: load the model "
                "without offload to export it"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({parameter.dtype}): load the model in float32 or bfloat16 "
                "to export it"
            )


def remove(hf_model: Any, removed: Mask) -> None:
    """Take the weights of heads and FFNs out of `hf_model`, in place. Groups must be expanded."""
    for site in sites(hf_model):
        gone = [component in removed for component in site.components]
        if site.kind == "head" and any(gone):
            kept = [head for head, lost in enumerate(gone) if not lost]
            _cut_attention(hf_model, site, kept)
        elif site.kind == "ffn" and all(gone):
            _drop_ffn(hf_model, site)


def grouping(kept: Sequence[int], heads: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """Kept query heads in equal groups, each of one original key/value head.

    >>> grouping([0, 1, 2, 5], heads=8, groups=2)  # three heads read key/value head 0, one reads 1
    ((0,), (1,), (2,), (5,))
    """
    share = heads // groups
    by_group = [[head for head in kept if head // share == group] for group in range(groups)]
    size = math.gcd(*map(len, by_group))
    return tuple(
        tuple(members[first : first + size])
        for members in by_group
        for first in range(0, len(members), size)
    )


def _cut_attention(hf_model: Any, site: Site, kept: Sequence[int]) -> None:
    row = site.row
    assert row is not None
    block = hf_model.get_submodule(site.block)
    attention = block.get_submodule(row.module)
    d_head, heads, share = site.d_head, site.width, site.width // site.kv_groups
    groups = grouping(kept, heads, site.kv_groups) if kept else ()
    origin = [members[0] // share for members in groups]
    if row.layout == "thirds":
        slots = {row.qkv: [*kept, *(heads + g for g in origin), *(2 * heads + g for g in origin)]}
    elif row.layout == "grouped":
        slots = {row.qkv: []}
        for members, group in zip(groups, origin, strict=True):
            first = group * (share + 2)
            own = [first + head % share for head in members]
            slots[row.qkv] += [*own, first + share, first + share + 1]
    else:
        slots = {row.q: list(kept), row.k: origin, row.v: origin}
    for path, wanted in slots.items():
        phantom = d_head * (3 if row.qkv else 1)
        left = _outputs(block.get_submodule(path), wanted, d_head) if kept else Absent(phantom)
        block.set_submodule(path, left)
    out: Any = block.get_submodule(row.out)
    if kept:
        _keep_inputs(out, _features(kept, d_head))
    else:
        block.set_submodule(row.out, Absent(_out_width(out), out.bias))
    _count(attention, max(len(kept), 1), max(len(groups), 1), d_head)
    if hf_model.config.model_type in _HANDED_BY_HEAD:
        for_heads(attention, heads, kept or (0,))


def _count(attention: Any, heads: int, groups: int, d_head: int) -> None:
    """Tell an attention how many heads it has left."""
    told = dict.fromkeys(_HEADS, heads) | dict.fromkeys(_KV_HEADS, groups)
    told |= dict.fromkeys(_WIDTHS, heads * d_head) | {"num_key_value_groups": heads // groups}
    for name, value in told.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def _drop_ffn(hf_model: Any, site: Site) -> None:
    block: Any = hf_model.get_submodule(site.block)
    path = site.path.removeprefix(f"{site.block}.")
    last: Any = block.get_submodule(path)
    if path in _BEFORE_FFN:
        block.set_submodule(_BEFORE_FFN[path], Absent(0))
        block.set_submodule(path, Absent(_out_width(last)))
    elif next(last.children(), None) is None:
        raise UnknownArchitecture(
            f"export without the FFN at {site.path}: it is the last projection of a "
            f"{hf_model.config.model_type}'s FFN, and nothing says what stands before it"
        )
    else:
        block.set_submodule(path, Absent(hf_model.config.hidden_size))


def _features(blocks: Sequence[int], d_head: int) -> Tensor:
    """Indices of the features of some heads."""
    return torch.tensor([b * d_head + i for b in blocks for i in range(d_head)], device="cpu")


def _outputs(linear: Any, wanted: Sequence[int], d_head: int) -> nn.Module:
    """`linear` with the output heads `wanted`; each is computed once, though wanted often."""
    once = list(dict.fromkeys(wanted))
    features = _features(once, d_head)
    axis = 1 if hasattr(linear, "nf") else 0  # GPT-2's Conv1D holds the transpose
    linear.weight = _kept(linear.weight, features, axis)
    if linear.bias is not None:
        linear.bias = _kept(linear.bias, features, 0)
    setattr(linear, "nf" if axis else "out_features", len(features))
    if len(once) == len(wanted):
        return linear
    return Spread(linear.weight, linear.bias, [once.index(head) for head in wanted], d_head)


def _keep_inputs(linear: Any, features: Tensor) -> None:
    transposed = hasattr(linear, "nx")
    linear.weight = _kept(linear.weight, features, 0 if transposed else 1)
    setattr(linear, "nx" if transposed else "in_features", len(features))


def _kept(parameter: nn.Parameter, features: Tensor, axis: int) -> nn.Parameter:
    cut = parameter.detach().index_select(axis, features.to(parameter.device))
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)


def _out_width(linear: Any) -> int:
    return linear.nf if hasattr(linear, "nf") else linear.out_features


@cache
def pruned_class(base: Any) -> Any:
    """`base`, a transformers class, without the components that its config names as removed."""

    class Pruned(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            removed = Mask.parse(",".join(getattr(config, KEY)))
            if any(isinstance(component, KVGroup | Mixer) for component in removed):
                raise ValueError(f"{KEY} of a config may name heads and FFNs only, not {removed}")
            remove(self, removed)

        # The signature is transformers', whose Trainer calls this with options of its own.
        def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
            super().save_pretrained(save_directory, **(options | {"variant": VARIANT}))

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{base.__name__}"
    # transformers leaves the unsaved buffers of classes from elsewhere unfilled (Falcon-H1's).
    Pruned.__module__ = base.__module__
    return Pruned


def pruned_class_of(config: Any) -> Any:
    """The class to load a config with that names removed components, or None for any other."""
    if not hasattr(config, KEY):
        return None
    architecture = (config.architectures or [""])[0].removeprefix("Pruned")
    base = getattr(transformers, architecture, None)
    if base is None:  # a class of ours, if it is registered
        base = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(base, type) or not issubclass(base, transformers.PreTrainedModel):
        raise ValueError(f"a pruned {architecture!r}: transformers has no such architecture")
    return pruned_class(base)
