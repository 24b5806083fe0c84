"""Does a reset change its place alone, and does everything return, bit by bit?"""

import copy
import re

import accelerate
import pytest
import torch
from torch import Tensor, nn

from ablate.fused import masks_at
from ablate.places import Place, places_of, weights_at
from ablate.reset import fingerprints, fresh, masks_all, reset_, restored, train_only_
from tests.families import FAMILIES, inputs_for, output_of, tiny


def _bits(model: nn.Module) -> dict[str, Tensor]:
    """Everything that restored promises, by name."""
    found = dict(model.state_dict()) | dict(model.named_buffers())
    return {name: tensor.clone() for name, tensor in found.items()}


def _flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8))
        if a[name].ndim
        else torch.equal(a[name], b[name])
        for name in a
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_in_its_place_alone_and_put_back(family: str) -> None:
    """A reset, three steps with weight decay, and back: the frozen never move, the loss returns."""
    model = tiny(family)
    place = places_of(model)[-1]
    inputs = inputs_for(model)
    before, clean, flags = _bits(model), output_of(model, inputs), _flags(model)
    with restored(model):
        new = reset_(model, place, seed=1)
        assert list(new) == list(weights_at(model, place))
        drawn = fresh(model, place, "init", 1)
        assert all(torch.equal(new[name], drawn[name]) for name in new)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == list(new)
        hurt = output_of(model, inputs)
        assert not torch.equal(hurt, clean)
        optimiser = torch.optim.AdamW(new.values(), lr=1e-2, weight_decay=0.1)
        frozen = fingerprints(model, [place])
        for _ in range(3):
            optimiser.zero_grad()
            model(**inputs)[0].float().log_softmax(-1)[..., 3].mean().neg().backward()
            optimiser.step()
        assert fingerprints(model, [place]) == frozen
        now = _bits(model)
        moved = {name for name in before if not torch.equal(before[name], now[name])}
        assert {name for name, p in model.named_parameters() if p in set(new.values())} >= moved
        assert not torch.equal(output_of(model, inputs), hurt)
    assert _same(_bits(model), before)
    assert _flags(model) == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(output_of(model, inputs), clean)


def test_several_places_of_one_law() -> None:
    model = tiny("gpt2")
    before = copy.deepcopy(model)
    new = reset_(model, [Place(0), Place(2, "ffn"), Place(0, "norms")], seed=3)
    assert {re.split(r"\.h\.(\d)\.", name)[1] for name in new} == {"0", "2"}
    assert len(new) == 12 + 4
    assert not torch.equal(
        new["transformer.h.0.mlp.c_fc.weight"], new["transformer.h.2.mlp.c_fc.weight"]
    )
    twin = copy.deepcopy(before)
    swapped = reset_(twin, [Place(0), Place(1)], "copy-above")  # block 1 is copied as it was
    name = "transformer.h.{}.mlp.c_fc.weight"
    for layer in (0, 1):
        assert torch.equal(
            swapped[name.format(layer)], before.get_parameter(name.format(layer + 1))
        )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "falcon", "falcon-7b"])
def test_two_places_in_one_fused_tensor(family: str) -> None:
    """qk alone keeps the values; qk and vo together are the attention's whole reset."""
    model = tiny(family)
    for order in (("qk", "vo"), ("vo", "qk")):
        with restored(model):
            both = reset_(model, [Place(0, part) for part in order], seed=2)
            whole = fresh(model, Place(0, "attention"), seed=2)
            assert masks_all(model, [Place(0, part) for part in order]) == {}
            assert all(torch.equal(value, whole[name]) for name, value in both.items())
    assert masks_all(model, [Place(0, "qk"), Place(0, "attention")]) == {}
    alone = masks_all(model, [Place(0, "qk"), Place(1), Place(0, "norms")])
    masks = masks_at(model, Place(0, "qk"))
    assert alone.keys() == masks.keys()
    assert all(torch.equal(alone[name], mask) for name, mask in masks.items())
    before = fingerprints(model, [Place(0, "qk")])
    old = _bits(model)
    new = reset_(model, Place(0, "qk"))
    assert fingerprints(model, [Place(0, "qk")]) == before
    assert fingerprints(model) != before
    for name, mask in masks_at(model, Place(0, "qk")).items():
        assert torch.equal(new[name].detach()[~mask], old[name][~mask])


def test_a_reset_that_resets_nothing_is_refused() -> None:
    model = tiny("opt")
    same = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    flags = _flags(model)
    with pytest.raises(ValueError, match="the weights it has: nothing would be reset"):
        reset_(model, Place(1), "rewind", initial=same)
    with pytest.raises(ValueError, match="no block above"):
        reset_(model, [Place(0), Place(2)], "copy-above")
    assert all(torch.equal(same[name], weight) for name, weight in model.named_parameters())
    assert _flags(model) == flags  # not half done
    trained = train_only_(model, Place(1, "norms"))
    assert len(trained) == 4
    assert sum(p.requires_grad for p in model.parameters()) == 4
    assert all(torch.equal(same[name], weight) for name, weight in model.named_parameters())


def test_what_is_no_list_of_places(unchecked: None) -> None:
    for places in ([], "3.ffn", ["3.ffn"]):
        with pytest.raises(ValueError, match=r"are no places: give at least one, Place\(3\)"):
            reset_(tiny("opt"), places)


def test_everything_returns_after_an_exception() -> None:
    """Values, objects, flags, buffers, submodules, dtype and gradients; ties stay ties."""
    model = tiny("falcon_mamba")
    model.train()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.full_like(last, 0.5)
    before, flags = _bits(model), _flags(model)
    objects = [id(parameter) for parameter in model.parameters()]
    modules = [id(module) for module in model.modules()]
    block = model.backbone.layers[0]

    def disturb() -> None:
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(1)
        assert last.grad is not None
        last.grad.add_(1)
        model.eval().requires_grad_(True)
        block.mixer.in_proj = nn.Linear(2, 2)
        block.mixer.out_proj.weight = nn.Parameter(torch.zeros(3))
        block.extra = nn.Linear(2, 2)
        del block.mixer.conv1d
        model.half()
        raise KeyError("disturbed")

    with pytest.raises(KeyError, match="disturbed"), restored(model):
        disturb()
    assert _same(_bits(model), before)
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert _flags(model) == flags
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(last.grad, torch.full_like(last, 0.5))
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_nan_and_negative_zero_return_as_they_were() -> None:
    model = tiny("opt")
    weight = model.model.decoder.layers[0].fc1.weight
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = float("nan"), -0.0
    before = fingerprints(model)
    with restored(model):
        with torch.no_grad():
            weight[0, 0], weight[0, 1] = 0.0, 0.0
        assert fingerprints(model) != before
    assert fingerprints(model) == before


def test_fingerprints_see_one_bit() -> None:
    model = tiny("gpt2", dtype=torch.bfloat16)
    before = fingerprints(model)
    weight = model.transformer.h[1].ln_1.weight
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], weight[3] + 1)
    after = fingerprints(model)
    assert [name for name in before if before[name] != after[name]] == [
        "transformer.h.1.ln_1.weight"
    ]
    assert (
        fingerprints(model, [Place(1)]).keys() == before.keys() - weights_at(model, Place(1)).keys()
    )


def test_an_offloaded_block_is_refused_and_its_neighbour_is_not() -> None:
    """accelerate keeps block 1 elsewhere: block 0 can be reset, and is put back."""
    whole, model = tiny("llama"), tiny("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model.model.layers[1], torch.device("cpu"), state_dict=None)
    inputs = inputs_for(model)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.\S+ of LlamaFor.* is offloaded"
    ) as why:
        reset_(model, Place(1))
    assert "\n" not in str(why.value)
    with pytest.raises(ValueError, match="copy-above for 0: .* is offloaded"):
        fresh(model, Place(0), "copy-above")
    clean = output_of(model, inputs)
    with restored(model):
        new = reset_(model, Place(0), seed=4)
        reset_(whole, Place(0), seed=4)
        assert torch.equal(output_of(model, inputs), output_of(whole, inputs))
        model(**inputs)[0].mean().backward()
        assert all(parameter.grad is not None for parameter in new.values())
    assert torch.equal(output_of(model, inputs), clean)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, weights[name])


def test_a_hooked_block_gets_the_weights_of_a_plain_one() -> None:
    """accelerate's hooks on a resident block change nothing about its law."""
    plain, model = tiny("gpt2"), tiny("gpt2")
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model.transformer, "_hf_hook") or hasattr(model, "_hf_hook")
    for law in ("init", "torch", "moments", "permuted"):
        ours, theirs = fresh(model, Place(1), law, 0), fresh(plain, Place(1), law, 0)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert output_of(model, inputs_for(model)).isfinite().all()
