"""Masks: a Boolean algebra of removed components, and its JSON."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablate.components import FFN, Head, KVGroup, Mixer
from ablate.masks import Mask

small = st.integers(0, 3)
components = st.one_of(
    st.builds(Head, small, small, st.sampled_from(["", "encoder", "cross"])),
    st.builds(KVGroup, small, small),
    st.builds(FFN, small),
    st.builds(Mixer, small),
)
removed = st.frozensets(components, max_size=8)


@given(removed, removed, removed)
def test_algebra(a, b, c):
    a, b, c = Mask(a), Mask(b), Mask(c)
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a - (b | c) == (a - b) & (a - c)
    assert (a - b) | (a & b) == a
    assert a | Mask() == a
    assert a & Mask() == Mask()
    assert a & b <= a <= a | b
    assert (a <= b) == (a | b == b)
    assert len(a | b) == len(a) + len(b) - len(a & b)


@given(removed)
def test_round_trips(removed):
    mask = Mask(removed)
    assert Mask.from_json(mask.to_json()) == mask
    assert Mask.parse(str(mask)) == mask
    assert repr(mask) == f"Mask.parse({str(mask)!r})"
    assert hash(Mask(reversed(list(mask)))) == hash(mask)


@given(removed)
def test_iteration_is_sorted_and_complete(removed):
    mask = Mask(removed)
    listed = list(mask)
    assert listed == sorted(listed)
    assert set(listed) == mask.removed
    assert all(component in mask for component in listed)
    table = mask.by_layer()
    assert sum(map(len, table.values())) == len(mask)
    assert all((c.stack, c.layer) == key for key, row in table.items() for c in row)


def test_by_eye():
    mask = Mask([FFN(5), Head(3, 1)]) | Mask.parse("L0H2, L3H1")
    assert str(mask) == "L0H2,L3H1,L5F"
    assert mask.to_json() == '{"removed": ["L0H2", "L3H1", "L5F"]}'
    assert Head(0, 2) in mask
    assert Head(0, 3) not in mask
    assert mask.by_layer()["", 3] == (Head(3, 1),)


def test_it_is_immutable():
    with pytest.raises(AttributeError):
        Mask().removed = frozenset()  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["[]", '{"removed": "L3H1"}', '{"removed": [3]}', "{}", "null", "{oops", ""]
)
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="no mask in"):
        Mask.from_json(text)


@pytest.mark.usefixtures("unchecked")
def test_text_as_component_is_refused():
    with pytest.raises(ValueError, match=r"use Mask\.parse"):
        Mask(["L3H1"])  # type: ignore[list-item]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [Head(0, 0), None, 3])
def test_what_is_no_list_of_components_is_refused(given):
    with pytest.raises(ValueError, match=rf"not {re.escape(repr(given))}: .*Mask\(\["):
        Mask(given)
