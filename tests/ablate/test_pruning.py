"""Orders, counts and the inflection point, against cases that can be checked by eye."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablate import FFN, Head, HookedModel, Mask, Mixer
from ablate.pruning import (
    nested_masks,
    random_ranking,
    ranked,
    removable,
    removed_count,
    weight_magnitudes,
)
from tests.families import FAMILIES, tiny

HEADS = tuple(Head(layer, head) for layer in range(2) for head in range(5))


def test_ranked_ascends_and_ties_keep_the_models_order():
    scores = dict(zip(HEADS, [3.0, 1.0, 2.0, 1.0, 0.0, 9.0, 8.0, 7.0, 6.0, 5.0], strict=True))
    assert [str(h) for h in ranked(scores)[:4]] == ["L0H4", "L0H1", "L0H3", "L0H2"]
    with pytest.raises(ValueError, match="L0H0 is nan"):
        ranked({HEADS[0]: float("nan")})


@given(st.integers(1, 5000), st.integers(0, 100))
def test_counts_are_the_floor_of_the_decimal_share(components: int, percent: int):
    assert removed_count(components, percent / 100) == percent * components // 100


def test_the_papers_counts():
    # Bansal et al. 2023: 4608 heads and 64 FFNs at 10 … 90 %.
    tenths = [i / 10 for i in range(1, 10)]
    heads = [460, 921, 1382, 1843, 2304, 2764, 3225, 3686, 4147]
    ffns = [6, 12, 19, 25, 32, 38, 44, 51, 57]
    assert [removed_count(4608, f) for f in tenths] == heads
    assert [removed_count(64, f) for f in tenths] == ffns


def test_masks_of_a_ranking_are_nested():
    ranking = random_ranking(HEADS, torch.Generator().manual_seed(1))
    masks = nested_masks(ranking, [0.0, 0.3, 0.7, 1.0])
    assert [len(m) for m in masks] == [0, 3, 7, 10]
    assert all(a <= b for a, b in zip(masks, masks[1:], strict=False))
    assert masks[1] == Mask(ranking[:3])
    with pytest.raises(ValueError, match=r"share 1.2"):
        nested_masks(ranking, [1.2])


def test_a_layer_quota_takes_its_share_of_every_layer():
    # All of layer 0 is ranked below all of layer 1: a global quota empties it first.
    ranking = (*HEADS[4::-1], *HEADS[5:])
    half, most, all_of_them = nested_masks(ranking, [0.5, 0.99, 1.0], quota="layer")
    assert half == Mask.parse("L0H4,L0H3,L1H0,L1H1")  # ⌊2.5⌋ of each five
    assert sorted(c.layer for c in most) == [0] * 4 + [1] * 4
    assert all_of_them == Mask(HEADS)
    assert nested_masks(ranking, [0.5]) == [Mask(HEADS[:5])]


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["encoder", "decoder", "cross"]), st.integers(0, 3)),
        st.integers(2, 6),
        min_size=1,
    ),
    st.lists(st.integers(0, 100), min_size=2).map(sorted),
    st.integers(0, 99),
)
def test_layer_quotas_against_a_plain_count(sizes, percents: list[int], seed: int):
    heads = [Head(layer, i, stack) for (stack, layer), n in sizes.items() for i in range(n)]
    ranking = random_ranking(heads, torch.Generator().manual_seed(seed))
    masks = nested_masks(ranking, [percent / 100 for percent in percents], quota="layer")
    assert all(a <= b for a, b in zip(masks, masks[1:], strict=False))
    for percent, mask in zip(percents, masks, strict=True):
        for (stack, layer), n in sizes.items():
            of = [c for c in ranking if (c.stack, c.layer) == (stack, layer)]
            gone = [c for c in of if c in mask]
            assert gone == of[: percent * n // 100]
            assert percent == 100 or len(gone) < n


def test_a_layer_quota_counts_kinds_apart_and_refuses_the_lonely():
    mixed = (*HEADS, FFN(0), FFN(1))
    (most,) = nested_masks(mixed, [0.9], quota="layer")
    assert sorted(map(str, most)) == [f"L{layer}H{i}" for layer in (0, 1) for i in range(4)]
    for lonely in ((FFN(0), FFN(1)), (Mixer(0), Mixer(1))):
        with pytest.raises(ValueError, match="2 components, each alone in its layer"):
            nested_masks(lonely, [0.5], quota="layer")
    assert nested_masks((FFN(0),), [1.0], quota="layer") == [Mask([FFN(0)])]


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_quota_is_refused():
    with pytest.raises(ValueError, match="no quota 'head'"):
        nested_masks(HEADS, [0.5], quota="head")


def test_random_rankings_are_seeded_permutations():
    one, same, other = (random_ranking(HEADS, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert one == same
    assert one != other
    assert sorted(one) == sorted(HEADS)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.80, 0.79, 0.78, 0.5], 4),  # exactly two points is within two points
        ([0.80, 0.70, 0.80, 0.80], 0),  # it came back: luck does not count
        ([0.80, 0.85, 0.90, 0.95], 6),
        ([0.80, 0.779, 0.80, 0.80], 0),
    ],
)
def test_removable_stops_at_the_first_fall(accuracies: list[float], expected: int):
    assert removable([0, 2, 4, 6], accuracies, tolerance=0.02) == expected


def test_a_curve_without_its_start_is_refused():
    with pytest.raises(ValueError, match="first for 0 removed"):
        removable([1, 2], [0.5, 0.5])


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_norm_of_the_weights_a_mask_silences(family: str):
    model = HookedModel(tiny(family))
    norms = weight_magnitudes(model)
    assert set(norms) == set(model.components)
    for site in model.sites:
        if site.kind == "ffn":
            continue
        # Only the inputs of one gate, through the module itself: ‖W e_i‖² summed over them.
        module = model.model.get_submodule(site.path)
        for index, component in enumerate(site.components):
            basis = torch.zeros(site.width * site.d_head, site.width * site.d_head)
            basis.fill_diagonal_(1.0)
            picked = basis[index * site.d_head : (index + 1) * site.d_head]
            with torch.no_grad():
                out = module(picked) - module(torch.zeros_like(picked))
            assert norms[component] == pytest.approx(float(out.norm()), rel=1e-4)


def test_magnitudes_of_offloaded_weights_are_the_same(tmp_path):
    from accelerate import disk_offload

    whole = weight_magnitudes(HookedModel(tiny("llama")))
    offloaded = tiny("llama")
    disk_offload(offloaded, tmp_path)
    assert weight_magnitudes(HookedModel(offloaded)) == pytest.approx(whole)
