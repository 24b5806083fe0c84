"""How many different streams do a set of masks make, and where does each leave the others?

A mask changes nothing below its lowest component, and two masks that remove the same components up
to block i have the same residual stream there. So the masks form a prefix tree over blocks: a node
of level i is one way of being masked below block i, and is computed once for all masks above it.

    level 0      0                       the whole model
    block 0      0 → 0, 1, 2             1 and 2 lose a head of block 0 each
    block 1      0 → 0, 3;  1 → 1 ...    3 leaves the whole model here

Node 0 is the whole model at every level. Leave-one-out is the widest such tree, the nested masks of
a pruning curve a narrow one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ablate.components import Component
from ablate.masks import Mask


@dataclass(frozen=True)
class Child:
    """A node of the next level: where it comes from and what it loses in this block."""

    parent: int
    cut: frozenset[Component]


def fork(
    masks: Sequence[Mask], blocks: Sequence[Collection[Component]]
) -> tuple[list[list[Child]], list[int]]:
    """(the children made by each block, the node in which each mask ends).

    `masks` are expanded (no key/value groups); `blocks` are the components of each block in the
    order in which they run. Child 0 of every block is the whole model, wanted or not.
    """
    node = [0] * len(masks)
    levels = []
    for components in blocks:
        here = frozenset(components)
        children = {Child(0, frozenset()): 0}
        node = [
            children.setdefault(Child(below, mask.removed & here), len(children))
            for below, mask in zip(node, masks, strict=True)
        ]
        levels.append(list(children))
    return levels, node
