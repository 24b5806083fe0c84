"""Gates: their gradients are right, per token and under checkpointing, and gates are checked."""

import pytest
import torch
from torch import nn

from ablate.hooked import HookedModel
from ablate.masks import Mask
from tests.families import FAMILIES, inputs_for, output_of, tiny

DOUBLE = ("opt", "gpt2", "falcon", "bert", "bart")
SINGLE_INSIDE = ("llama", "mamba", "mamba2", "falcon_h1")
"""Families whose norms or scans compute in fp32 whatever the dtype."""


def frozen(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def loss_of(model, inputs):
    """A scalar that every token of the output matters to."""
    output = model(**inputs)[0]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return (output * weights).mean() + output.logsumexp(-1).mean()


def gradients(model, inputs, gates):
    with model.gated(gates):
        loss_of(model.model, inputs).backward()
    return {name: gate.grad for name, gate in gates.items()}


@pytest.mark.parametrize(
    ("family", "step", "tolerance"),
    [(f, 1e-5, 1e-8) for f in DOUBLE] + [(f, 3e-2, 1e-3) for f in SINGLE_INSIDE],
)
def test_gradients_equal_finite_differences(family, step, tolerance):
    model = HookedModel(frozen(tiny(family, dtype=torch.float64)))
    inputs = inputs_for(model.model)
    gates = model.unit_gates()
    assert all(gate.dtype == torch.float64 for gate in gates.values())
    found = gradients(model, inputs, gates)
    assert all(parameter.grad is None for parameter in model.model.parameters())

    def moved(name, index, by):
        gates = model.unit_gates(requires_grad=False)
        gates[name].view(-1)[index] += by
        with model.gated(gates), torch.no_grad():
            return float(loss_of(model.model, inputs))

    def difference(name, index, step):
        return (moved(name, index, step) - moved(name, index, -step)) / (2 * step)

    for site in (model.sites[0], model.sites[-1]):
        for index in range(site.width):
            # Richardson: the error of central differences falls from step² to step⁴.
            fine, coarse = (difference(site.name, index, s) for s in (step, 2 * step))
            expected = (4 * fine - coarse) / 3
            assert float(found[site.name].view(-1)[index]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_gate_per_token_sums_to_one_gate(family):
    model = HookedModel(frozen(tiny(family)))
    inputs = inputs_for(model.model)
    single = gradients(model, inputs, model.unit_gates())
    with model.gate_gradients() as found:
        loss_of(model.model, inputs).backward()
    for site in model.sites:
        (gradient,) = found[site.name]
        assert gradient.shape[0] == 2
        assert gradient.shape[2] == site.width
        summed = gradient.sum((0, 1)).view_as(single[site.name])
        assert torch.allclose(summed, single[site.name], atol=2e-5)


@pytest.mark.parametrize("family", ["opt", "llama", "bert"])
def test_gate_gradients_equal_those_of_given_gates(family):
    """[batch, pos, head] and [batch, pos] gates, also where OPT's FFN sees [batch·pos, d]."""
    model = HookedModel(frozen(tiny(family)))
    inputs = inputs_for(model.model)
    given = gradients(model, inputs, model.unit_gates(tuple(inputs["input_ids"].shape)))
    with model.gate_gradients() as found:
        loss_of(model.model, inputs).backward()
    for site in model.sites:
        (gradient,) = found[site.name]
        expected = given[site.name]
        assert torch.allclose(gradient.view_as(expected), expected, rtol=1e-5, atol=1e-7)


def test_a_gate_acts_on_its_own_tokens():
    """Closing an FFN for one example leaves the others of the batch as they were."""
    model = HookedModel(tiny("opt"))
    inputs = inputs_for(model.model, batch=3)
    whole = output_of(model.model, inputs)
    with model.gated({"blocks.1.hook_mlp_out": torch.tensor([1.0, 0.0, 1.0])[:, None]}):
        gated = output_of(model.model, inputs)
    with model.ablated(Mask.parse("L1F")):
        ablated = output_of(model.model, inputs)
    assert torch.equal(gated[[0, 2]], whole[[0, 2]])
    assert torch.equal(gated[1], ablated[1])


@pytest.mark.parametrize("family", ["opt", "llama", "t5", "mamba"])
def test_gate_gradient_is_z_times_its_gradient(family):
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model)
    gates = model.unit_gates()
    with model.capture([site.name for site in model.sites]) as cache, model.gated(gates):
        loss = loss_of(model.model, inputs)
    kept = [cache[site.name] for site in model.sites]
    through_gates = torch.autograd.grad(loss, list(gates.values()), retain_graph=True)
    through_z = torch.autograd.grad(loss, kept)
    for site, z, dz, dgate in zip(model.sites, kept, through_z, through_gates, strict=True):
        axes = (0, 1, 3) if site.kind == "head" else (0, 1, 2)
        assert torch.allclose((z * dz).sum(axes), dgate, atol=2e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "roberta"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(family, reentrant):
    """In training mode, with recomputation in the backward: same logits, same gradients."""
    model = HookedModel(tiny(family, attention="eager"))
    inputs = inputs_for(model.model)
    for module in model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mask = Mask(model.sites[0].components[-1:])
    model.model.train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        gates = model.unit_gates()
        model.model.zero_grad()
        with model.ablated(mask), model.gated(gates):
            # Trainer does not ask for a cache either.
            output = model.model(**inputs, use_cache=False)[0]
            output.pow(2).mean().backward()
        results.append((output.detach(), {n: g.grad for n, g in gates.items()}))
    (plain, expected), (checkpointed, found) = results
    assert torch.equal(checkpointed, plain)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6)


def test_bf16_gates_are_fp32_leaves():
    model = HookedModel(frozen(tiny("llama", dtype=torch.bfloat16)))
    found = gradients(model, inputs_for(model.model), model.unit_gates())
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_values_may_change_between_forwards():
    model = HookedModel(tiny("opt"))
    inputs = inputs_for(model.model)
    with model.ablated(Mask.parse("L1H2")):
        expected = output_of(model.model, inputs)
    gates = model.unit_gates(requires_grad=False)
    with model.gated(gates):
        output_of(model.model, inputs)
        gates["blocks.1.attn.hook_z"][2] = 0
        assert torch.equal(output_of(model.model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.9.attn.hook_z", (4,), "no hook point blocks.9.attn.hook_z in opt: nearest are"),
        ("blocks.0.attn.hook_z", (3,), r"shape \(3,\) at .* broadcasts to \[batch, pos, head\]"),
        ("blocks.0.hook_mlp_out", (2, 9, 1), r"broadcasts to \[batch, pos\]"),
    ],
)
def test_gates_that_do_not_fit_are_refused(name, shape, message):
    model = HookedModel(tiny("opt"))
    with pytest.raises(ValueError, match=message), model.gated({name: torch.ones(shape)}):
        pass


@pytest.mark.parametrize("value", [1.0, 0.3])
def test_gate_gradients_at_a_value_equal_those_of_gates_there(value):
    """One site's gates stand elsewhere; no other site is watched."""
    model = HookedModel(frozen(tiny("falcon")))
    inputs = inputs_for(model.model)
    name = "blocks.0.hook_mlp_out"  # Falcon adds into it in place
    given = gradients(model, inputs, {name: torch.full((2, 9), value, requires_grad=True)})
    with model.gate_gradients({name: value}) as found:
        loss_of(model.model, inputs).backward()
    assert list(found) == [name]
    assert torch.allclose(found[name][0][..., 0], given[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="no hook point blocks.9.hook_mlp_out in falcon"):
        model.gate_gradients({"blocks.9.hook_mlp_out": 1.0}).__enter__()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("gate", [0.5, [1.0, 0.0, 1.0, 1.0], None])
def test_gates_that_are_no_tensors_are_refused(gate):
    model = HookedModel(tiny("opt"))
    name = "blocks.0.attn.hook_z"
    with pytest.raises(ValueError, match=f"{name} .*: give a tensor"), model.gated({name: gate}):
        pass
