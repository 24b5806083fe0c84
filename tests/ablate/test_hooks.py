"""Counting: a hook that stays silent, or fires too often, is an error."""

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

from ablate.anatomy import Anatomy, Attention, Blocks
from ablate.hooked import HookedModel
from ablate.masks import Mask
from tests.families import inputs_for, output_of, tiny


class Mixing(nn.Module):
    """Attention-shaped: `fused` computes with W_O's weight without calling it, as kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(8, 8, bias=False)
        self.calls = "once"

    def forward(self, x):
        match self.calls:
            case "once":
                return self.o(x)
            case "fused":
                return F.linear(x, self.o.weight)
            case "twice":
                return self.o(x) + self.o(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Mixing()

    def forward(self, hidden_states):
        return hidden_states + self.attn(hidden_states)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(hidden_states=x)
        return x


ROW = Anatomy("toy", (Blocks("blocks", Attention("attn", "attn.o", 4)),))


def toy():
    return HookedModel(Toy(), anatomy=ROW)


def test_a_model_of_your_own_with_an_anatomy():
    model = toy()
    x = torch.randn(2, 3, 8)
    assert [str(c) for c in model.components] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    with model.ablated(Mask.parse("L0H1,L1H0,L1H1")):
        ablated = model.model(x)
    weight = model.model.blocks[0].attn.o.weight
    assert torch.allclose(ablated, x + x[..., :4] @ weight[:, :4].T, atol=1e-6)


@pytest.mark.parametrize(("calls", "fired"), [("fused", 0), ("twice", 2)])
def test_a_silent_or_repeated_site_is_an_error(calls, fired):
    model = toy()
    model.model.blocks[1].attn.calls = calls
    message = rf"blocks\.1\.attn\.hook_z fired {fired} times, expected 1.*blocks\.1.*model\.eval"
    mask = Mask.parse("L0H1,L1H0")
    with pytest.raises(RuntimeError, match=message), model.ablated(mask):
        model.model(torch.randn(2, 3, 8))
    with model.ablated(Mask.parse("L0H1")):  # the other block is fine
        model.model(torch.randn(2, 3, 8))


def test_the_error_of_the_body_is_not_covered_up():
    model = toy()
    model.model.blocks[0].attn.calls = "fused"
    mask, wrong = Mask.parse("L0H0"), torch.randn(2, 3, 7)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), model.ablated(mask):
        model.model(wrong)


def test_blocks_may_be_called_one_by_one():
    model = toy()
    with model.ablated(Mask.parse("L0H0,L1H0")):
        for _ in range(3):
            model.model.blocks[1](torch.randn(2, 3, 8))


def test_mamba_s_fused_kernel_in_training_is_caught(monkeypatch):
    """transformers calls a kernel with out_proj.weight then, and out_proj itself never runs."""
    model = HookedModel(tiny("mamba"))
    mixer = model.model.backbone.layers[0].mixer

    def fused(hidden_states, *args, **kwargs):
        return F.linear(hidden_states.repeat(1, 1, 2), mixer.out_proj.weight)

    monkeypatch.setattr(mixer, "forward", fused)
    message = "hook_ssm_out fired 0 times, expected 1"
    with pytest.raises(RuntimeError, match=message), model.ablated(Mask.parse("L0M")):
        output_of(model.model, inputs_for(model.model))


@pytest.fixture
def compiled():
    """(compile, count): torch.compile that refuses graph breaks and counts its graphs."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    yield lambda model: torch.compile(model, backend=counter, fullgraph=True), counter
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "depth"), [("opt", "num_hidden_layers"), ("gpt2", "n_layer"), ("llama", None)]
)
@pytest.mark.usefixtures("unchecked")
def test_compiled_inside(family, depth, compiled):
    """One graph, no break; gates changed in place act at once without another graph."""
    compile_, counter = compiled
    model = HookedModel(tiny(family, **({depth: 1} if depth else {})))
    inputs = inputs_for(model.model)
    whole = output_of(model.model, inputs)
    mask = Mask.parse("L0H1,L0F")
    with model.ablated(mask):
        expected = output_of(model.model, inputs)
    with model.ablated(mask) as gates:
        fast = compile_(model.model)
        for _ in range(3):
            assert torch.equal(output_of(fast, inputs), expected)
        for gate in gates.values():
            gate.fill_(1)
        assert torch.equal(output_of(fast, inputs), whole)
    assert counter.frame_count == 1
    assert torch.equal(output_of(fast, inputs), whole)


@pytest.mark.usefixtures("unchecked")
def test_compiled_outside(compiled):
    """torch.compile by itself would not see hooks that come and go after compilation."""
    compile_, _ = compiled
    model, x = toy(), torch.randn(2, 3, 8)
    whole = model.model(x)
    fast = compile_(model.model)
    fast(x)
    for mask in map(Mask.parse, ("L0H1", "L1H0", "L0H0,L1H1", "L0H1")):
        with model.ablated(mask):
            expected = model.model(x)
            assert torch.equal(fast(x), expected)
            assert not torch.equal(expected, whole)
        assert torch.equal(fast(x), whole)
    with model.capture("blocks.0.attn.hook_z") as cache:
        fast(x)
    assert torch.equal(cache["blocks.0.attn.hook_z"], x.view(2, 3, 2, 4))


@pytest.mark.usefixtures("unchecked")
def test_a_silent_site_is_an_error_in_compiled_code(compiled):
    compile_, _ = compiled
    model = toy()
    model.model.blocks[1].attn.calls = "fused"
    fast, x = compile_(model.model), torch.randn(2, 3, 8)
    message, mask = "fired 0 times, expected 2", Mask.parse("L1H0")
    with pytest.raises(RuntimeError, match=message), model.ablated(mask):
        _ = fast(x), fast(x)
