"""Are fresh weights drawn by the law that was asked for, alone, and the same for the same seed?"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from scipy.stats import ks_2samp
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ablate.anatomy import Anatomy, Blocks
from ablate.fused import masks_at
from ablate.identity import has_identity
from ablate.laws import LAWS, Law, fresh
from ablate.places import Place, places_of, weights_at
from ablate.stack import record
from tests.families import CONFIGS, FAMILIES, class_of, inputs_for, tiny

POST_NORM = ("opt-350m", "bert", "bert-bare", "roberta", "bart")
FUSED = ("gpt2", "gpt_neox", "bloom", "falcon", "falcon-rw", "falcon-7b")


def _new(family: str, seed: int) -> nn.Module:
    """A freshly built model of the config, as transformers makes it: the oracle of init."""
    name, config, arguments = CONFIGS[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return class_of(name)(class_of(config)(**arguments))


def _pool(draws: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([draw[name].detach().flatten() for draw in draws])


@pytest.mark.parametrize("family", FAMILIES)
def test_init_is_what_a_new_model_has(family: str) -> None:
    """Per tensor: the same constants, or mean, spread and distribution of eight new models."""
    model = tiny(family)
    new = [dict(_new(family, seed).named_parameters()) for seed in range(8)]
    places = places_of(model)
    for place in (places[0], places[-1]):
        ours = [fresh(model, place, "init", seed) for seed in range(8)]
        assert list(ours[0]) == list(weights_at(model, place))
        for name in ours[0]:
            mine, theirs = _pool(ours, name), _pool(new, name)
            if torch.equal(new[0][name], new[1][name]):  # gains, biases, A and D of an SSM
                assert torch.equal(ours[0][name], new[0][name]), name
                continue
            assert not torch.equal(ours[0][name], ours[1][name]), name
            error = float(theirs.std()) / math.sqrt(len(mine))
            assert abs(mine.mean() - theirs.mean()) < 6 * error, name
            kurtosis = float(((theirs - theirs.mean()) ** 4).mean() / theirs.var() ** 2)
            spread = math.sqrt((kurtosis - 1) / 4 / len(mine))  # relative error of a std
            assert abs(mine.std() / theirs.std() - 1) < 7 * spread, name
            assert ks_2samp(mine.numpy(), theirs.numpy()).pvalue > 1e-5, name


def test_depth_is_in_gpt2s_projections() -> None:
    """c_proj is 1/√(2N) as wide: drawn by the attention around it, after the module itself."""
    drawn = fresh(tiny("gpt2", n_embd=128), Place(1), "init", 0)
    assert drawn["transformer.h.1.attn.c_attn.weight"].std() == pytest.approx(0.02, rel=0.03)
    wide = 0.02 / math.sqrt(2 * 3)
    assert drawn["transformer.h.1.mlp.c_proj.weight"].std() == pytest.approx(wide, rel=0.03)


@pytest.mark.parametrize("family", ["opt", "bert", "t5", "gpt2"])
def test_a_loaded_checkpoint_is_reset_although_it_is_marked(family: str, tmp_path: Path) -> None:
    """The trap: on a loaded model `apply(_init_weights)` changes nothing."""
    tiny(family).save_pretrained(tmp_path)
    model = getattr(hf, CONFIGS[family][0]).from_pretrained(tmp_path)
    place = places_of(model)[0]
    old = {name: weight.detach().clone() for name, weight in weights_at(model, place).items()}
    block = model.get_submodule(re.split(r"(?<=\.\d)\.", next(iter(old)))[0])
    block.apply(model._init_weights)
    assert all(torch.equal(old[name], weight) for name, weight in weights_at(model, place).items())
    new = fresh(model, place, "init", 0)
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert all(torch.equal(old[name], weight) for name, weight in weights_at(model, place).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_and_every_generator_stay_as_they_are(family: str) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initial = {name: tensor.detach() * 0.5 for name, tensor in model.named_parameters()}
    states = torch.get_rng_state(), repr(np.random.get_state())
    for place in places_of(model):
        for law in LAWS:
            if law.startswith("copy") or (law == "identity" and family in POST_NORM):
                continue
            drawn = fresh(model, place, law, 3, initial=initial)
            again = fresh(model, place, law, 3, initial=initial)
            old = weights_at(model, place)
            assert list(drawn) == list(old)
            for name, value in drawn.items():
                assert torch.equal(value, again[name])
                assert (value.shape, value.dtype) == (old[name].shape, old[name].dtype)
                assert value.isfinite().all()
                assert not value.requires_grad
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == repr(np.random.get_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("law", ["init", "torch", "moments", "permuted"])
def test_seeds_blocks_and_parts(law: Law) -> None:
    """Another seed or block draws otherwise; a part is drawn as in its block."""
    model = tiny("llama")
    block = fresh(model, Place(0), law, 0)
    for part in ("attention", "ffn", "norms", "qk", "vo"):
        for name, value in fresh(model, Place(0, part), law, 0).items():
            assert torch.equal(value, block[name])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(block[name], fresh(model, Place(0), law, 1)[name])
    assert not torch.equal(block[name], fresh(model, Place(0), law, -1)[name])
    above = fresh(model, Place(1), law, 0)[name.replace(".0.", ".1.")]
    assert not torch.equal(block[name], above)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_only_rounds(dtype: torch.dtype) -> None:
    single, other = tiny("mamba"), tiny("mamba", dtype=dtype)
    for law in ("init", "torch"):
        ours = fresh(other, Place(1), law, 0)
        for name, value in fresh(single, Place(1), law, 0).items():
            assert ours[name].dtype == dtype
            assert torch.allclose(ours[name].double(), value.double(), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "jamba", "opt", "falcon"])
def test_torch_is_torchs_own_law(family: str) -> None:
    """Uniform within 1/√inputs for every linear map, its bias too; gains 1."""
    model = tiny(family)
    for place in places_of(model):
        owners = {
            name: model.get_submodule(name.rpartition(".")[0]) for name in weights_at(model, place)
        }
        drawn = [fresh(model, place, "torch", seed) for seed in range(4)]
        for name, owner in owners.items():
            kind = type(owner).__name__
            values = torch.stack([draw[name] for draw in drawn])
            if "Norm" in kind:
                assert torch.equal(values, torch.full_like(values, float("weight" in name)))
                continue
            if "Mixer" in kind:
                continue  # A and D of an SSM: torch has no law
            if isinstance(owner, Conv1D):
                inputs = owner.nx
            elif isinstance(owner, nn.Conv1d):
                inputs = owner.weight.shape[1] * owner.kernel_size[0]
            else:
                inputs = (values if values.ndim > 2 else owner.weight).shape[-1]
            bound = 1 / math.sqrt(inputs)
            assert bound * (1 - 60 / values.numel()) < values.abs().max() <= bound, name
            width = 2 * bound / math.sqrt(12)
            assert values.std() == pytest.approx(width, rel=4 / math.sqrt(values.numel())), name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in POST_NORM])
def test_identity_adds_nothing_to_the_stream(family: str) -> None:
    model = tiny(family)
    inputs = inputs_for(model)
    for place in places_of(model):
        assert has_identity(model, place)
        drawn = fresh(model, place, "identity", 0)
        usual = fresh(model, place, "init", 0)
        zeroed = {name for name, value in drawn.items() if not torch.equal(value, usual[name])}
        assert 1 <= len(zeroed) < len(drawn)
        with torch.no_grad():
            for name, parameter in weights_at(model, place).items():
                parameter.copy_(drawn[name])
    for stack in {place.stack for place in places_of(model)}:
        recorded = record(model, inputs, keep=(0, 1), stack=stack)
        with torch.no_grad():
            assert torch.equal(
                recorded.run_blocks(0, recorded.n_blocks, recorded.resid(0)), recorded.resid(0)
            )


def test_identity_of_one_branch_leaves_the_other() -> None:
    model = tiny("opt")
    drawn = fresh(model, Place(1, "ffn"), "identity", 0)
    zero = {
        name.removeprefix("model.decoder.layers.1.")
        for name, value in drawn.items()
        if not value.any()
    }
    assert zero == {"fc1.bias", "fc2.weight", "fc2.bias"}  # fc1's bias starts at zero anyway


@pytest.mark.parametrize("family", POST_NORM)
def test_there_is_no_identity_under_post_norm(family: str) -> None:
    model = tiny(family)
    place = places_of(model)[-1]
    assert not has_identity(model, place)
    with pytest.raises(ValueError, match="norms the residual stream itself"):
        fresh(model, place, "identity")
    with torch.no_grad():  # and it is true: with all outputs zero the stream still changes
        for name, parameter in weights_at(model, place).items():
            if ".out" in name or "output.dense" in name or "fc2" in name:
                parameter.zero_()
        last = place.layer
        recorded = record(model, inputs_for(model), keep=(last,), stack=place.stack)
        resid = recorded.resid(last)
        assert not torch.allclose(recorded.run_blocks(last, last + 1, resid), resid, atol=0.01)


def test_under_post_norm_one_branch_may_be_silent() -> None:
    model = tiny("bart")
    drawn = fresh(model, Place(1, "cross", "decoder"), "identity", 0)
    path = "model.decoder.layers.1.encoder_attn."
    assert {name.removeprefix(path) for name, value in drawn.items() if not value.any()} >= {
        "out_proj.weight",
        "out_proj.bias",
    }
    assert drawn[f"{path}k_proj.weight"].any()
    with torch.no_grad():
        for name, parameter in weights_at(model, Place(1, "cross", "decoder")).items():
            parameter.copy_(drawn[name])
    inputs = inputs_for(model)
    other = inputs | {"input_ids": inputs["input_ids"].flip(1)}
    layer = model.get_decoder().layers[1]  # what the branch adds, whatever the source says
    heard: list[torch.Tensor] = []
    hook = layer.encoder_attn.register_forward_hook(lambda module, args, out: heard.append(out[0]))
    with torch.no_grad():
        model(**inputs)
        model(**other)
    hook.remove()
    assert not heard[0].any()
    assert not heard[1].any()


def test_bloom_with_its_residual_behind_the_norm_has_none() -> None:
    model = tiny("bloom", apply_residual_connection_post_layernorm=True)
    assert not has_identity(model, Place(0))


def test_copies_of_neighbours() -> None:
    model = tiny("opt")
    name = "model.decoder.layers.{}.fc1.weight"
    at = {layer: model.get_parameter(name.format(layer)) for layer in range(3)}
    for law, expected in (
        ("copy-below", at[0]),
        ("copy-above", at[2]),
        ("copy-mean", (at[0] + at[2]) / 2),
    ):
        drawn = fresh(model, Place(1, "ffn"), law)
        assert torch.allclose(drawn[name.format(1)], expected, atol=1e-7)
        assert drawn[name.format(1)].data_ptr() != expected.data_ptr()
    for layer, law in ((0, "copy-below"), (0, "copy-mean"), (2, "copy-above"), (2, "copy-mean")):
        with pytest.raises(ValueError, match=f"{law} for {layer}: there is no block"):
            fresh(model, Place(layer), law)
    with pytest.raises(ValueError, match=r"block 1 has no .*mamba\.A_log"):
        fresh(tiny("jamba"), Place(0), "copy-above")
    with pytest.raises(ValueError, match="block 1 has no"):
        fresh(tiny("t5"), Place(0, "position_bias", "encoder"), "copy-above")
    model.model.decoder.layers[0].fc1.weight = nn.Parameter(torch.zeros(40, 32))
    with pytest.raises(ValueError, match=r"copy-below gives .* the shape \[40, 32\]"):
        fresh(model, Place(1), "copy-below")
    with pytest.raises(ValueError, match="neighbours of .* differ in shape"):
        fresh(model, Place(1), "copy-mean")


@pytest.mark.parametrize("family", ["opt", "gpt2", "mamba"])
def test_moments_and_permutations(family: str) -> None:
    model = tiny(family)
    old = weights_at(model, Place(1))
    noisy = [fresh(model, Place(1), "moments", seed) for seed in range(20)]
    mixed = fresh(model, Place(1), "permuted", 0)
    for name, weight in old.items():
        assert torch.equal(mixed[name].flatten().sort()[0], weight.detach().flatten().sort()[0])
        values = _pool(noisy, name)
        std = float(weight.detach().std(correction=0))
        assert abs(values.mean() - weight.mean()) <= 5 * std / math.sqrt(len(values)), name
        assert values.std() == pytest.approx(std, rel=4 / math.sqrt(len(values)), abs=1e-9), name
        if std:
            assert not torch.equal(mixed[name], weight)
            assert (
                ks_2samp(
                    ((values - values.mean()) / std).numpy(),
                    torch.randn(4096, generator=torch.Generator().manual_seed(0)).numpy(),
                ).pvalue
                > 1e-4
            )


@pytest.mark.parametrize("family", FUSED)
def test_the_rest_of_a_fused_tensor_is_kept(family: str) -> None:
    model = tiny(family)
    for law in ("init", "moments", "permuted", "rewind"):
        initial = {name: weight + 1 for name, weight in model.named_parameters()}
        place = Place(0, "vo")
        drawn = fresh(model, place, law, 0, initial=initial)
        for name, mask in masks_at(model, place).items():
            old = model.get_parameter(name)
            assert torch.equal(drawn[name][~mask], old[~mask])
            assert not torch.equal(drawn[name][mask], old[mask])
            if law == "permuted":
                assert torch.equal(drawn[name][mask].sort()[0], old[mask].sort()[0])


def test_rewinding_to_a_mapping_a_file_and_a_folder(tmp_path: Path) -> None:
    model, place = tiny("gpt2"), Place(2)
    initial = {name: tensor.clone() for name, tensor in _new("gpt2", 5).named_parameters()}
    save_file(initial, tmp_path / "initial.safetensors")
    other = {name: tensor + 1 for name, tensor in initial.items()}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(initial, folder / "model.safetensors")
    save_file(other, folder / "trained.safetensors")
    for source in (initial, tmp_path / "initial.safetensors", str(folder)):
        drawn = fresh(model, place, "rewind", initial=source)
        assert all(torch.equal(value, initial[name]) for name, value in drawn.items())
    del initial["transformer.h.2.ln_1.bias"]
    with pytest.raises(ValueError, match=r"lack transformer\.h\.2\.ln_1\.bias \(1 of 12"):
        fresh(model, place, "rewind", initial=initial)
    fresh(model, Place(1), "rewind", initial=initial)
    initial["transformer.h.2.ln_1.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"the shape \[7\], the model has \[32\]"):
        fresh(model, place, "rewind", initial=initial)
    with pytest.raises(ValueError, match="rewind needs initial="):
        fresh(model, place, "rewind")
    for nowhere in (tmp_path / "nowhere", tmp_path):  # a folder without a checkpoint
        with pytest.raises(ValueError, match="no initial weights at"):
            fresh(model, place, "rewind", initial=nowhere)
    (tmp_path / "bad.safetensors").write_text("no tensors at all, only text")
    with pytest.raises(ValueError, match=r"bad\.safetensors is no safetensors file"):
        fresh(model, place, "rewind", initial=tmp_path / "bad.safetensors")


def test_laws_that_cannot_be(unchecked: None) -> None:
    with pytest.raises(ValueError, match="no law 'xavier': use one of init, rewind"):
        fresh(tiny("opt"), Place(0), "xavier")
    for part in ("norms", "qk"):
        with pytest.raises(ValueError, match=f"{part} has no output projection to zero"):
            fresh(tiny("opt"), Place(0, part), "identity")


def test_an_initialiser_that_leaves_a_tensor_out_is_found() -> None:
    model, name = tiny("opt"), "model.decoder.layers.0.gain"
    model.model.decoder.layers[0].register_parameter("gain", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"leaves model\.decoder\.layers\.0\.gain as it was"):
        fresh(model, Place(0), "init")
    for law in ("permuted", "moments"):  # one entry has no spread
        assert torch.equal(fresh(model, Place(0), law)[name], torch.ones(1))


def test_hooks_and_what_they_hold_are_not_copied() -> None:
    model = tiny("opt")
    held = torch.ones(2, requires_grad=True) * 2  # deepcopy refuses such a tensor
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: held)
    model.model.decoder.layers[0].fc1.held = held
    fresh(model, Place(0), "init")


def test_the_innermost_model_initialises() -> None:
    """A model within a model has a law of its own; transformers dispatches to it."""
    model = tiny("t5")

    def halves(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.fill_(0.5)

    model.encoder._init_weights = halves
    inner = fresh(model, Place(0, stack="encoder"), "init")
    assert all((value == 0.5).all() for value in inner.values())
    outer = fresh(model, Place(0, stack="decoder"), "init")
    assert not any((value == 0.5).all() for value in outer.values())


def test_without_an_initialiser_there_is_no_init() -> None:
    class Bare(nn.Module):
        base_model_prefix = ""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    row = Anatomy("bare", (Blocks("layers", ffn=""),))
    with pytest.raises(ValueError, match="Bare has no _init_weights"):
        fresh(Bare(), Place(0), "init", anatomy=row)
    assert len(fresh(Bare(), Place(0), "copy-above", anatomy=row)) == 2
