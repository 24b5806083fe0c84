"""Fills: each equals what a hook written by hand puts there, and refuses what it cannot fill."""

import pytest
import torch

from ablate.fills import mean_fill, resample_fill
from ablate.hooked import HookedModel
from ablate.masks import Mask
from tests.families import inputs_for, output_of, tiny

FEW = ("opt", "gpt2", "llama", "bert", "t5", "mamba", "jamba")


def batches(model, count=3, **options):
    return [inputs_for(model.model, batch=4, seed=s, **options) for s in range(count)]


def captured(model, inputs, name):
    with model.capture(name) as cache:
        output_of(model.model, inputs)
    return cache[name]


def replaced_by_hand(model, site, component, value, inputs):
    """The logits when a hook of our own writes `value` over the component's activations."""
    first = (component.head if site.kind == "head" else 0) * site.d_head
    part = slice(first, first + site.d_head) if site.where == "input" else slice(None)

    def write(x):
        x = x.clone()
        x[..., part] = value[..., part]
        return x

    module = model.model.get_submodule(site.path)
    if site.where == "input":
        handle = module.register_forward_pre_hook(lambda m, a: (write(a[0]),))
    else:
        handle = module.register_forward_hook(lambda m, a, out: write(out))
    try:
        return output_of(model.model, inputs)
    finally:
        handle.remove()


def one_of_each(model):
    last = {(site.kind, site.stack): site for site in model.sites}
    return [(site, site.components[-1]) for site in last.values()]


@pytest.mark.parametrize("family", FEW)
def test_pooled_mean(family):
    model = HookedModel(tiny(family))
    reference = batches(model)
    fill = mean_fill(model, reference)
    inputs = inputs_for(model.model, seed=9)
    for site, component in one_of_each(model):
        seen = torch.stack([captured(model, batch, site.name) for batch in reference])
        mean = seen.flatten(3).mean((0, 1, 2)).flatten()
        assert torch.allclose(fill.values[site.name], mean, atol=1e-6)
        with model.ablated(Mask([component]), fill=fill):
            filled = output_of(model.model, inputs)
        by_hand = replaced_by_hand(model, site, component, fill.values[site.name], inputs)
        assert torch.equal(filled, by_hand)
        assert not torch.equal(filled, output_of(model.model, inputs))


@pytest.mark.parametrize("family", FEW)
def test_mean_per_position(family):
    model = HookedModel(tiny(family))
    reference = batches(model)
    fill = mean_fill(model, reference, per_position=True)
    inputs = inputs_for(model.model, seed=9)
    for site, component in one_of_each(model):
        seen = torch.cat([captured(model, batch, site.name) for batch in reference])
        mean = seen.flatten(2).mean(0)
        value = fill.values[site.name]
        assert torch.allclose(value, mean, atol=1e-6)
        if family == "opt" and site.kind == "ffn":
            value = value.repeat(2, 1)  # OPT's FFN sees batch·pos rows
        with model.ablated(Mask([component]), fill=fill):
            filled = output_of(model.model, inputs)
        assert torch.equal(filled, replaced_by_hand(model, site, component, value, inputs))


@pytest.mark.parametrize("family", FEW)
def test_resample(family):
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model, batch=5)
    fill = resample_fill(model, inputs, torch.Generator().manual_seed(3))
    order = None
    for site, component in one_of_each(model):
        own = captured(model, inputs, site.name).flatten(2)
        value = fill.values[site.name]
        same = [[torch.equal(given, mine) for mine in own] for given in value]
        donors = [row.index(True) for row in same]
        assert sorted(donors) == list(range(5))
        assert all(donor != example for example, donor in enumerate(donors))
        assert order in (None, donors)  # one donor for all sites
        order = donors
        if family == "opt" and site.kind == "ffn":
            value = value.flatten(0, 1)
        with model.ablated(Mask([component]), fill=fill):
            filled = output_of(model.model, inputs)
        assert torch.equal(filled, replaced_by_hand(model, site, component, value, inputs))


def test_resampling_is_seeded():
    model = HookedModel(tiny("opt"))
    inputs = inputs_for(model.model, batch=6)
    one, same, other = (
        resample_fill(model, inputs, torch.Generator().manual_seed(seed)).values[
            "blocks.0.attn.hook_z"
        ]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_padding_does_not_enter_the_mean():
    model = HookedModel(tiny("opt"))
    inputs = inputs_for(model.model, padded=True)
    name = "blocks.1.attn.hook_z"
    seen = captured(model, inputs, name).flatten(2)
    kept = torch.cat([seen[0], seen[1, :6]])
    assert torch.allclose(mean_fill(model, [inputs]).values[name], kept.mean(0), atol=1e-6)
    by_position = mean_fill(model, [inputs], per_position=True).values[name]
    assert torch.allclose(by_position[8], seen[0, 8], atol=1e-6)
    assert torch.allclose(by_position[0], seen[:, 0].mean(0), atol=1e-6)


def test_a_constant_component_is_its_mean():
    """A head whose value is one vector everywhere can be mean-filled without any effect."""
    model = HookedModel(tiny("opt"))
    attention = model.model.model.decoder.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[8:16] = 0
    inputs = inputs_for(model.model, seed=9)
    whole = output_of(model.model, inputs)
    with model.ablated(Mask.parse("L1H1"), fill=mean_fill(model, batches(model))):
        assert torch.allclose(output_of(model.model, inputs), whole, atol=1e-5)
    with model.ablated(Mask.parse("L1H1")):
        assert not torch.allclose(output_of(model.model, inputs), whole, atol=1e-2)


def test_an_empty_mask_with_a_fill_changes_nothing():
    model = HookedModel(tiny("opt"))
    inputs = inputs_for(model.model)
    whole = output_of(model.model, inputs)
    with model.ablated(Mask(), fill=mean_fill(model, batches(model))):
        assert torch.equal(output_of(model.model, inputs), whole)


def test_bf16_fills_keep_the_dtype():
    model = HookedModel(tiny("llama", dtype=torch.bfloat16))
    with model.ablated(Mask.parse("L0H1,L1F"), fill=mean_fill(model, batches(model))):
        assert output_of(model.model, inputs_for(model.model)).dtype == torch.bfloat16


def test_refusals():
    model = HookedModel(tiny("opt"))
    with pytest.raises(ValueError, match="no batches"):
        mean_fill(model, [])
    unequal = [inputs_for(model.model), inputs_for(model.model, pos=5)]
    with pytest.raises(ValueError, match="9 and 5 positions"):
        mean_fill(model, unequal, per_position=True)
    with pytest.raises(ValueError, match="padding in every example"):
        mean_fill(model, [inputs_for(model.model, batch=1, padded=True)], per_position=True)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="at least two"):
        resample_fill(model, inputs_for(model.model, batch=1), generator)
    with pytest.raises(ValueError, match="padded batch"):
        resample_fill(model, inputs_for(model.model, padded=True), generator)
    fill = mean_fill(model, [inputs_for(model.model)], per_position=True)
    with (
        pytest.raises(ValueError, match="pooled mean"),
        model.ablated(Mask.parse("L0H0"), fill=fill),
    ):
        output_of(model.model, inputs_for(model.model, pos=5))
    other = HookedModel(tiny("gpt2", n_layer=4))
    mask = Mask.parse("L3H0")
    with pytest.raises(ValueError, match="no mean for blocks.3"), other.ablated(mask, fill=fill):
        pass


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_fill_is_refused():
    model = HookedModel(tiny("opt"))
    mask = Mask.parse("L0H1")
    with pytest.raises(ValueError, match="no fill 'mean': use 'zero'"), model.ablated(mask, "mean"):
        pass
