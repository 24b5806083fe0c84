"""The tree of masked streams: masks end together iff they agree, and no node stands twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ablate.components import FFN, Component, Head
from ablate.masks import Mask
from ablate.variants import Child, fork

BLOCKS: list[list[Component]] = [
    [Head(0, 0), Head(0, 1), FFN(0)],
    [],
    [Head(2, 0)],
    [Head(3, 0), FFN(3)],
]
COMPONENTS = [component for block in BLOCKS for component in block]
REMOVED = st.lists(st.lists(st.sampled_from(COMPONENTS)), min_size=1, max_size=12)


def history(levels: list[list[Child]], end: int) -> list[frozenset[Component]]:
    """What a node lost in each block, walking down from where it ends."""
    cuts = []
    for children in reversed(levels):
        cuts.append(children[end].cut)
        end = children[end].parent
    assert end == 0
    return cuts[::-1]


@given(removed=REMOVED)
def test_walking_back_finds_the_mask(removed: list[list[Component]]) -> None:
    masks = [Mask(components) for components in removed]
    levels, ends = fork(masks, BLOCKS)
    assert len(levels) == len(BLOCKS)
    for mask, end in zip(masks, ends, strict=True):
        wanted = [mask.removed & frozenset(block) for block in BLOCKS]
        assert history(levels, end) == wanted


@given(removed=REMOVED)
def test_there_are_as_many_nodes_as_different_beginnings(removed: list[list[Component]]) -> None:
    masks = [Mask(components) for components in removed]
    levels, ends = fork(masks, BLOCKS)
    for above, children in enumerate(levels, start=1):
        below = [frozenset().union(*BLOCKS[:above]) & mask.removed for mask in masks]
        assert len(children) == len({frozenset(), *below})
        assert len(set(children)) == len(children)
        assert children[0] == Child(0, frozenset())
    agree = [(one, other) for one in range(len(masks)) for other in range(one)]
    assert all((ends[i] == ends[j]) == (masks[i] == masks[j]) for i, j in agree)
    assert all((end == 0) == (mask == Mask()) for end, mask in zip(ends, masks, strict=True))


def test_leave_one_out_and_nested_masks() -> None:
    levels, _ = fork([Mask([component]) for component in COMPONENTS], BLOCKS)
    assert [len(children) for children in levels] == [4, 4, 5, 7]
    from_above = [Mask(COMPONENTS[-n:]) for n in range(1, len(COMPONENTS) + 1)]
    levels, ends = fork(from_above, BLOCKS)
    assert [len(children) for children in levels] == [4, 4, 5, 7]
    assert len(set(ends)) == len(COMPONENTS)


def test_what_is_in_no_block_makes_no_node() -> None:
    assert fork([Mask([Head(9, 9)]), Mask()], BLOCKS)[1] == [0, 0]
