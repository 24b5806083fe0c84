"""Composition against whole matrices of the stream and of the vocabulary, and a circuit written by
hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ablate import Head, HookedModel
from probes.circuits import embedding, key_weights, output_weights, query_weights, value_weights
from probes.composition import _pairs, chance, composition_scores, pair_compositions
from tests.families import VOCAB, tiny
from tests.induction_model import PREVIOUS, TOKEN, _copy, induction_opt

MODELS = [
    "opt",
    "opt-350m",
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen3",
    "bloom",
    "falcon",
    "bert",
    "bart",
]


def whole(model: HookedModel, norms: bool) -> dict[Head, tuple[Tensor, Tensor]]:
    """head -> (W_QK, W_OV), [d_model, d_model], double."""
    found = {}
    for site in (s for s in model.sites if s.kind == "head" and s.stack != "cross"):
        w_q, w_k = (f(model, site, norms=norms) for f in (query_weights, key_weights))
        w_v, w_o = value_weights(model, site, norms=norms), output_weights(model, site)[0]
        for h, component in enumerate(site.components):
            qk = w_q[h].double() @ w_k[h].double().T
            found[component] = qk, w_v[h].double() @ w_o[h].double()
    return found


def by_vocabulary(model: HookedModel, qk: Tensor, path: Tensor) -> float:
    """All eigenvalues of the [vocab, vocab] circuit: query token by token before the key."""
    w_e = embedding(model, torch.arange(VOCAB)).double()
    circuit = w_e @ qk @ path.T @ (w_e - w_e.mean(0)).T
    values = torch.linalg.eigvals(circuit)
    return float(values.real.sum() / values.abs().sum())


def by_matrices(qk: Tensor, path: Tensor) -> float:
    return float((qk @ path.T).norm() / qk.norm() / path.norm())


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_pairs_equal_whole_matrices(family: str, norms: bool):
    model = HookedModel(tiny(family))
    heads = whole(model, norms)
    frame = pair_compositions(model, norms=norms)
    expected = {
        (str(h), str(p)): (by_matrices(qk, heads[p][1]), by_vocabulary(model, qk, heads[p][1]))
        for h, (qk, _) in heads.items()
        for p in heads
        if p.layer < h.layer and p.stack == h.stack
    }
    assert set(zip(frame["component"], frame["previous"], strict=True)) == set(expected)
    assert len(frame) == len(expected)
    for row in frame.itertuples():
        ratio, share = expected[row.component, row.previous]
        assert row.k_composition == pytest.approx(ratio, rel=1e-4)
        assert row.qk_matching == pytest.approx(share, abs=1e-3)
    assert set(frame["chance"]) == {32**-0.5}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_heads_equal_whole_matrices_of_the_weighted_path(family: str, norms: bool):
    model = HookedModel(tiny(family))
    heads = whole(model, norms)
    generator = torch.Generator().manual_seed(0)
    weights = {p: float(torch.rand((), generator=generator)) for p in heads}
    found = composition_scores(model, weights, norms=norms)
    assert list(found["qk_matching"]) == list(found["k_composition"]) == list(heads)
    for h, (qk, _) in heads.items():
        ratio, share = found["k_composition"][h], found["qk_matching"][h]
        earlier = [p for p in heads if p.layer < h.layer and p.stack == h.stack]
        if not earlier:
            assert math.isnan(ratio)
            assert math.isnan(share)
            continue
        path = torch.stack([weights[p] * heads[p][1] for p in earlier]).sum(0)
        assert ratio == pytest.approx(by_matrices(qk, path), rel=1e-4)
        assert share == pytest.approx(by_vocabulary(model, qk, path), abs=1e-3)


ONLY_L0H0 = {Head(0, 0): 1.0, Head(0, 1): 0.0, Head(0, 2): 0.0}


def test_the_hand_written_circuit():
    model = HookedModel(induction_opt())
    for norms, tolerance in ((False, 1e-5), (True, 1e-3)):
        found = composition_scores(model, ONLY_L0H0, norms=norms)
        assert found["qk_matching"][Head(1, 1)] == pytest.approx(1, abs=tolerance)
        assert found["qk_matching"][Head(1, 0)] == found["qk_matching"][Head(1, 2)] == 0
        assert all(math.isnan(found["qk_matching"][Head(0, h)]) for h in range(3))
    ratio = composition_scores(model, ONLY_L0H0, norms=False)["k_composition"]
    # 25 equal singular values, all of which compose: 5 / (5 · 5), where chance is 150 ** -½.
    assert ratio[Head(1, 1)] == pytest.approx(1 / 5)
    assert ratio[Head(1, 0)] == 0
    assert chance(150) < 0.1


def test_it_takes_the_sign_and_the_predecessor():
    model = HookedModel(induction_opt())
    second = model.model.model.decoder.layers[1].self_attn
    with torch.no_grad():
        second.q_proj.weight *= -1
    found = composition_scores(model, ONLY_L0H0, norms=False)["qk_matching"]
    assert found[Head(1, 1)] == pytest.approx(-1, abs=1e-5)
    # A previous-token head of no weight carries nothing; nor does one that writes elsewhere.
    nothing = dict.fromkeys(ONLY_L0H0, 0.0)
    assert composition_scores(model, nothing)["qk_matching"][Head(1, 1)] == 0
    assert composition_scores(model, nothing)["k_composition"][Head(1, 1)] == 0
    first = model.model.model.decoder.layers[0].self_attn
    with torch.no_grad():
        first.out_proj.weight.zero_()
        _copy(first, 1, TOKEN, PREVIOUS)
    assert composition_scores(model, ONLY_L0H0, norms=False)["qk_matching"][Head(1, 1)] == 0
    moved = {Head(0, 0): 0.0, Head(0, 1): 1.0, Head(0, 2): 0.0}
    found = composition_scores(model, moved, norms=False)["qk_matching"]
    assert found[Head(1, 1)] == pytest.approx(-1, abs=1e-5)


def test_pairs_of_the_hand_written_circuit():
    frame = pair_compositions(HookedModel(induction_opt()), norms=False)
    frame = frame.set_index(["component", "previous"])
    assert frame.loc[("L1H1", "L0H0"), "qk_matching"] == pytest.approx(1, abs=1e-5)
    assert frame["qk_matching"].sum() == pytest.approx(1, abs=1e-5)
    assert len(frame) == 9


def test_weights_at_random_angles_give_chance():
    generator = torch.Generator().manual_seed(0)
    d_model, d_head, heads = 48, 6, 40
    w_q, w_k, w_v, w_o = (
        torch.randn(heads, d_model, d_head, generator=generator) for _ in range(4)
    )
    w_v[..., 0] *= 10  # whatever the spectra
    ratios, shares = _pairs(w_q, w_k, w_v, w_o.transpose(-2, -1), w_q)
    assert float(ratios.square().mean().sqrt()) == pytest.approx(chance(d_model), rel=0.01)
    assert abs(float(shares.mean())) < 0.1  # 1600 pairs of 40 heads, spread 0.6


def test_a_hybrid_with_one_attention_has_no_earlier_head():
    model = HookedModel(tiny("jamba"))
    found = composition_scores(model, {})
    assert set(found["qk_matching"]) == {Head(1, h) for h in range(4)}
    assert all(math.isnan(x) for scores in found.values() for x in scores.values())
    assert pair_compositions(model).empty


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="it has no attention, so no QK circuit"):
        composition_scores(HookedModel(tiny("mamba")), {})
    with pytest.raises(ValueError, match="it has no attention, so no QK circuit"):
        pair_compositions(HookedModel(tiny("mamba2")))
    with pytest.raises(
        ValueError, match="composition with L0H2 asked for.*give the score of every"
    ):
        composition_scores(HookedModel(tiny("opt")), {Head(0, 0): 1.0, Head(0, 1): 1.0})


def test_offloaded_weights_give_the_same_scores(tmp_path):
    from accelerate import disk_offload

    offloaded = tiny("gpt2")
    disk_offload(offloaded, tmp_path)
    weights = {Head(layer, h): 1.0 for layer in range(3) for h in range(4)}
    expected = composition_scores(HookedModel(tiny("gpt2")), weights)
    found = composition_scores(HookedModel(offloaded), weights)
    for name in ("k_composition", "qk_matching"):
        assert found[name] == pytest.approx(expected[name], nan_ok=True)
