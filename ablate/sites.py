"""Which branches does a loaded model have, and how many heads?

A `Site` is one place where a branch can be cut, found by the model's row in `ablate.anatomy` and
named as TransformerLens names it. Heads are counted from the widths of each layer's own modules, so
a layer that lost heads has fewer, and a config's head_dim is never believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ablate.anatomy import (
    Anatomy,
    Attention,
    Blocks,
    UnknownArchitecture,
    anatomy_of,
    base_path,
    find,
)
from ablate.components import FFN, Component, Head, KVGroup, Mixer, Stack
from ablate.remains import Absent

Kind = Literal["head", "ffn", "mixer"]


@dataclass(frozen=True)
class Site:
    """One gateable place in a loaded model."""

    name: str
    """TransformerLens' name, such as `blocks.3.attn.hook_z`."""
    path: str
    """Dotted path of the hooked module in the model."""
    where: Literal["input", "output"]
    layer: int
    stack: Stack
    kind: Kind
    width: int
    """Number of gates: heads of an attention, 1 for an FFN or a mixer."""
    d_head: int = 0
    """Width of one head (of the whole ssm_out for a mixer); 0 for an FFN."""
    kv_groups: int = 0
    """Number of key/value heads; 0 where there are none."""
    block: str = ""
    """Dotted path of the block this site is in."""
    attention: str = ""
    """Dotted path of the attention module, for heads."""
    row: Attention | None = None
    """How that attention is laid out (q, k, v, their order), for heads."""
    behind: bool = False
    """For a mixer: it reads what the attention of its block has added, not what came in."""

    @property
    def components(self) -> tuple[Component, ...]:
        """What the gates of this site switch, in order."""
        match self.kind:
            case "head":
                return tuple(Head(self.layer, h, self.stack) for h in range(self.width))
            case "ffn":
                return (FFN(self.layer, self.stack),)
            case "mixer":
                return (Mixer(self.layer, self.stack),)

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        """The key/value groups of its heads, in order; each has as many heads as the others."""
        return tuple(KVGroup(self.layer, group, self.stack) for group in range(self.kv_groups))


def _width(module: nn.Module, side: Literal["in", "out"]) -> int:
    """Input or output width of a linear map; GPT-2's Conv1D calls them nx and nf."""
    for name in ("in_features", "nx") if side == "in" else ("out_features", "nf"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    raise UnknownArchitecture(
        f"{type(module).__name__} is not a projection: it has no {side}_features"
    )


def _head_counts(block: nn.Module, row: Attention) -> tuple[int, int, int]:
    """(query heads, key/value heads, d_head) of one attention, from the widths of its modules."""
    module, out = block.get_submodule(row.module), block.get_submodule(row.out)
    d_head = row.d_head if isinstance(row.d_head, int) else getattr(module, row.d_head)
    heads, rest = divmod(_width(out, "in"), d_head)
    if rest:
        raise UnknownArchitecture(
            f"{row.out} takes {_width(out, 'in')} inputs, no multiple of d_head {d_head}: "
            "give the attention's own d_head in anatomy="
        )
    if row.qkv:
        groups = (_width(block.get_submodule(row.qkv), "out") // d_head - heads) // 2
    elif row.k:
        groups = _width(block.get_submodule(row.k), "out") // d_head
    else:
        groups = heads
    return heads, groups, d_head


def block_name(stack: Stack, layer: int) -> str:
    """TransformerLens' name of a block: blocks.3, encoder_blocks.3 or decoder_blocks.3."""
    return {"": "", "encoder": "encoder_", "decoder": "decoder_", "cross": "decoder_"}[
        stack
    ] + f"blocks.{layer}"


def _block_sites(row: Blocks, layer: int, path: str, block: nn.Module) -> list[Site]:
    name, found = block_name(row.stack, layer), []
    parts: tuple[tuple[Attention | None, str, Stack], ...] = (
        (row.attention, "self_attn" if row.cross else "attn", row.stack),
        (row.cross, "cross_attn", "cross"),
    )
    for attention, part, stack in parts:
        if attention is None or find(block, attention.out) is None:
            continue
        heads, groups, d_head = _head_counts(block, attention)
        if not heads:  # all removed for good
            continue
        found.append(
            Site(
                name=f"{name}.{part}.hook_z",
                path=f"{path}.{attention.out}",
                where="input",
                layer=layer,
                stack=stack,
                kind="head",
                width=heads,
                d_head=d_head,
                kv_groups=groups,
                block=path,
                attention=f"{path}.{attention.module}",
                row=attention,
            )
        )
    if (out := find(block, row.mixer)) is not None:
        found.append(
            Site(
                name=f"{name}.mixer.hook_ssm_out",
                path=f"{path}.{row.mixer}",
                where="input",
                layer=layer,
                stack=row.stack,
                kind="mixer",
                width=1,
                d_head=_width(out, "in"),
                block=path,
                behind=row.mixer_behind and bool(found),
            )
        )
    ffn = find(block, row.ffn)
    if ffn is not None and not isinstance(ffn, Absent):
        found.append(
            Site(
                name=f"{name}.hook_mlp_out",
                path=f"{path}.{row.ffn}",
                where="output",
                layer=layer,
                stack=row.stack,
                kind="ffn",
                width=1,
                block=path,
            )
        )
    return found


def sites(hf_model: nn.Module, anatomy: Anatomy | None = None) -> tuple[Site, ...]:
    """Every gateable place of a loaded model, in the order of its blocks.

    Raises UnknownArchitecture where no row fits, or a row finds nothing in this model.
    """
    row = anatomy or anatomy_of(hf_model)
    found: list[Site] = []
    for stack in row.stacks:
        path = base_path(hf_model, stack.path)
        blocks = find(hf_model, path)
        if blocks is not None:
            for layer, (name, block) in enumerate(blocks.named_children()):
                found += _block_sites(stack, layer, f"{path}.{name}", block)
    if not found:
        raise UnknownArchitecture(
            f"the anatomy of {row.family!r} finds no branch in {type(hf_model).__name__}: looked "
            f"for blocks in {', '.join(base_path(hf_model, s.path) for s in row.stacks)}; "
            "pass an anatomy= with this model's paths"
        )
    return tuple(found)
