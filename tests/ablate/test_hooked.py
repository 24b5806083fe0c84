"""HookedModel: empty masks change nothing, masks equal zeroed weights, nothing is left behind."""

import copy

import pytest
import torch
from accelerate import disk_offload
from torch import nn

from ablate.anatomy import UnknownArchitecture
from ablate.components import FFN, Head, KVGroup, Mixer
from ablate.hooked import HookedModel
from ablate.masks import Mask
from tests.ablate.oracle import without
from tests.families import DECODERS, FAMILIES, TWO_STACKS, inputs_for, output_of, tiny, tokens

DTYPES = (torch.float32, torch.bfloat16)
PLACES = [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager")]


def samples(model):
    """One component of every kind and stack: the last of each, so a wrong offset shows."""
    last = {(site.kind, site.stack): site for site in model.sites}
    return [(site, site.components[-1]) for site in last.values()]


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "attention"), PLACES)
def test_masks_equal_zeroed_weights(family, attention, dtype):
    hf_model = tiny(family, attention=attention, dtype=dtype)
    if attention == "eager" and not hf_model._supports_sdpa:
        return  # eager is all this family has: covered as "sdpa"
    model, inputs = HookedModel(hf_model), inputs_for(hf_model, padded=True)
    whole = output_of(hf_model, inputs)
    with model.ablated(Mask()):
        assert hooks_on(hf_model) == 0
        assert torch.equal(output_of(hf_model, inputs), whole)
    with model.gated(model.unit_gates(requires_grad=False)):
        assert torch.equal(output_of(hf_model, inputs), whole)
    for site, component in samples(model):
        with model.ablated(Mask([component])):
            masked = output_of(hf_model, inputs)
        assert torch.equal(masked, output_of(without(hf_model, site, component), inputs))
        assert not torch.equal(masked, whole), f"{component} does nothing"
    assert hooks_on(hf_model) == 0
    assert torch.equal(output_of(hf_model, inputs), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_component_at_once(family):
    """All heads, FFNs and mixers in turn; together they equal their union."""
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model)
    twin = model.model
    for site in model.sites:
        for component in site.components:
            twin = without(twin, site, component)
    with model.ablated(Mask(model.components)):
        assert torch.equal(output_of(model.model, inputs), output_of(twin, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_when_everything_is_on_disk(family, tmp_path):
    hf_model = tiny(family)
    inputs = inputs_for(hf_model)
    expected = [
        (component, output_of(without(hf_model, site, component), inputs))
        for site, component in samples(HookedModel(hf_model))
    ]
    model = HookedModel(hf_model)  # before dispatch ...
    disk_offload(hf_model, tmp_path, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in hf_model.parameters())
    for wrapped in (model, HookedModel(hf_model)):  # ... and after
        for component, logits in expected:
            with wrapped.ablated(Mask([component])):
                assert torch.equal(output_of(hf_model, inputs), logits)


@pytest.mark.parametrize(
    "family", ["opt", "gpt2", "llama", "mixtral", "mamba", "falcon_h1", "jamba"]
)
def test_exact_split_over_cpu_and_disk(family, tmp_path):
    hf_model = tiny(family)
    hf_model.save_pretrained(tmp_path)
    inputs = inputs_for(hf_model)
    whole = HookedModel(hf_model)
    path, _, last = whole.sites[-1].block.rpartition(".")
    base, _, stack = path.rpartition(".")
    parts = [f"{base}.{name}" for name, _ in hf_model.get_submodule(base).named_children()]
    devices = dict.fromkeys([*parts, "lm_head"], "cpu")
    del devices[f"{base}.{stack}"]
    devices |= {
        f"{path}.{i}": "disk" if i in (0, int(last)) else "cpu" for i in range(int(last) + 1)
    }
    folder = tmp_path / "offload"  # a mixture of experts is saved in another layout
    model = HookedModel.from_pretrained(tmp_path, device_map=devices, offload_folder=folder)
    assert {p.device.type for p in model.model.parameters()} == {"cpu", "meta"} or int(last) == 1
    assert torch.equal(output_of(model.model, inputs), output_of(hf_model, inputs))
    for site, component in samples(whole):
        with model.ablated(Mask([component])):
            masked = output_of(model.model, inputs)
        assert torch.equal(masked, output_of(without(hf_model, site, component), inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_changed(family):
    model = HookedModel(tiny(family))
    before = copy.deepcopy(model.model.state_dict())
    inputs = inputs_for(model.model)
    with model.ablated(Mask(model.components[:3])), model.gated(model.unit_gates()):
        model.model(**inputs)[0].float().pow(2).mean().backward()
        assert list(model.model.state_dict()) == list(before)
    after = model.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["llama", "falcon", "falcon-7b", "opt"])
def test_a_key_value_group_is_its_heads(family):
    model = HookedModel(tiny(family))
    site = next(s for s in reversed(model.sites) if s.kind == "head")
    share = site.width // site.kv_groups
    group = site.kv_groups - 1
    heads = [Head(site.layer, h) for h in range(group * share, (group + 1) * share)]
    assert model.expand(Mask([KVGroup(site.layer, group)])) == Mask(heads)
    inputs = inputs_for(model.model)
    with model.ablated(Mask([KVGroup(site.layer, group)])):
        grouped = output_of(model.model, inputs)
    with model.ablated(Mask(heads)):
        assert torch.equal(grouped, output_of(model.model, inputs))


def test_a_group_s_heads_are_those_that_read_its_key_and_value():
    """Zeroing a key/value head's value weights removes exactly the heads of its group."""
    model = HookedModel(tiny("llama"))
    twin = copy.deepcopy(model.model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.v_proj.weight[8:] = 0
    inputs = inputs_for(twin)
    with model.ablated(Mask([KVGroup(0, 1)])):
        assert torch.equal(output_of(model.model, inputs), output_of(twin, inputs))


def test_contexts_nest():
    model = HookedModel(tiny("opt"))
    inputs = inputs_for(model.model)
    first, second = Mask.parse("L0H1,L1F"), Mask.parse("L0H2,L2H0")
    with model.ablated(first | second):
        both = output_of(model.model, inputs)
    with model.ablated(first), model.ablated(second):
        assert torch.equal(output_of(model.model, inputs), both)
    with model.ablated(first):
        once = output_of(model.model, inputs)
        with model.ablated(second):
            pass
        assert torch.equal(output_of(model.model, inputs), once)


def test_a_capture_sees_what_was_entered_before_it():
    model = HookedModel(tiny("opt"))
    inputs, name = inputs_for(model.model), "blocks.1.attn.hook_z"
    mask = Mask.parse("L1H2")
    with model.capture(name) as outer, model.ablated(mask), model.capture(name) as inner:
        output_of(model.model, inputs)
    assert outer[name][:, :, 2].abs().sum() > 0
    assert inner[name][:, :, 2].abs().sum() == 0
    assert torch.equal(inner[name][:, :, :2], outer[name][:, :, :2])


def test_an_exception_leaves_no_hooks():
    model = HookedModel(tiny("llama"))
    mask, names = Mask.parse("L0H1,L1F"), model.hook_names[:2]
    with pytest.raises(RuntimeError, match="inside"), model.ablated(mask), model.capture(names):
        raise RuntimeError("inside")
    assert hooks_on(model.model) == 0
    with model.ablated(Mask.parse("L0H1")), pytest.raises((ValueError, TypeError, AttributeError)):
        model.model(input_ids="nonsense")
    assert hooks_on(model.model) == 0


@pytest.mark.parametrize(
    "family", ["opt", "llama", "gpt2", "falcon_h1", "jamba", "mamba", *TWO_STACKS]
)
def test_generate_inside(family):
    """Greedy decoding with a cache, inside the context, is that of zeroed weights."""
    model = HookedModel(tiny(family))
    site, component = samples(model)[0]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with model.ablated(Mask([component])):
        generated = model.model.generate(tokens(), **options)
    assert torch.equal(
        generated, without(model.model, site, component).generate(tokens(), **options)
    )


def test_saving_inside_saves_the_model(tmp_path):
    model = HookedModel(tiny("opt"))
    whole = output_of(model.model, inputs_for(model.model))
    with model.ablated(Mask.parse("L0H1")):
        model.model.save_pretrained(tmp_path)
    again = HookedModel.from_pretrained(tmp_path)
    assert torch.equal(output_of(again.model, inputs_for(again.model)), whole)


def test_trainer_trains_inside(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = HookedModel(tiny("opt"))
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    before = copy.deepcopy(model.model.state_dict())
    with model.ablated(Mask.parse("L1H0,L2F")):
        Trainer(model.model, arguments, train_dataset=rows).train()
    after = model.model.state_dict()
    assert list(after) == list(before)
    # W_O's columns of the removed head received no gradient; its neighbour's did.
    moved = [
        (after[n] - before[n]).abs() for n in before if n.endswith("1.self_attn.out_proj.weight")
    ]
    assert moved[0][:, :8].max() == 0 < moved[0][:, 8:].max()


@pytest.mark.parametrize(
    ("family", "component", "message"),
    [
        ("gpt2", Head(12, 0), "no head L12H0 in gpt2: layers run 0–2, heads 0–3"),
        ("gpt2", Head(0, 4), "no head L0H4 in gpt2: layers run 0–2, heads 0–3"),
        ("llama", KVGroup(0, 2), "no key/value group L0G2 in llama: layers run 0–1, groups 0–1"),
        ("opt", FFN(3), "no FFN L3F in opt: layers run 0–2"),
        ("opt", Mixer(0), "no mixer L0M in opt: it has ffn, head sites only"),
        ("jamba", Head(0, 0), "no head L0H0 in jamba: layers that have one are 1, heads 0–3"),
        ("t5", Head(0, 0), "no head L0H0 in t5: it has cross.head, decoder.ffn, "),
        ("bart", Head(2, 0, "cross"), "no head cross.L2H0 in bart: layers run 0–1, heads 0–3"),
    ],
)
def test_what_does_not_exist_is_refused(family, component, message):
    model = HookedModel(tiny(family))
    with pytest.raises(ValueError, match=message), model.ablated(Mask([component])):
        pass


def test_unknown_family_is_refused():
    with pytest.raises(UnknownArchitecture, match="no anatomy for 'Linear'"):
        HookedModel(nn.Linear(2, 2))


def test_components_and_heads_are_in_model_order():
    model = HookedModel(tiny("opt"))
    assert [str(c) for c in model.components[:6]] == ["L0H0", "L0H1", "L0H2", "L0H3", "L0F", "L1H0"]
    assert len(model.heads) == 12
    assert len(HookedModel(tiny("t5")).heads) == 24


@pytest.mark.parametrize("family", DECODERS[:3])
def test_gates_yielded_by_ablated_switch_in_place(family):
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model)
    whole = output_of(model.model, inputs)
    with model.ablated(Mask.parse("L0H1,L1F")) as gates:
        assert {name: gate.tolist() for name, gate in gates.items()} == {
            "blocks.0.attn.hook_z": [1, 0, 1, 1],
            "blocks.1.hook_mlp_out": 0,
        }
        for gate in gates.values():
            gate.fill_(1)
        assert torch.equal(output_of(model.model, inputs), whole)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mask", ["L3H1", Head(0, 0), [Head(0, 0)], None])
def test_what_is_no_mask_is_refused(mask):
    model = HookedModel(tiny("opt"))
    with pytest.raises(ValueError, match=r"no mask: .*Mask\.parse\('L3H1'\)"), model.ablated(mask):
        pass
