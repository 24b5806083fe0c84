"""Capture: the right tensors under TransformerLens' names, checked against the bridge."""

import pytest
import torch

from ablate.hooked import HookedModel
from ablate.masks import Mask
from tests.families import FAMILIES, inputs_for, output_of, tiny, tokens


def everything(model, inputs):
    with model.capture(model.hook_names) as cache:
        output = output_of(model.model, inputs)
    assert set(cache) == set(model.hook_names)
    return output, cache


@pytest.mark.parametrize("family", FAMILIES)
def test_capturing_everything_changes_nothing(family):
    model = HookedModel(tiny(family, attention="eager"))
    inputs = inputs_for(model.model)
    whole = output_of(model.model, inputs)
    captured, cache = everything(model, inputs)
    assert torch.equal(captured, whole)
    for name, tensor in cache.items():
        if name.endswith("hook_pattern"):
            assert torch.allclose(tensor.sum(-1), torch.ones(()), atol=1e-5)
    for site in model.sites:
        batch, pos = (2, 7) if site.stack in ("decoder", "cross") else (2, 9)
        shape = cache[site.name].shape
        match site.kind:
            case "head":
                assert shape == (batch, pos, site.width, site.d_head)
            case "mixer":
                assert shape == (batch, pos, site.d_head)
            case "ffn":
                assert shape == (batch, pos, model.model.config.hidden_size)


@pytest.mark.parametrize(
    "family", ["opt", "gpt2", "llama", "qwen3", "phi", "gpt_neox", "falcon_h1"]
)
def test_branches_add_up_to_the_residual_stream(family):
    """resid_post = resid_pre + attn_out (+ ssm_out W_out) + mlp_out, and the next block's input."""
    model = HookedModel(tiny(family, attention="eager"))
    _, cache = everything(model, inputs_for(model.model))
    for layer in range(model.sites[-1].layer + 1):
        at = f"blocks.{layer}.hook_"
        total = cache[f"{at}resid_pre"] + cache[f"{at}attn_out"] + cache[f"{at}mlp_out"]
        if family == "falcon_h1":
            mixer = model.model.model.layers[layer].mamba.out_proj
            total = total + mixer(cache[f"blocks.{layer}.mixer.hook_ssm_out"])
        assert torch.allclose(total, cache[f"{at}resid_post"], atol=2e-5)
        after = f"blocks.{layer + 1}.hook_resid_pre"
        if after in cache:
            assert torch.equal(cache[f"{at}resid_post"], cache[after])


@pytest.mark.parametrize("family", ["falcon", "falcon-7b"])
def test_falcon_adds_into_its_ffn_output_but_not_into_the_cache(family):
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model)
    name = "blocks.0.hook_mlp_out"
    seen = {}
    mlp = model.model.transformer.h[0].mlp
    handle = mlp.register_forward_hook(lambda m, a, out: seen.update(out=out.clone()))
    with model.capture(name) as cache:
        output_of(model.model, inputs)
    handle.remove()
    assert torch.equal(cache[name], seen["out"])


def test_pattern_under_sdpa_is_refused_with_the_remedy():
    model = HookedModel(tiny("opt"))
    name = "blocks.0.attn.hook_pattern"
    with (
        pytest.raises(ValueError, match="'sdpa'.*set_attn_implementation"),
        model.capture(name),
    ):
        pass
    model.model.set_attn_implementation("eager")
    with model.capture(name) as cache:
        output_of(model.model, inputs_for(model.model))
    assert cache[name].shape == (2, 4, 9, 9)


def test_pattern_under_sdpa_inside_the_context_is_refused_too():
    model = HookedModel(tiny("opt", attention="eager"))
    message, name = "returned no attention pattern.*eager", "blocks.0.attn.hook_pattern"
    inputs = inputs_for(model.model)
    with pytest.raises(RuntimeError, match=message), model.capture(name):
        _ = model.model.set_attn_implementation("sdpa"), output_of(model.model, inputs)


def test_unknown_names_are_refused_with_the_nearest():
    model = HookedModel(tiny("opt"))
    message = r"no hook point blocks\.0\.hook_z in opt: nearest are blocks\.0\.attn\.hook_z"
    with pytest.raises(ValueError, match=message), model.capture("blocks.0.hook_z"):
        pass


def test_the_last_forward_is_kept():
    model = HookedModel(tiny("opt"))
    name = "blocks.2.attn.hook_z"
    with model.capture(name) as cache:
        output_of(model.model, inputs_for(model.model, seed=1))
        first = cache[name]
        output_of(model.model, inputs_for(model.model, pos=5, seed=2))
    assert first.shape == (2, 9, 4, 8)
    assert cache[name].shape == (2, 5, 4, 8)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "falcon_h1"])
def test_transformer_lens_agrees(family):
    """z, pattern, mlp_out, residual stream, and mask gradients, from another library."""
    hf_model = tiny(family, attention="eager")
    model = HookedModel(hf_model)
    bridge = model.to_bridge()
    ids = tokens(2, 9)
    output, cache = everything(model, {"input_ids": ids})
    theirs, their_cache = bridge.run_with_cache(ids)
    # The bridge computes GPT-2's attention itself, in another order; the others' it calls.
    tolerance = 1e-4 if family == "gpt2" else 0
    assert torch.allclose(theirs, output, atol=tolerance, rtol=0)
    shared = [name for name in model.hook_names if name in their_cache]
    kinds = {name.rpartition(".")[2] for name in shared}
    assert {"hook_z", "hook_pattern", "hook_resid_pre", "hook_mlp_out"} <= kinds
    for name in shared:
        theirs = their_cache[name].reshape(cache[name].shape)
        assert torch.allclose(theirs, cache[name], atol=tolerance, rtol=0), name

    def loss_of(logits):
        return logits.logsumexp(-1).mean()

    gates = model.unit_gates()
    with model.gated(gates):
        loss_of(hf_model(input_ids=ids).logits).backward()
    names = [site.name for site in model.sites if site.kind == "head"]
    leaves = {name: torch.ones(4, requires_grad=True) for name in names}
    hooks = [(name, lambda z, hook, leaf=leaf: z * leaf[:, None]) for name, leaf in leaves.items()]
    loss_of(bridge.run_with_hooks(ids, fwd_hooks=hooks)).backward()
    for name, leaf in leaves.items():
        assert torch.allclose(leaf.grad, gates[name].grad, atol=1e-6)


def test_the_bridge_is_over_a_copy():
    hf_model = tiny("opt")
    before = list(hf_model.state_dict())
    HookedModel(hf_model).to_bridge()
    assert list(hf_model.state_dict()) == before
    assert hf_model.config._attn_implementation == "sdpa"


def test_no_bridge_inside_a_context():
    model = HookedModel(tiny("opt"))
    mask = Mask.parse("L0H1")
    with pytest.raises(ValueError, match="leave the context first"), model.ablated(mask):
        model.to_bridge()


def test_transformer_lens_ablates_the_same_head():
    model = HookedModel(tiny("opt", attention="eager"))
    ids = tokens()

    def remove(z, hook):
        z[:, :, 2] = 0
        return z

    theirs = model.to_bridge().run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", remove)])
    with model.ablated(Mask.parse("L1H2")):
        assert torch.equal(output_of(model.model, {"input_ids": ids}), theirs)
