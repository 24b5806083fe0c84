"""Placement: what loads, and one clear line for everything that must not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ablate.anatomy import UnknownArchitecture
from ablate.hooked import HookedModel
from ablate.placement import require_materialised, resolve
from tests.families import FAMILIES, inputs_for, output_of, tiny

LOST = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def checkpoint(tmp_path):
    tiny("opt").save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def edit_weights(checkpoint, edit):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(checkpoint, **changes):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family, tmp_path):
    """Saved and loaded: the same class, and (tied weights included) the same logits."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    again = HookedModel.from_pretrained(tmp_path)
    assert type(again.model) is type(model)
    assert again.tokenizer is None
    assert not again.model.training
    inputs = inputs_for(model)
    assert torch.equal(output_of(again.model, inputs), output_of(model, inputs))


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", "disk", {"": "cpu"}, {"": "disk"}])
def test_device_maps(checkpoint, device_map):
    model = HookedModel.from_pretrained(str(checkpoint), device_map=device_map)
    inputs = inputs_for(model.model)
    assert torch.equal(output_of(model.model, inputs), output_of(tiny("opt"), inputs))
    on_disk = device_map in ("disk", {"": "disk"})
    assert all((p.device.type == "meta") == on_disk for p in model.model.parameters())


def test_dtype_and_attention(checkpoint):
    model = HookedModel.from_pretrained(
        checkpoint, dtype="bfloat16", attn_implementation="eager"
    ).model
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert HookedModel.from_pretrained(checkpoint, dtype=torch.float64).model.dtype == torch.float64
    assert HookedModel.from_pretrained(checkpoint).model.dtype == torch.float32


def test_missing_tensors_are_refused(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.pop(LOST))
    with pytest.raises(ValueError, match=f"lacks 1 of its tensors .{LOST}.*drawn at random"):
        HookedModel.from_pretrained(checkpoint)


def test_another_shape_is_refused(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update({LOST: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=rf"{LOST} as \(3, 3\) where .* \(48, 32\)"):
        HookedModel.from_pretrained(checkpoint)


def test_a_folder_that_is_no_checkpoint(checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no checkpoint: it has no config.json"):
        HookedModel.from_pretrained(empty)
    with pytest.raises(ValueError, match=r"no folder .*nowhere: give a checkpoint folder"):
        HookedModel.from_pretrained(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").rename(checkpoint / "elsewhere")
    with pytest.raises(ValueError, match="config.json but no model.safetensors"):
        HookedModel.from_pretrained(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\).*convert"):
        HookedModel.from_pretrained(checkpoint)
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(ValueError, match=r"2 of 2 weight files are missing.*model-1"):
        HookedModel.from_pretrained(checkpoint)


def test_a_broken_file_is_refused_in_one_line(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=r"^cannot load [^\n]*$"):
        HookedModel.from_pretrained(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^cannot load [^\n]*not a valid JSON file[^\n]*$"):
        HookedModel.from_pretrained(checkpoint)


def test_unknown_families_and_names(checkpoint):
    edit_config(checkpoint, model_type="vit")
    with pytest.raises(UnknownArchitecture, match="no anatomy for 'vit'.*anatomy="):
        HookedModel.from_pretrained(checkpoint)
    edit_config(checkpoint, model_type="no-such-thing")
    with pytest.raises(ValueError, match=r"^cannot load [^\n]*no-such-thing[^\n]*$"):
        HookedModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"^cannot load no-such-model: [^\n]*neither a folder nor"):
        HookedModel.from_pretrained("no-such-model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, "no dtype 'float33': use float32"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"device_map": "gpu"}, "no device 'gpu': use cpu"),
        ({"device_map": "cuda:99"}, "device cuda:99 asked for, but this machine has"),
        ({"device_map": {"transformer": "cpu"}}, "places 'transformer', which OPTForCausalLM does"),
        ({"attn_implementation": "lazy"}, "cannot load .*lazy"),
    ],
)
def test_options_that_make_no_sense(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        HookedModel.from_pretrained(checkpoint, **options)


def test_no_code_from_a_checkpoint(checkpoint, tmp_path):
    mark = tmp_path / "ran"
    (checkpoint / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_config(checkpoint, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    with pytest.raises(ValueError, match="^cannot load"):
        HookedModel.from_pretrained(checkpoint)
    assert not mark.exists()


def test_a_folder_may_shadow_a_hub_id(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("opt") == ("opt", True)
    assert resolve("facebook/opt-125m") == ("facebook/opt-125m", False)


def test_training_offloaded_parameters_is_refused(checkpoint):
    model = HookedModel.from_pretrained(checkpoint, device_map="disk").model
    with pytest.raises(ValueError, match="model.decoder.embed_tokens.weight is offloaded"):
        require_materialised(model.named_parameters())
    require_materialised(tiny("opt").named_parameters())


def test_a_bridge_over_offloaded_weights_is_refused(checkpoint):
    model = HookedModel.from_pretrained(checkpoint, device_map="disk")
    with pytest.raises(ValueError, match="offloaded weights, which a bridge cannot copy"):
        model.to_bridge()


def test_the_name_is_the_folder_s(checkpoint):
    assert HookedModel.from_pretrained(checkpoint).name == "opt"
    assert HookedModel(tiny("bart")).name == "bart"
