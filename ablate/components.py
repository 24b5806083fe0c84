"""What are the units a study can remove from a model?

A transformer block writes to the residual stream through *branches*. A component is one such write:

    Head(l, h)     z_h W_O[h]       one attention head of layer l, h counted over query heads
    KVGroup(l, g)  the heads that share key/value head g (one head each without sharing)
    FFN(l)         mlp_out          dense, gated, or a mixture of experts as a whole
    Mixer(l)       ssm_out W_out    an SSM or another token mixer that has no heads

Layers, heads and groups count from 0. A model with two stacks says which one a component is in:
``encoder``, ``decoder`` (its self-attention and FFNs) or ``cross`` (the decoder's attention to the
encoder). Models with one stack leave it empty. Written out: ``L3H1``, ``L3G0``, ``L5F``, ``L2M``,
``cross.L0H2``.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Literal

Stack = Literal["", "encoder", "decoder", "cross"]
STACKS: tuple[Stack, ...] = ("", "encoder", "decoder", "cross")
_NAMED: dict[str, Stack] = {stack: stack for stack in STACKS}

_WRITTEN = re.compile(r"(?:(encoder|decoder|cross)\.)?L(\d+)(?:H(\d+)|G(\d+)|(F)|(M))", re.ASCII)


def _check(component: Component, *counts: str) -> None:
    """Make the counts plain ints (rows of a frame arrive as numpy's) and refuse negative ones."""
    for name in counts:
        value = operator.index(getattr(component, name))
        if value < 0:
            raise ValueError(f"{name} {value} of a {type(component).__name__}: counts start at 0")
        object.__setattr__(component, name, value)
    allowed = STACKS if isinstance(component, Head | KVGroup) else STACKS[:3]
    if component.stack not in allowed:
        raise ValueError(
            f"stack {component.stack!r} of a {type(component).__name__}: "
            f"use one of {', '.join(map(repr, allowed))}"
        )


def sort_key(component: Component) -> tuple[int, int, int, int]:
    """Order of print and iteration: by stack, then layer, then heads, groups, FFN, mixer."""
    kind, index = {
        Head: lambda c: (0, c.head),
        KVGroup: lambda c: (1, c.group),
        FFN: lambda c: (2, 0),
        Mixer: lambda c: (3, 0),
    }[type(component)](component)
    return STACKS.index(component.stack), component.layer, kind, index


def _before(self: Component, other: Component) -> bool:
    if not isinstance(other, Head | KVGroup | FFN | Mixer):
        return NotImplemented
    return sort_key(self) < sort_key(other)


def _written(component: Component, tail: str) -> str:
    stack = f"{component.stack}." if component.stack else ""
    return f"{stack}L{component.layer}{tail}"


@dataclass(frozen=True)
class Head:
    """Attention head `head` of layer `layer`, counted over query heads."""

    layer: int
    head: int
    stack: Stack = ""

    def __post_init__(self) -> None:
        _check(self, "layer", "head")

    def __str__(self) -> str:
        return _written(self, f"H{self.head}")

    __lt__ = _before


@dataclass(frozen=True)
class KVGroup:
    """The query heads of layer `layer` that read key/value head `group`."""

    layer: int
    group: int
    stack: Stack = ""

    def __post_init__(self) -> None:
        _check(self, "layer", "group")

    def __str__(self) -> str:
        return _written(self, f"G{self.group}")

    __lt__ = _before


@dataclass(frozen=True)
class FFN:
    """The feed-forward branch of layer `layer`; a mixture of experts counts as one."""

    layer: int
    stack: Stack = ""

    def __post_init__(self) -> None:
        _check(self, "layer")

    def __str__(self) -> str:
        return _written(self, "F")

    __lt__ = _before


@dataclass(frozen=True)
class Mixer:
    """The head-less token mixer (SSM) of layer `layer`."""

    layer: int
    stack: Stack = ""

    def __post_init__(self) -> None:
        _check(self, "layer")

    def __str__(self) -> str:
        return _written(self, "M")

    __lt__ = _before


Component = Head | KVGroup | FFN | Mixer


def parse_component(text: str) -> Component:
    """The component written as `text` (`L3H1`, `L3G0`, `L5F`, `L2M`, `cross.L0H2`).

    Inverse of `str`. Raises ValueError on anything else.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"no component is written {text!r}: use L3H1 (head), L3G0 (key/value group), L5F (FFN) "
            "or L2M (mixer), with encoder., decoder. or cross. before it in two-stack models"
        )
    written, layer, head, group, ffn, _ = found.groups(default="")
    stack = _NAMED[written]
    if head:
        return Head(int(layer), int(head), stack)
    if group:
        return KVGroup(int(layer), int(group), stack)
    return FFN(int(layer), stack) if ffn else Mixer(int(layer), stack)
