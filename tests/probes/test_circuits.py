"""OV circuits against TransformerLens' FactoredMatrix, the model's own modules, and known heads."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformer_lens import FactoredMatrix

from ablate import Head, HookedModel
from ablate.pruning import ranked
from probes.circuits import (
    embedding,
    has_direct_path,
    key_weights,
    output_weights,
    ov_eigenvalue_scores,
    query_weights,
    unembedding,
    value_weights,
)
from tests.families import DECODERS, ENCODERS, VOCAB, inputs_for, output_of, tiny
from tests.induction_model import PREDICTION, PREVIOUS, TOKEN, _copy, induction_opt

ATTENDING = [name for name in DECODERS if "mamba" not in name]


@pytest.mark.parametrize("family", [*ATTENDING, "t5", "bart"])
def test_the_norm_in_front_and_the_values_are_the_models_own(family: str):
    """z of a query that attends to itself alone is what W_V makes of the stream, norm included."""
    model = HookedModel(tiny(family))
    for site in (s for s in model.sites if has_direct_path(model, s)):
        stack = "decoder_blocks" if site.stack else "blocks"
        names = [site.name, f"{stack}.{site.layer}.hook_resid_pre"]
        outputs = []
        for seed in (1, 2):  # two streams: what is constant in z cancels
            inputs = inputs_for(model.model, batch=1, pos=9, seed=seed)
            with model.capture(names) as cache:
                output_of(model.model, inputs)
            outputs.append([cache[name][0, 0] for name in names])  # the first query sees itself
        w_v, norm = value_weights(model, site), _norm_in_front(model, site)
        z, streams = ([o[i] for o in outputs] for i in (0, 1))
        scaled = [_scaled(x, norm) for x in streams]
        expected = torch.einsum("m,hmd->hd", scaled[0] - scaled[1], w_v)
        difference = z[0] - z[1]
        # Up to a scale: Falcon-H1 multiplies what goes into its attention.
        cosine = torch.nn.functional.cosine_similarity(difference, expected, dim=-1)
        assert torch.allclose(cosine, torch.ones(()), atol=1e-4), (family, site.name)


class _Arguments(TorchFunctionMode):
    """Keeps the queries and keys that torch's sdpa is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(args[:2])
        return func(*args, **(kwargs or {}))


FUSED = [name for name in ATTENDING if name not in ("bloom", "gemma2")]  # these have eager alone


@pytest.mark.parametrize("family", FUSED)
def test_queries_and_keys_are_the_models_own(family: str):
    """At position 0, where no rotation turns them, and up to a scale."""
    model = HookedModel(tiny(family))
    sites = [site for site in model.sites if site.kind == "head"]
    found = []
    for seed in (1, 2):  # two streams: what is constant in q and k cancels
        inputs = inputs_for(model.model, batch=1, pos=9, seed=seed)
        names = [f"blocks.{s.layer}.hook_resid_pre" for s in sites]
        with model.capture(names) as cache, _Arguments() as arguments:
            output_of(model.model, inputs)
        found.append((cache, arguments.seen))
    for i, site in enumerate(sites):
        norm = _norm_in_front(model, site)
        streams = [
            _scaled(cache[f"blocks.{site.layer}.hook_resid_pre"][0, 0], norm) for cache, _ in found
        ]
        for part, weights in enumerate((query_weights(model, site), key_weights(model, site))):
            ours = [seen[i][part][0, :, 0] for _, seen in found]
            ours = [x.repeat_interleave(site.width // len(x), dim=0) for x in ours]
            if family == "qwen3":  # norms of queries and keys; no biases
                stream, own = streams[0], ours[0]
            else:
                stream, own = streams[0] - streams[1], ours[0] - ours[1]
            expected = torch.einsum("m,hmd->hd", stream, weights)
            cosine = torch.nn.functional.cosine_similarity(own, expected, dim=-1)
            assert torch.allclose(cosine, torch.ones(()), atol=1e-4), (family, site.name, part)


@pytest.mark.parametrize("family", ["bloom", "t5", "bart", "bert", "opt", "opt-350m", "gpt2"])
def test_queries_and_keys_make_the_models_patterns(family: str):
    """log A[1, 0] − log A[1, 1] is x_1 W_Q W_Kᵀ (x_0 − x_1), and what positions add."""
    model = HookedModel(tiny(family, attention="eager"))
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    sites = [s for s in model.sites if s.kind == "head" and s.stack != "cross"]
    stems = {s.name: s.name.split(".attn")[0].split(".self_attn")[0] for s in sites}
    names = [f"{stem}.hook_resid_pre" for stem in stems.values()]
    names += [s.name.replace("hook_z", "hook_pattern") for s in sites]
    caches = []
    for seed in (1, 2):
        with model.capture(names) as cache:
            output_of(model.model, inputs_for(model.model, batch=1, pos=4, seed=seed))
        caches.append(dict(cache))
    for site in sites:
        w_q, w_k = query_weights(model, site), key_weights(model, site)
        differences = []
        for cache in caches:
            stream = cache[f"{stems[site.name]}.hook_resid_pre"][0, :2]
            x = torch.stack([_scaled(row, _norm_in_front(model, site)) for row in stream])
            ours = torch.einsum("a,had,hbd,b->h", x[1], w_q, w_k, x[0] - x[1])
            ours = ours if family == "t5" else ours / site.d_head**0.5
            pattern = cache[site.name.replace("hook_z", "hook_pattern")][0]
            differences.append(ours - (pattern[:, 1, 0] / pattern[:, 1, 1]).log())
        # Position biases are the same for all tokens.
        assert torch.allclose(*differences, atol=2e-3, rtol=1e-3), (family, site.name)


def _norm_in_front(model, site):
    block = model.model.get_submodule(site.block)
    if not getattr(block, "do_layer_norm_before", True):
        return None
    return next((n for name in site.row.norms if (n := _find(block, name))), None)


def _find(block, name):
    return block.get_submodule(name) if any(n == name for n, _ in block.named_modules()) else None


def _scaled(x, norm):
    """x over its spread: the part of a norm that is no linear map."""
    if norm is None:
        return x
    kind = type(norm).__name__
    centred = x - x.mean() if kind == "LayerNorm" else x
    return centred / centred.pow(2).mean().sqrt()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    "family", ["opt", "opt-350m", "gpt2", "gpt_neox", "llama", "bloom", "jamba"]
)
def test_eigenvalues_equal_those_of_the_whole_circuit(family: str, norms: bool):
    model = HookedModel(tiny(family))
    scores = ov_eigenvalue_scores(model, norms=norms, chunk=7)
    tokens = torch.arange(VOCAB)
    w_e = embedding(model, tokens).double()
    w_u = unembedding(model, tokens[None], final_norm=norms)[0].double()
    w_u = w_u - w_u.mean(0)
    for site in (s for s in model.sites if has_direct_path(model, s)):
        w_o, w_v = output_weights(model, site)[0].double(), value_weights(model, site, norms=norms)
        for h, component in enumerate(site.components):
            circuit = FactoredMatrix(w_e @ w_v[h].double(), w_o[h] @ w_u.T)
            for values in (circuit.eigenvalues, torch.linalg.eigvals(circuit.AB)):
                expected = float(values.real.sum() / values.abs().sum())
                assert scores[component] == pytest.approx(expected, abs=1e-4)


def test_known_heads():
    model = induction_opt()
    second = model.model.decoder.layers[1].self_attn
    with torch.no_grad():
        _copy(second, 2, TOKEN, PREDICTION)  # writes the token below what it reads: negative
        second.out_proj.weight[:, 2 * 50 : 3 * 50] *= -1
        _copy(second, 0, TOKEN, PREDICTION)
        _copy(second, 1, PREVIOUS, PREDICTION)  # copies, but not from the embedding
        second.v_proj.weight[50:100, TOKEN:PREVIOUS] = 0
    scores = ov_eigenvalue_scores(HookedModel(model), norms=False)
    assert scores[Head(1, 0)] == pytest.approx(1, abs=1e-5)
    assert scores[Head(1, 2)] == pytest.approx(-1, abs=1e-5)
    assert scores[Head(1, 1)] == scores[Head(0, 1)] == 0
    assert ranked(scores)[-1] == Head(1, 0)


def test_a_model_without_logits_is_refused():
    for family in ENCODERS:
        with pytest.raises(ValueError, match="none of its heads has a direct path"):
            ov_eigenvalue_scores(HookedModel(tiny(family)))


def test_offloaded_weights_give_the_same_scores(tmp_path):
    from accelerate import disk_offload

    offloaded = tiny("gpt2")
    disk_offload(offloaded, tmp_path)
    expected = ov_eigenvalue_scores(HookedModel(tiny("gpt2")))
    assert ov_eigenvalue_scores(HookedModel(offloaded)) == pytest.approx(expected)
