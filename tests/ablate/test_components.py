"""Components: written form, order, refusals."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablate.components import FFN, Head, KVGroup, Mixer, parse_component

counts = st.integers(0, 200)
stacks = st.sampled_from(["", "encoder", "decoder", "cross"])
own_stacks = st.sampled_from(["", "encoder", "decoder"])
components = st.one_of(
    st.builds(Head, counts, counts, stacks),
    st.builds(KVGroup, counts, counts, stacks),
    st.builds(FFN, counts, own_stacks),
    st.builds(Mixer, counts, own_stacks),
)


@given(components)
def test_parse_inverts_str(component):
    assert parse_component(str(component)) == component


@pytest.mark.parametrize(
    ("component", "text"),
    [
        (Head(3, 1), "L3H1"),
        (Head(0, 12, "cross"), "cross.L0H12"),
        (KVGroup(3, 0, "decoder"), "decoder.L3G0"),
        (FFN(5), "L5F"),
        (Mixer(2), "L2M"),
    ],
)
def test_written_form(component, text):
    assert str(component) == text


@pytest.mark.parametrize(
    "text", ["", "L3", "H1", "L3H", "l3h1", "L-1H0", "L3H1x", "left.L3H1", "cross.L3F", "L٣H1"]
)
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match="L3H1|one of"):
        parse_component(text)


@pytest.mark.usefixtures("unchecked")
def test_negative_and_unknown_stack_are_refused():
    with pytest.raises(ValueError, match="head -1"):
        Head(0, -1)
    with pytest.raises(ValueError, match="stack 'middle'"):
        FFN(0, "middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stack 'cross'"):
        Mixer(0, "cross")


@pytest.mark.usefixtures("unchecked")
def test_counts_become_plain_ints():
    assert Head(np.int64(3), np.int64(1)) == Head(3, 1)
    assert type(Head(np.int64(3), np.int64(1)).layer) is int


def test_order_is_stack_layer_kind_index():
    ordered = [Head(0, 1), FFN(0), Head(1, 0), KVGroup(1, 0), Mixer(1), Head(0, 0, "encoder")]
    assert sorted(reversed(ordered)) == ordered


def test_importing_the_names_needs_no_torch():
    code = "import ablate, sys; ablate.Mask([ablate.Head(0, 0)]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    import ablate

    for name in ablate.__all__:
        assert getattr(ablate, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Heads'"):
        getattr(ablate, "Heads")  # noqa: B009
