"""Export: the smaller checkpoint says what the masked model says, and is smaller."""

import json
import random
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from ablate import anatomy
from ablate.components import FFN, Head, KVGroup, Mixer
from ablate.export import export, parameters, sizes_and_speed
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.pruned import grouping
from ablate.remains import Spread
from tests.families import FAMILIES, TWO_STACKS, inputs_for, output_of, tiny, tokens

WITH_HEADS = [name for name in FAMILIES if name not in ("mamba", "mamba2", "falcon_mamba")]
STANDARD = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi")
HYBRIDS = ("falcon_h1", "jamba", "bamba")


def removable(model):
    return [c for c in model.components if not isinstance(c, Mixer)]


def masks_of(model):
    """Uniform, ragged with FFNs, and everything that can go from the first layer that has heads."""
    chance = random.Random(0)
    first = model.heads[0].layer
    components = removable(model)
    return {
        "uniform": Mask(head for head in model.heads if head.head in (1, 2)),
        "ragged": Mask(chance.sample(components, len(components) // 2)),
        "layer": Mask(c for c in components if c.layer == first),
        "ffn": Mask([next(c for c in components if isinstance(c, FFN))]),
    }


def masked(model, mask, inputs):
    with model.ablated(mask):
        return output_of(model.model, inputs)


@pytest.mark.parametrize("kind", ["uniform", "ragged", "layer", "ffn"])
@pytest.mark.parametrize("family", WITH_HEADS)
def test_exported_is_masked(family, kind, tmp_path):
    """Every family, padded: equal to 1e-5 after the round trip, and visibly not the whole model."""
    model = HookedModel(tiny(family))
    mask = masks_of(model)[kind]
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    written = export(model, mask, tmp_path / "small")
    again = HookedModel.from_pretrained(tmp_path / "small")
    inputs = inputs_for(model.model, padded=True)
    wanted = masked(model, mask, inputs)
    torch.testing.assert_close(output_of(again.model, inputs), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output_of(model.model, inputs), wanted, atol=1e-3)
    assert written.parameters == parameters(again.model) < parameters(model.model)
    assert len(again.components) == len(model.components) - len(model.expand(mask))
    # The model itself is as it was.
    assert all(torch.equal(x, before[name]) for name, x in model.model.state_dict().items())
    assert not hasattr(model.model.config, "ablate_removed")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["opt", "falcon", "falcon-rw", "qwen3", "t5"])
def test_both_attentions(family, attention, tmp_path):
    model = HookedModel(tiny(family, attention=attention))
    mask = masks_of(model)["ragged"]
    export(model, mask, tmp_path / "small")
    again = HookedModel.from_pretrained(tmp_path / "small", attn_implementation=attention)
    inputs = inputs_for(model.model)
    wanted = masked(model, mask, inputs)
    torch.testing.assert_close(output_of(again.model, inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*STANDARD, *HYBRIDS])
def test_uniform_loads_with_plain_transformers(family, tmp_path):
    """One query head off each key/value head, in every layer: a stock config says it all."""
    model = HookedModel(tiny(family))
    mask = Mask(head for head in model.heads if head.head in (1, 2))
    assert export(model, mask, tmp_path / "small").standard
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    stock, info = loaded
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert type(stock) is type(model.model)
    inputs = inputs_for(model.model)
    wanted = masked(model, mask, inputs)
    torch.testing.assert_close(output_of(stock.eval(), inputs), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["L0H1", "L0F", "L0H0,L0H1,L0H2,L0H3"])
def test_stock_class_refuses_pruned(mask, tmp_path):
    """Above all without an FFN, whose place a stock class would fill with random weights."""
    export(HookedModel(tiny("llama")), Mask.parse(mask), tmp_path / "small")
    for loads in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(OSError, match="no file named model.safetensors"):
            loads.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize(
    "family", ["opt", "gpt2", "llama", "bloom", "gpt_neox", "falcon", "t5", "bart"]
)
@pytest.mark.parametrize("kind", ["ragged", "layer"])
def test_generates_with_a_cache(family, kind, tmp_path):
    """The same tokens as the masked model, also where the first layer's attention is gone."""
    model = HookedModel(tiny(family))
    mask = masks_of(model)[kind]
    export(model, mask, tmp_path / "small")
    again = HookedModel.from_pretrained(tmp_path / "small").model
    prompt = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    prompt["attention_mask"][0, :2] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
    with model.ablated(mask):
        wanted = model.model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(again.generate(**prompt, **options, use_cache=True), wanted)


def test_grouping():
    """Equal shares stay groups; unequal ones are split into groups of their common divisor."""
    assert grouping([0, 1, 4, 5], heads=8, groups=2) == ((0, 1), (4, 5))
    assert grouping([0, 1, 2, 3, 5, 6], heads=8, groups=2) == ((0, 1), (2, 3), (5, 6))
    assert grouping([1, 2, 3, 6], heads=8, groups=2) == ((1,), (2,), (3,), (6,))
    assert grouping([6, 7], heads=8, groups=2) == ((6, 7),)


def test_key_value_heads(tmp_path):
    """A key/value head goes with its last query head, and is stored once however unevenly read."""
    model = HookedModel(tiny("llama"))  # four heads on two key/value heads of eight numbers
    mask = Mask([KVGroup(0, 1), Head(1, 3)])
    export(model, mask, tmp_path / "small")
    layers: Any = HookedModel.from_pretrained(tmp_path / "small").model.model.layers
    first, second = (layer.self_attn for layer in layers)
    assert first.k_proj.weight.shape == first.v_proj.weight.shape == (8, 32)
    assert not isinstance(first.k_proj, Spread)
    assert second.q_proj.weight.shape == (24, 32)
    assert second.k_proj.weight.shape == (16, 32)
    assert second.k_proj.order == (0, 0, 1)


def test_biases(tmp_path):
    """W_O's bias stays though all heads go; an FFN takes its own along. The modules are empty."""
    model = HookedModel(tiny("opt"))
    mask = Mask([*(Head(1, h) for h in range(4)), FFN(2)])
    export(model, mask, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.pruned.safetensors", "pt") as file:
        names = set(file.keys())
        bias = file.get_tensor("model.decoder.layers.1.self_attn.out_proj.bias")
    assert torch.equal(bias, model.model.model.decoder.layers[1].self_attn.out_proj.bias)
    attention = {name for name in names if "layers.1.self_attn." in name}
    assert attention == {"model.decoder.layers.1.self_attn.out_proj.bias"}
    assert not any("layers.2.fc" in name for name in names)


def test_exported_model_is_a_model(tmp_path):
    """It can be masked again, trained, and saved by its own save_pretrained."""
    model = HookedModel(tiny("llama"))
    mask = Mask.parse("L0H1,L0F,L1H0,L1H1")
    export(model, mask, tmp_path / "small")
    again = HookedModel.from_pretrained(tmp_path / "small")
    inputs = inputs_for(model.model)
    # Head 1 of layer 0 is now the old head 2; layer 1 has the old heads 2 and 3.
    wanted = masked(model, mask | Mask.parse("L0H2,L1H3"), inputs)
    got = masked(again, Mask.parse("L0H1,L1H1"), inputs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    again.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    idle = {name for name, p in again.model.named_parameters() if p.grad is None}
    assert idle == {"model.layers.0.post_attention_layernorm.weight"}  # it fed the removed FFN
    with torch.no_grad():
        again.model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    again.model.save_pretrained(tmp_path / "trained")
    trained = HookedModel.from_pretrained(tmp_path / "trained")
    assert torch.equal(output_of(trained.model, inputs), output_of(again.model, inputs))
    with pytest.raises(ValueError, match="already pruned"):
        export(again, Mask.parse("L0H0"), tmp_path / "twice")


@pytest.mark.parametrize("family", ["opt", "bloom", "t5"])
def test_offload(family, tmp_path):
    """A pruned checkpoint may be offloaded; an offloaded model cannot be pruned."""
    model = HookedModel(tiny(family))
    mask = masks_of(model)["ragged"]
    export(model, mask, tmp_path / "small")
    inputs = inputs_for(model.model)
    again = HookedModel.from_pretrained(tmp_path / "small", device_map="disk")
    wanted = masked(model, mask, inputs)
    torch.testing.assert_close(output_of(again.model, inputs), wanted, atol=1e-5, rtol=1e-5)
    model.model.save_pretrained(tmp_path / "whole")
    offloaded = HookedModel.from_pretrained(tmp_path / "whole", device_map="disk")
    with pytest.raises(ValueError, match="offloaded"):
        export(offloaded, mask, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_bfloat16_keeps_its_dtype(tmp_path):
    model = HookedModel(tiny("llama", dtype=torch.bfloat16))
    export(model, Mask.parse("L0H1"), tmp_path / "small")
    again = HookedModel.from_pretrained(tmp_path / "small").model
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", [name for name in TWO_STACKS if name != "bart"])
def test_heads_of_all_stacks(family, tmp_path):
    """T5's shared position bias under a different set of heads in every attention. In fp64: T5
    does not scale its scores, so wide random weights make fp32 itself worse than 1e-5."""
    model = HookedModel(tiny(family, dtype=torch.float64))
    inputs = inputs_for(model.model, padded=True)
    for seed in range(4):
        chance = random.Random(seed)
        mask = Mask(chance.sample(model.heads, chance.randrange(1, len(model.heads))))
        export(model, mask, tmp_path / str(seed))
        again = HookedModel.from_pretrained(tmp_path / str(seed))
        wanted = masked(model, mask, inputs)
        torch.testing.assert_close(output_of(again.model, inputs), wanted, atol=1e-6, rtol=1e-6)


def test_sizes_and_speed(tmp_path):
    model = HookedModel(tiny("opt"))
    mask = Mask.parse("L0H0,L0H1,L1F,L2H3")
    written = export(model, mask, tmp_path / "small")
    inputs = inputs_for(model.model)
    frame = sizes_and_speed(model, mask, tmp_path / "small", inputs, rounds=1)
    value = frame.set_index(["metric", "model"]).value
    assert value["parameters", "whole"] == written.parameters_before == parameters(model.model)
    assert value["parameters", "exported"] == written.parameters
    head = 8 * (4 * 32 + 3)  # rows of q, k, v with biases; columns of o
    ffn = 2 * 32 * 48 + 32 + 48
    assert written.parameters_before - written.parameters == 3 * head + ffn
    assert value["bytes", "whole"] == 4 * written.parameters_before
    assert 4 * written.parameters <= value["bytes", "exported"] < value["bytes", "whole"]
    assert value["largest_difference", "exported"] < 1e-5
    assert (value["tokens_per_second"] > 0).all()
    speeds = frame[frame.metric == "tokens_per_second"]
    assert (speeds.low <= speeds.value).all()
    assert (speeds.value <= speeds.high).all()
    with pytest.raises(ValueError, match="at least one"):
        sizes_and_speed(model, mask, tmp_path / "small", inputs, rounds=0)
    assert Mask.from_json((tmp_path / "small" / "removed.json").read_text()) == mask


def test_tokenizer_goes_along(tmp_path):
    model = HookedModel.from_pretrained("stdlib-opt")
    export(model, Mask.parse("L0H0"), tmp_path / "small")
    again = HookedModel.from_pretrained(tmp_path / "small")
    assert again.tokenizer("def f():").input_ids == model.tokenizer("def f():").input_ids


def test_refusals(tmp_path):
    """One line each, and nothing is left behind."""
    model = HookedModel(tiny("llama"))
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists"):
        export(model, Mask.parse("L0H0"), tmp_path / "there")
    with pytest.raises(ValueError, match="removes nothing"):
        export(model, Mask(), tmp_path / "small")
    with pytest.raises(ValueError, match="removes every component"):
        export(model, Mask(model.components), tmp_path / "small")
    with pytest.raises(ValueError, match="no head L9H0"):
        export(model, Mask.parse("L9H0"), tmp_path / "small")
    hybrid = HookedModel(tiny("jamba"))
    with pytest.raises(ValueError, match="mixer L0M"):
        export(hybrid, Mask.parse("L0M"), tmp_path / "small")
    own = anatomy.Anatomy("llama", anatomy.FAMILIES["opt"].stacks)
    model.anatomy = own
    with pytest.raises(ValueError, match="anatomy= of its own"):
        export(model, Mask.parse("L0H0"), tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_nothing_half_written(tmp_path, monkeypatch):
    """A save that dies half-way leaves neither the folder nor its beginnings."""
    model = HookedModel(tiny("opt"))

    def full(self, text):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="no space"):
        export(model, Mask.parse("L0H0"), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_config_and_weights_must_agree(tmp_path):
    """A folder whose config names other components than its weights lack is refused."""
    export(HookedModel(tiny("opt")), Mask.parse("L0H0,L1F"), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    for removed in (["L0H0"], ["L0H0", "L0H1", "L1F"], ["L0M"]):
        file.write_text(json.dumps(config | {"ablate_removed": removed}))
        with pytest.raises(ValueError, match="small"):
            HookedModel.from_pretrained(tmp_path / "small")
