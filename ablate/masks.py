"""Which components are removed?

A `Mask` is an immutable set of *removed* components, so `Mask()` is the whole model and
`a | b` removes what either removes. It knows nothing about any model: whether a component exists,
and which heads a key/value group stands for, is answered by `HookedModel`, which applies masks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ablate.components import Component, Stack, parse_component, sort_key


@dataclass(frozen=True, init=False, repr=False)
class Mask:
    """The set of removed components.

    >>> Mask([Head(3, 1), FFN(5)]) | Mask.parse("L0H2")
    Mask.parse('L0H2,L3H1,L5F')
    """

    removed: frozenset[Component]

    def __init__(self, removed: Iterable[Component] = ()) -> None:
        if not isinstance(removed, Iterable):
            raise ValueError(
                f"a mask holds a list, not {removed!r}: for one component give Mask([Head(3, 1)])"
            )
        components = frozenset(removed)
        for component in components:
            if not isinstance(component, Component):
                raise ValueError(
                    f"a mask holds Head, KVGroup, FFN and Mixer values, not {component!r}: "
                    "for text use Mask.parse"
                )
        object.__setattr__(self, "removed", components)

    @classmethod
    def parse(cls, text: str) -> Mask:
        """The mask written as comma-separated components; empty text is the empty mask."""
        return cls(parse_component(part) for part in text.split(",") if part.strip())

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def __repr__(self) -> str:
        return f"Mask.parse({str(self)!r})"

    def __iter__(self) -> Iterator[Component]:
        return iter(sorted(self.removed, key=sort_key))

    def __len__(self) -> int:
        return len(self.removed)

    def __contains__(self, component: object) -> bool:
        return component in self.removed

    def __or__(self, other: Mask) -> Mask:
        """Remove what either mask removes."""
        return Mask(self.removed | other.removed)

    def __and__(self, other: Mask) -> Mask:
        """Remove what both masks remove."""
        return Mask(self.removed & other.removed)

    def __sub__(self, other: Mask) -> Mask:
        """Remove what this mask removes and `other` keeps."""
        return Mask(self.removed - other.removed)

    def __le__(self, other: Mask) -> bool:
        """Does `other` remove everything this mask removes?"""
        return self.removed <= other.removed

    def by_layer(self) -> dict[tuple[Stack, int], tuple[Component, ...]]:
        """The removed components of each (stack, layer), sorted; untouched layers are left out."""
        table: dict[tuple[Stack, int], tuple[Component, ...]] = {}
        for component in self:
            key = component.stack, component.layer
            table[key] = (*table.get(key, ()), component)
        return table

    def to_json(self) -> str:
        """`{"removed": ["L3H1", "L5F"]}`, sorted, so equal masks give equal text."""
        return json.dumps({"removed": [str(component) for component in self]})

    @classmethod
    def from_json(cls, text: str) -> Mask:
        """Inverse of `to_json`. Raises ValueError on any other text."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = None
        match value:
            case {"removed": [*names]} if len(value) == 1 and all(
                isinstance(name, str) for name in names
            ):
                return cls(parse_component(name) for name in names)
        raise ValueError(
            f'no mask in {text[:80]!r}: it must look like {{"removed": ["L3H1", "L5F"]}}'
        )


def require_mask(value: object) -> Mask:
    """`value` if it is a mask; ValueError says how to make one."""
    if not isinstance(value, Mask):
        raise ValueError(
            f"{value!r} is no mask: give Mask([Head(3, 1), FFN(5)]) or Mask.parse('L3H1')"
        )
    return value
