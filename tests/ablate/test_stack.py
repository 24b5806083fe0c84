"""Running a model in parts: equal to running it whole, in every family, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload, dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from ablate.anatomy import FAMILIES as ROWS
from ablate.anatomy import Anatomy, Blocks, UnknownArchitecture
from ablate.calls import BATCHED, Call, Output
from ablate.components import FFN, Component, Head
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.stack import Recorded, embed, record
from tests.families import DECODERS, FAMILIES, TWO_STACKS, inputs_for, output_of, tiny

PADDINGS = ("none", "right", "left")
BATCH, POS = 3, 7
# Families that differ in what their blocks are given: nothing but a mask, rotary tables shared by
# the batch, alibi tables per example and head, masks that differ between layers, a recurrent mask.
KINDS = ("opt-350m", "llama", "bloom", "gemma2", "falcon_h1", "jamba")


def padded(model: Any, padding: str) -> dict[str, Tensor]:
    """A batch of three; one of them has two (left) or three (right) padded positions."""
    inputs = inputs_for(model, BATCH, POS)
    if padding == "none":
        del inputs["attention_mask"]
    elif padding == "left":
        inputs["attention_mask"][0, :2] = 0
    else:
        inputs["attention_mask"][1, -3:] = 0
    return inputs


def recorded_all(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Recorded:
    depth = record(model, inputs, **options).n_blocks
    return record(model, inputs, keep=range(depth + 1), **options)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Call):
        value = (value.args, value.kwargs)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    else:
        yield value.recorded if isinstance(value, Output) else value


# The whole, from parts


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", [*DECODERS, *TWO_STACKS, "bert", "roberta"])
def test_embed_then_blocks_one_by_one_then_head_is_the_forward(family: str, padding: str) -> None:
    model: Any = tiny(family)
    inputs = padded(model, padding)
    whole = output_of(model, inputs)
    recorded = recorded_all(model, inputs)
    with torch.no_grad():
        resid = embed(model, inputs)
        for i in range(recorded.n_blocks):
            assert torch.equal(resid, recorded.resid(i))
            resid = recorded.run_blocks(i, i + 1, resid)
        assert torch.equal(resid, recorded.resid(recorded.n_blocks))
        assert torch.equal(recorded.head(resid), whole)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {"alibi": True, "new_decoder_architecture": False}),
        ("mistral", {"sliding_window": 3}),
        ("gemma2", {"sliding_window": 3, "final_logit_softcapping": 0.7}),
        ("opt", {"word_embed_proj_dim": 16}),
        ("opt-350m", {"word_embed_proj_dim": 32}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("falcon_h1", {"lm_head_multiplier": 0.3, "embedding_multiplier": 2.0}),
        ("t5", {"num_layers": 3}),
        ("mixtral", {"output_router_logits": True}),
    ],
)
def test_variants_of_a_family_are_exact_too(
    family: str, changes: dict[str, Any], attention: str
) -> None:
    model: Any = tiny(family, attention=attention, **changes)
    inputs = padded(model, "left")
    recorded = record(model, inputs)
    with torch.no_grad():
        logits = recorded.head(recorded.run_blocks(0, recorded.n_blocks, recorded.resid(0)))
        assert torch.equal(logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ["opt", "llama", "mamba", "falcon_h1"])
def test_bf16_and_autocast_are_exact_too(family: str) -> None:
    half: Any = tiny(family, dtype=torch.bfloat16)
    inputs = padded(half, "left")
    recorded = record(half, inputs)
    with torch.no_grad():
        logits = recorded.head(recorded.run_blocks(0, recorded.n_blocks, recorded.resid(0)))
    assert torch.equal(logits, output_of(half, inputs))

    full: Any = tiny(family)
    with torch.autocast("cpu", torch.bfloat16):
        whole = output_of(full, inputs)
        recorded = record(full, inputs)
        logits = recorded.head(recorded.run_blocks(0, recorded.n_blocks, recorded.resid(0)))
        assert torch.equal(logits, whole)
        # The forward without gradients must not leave casts without gradients behind.
        logits.float().square().mean().backward()
    assert all(p.grad is not None for p in full.get_output_embeddings().parameters())
    assert any(p.grad is not None for p in recorded.part.blocks[0].parameters())


@pytest.fixture(scope="module")
def deep() -> Recorded:
    model: Any = tiny("llama", num_hidden_layers=5)
    return recorded_all(model, padded(model, "left"))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 5), min_size=2, max_size=6).map(sorted))
def test_any_cuts_give_the_same_stream(deep: Recorded, cuts: list[int]) -> None:
    with torch.no_grad():
        resid = deep.resid(cuts[0])
        for first, end in zip(cuts, cuts[1:], strict=False):
            resid = deep.run_blocks(first, end, resid)
    assert torch.equal(resid, deep.resid(cuts[-1]))


@pytest.mark.parametrize("family", TWO_STACKS)
def test_encoder_blocks_end_in_what_the_decoder_reads(family: str) -> None:
    model: Any = tiny(family)
    inputs = padded(model, "right")
    recorded = recorded_all(model, inputs, stack="encoder")
    last = recorded.n_blocks
    with torch.no_grad():
        resid = recorded.run_blocks(0, last, embed(model, inputs, stack="encoder"))
        assert torch.equal(resid, recorded.resid(last))
        assert torch.equal(recorded.part.close(resid), model(**inputs).encoder_last_hidden_state)


# Logits at positions


@pytest.mark.parametrize("family", [*DECODERS, *TWO_STACKS])
def test_head_at_positions_is_the_forward_there(family: str) -> None:
    model: Any = tiny(family)
    inputs = padded(model, "left")
    whole = output_of(model, inputs)
    recorded = recorded_all(model, inputs)
    resid = recorded.resid(recorded.n_blocks)
    where = torch.tensor([[2, 4], [0, 3], [2, 4]])
    mask = torch.zeros(whole.shape[:2], dtype=torch.bool)
    mask[1, 2:] = mask[0, -1] = True
    with torch.no_grad():
        # Other numbers of rows may take another matrix kernel: equal to rounding, not to the bit.
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(recorded.head(resid, where), whole[where.T.unbind()], **close)
        torch.testing.assert_close(recorded.head(resid, mask), whole[mask], **close)
        assert recorded.head(resid, where[:0]).shape == (0, whole.shape[-1])


# Other rows


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tile_and_select_give_blocks_what_the_forward_of_those_rows_would(
    family: str, padding: str
) -> None:
    model: Any = tiny(family)
    inputs = padded(model, padding)
    recorded = recorded_all(model, inputs)
    for rows in ([0, 1, 2] * 3, [2, 1, 1, 0]):
        there = recorded.select(rows)
        oracle = record(model, {name: x[rows] for name, x in inputs.items()})
        for mine, real in zip(leaves(there.calls), leaves(oracle.calls), strict=True):
            if isinstance(mine, Tensor) and isinstance(real, Tensor):
                mine, real = torch.broadcast_tensors(mine, real)
                assert torch.equal(mine, real)
            elif not isinstance(mine, Tensor):  # padding left out: the real forward drops the mask
                assert mine == real
        resid, last = there.resid(1), recorded.n_blocks
        torch.testing.assert_close(
            there.run_blocks(1, last, resid), recorded.resid(last)[rows], rtol=1e-5, atol=1e-4
        )
        assert torch.equal(
            recorded.run_blocks(1, last, resid, rows), there.run_blocks(1, last, resid)
        )


@pytest.mark.parametrize("family", KINDS)
def test_one_example_can_be_tiled(family: str) -> None:
    model: Any = tiny(family)
    inputs = {name: x[:1] for name, x in padded(model, "left").items()}
    recorded = recorded_all(model, inputs)
    last, tiled = recorded.n_blocks, recorded.tile(4)
    masks = [
        call.kwargs["attention_mask"] for call in tiled.calls if "attention_mask" in call.kwargs
    ]
    assert all(mask.shape[0] == 4 for mask in masks), "flash attention does not broadcast masks"
    with torch.no_grad():
        resid = tiled.run_blocks(0, last, tiled.resid(0))
    torch.testing.assert_close(resid, recorded.resid(last).repeat(4, 1, 1), rtol=1e-5, atol=1e-4)


def test_a_batch_as_large_as_it_is_long_is_not_confused() -> None:
    for family in KINDS:
        model: Any = tiny(family)
        inputs = inputs_for(model, POS, POS)
        inputs["attention_mask"][0, :3] = 0
        recorded = recorded_all(model, inputs)
        rows = [3, 0]
        with torch.no_grad():
            resid = recorded.run_blocks(0, recorded.n_blocks, recorded.resid(0)[rows], rows)
        whole = recorded.resid(recorded.n_blocks)[rows]
        torch.testing.assert_close(resid, whole, rtol=1e-5, atol=1e-4)


def test_selections_compose_and_share() -> None:
    model: Any = tiny("opt")
    recorded = recorded_all(model, padded(model, "left"))
    twice = recorded.tile(2).select([5, 0])  # example 2 of copy 1, example 0 of copy 0
    assert twice.batch == 2
    assert torch.equal(twice.resid(1), recorded.resid(1)[[2, 0]])
    masks = {id(call.kwargs["attention_mask"]) for call in twice.calls}
    assert len(masks) == 1, "blocks that shared a mask share its expansion"


def test_several_ablations_go_through_at_once() -> None:
    model: Any = tiny("llama", num_hidden_layers=3)
    hooked = HookedModel(model)
    inputs = padded(model, "left")
    recorded = recorded_all(model, inputs)
    heads = [Head(1, h) for h in range(4)]
    gate = (1 - torch.eye(4)).repeat_interleave(BATCH, 0)[:, None]  # [copy * batch, 1, head]
    tiled = recorded.tile(4)
    with torch.no_grad(), hooked.gated({"blocks.1.attn.hook_z": gate}):
        logits = tiled.head(tiled.run_blocks(1, 3, tiled.resid(1)))
    for copy, head in enumerate(heads):
        with hooked.ablated(Mask([head])):
            alone = output_of(model, inputs)
        part = logits[copy * BATCH : (copy + 1) * BATCH]
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(part, output_of(model, inputs), atol=1e-3)


# Hooks, gradients


@pytest.mark.parametrize("family", [*DECODERS, *TWO_STACKS])
def test_components_removed_in_a_segment_are_removed_from_the_forward(family: str) -> None:
    model: Any = tiny(family)
    hooked = HookedModel(model)
    stack = "decoder" if family in TWO_STACKS else ""
    here = [c for c in hooked.components if c.layer == 1 and c.stack in (stack, "cross")]
    removed: list[Component] = [c for c in here if not isinstance(c, Head | FFN) or c == here[0]]
    removed = removed or here[:1]
    inputs = padded(model, "left")
    clean = output_of(model, inputs)
    recorded = record(model, inputs, keep=[1])
    with hooked.ablated(Mask(removed)), torch.no_grad():
        resid = recorded.run_blocks(1, recorded.n_blocks, recorded.resid(1))
        logits = recorded.head(resid)
        whole = output_of(model, inputs)
    assert torch.equal(logits, whole)
    assert not torch.equal(logits, clean)


def test_recording_inside_a_context_is_of_the_ablated_forward() -> None:
    model: Any = tiny("opt")
    hooked, inputs = HookedModel(model), padded(model, "right")
    with hooked.ablated(Mask([Head(0, 1), FFN(2)])):
        recorded = recorded_all(model, inputs)
        whole = output_of(model, inputs)
        logits = recorded.head(recorded.run_blocks(0, 3, embed(model, inputs)))
    assert torch.equal(logits, whole)
    assert torch.equal(recorded.head(recorded.resid(3)), whole)


def test_what_a_user_hook_adds_to_the_stream_is_added_once() -> None:
    model: Any = tiny("gpt2")
    inputs = padded(model, "left")
    block = model.transformer.h[1]
    block.register_forward_pre_hook(lambda module, args: (args[0] + 1.0, *args[1:]))
    block.register_forward_hook(lambda module, args, output: output * 0.5)
    recorded = record(model, inputs, keep=[0, 1])
    whole = output_of(model, inputs)
    for first in (0, 1):
        with torch.no_grad():
            resid = recorded.run_blocks(first, 3, recorded.resid(first))
            assert torch.equal(recorded.head(resid), whole)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", [*KINDS, "gpt2", "mamba2", "mixtral", "bart"])
def test_gradients_of_a_segment_are_those_of_the_forward(family: str, checkpoint: bool) -> None:
    model: Any = tiny(family)
    inputs = padded(model, "left")
    recorded = record(model, inputs, keep=[0, 1])
    block = recorded.part.blocks[1]
    entering: list[Tensor] = []

    def keep_gradient(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        resid = args[0] if args else kwargs["hidden_states"]
        resid.retain_grad()
        entering.append(resid)

    with block.register_forward_pre_hook(keep_gradient, with_kwargs=True):
        model(**inputs).logits.square().mean().backward()
    whole = {name: p.grad for name, p in block.named_parameters()}
    model.zero_grad()

    resid = recorded.resid(1).clone().requires_grad_()
    last = recorded.run_blocks(1, recorded.n_blocks, resid, checkpoint=checkpoint)
    recorded.head(last).square().mean().backward()
    assert any(gradient is not None for gradient in whole.values())
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (whole[name] is None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, whole[name]), name
    assert torch.equal(resid.grad, entering[0].grad)


def test_gradients_pass_through_what_blocks_hand_on() -> None:
    """T5 computes one position bias in block 0 and hands it on: block 0 answers for all uses."""
    # fp64: where the bias needs a gradient, and where not, attention takes different kernels.
    model: Any = tiny("t5", dtype=torch.float64)
    inputs = padded(model, "right")
    bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    query = model.decoder.block[1].layer[0].SelfAttention.q.weight
    whole = torch.autograd.grad(model(**inputs).logits.square().mean(), [bias, query])
    recorded = record(model, inputs, keep=[0, 1])

    resid = recorded.run_blocks(0, 2, recorded.resid(0))
    parts = torch.autograd.grad(recorded.head(resid).square().mean(), [bias, query])
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-14)
    resid = recorded.run_blocks(1, 2, recorded.resid(1))
    parts = torch.autograd.grad(recorded.head(resid).square().mean(), query)
    torch.testing.assert_close(parts, whole[1:], rtol=1e-10, atol=1e-14)

    with torch.no_grad():  # a block that has changed since hands on what it is now
        bias += torch.randn_like(bias)
        resid = recorded.run_blocks(0, 2, recorded.resid(0))
        assert torch.equal(resid, record(model, inputs, keep=[2]).resid(2))


def test_embed_has_the_gradients_of_the_forward() -> None:
    model: Any = tiny("opt-350m")
    inputs = padded(model, "right")
    recorded = record(model, inputs)
    weight = model.get_input_embeddings().weight
    (whole,) = torch.autograd.grad(model(**inputs).logits.square().mean(), weight)
    resid = recorded.run_blocks(0, recorded.n_blocks, embed(model, inputs))
    (parts,) = torch.autograd.grad(recorded.head(resid).square().mean(), weight)
    assert torch.equal(parts, whole)


def test_recording_in_inference_mode_can_be_trained_on() -> None:
    model: Any = tiny("llama")
    with torch.inference_mode():
        recorded = record(model, padded(model, "left"), keep=[1])
    recorded.head(recorded.run_blocks(1, 2, recorded.resid(1))).mean().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None


# Placement


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # BART's top-level buffer
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["opt-350m", "llama", "gemma2", "mamba2", "falcon_h1", "bart"])
def test_offloaded_models_are_exact_and_stay_offloaded(
    family: str, where: str, tmp_path: Path
) -> None:
    model: Any = tiny(family)
    inputs = padded(model, "left")
    whole = output_of(model, inputs)
    names = [name for name, _ in (*model.named_children(), *model.named_buffers(recurse=False))]
    places = dict.fromkeys(names, where) | {"lm_head": "cpu"}
    dispatch_model(
        model,
        places,
        main_device="cpu",
        offload_dir=tmp_path,
        offload_buffers=True,
        force_hooks=True,
    )
    assert torch.equal(output_of(model, inputs), whole)
    state = {name: x.device.type for name, x in model.state_dict(keep_vars=True).items()}
    assert (set(state.values()) == {"cpu", "meta"}) == (where == "disk")

    recorded = recorded_all(model, inputs)
    with torch.no_grad():
        resid = embed(model, inputs)
        for i in range(recorded.n_blocks):
            assert torch.equal(resid, recorded.resid(i))
            resid = recorded.run_blocks(i, i + 1, resid)
        assert torch.equal(recorded.head(resid), whole)
    after = {name: x.device.type for name, x in model.state_dict(keep_vars=True).items()}
    assert after == state


@pytest.mark.parametrize("family", ["opt", "bert", "mamba"])
def test_blocks_computed_again_in_the_backward_pass_stay_offloaded(
    family: str, tmp_path: Path
) -> None:
    """torch would stop the second run before accelerate unloads the last module it ran."""
    model: Any = tiny(family).requires_grad_(False)
    inputs = padded(model, "left")
    gradients = []
    for _ in range(2):
        recorded = record(model, inputs)
        resid = recorded.resid(0).clone().requires_grad_()
        recorded.run_blocks(0, 2, resid, checkpoint=True).square().sum().backward()
        gradients.append(resid.grad)
        if len(gradients) == 1:
            disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(*gradients)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_tensor_of_the_model_itself_can_be_offloaded(tmp_path: Path) -> None:
    model: Any = tiny("bart")
    model.final_logits_bias += 3.0
    inputs = padded(model, "left")
    whole = output_of(model, inputs)
    disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    assert model.final_logits_bias.is_meta
    recorded = record(model, inputs)
    with torch.no_grad():
        start = embed(model, inputs)
        assert model.final_logits_bias.is_meta, "leaving a forward early must not skip unloading"
        resid = recorded.run_blocks(0, recorded.n_blocks, start)
        assert torch.equal(recorded.head(resid), whole)
    assert model.final_logits_bias.is_meta


# Nothing is left behind, nothing is guessed


def test_the_model_and_the_recording_are_as_before() -> None:
    model: Any = tiny("falcon")
    inputs = padded(model, "left")
    modules = dict(model.named_modules())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    recorded = recorded_all(model, inputs)
    before = [recorded.resid(i).clone() for i in range(3)]
    recorded.head(recorded.run_blocks(0, 2, recorded.resid(0)))
    assert all(torch.equal(recorded.resid(i), before[i]) for i in range(3))
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for run in (record, embed):
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            run(model, {"attention_mask": inputs["attention_mask"]})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refusals_say_what_to_do() -> None:
    model: Any = tiny("opt")
    inputs = padded(model, "right")
    recorded = record(model, inputs, keep=[1, 3])
    resid = recorded.resid(1)
    for call, words in [
        (lambda: recorded.run_blocks(2, 4, resid), "blocks 2 to 4: a segment lies within 0 to 3"),
        (lambda: recorded.run_blocks(2, 1, resid), "blocks 2 to 1"),
        (lambda: recorded.run_blocks(1, 2, resid[:2]), "resid of shape [2, 7, 32], recorded [3"),
        (lambda: recorded.run_blocks(1, 2, resid[:, :5]), "record() again for other tokens"),
        (lambda: recorded.select([0, 3]), "rows [0, 3]: give at least one, each within 0 to 2"),
        (lambda: recorded.select([]), "rows"),
        (lambda: recorded.select([True, False, True]), "a list of row numbers"),
        (lambda: recorded.tile(0), "0 copies"),
        (lambda: record(model, inputs, keep=[4, -1]), "keep=[-1, 4]: residual streams are 0 to 3"),
        (lambda: record(model, inputs, stack="decoder"), "stack 'decoder' of OPTForCausalLM"),
        (
            lambda: record(model, inputs | {"past_key_values": DynamicCache()}),
            "OPTDecoderLayer was given a cache as 'past_key_values'",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    with pytest.raises(LookupError, match=re.escape("resid(0) was not kept, only [1, 3]")):
        recorded.resid(0)


def test_masks_made_for_another_attention_are_refused() -> None:
    model: Any = tiny("llama")
    recorded = record(model, padded(model, "none"))  # sdpa: no mask, causal by a flag
    model.set_attn_implementation("eager")  # would look into the future
    with pytest.raises(ValueError, match="recorded under sdpa attention, the model is now set to"):
        recorded.run_blocks(0, 1, recorded.resid(0))


def test_heads_that_are_not_there_are_refused() -> None:
    encoder: Any = tiny("t5")
    recorded = record(encoder, padded(encoder, "right"), stack="encoder")
    with pytest.raises(ValueError, match="head of an encoder"):
        recorded.head(recorded.resid(0))
    opt: Any = tiny("opt")
    for bare in (tiny("bert-bare"), opt.model):
        recorded = record(bare, inputs_for(bare))
        with pytest.raises(ValueError, match="with its language-model head"):
            recorded.head(recorded.resid(0))


def test_an_argument_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("bloom")
    recorded = record(model, padded(model, "left"))
    monkeypatch.delitem(BATCHED, "alibi")
    words = "argument 'alibi' ([12, 1, 7]) of the blocks: there is no rule"
    with pytest.raises(ValueError, match=re.escape(words)):
        recorded.tile(2)


def test_blocks_that_do_not_follow_one_another_are_refused() -> None:
    inputs = padded(tiny("opt"), "right")

    model: Any = tiny("opt").train()
    model.model.decoder.layerdrop = 1.0
    with pytest.raises(ValueError, match=r"ran 0 of its 3 blocks.*call eval\(\) first"):
        record(model, inputs)

    model: Any = tiny("opt")
    model.model.decoder.layers[1] = model.model.decoder.layers[0]
    with pytest.raises(ValueError, match="runs block 0 after 1 blocks, not once in its turn"):
        record(model, inputs)

    model: Any = tiny("opt")

    class Louder(nn.ModuleList):
        """Blocks between which something happens to the residual stream."""

        def __iter__(self) -> Iterator[Any]:
            for block in super().__iter__():
                yield lambda resid, block=block, **kwargs: block(resid * 2, **kwargs)

    model.model.decoder.layers.__class__ = Louder
    with pytest.raises(ValueError, match="changes the residual stream between blocks 0 and 1"):
        record(model, inputs)


def test_an_anatomy_that_leaves_out_the_final_norm_is_refused() -> None:
    model: Any = tiny("llama")
    (row,) = ROWS["llama"].stacks
    without = Anatomy("llama", (Blocks(row.path, row.attention, ffn=row.ffn),))
    with pytest.raises(UnknownArchitecture, match="model of LlamaForCausalLM does more behind"):
        record(model, padded(model, "none"), anatomy=without)
