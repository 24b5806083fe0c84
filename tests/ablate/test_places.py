"""Is a block exactly its parts, in every family, and is what it lacks refused by name?"""

import copy
import re

import pytest
import torch
import transformers as hf
from torch import nn

from ablate.anatomy import FAMILIES as ROWS
from ablate.anatomy import Anatomy, Attention, Blocks, UnknownArchitecture
from ablate.fused import masks_at
from ablate.hooked import HookedModel
from ablate.places import PARTS, Part, Place, places_of, weights_at
from tests.families import FAMILIES, tiny

TOGETHER: tuple[Part, ...] = ("attention", "cross", "mixer", "ffn", "norms")
"""The parts that make up a block."""
FUSED = ("gpt2", "gpt_neox", "bloom", "falcon", "falcon-rw", "falcon-7b")


def test_written_and_read_back() -> None:
    for text in ("3", "3.ffn", "encoder.1", "decoder.1.cross", "0.position_bias"):
        assert str(Place.parse(text)) == text
    assert Place.parse("3.block") == Place(3)
    assert sorted([Place(2), Place(0, "ffn"), Place(0)]) == [Place(0), Place(0, "ffn"), Place(2)]
    assert Place.parse("decoder.1.cross") == Place(1, "cross", "decoder")


@pytest.mark.parametrize("text", ["", "L3", "3.mlp", "cross.1", "-1", "3.", "٣", "1.ffn.norms"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(ValueError, match="no place is written"):
        Place.parse(text)


def test_places_that_cannot_be(unchecked: None) -> None:
    with pytest.raises(ValueError, match="layers count from 0"):
        Place(-1)
    with pytest.raises(ValueError, match="no part 'mlp'.*ffn"):
        Place(0, "mlp")
    with pytest.raises(ValueError, match="use '', 'encoder' or 'decoder'"):
        Place(0, stack="cross")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_exactly_its_parts(family: str) -> None:
    model = tiny(family)
    stacks = [row.stack for row in ROWS[model.config.model_type].stacks]
    assert {place.stack for place in places_of(model)} == set(stacks)
    seen: set[int] = set()
    for place in places_of(model):
        block = weights_at(model, place)
        parts = [
            weights_at(model, other)
            for part in TOGETHER
            for other in places_of(model, part)
            if (other.layer, other.stack) == (place.layer, place.stack)
        ]
        names = [name for part in parts for name in part]
        assert sorted(names) == sorted(block)  # nothing twice, nothing left out
        assert all(dict(model.named_parameters())[name] is block[name] for name in block)
        seen |= {id(weight) for weight in block.values()}
    # Of all stacks, only T5's position bias is in a block and in none of its parts.
    inside = {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(r"\.(layers?|h|blocks?)\.\d+\.", name)
    }
    rest = [name for name, parameter in inside.items() if id(parameter) not in seen]
    expected = 2 if family.startswith("t5") else 0
    assert len(rest) == expected
    assert all("relative_attention_bias" in name for name in rest)


def _short(model: nn.Module, place: Place) -> set[str]:
    """Names in the block without `.weight` and `.bias`."""
    names = weights_at(model, place)
    return {re.split(r"\.\d+\.", name, maxsplit=1)[1].rpartition(".")[0] for name in names}


def test_the_parts_of_known_blocks() -> None:
    opt = tiny("opt")
    projections = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
    assert _short(opt, Place(0, "attention")) == projections
    assert _short(opt, Place(0, "qk")) == {"self_attn.q_proj", "self_attn.k_proj"}
    assert _short(opt, Place(0, "vo")) == {"self_attn.v_proj", "self_attn.out_proj"}
    assert _short(opt, Place(0, "ffn")) == {"fc1", "fc2"}
    assert _short(opt, Place(0, "norms")) == {"self_attn_layer_norm", "final_layer_norm"}
    assert len(weights_at(opt, Place(0, "qk"))) == 4  # biases are in it
    bert = tiny("bert")
    assert _short(bert, Place(1, "ffn")) == {"intermediate.dense", "output.dense"}
    assert _short(bert, Place(1, "norms")) == {"attention.output.LayerNorm", "output.LayerNorm"}
    t5 = tiny("t5")
    cross = {f"layer.1.EncDecAttention.{name}" for name in "qkvo"}
    assert _short(t5, Place(0, "cross", "decoder")) == cross
    assert "layer.1.layer_norm" in _short(t5, Place(0, "norms", "decoder"))
    bias = weights_at(t5, Place(0, "position_bias", "encoder"))
    assert list(bias) == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    qwen3 = tiny("qwen3")
    assert "self_attn.q_norm" in _short(qwen3, Place(0, "attention"))
    assert _short(qwen3, Place(0, "norms")) == {"input_layernorm", "post_attention_layernorm"}
    mixtral = tiny("mixtral")
    assert {name.partition("mlp.")[2] for name in weights_at(mixtral, Place(0, "ffn"))} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    jamba = tiny("jamba")
    assert [str(place) for place in places_of(jamba, "mixer")] == ["0.mixer"]
    assert [str(place) for place in places_of(jamba, "attention")] == ["1.attention"]


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_is_cut_where_the_model_cuts_it(family: str) -> None:
    """Values alone reach z linearly, queries and keys only the pattern: seen from outside."""
    model = tiny(family, attention="eager")
    hooked = HookedModel(model)
    place = Place(0, "qk")
    masks, others = masks_at(model, place), masks_at(model, Place(0, "vo"))
    assert masks.keys() == others.keys()
    assert masks
    inputs = {"input_ids": torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))}

    def seen(twin: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_z")
        with torch.no_grad(), HookedModel(twin).capture(names) as cache:
            twin(**inputs)
        return cache[names[0]], cache[names[1]]

    pattern, z = seen(model)
    for part, other in ((masks, others), (others, masks)):
        twin = copy.deepcopy(model)
        for name, mask in part.items():
            assert torch.equal(mask, ~other[name])
            with torch.no_grad():
                dict(twin.named_parameters())[name][mask] *= 3.0
        new_pattern, new_z = seen(twin)
        if part is others:
            assert torch.equal(new_pattern, pattern)
            assert torch.allclose(new_z, 3 * z, atol=1e-4)
        else:
            assert not torch.allclose(new_pattern, pattern, atol=1e-3)
    assert hooked.sites


def test_only_fused_projections_have_masks() -> None:
    assert masks_at(tiny("gpt2"), Place(0, "attention")) == {}
    assert masks_at(tiny("llama"), Place(0, "qk")) == {}
    vo = weights_at(tiny("gpt2"), Place(0, "vo"))
    assert {name.rpartition(".attn.")[2] for name in vo} == {
        "c_attn.weight",
        "c_attn.bias",
        "c_proj.weight",
        "c_proj.bias",
    }


def test_what_a_model_does_not_have() -> None:
    gpt2, t5, mamba = tiny("gpt2"), tiny("t5"), tiny("mamba")
    for model, place, words in (
        (gpt2, Place(3), "no block 3 in GPT2LMHeadModel: layers run 0–2"),
        (gpt2, Place(0, "cross"), "no cross in block 0 of GPT2LMHeadModel: it has attention, ffn"),
        (gpt2, Place(0, stack="encoder"), "stack 'encoder' of GPT2LMHeadModel asked for: it has"),
        (t5, Place(0), "it has 'encoder', 'decoder'"),
        (t5, Place(0, "cross", "encoder"), "no cross in block 0"),
        (t5, Place(1, "position_bias", "encoder"), "no position_bias in block 1"),
        (mamba, Place(0, "qk"), "no qk in block 0 of MambaForCausalLM: it has norms, mixer"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            weights_at(model, place)
        assert "\n" not in str(error.value)


def test_tied_weights_are_refused_by_name() -> None:
    model = tiny("opt")
    layers = model.model.decoder.layers
    layers[1].fc1.weight = layers[0].fc1.weight
    with pytest.raises(ValueError, match=r"layers\.0\.fc1\.weight .* is tied to .*layers\.1\.fc1"):
        weights_at(model, Place(0))
    with pytest.raises(ValueError, match="is tied to"):
        weights_at(model, Place(1, "ffn"))
    weights_at(model, Place(1, "attention"))
    flat = nn.Parameter(torch.zeros(2, 48, 32))  # two tensors, one storage
    layers[1].fc1.weight = nn.Parameter(flat.detach()[0])
    layers[2].fc1.weight = nn.Parameter(flat.detach()[1])
    with pytest.raises(ValueError, match="is tied to"):
        weights_at(model, Place(2))


def test_weights_that_are_elsewhere_or_packed() -> None:
    model = tiny("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"up_proj\.weight .* is torch\.int8: load it without"):
        weights_at(model, Place(0))
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ of Llama.* is offloaded: .* device_map"):
        weights_at(model, Place(1))


def test_unknown_architectures_and_your_own_row() -> None:
    config = hf.GPTBigCodeConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = hf.GPTBigCodeForCausalLM(config)
    with pytest.raises(UnknownArchitecture, match="no anatomy for 'gpt_bigcode'"):
        weights_at(model, Place(0))
    row = Anatomy("mine", (Blocks("h", Attention("attn", "attn.c_proj"), ffn="mlp"),))
    assert set(weights_at(model, Place(0), row)) == {
        name for name, _ in model.named_parameters() if ".h.0." in name
    }
    assert len(weights_at(model, Place(1, "ffn"), row)) == 4
    assert set(PARTS) >= set(TOGETHER)
