"""The toolkit on hybrids: a language model and a regressor of attention and Mamba, unchanged tools.

The language model is the family `ablate_hybrid` of tests/families.py too, under the tests of every
room; here is what those do not ask: Mamba behind attention, regressors, whole models as students.
"""

import pytest
import torch
from torch import Tensor, nn

from ablate import FFN, Head, HookedModel, Mask, Mixer
from ablate.export import export
from ablate.identity import has_identity
from ablate.importance import gradient_importance
from ablate.laws import fresh
from ablate.places import Place, places_of, weights_at
from ablate.reset import reset_, restored
from ablate.stack import record
from ablate.students import Students
from ablate.sweep import Reading, sweep
from experiments.hybrids.architecture.model import Hybrid, HybridConfig
from probes.induction import induction_scan
from tests.families import tiny

BLOCKS = "mamba-rms,learned-attention-mamba_ffn-rms,rope-attention-swiglu-layer"
"""Every slot: a Mamba alone, one behind attention, attention with an FFN."""
EVERY = [Mixer(0), *(Head(1, h) for h in range(4)), Mixer(1), *(Head(2, h) for h in range(4))]


@pytest.fixture(scope="module")
def regressor() -> Hybrid:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = HybridConfig(
            blocks=BLOCKS, d_model=32, heads=4, d_state=4, expand=2, x_dim=5, n_positions=24
        )
        model = Hybrid(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith(("A_log", "conv1d.weight")):
                nn.init.normal_(parameter, std=0.2)
    return model


def _prompts(batch: int = 3, pos: int = 10) -> Tensor:
    return torch.randn(batch, pos, 5, generator=torch.Generator().manual_seed(1))


def _error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared error against the first coordinate, an example."""
    logits = model(**batch).logits[:, ::2, 0]
    return (logits - batch["prompts"][:, ::2, 0]).square().mean(1)


def test_components_of_a_regressor(regressor):
    model = HookedModel(regressor)
    assert list(model.components) == [*EVERY, FFN(2)]


@pytest.mark.parametrize(
    ("component", "weight", "columns"),
    [
        (Head(1, 2), "model.blocks.1.attn.o_proj.weight", slice(16, 24)),
        (Mixer(0), "model.blocks.0.mixer.out_proj.weight", slice(None)),
        (Mixer(1), "model.blocks.1.mixer.out_proj.weight", slice(None)),
        (FFN(2), "model.blocks.2.mlp.down_proj.weight", slice(None)),
    ],
)
def test_ablation_is_what_zeroed_weights_do(regressor, component, weight, columns):
    model = HookedModel(regressor)
    with torch.no_grad(), model.ablated(Mask([component])):
        found = regressor(prompts=_prompts()).logits
    parameter = regressor.get_parameter(weight)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[:, columns] = 0
        expected = regressor(prompts=_prompts()).logits
        parameter.copy_(kept)
        whole = regressor(prompts=_prompts()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - whole).abs().max() > 1e-2


def test_a_mamba_behind_attention_sees_that_a_head_is_gone():
    """What a sweep knows of the whole model does not hold for a Mamba that reads masked heads."""
    model = HookedModel(tiny("ablate_hybrid", blocks="attention-mamba_ffn-rms,attention-rms"))
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([[0, 4], [1, 8]])
    masks = [Mask([component]) for component in model.components]
    (swept,) = sweep(model, masks, [Reading({"input_ids": ids}, where, torch.tensor([5, 7]))])
    for mask, found in zip(masks, swept.log_p, strict=True):
        with torch.no_grad(), model.ablated(mask):
            log_p = model.model(ids).logits.log_softmax(-1)
        expected = torch.stack([log_p[0, 4, 5], log_p[1, 8, 7]])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_importance_of_a_regressor_is_the_gate_s_slope(regressor):
    model = HookedModel(regressor)
    batch = {"prompts": _prompts()}
    found = gradient_importance(model, [batch], lambda batch: _error(regressor, batch))
    assert found.components == model.components
    for component in (Head(1, 2), Mixer(1), FFN(2)):
        site = model._site_of(component)  # noqa: SLF001
        gate = model.unit_gates()[site.name]
        one = gate if isinstance(component, Head) else gate.reshape(())
        with model.gated({site.name: one}):
            (slope,) = torch.autograd.grad(_error(regressor, batch).sum(), [one])
        slope = slope[component.head] if isinstance(component, Head) else slope
        value = found.gate[:, model.components.index(component)].sum()
        torch.testing.assert_close(value, slope, rtol=1e-4, atol=1e-6)


def test_segments_of_a_regressor_are_its_forward(regressor):
    inputs = {"prompts": _prompts()}
    recorded = record(regressor, inputs, keep=[0, 2])
    with torch.no_grad():
        expected = regressor(**inputs).logits
        assert torch.equal(recorded.head(recorded.run_blocks(2, 3, recorded.resid(2))), expected)
        rows = torch.tensor([2, 0])
        found = recorded.run_blocks(0, 3, recorded.resid(0)[rows], rows)
        torch.testing.assert_close(recorded.head(found), expected[rows], rtol=1e-5, atol=1e-5)


def test_parts_of_blocks(regressor):
    parts = {str(place) for part in ("attention", "mixer", "ffn", "norms")
             for place in places_of(regressor, part)}  # fmt: skip
    assert parts == {
        "0.mixer", "0.norms", "1.attention", "1.mixer", "1.norms", "2.attention", "2.ffn", "2.norms"
    }  # fmt: skip
    for layer in range(3):
        whole = weights_at(regressor, Place(layer))
        assert set(whole) == {
            n for n, _ in regressor.named_parameters() if n.startswith(f"model.blocks.{layer}.")
        }


@pytest.mark.parametrize("law", ["init", "torch", "identity", "moments", "permuted"])
def test_resets_and_puts_back(regressor, law):
    before = {name: p.detach().clone() for name, p in regressor.named_parameters()}
    prompts = _prompts()
    with torch.no_grad():
        whole = regressor(prompts=prompts).logits
        with restored(regressor):
            reset_(regressor, Place(1), law)
            reset = regressor(prompts=prompts).logits
            if law == "identity":
                x = torch.randn(2, 5, 32)
                assert torch.equal(regressor.model.blocks[1](x), x)
        assert not torch.allclose(whole, reset)
        assert torch.equal(regressor(prompts=prompts).logits, whole)
    assert all(torch.equal(before[name], p) for name, p in regressor.named_parameters())


def test_a_doubled_stream_has_no_identity():
    model = Hybrid(HybridConfig(blocks="attention-mamba_ffn-rms", d_model=32, heads=4))
    doubled = Hybrid(
        HybridConfig(blocks="attention-mamba_ffn-rms", d_model=32, heads=4, double_residual=True)
    )
    assert has_identity(model, Place(0))
    assert not has_identity(doubled, Place(0))
    with pytest.raises(ValueError, match="the law identity"):
        fresh(doubled, Place(0), "identity")


def test_a_whole_model_as_students():
    """Seeds side by side are the models one by one: values and gradients."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = HybridConfig(
            blocks=BLOCKS, d_model=32, heads=4, d_state=4, expand=2, x_dim=5, n_positions=24
        )
        models.append(Hybrid(config))
    names = [name for name, _ in models[0].named_parameters()]
    students = Students(models[0], [dict(m.named_parameters()) for m in models], names)
    prompts = torch.randn(3, 2, 8, 5)
    logits = students(prompts=prompts.flatten(0, 1)).logits.unflatten(0, (3, 2))
    (logits.square().sum()).backward()
    for k, model in enumerate(models):
        own = model(prompts=prompts[k]).logits
        torch.testing.assert_close(logits[k], own, rtol=1e-4, atol=1e-5)
        own.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found = students.trained()[name].grad
            assert found is not None
            torch.testing.assert_close(found[k], parameter.grad, rtol=1e-3, atol=1e-5)


def test_induction_scores_of_heads_and_mixers():
    model = HookedModel(tiny("ablate_hybrid", attention="eager"))
    frame = induction_scan(model, seeds=(0,), lengths=(6,), mixers=True)
    scored = set(zip(frame["layer"], frame["head"], strict=True))
    assert scored == {(0, -1), (1, -1), *((layer, h) for layer in (1, 2) for h in range(4))}


def test_an_exported_regressor_is_the_masked_one(regressor, tmp_path):
    regressor.config.architectures = ["Hybrid"]
    model = HookedModel(regressor)
    mask = Mask([Head(1, 2), Head(2, 0), FFN(2)])
    made = export(model, mask, tmp_path / "small")
    assert made.parameters < made.parameters_before
    again = HookedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad(), model.ablated(mask):
        expected = regressor(prompts=_prompts()).logits
    torch.testing.assert_close(again.model(prompts=_prompts()).logits, expected)


def test_there_is_no_bridge(regressor):
    with pytest.raises(ValueError, match="TransformerLens has none for Hybrid; use capture"):
        HookedModel(regressor).to_bridge()
