"""A sweep says what one forward a mask says, in every family, for every mask and fill."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ablate.components import FFN, Head, KVGroup, Mixer
from ablate.fills import Fill, mean_fill, resample_fill
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.sweep import Reading, next_tokens, sweep
from tests.ablate.one_by_one import (
    everywhere,
    few,
    logits_under,
    many_masks,
    padded,
    read_off,
)
from tests.families import FAMILIES, TWO_STACKS, inputs_for, tiny

HEADED = tuple(family for family in FAMILIES if family != "bert-bare")
# One of each way a block can be built: post-norm, ALiBi with the residual inside, parallel
# branches, shared keys, windows, experts, two stacks, SSMs alone and beside attention.
KINDS = ("opt-350m", "gpt2", "bloom", "phi", "gemma2", "mixtral", "bart", "mamba2", "falcon_h1")


def agree(
    model: HookedModel,
    masks: list[Mask],
    reading: Reading,
    fill: Any = "zero",
    logits: Tensor | None = None,
) -> None:
    """The sweep of one reading equals one forward a mask, to 1e-5 nats."""
    (swept,) = sweep(model, masks, [reading], fill=fill)
    logits = logits_under(model, masks, reading, fill) if logits is None else logits
    log_p, best = read_off(logits, reading)
    assert swept.log_p.shape == log_p.shape
    torch.testing.assert_close(swept.log_p, log_p, rtol=0, atol=1e-5)
    assert torch.equal(swept.best, best)
    assert (log_p - log_p[0]).abs().max() > 1e-2, "masks that change nothing"


@pytest.mark.parametrize(
    ("padding", "attention"),
    [("none", "sdpa"), ("left", "sdpa"), ("right", "eager")],
)
@pytest.mark.parametrize("family", HEADED)
def test_every_mask_in_every_family(family: str, padding: str, attention: str) -> None:
    model = HookedModel(tiny(family, attention=attention))
    inputs = padded(model.model, padding)
    masks = many_masks(model)
    logits = logits_under(model, masks, few(inputs))
    for reading in (few(inputs), everywhere(inputs)):
        agree(model, masks, reading, logits=logits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {"alibi": True, "new_decoder_architecture": False}),
        ("mistral", {"sliding_window": 3}),
        ("gemma2", {"sliding_window": 3, "final_logit_softcapping": 0.7}),
        ("opt", {"word_embed_proj_dim": 16}),
        ("falcon_h1", {"lm_head_multiplier": 0.3, "attention_out_multiplier": 0.5}),
        ("t5", {"num_layers": 3}),
        ("llama", {"num_hidden_layers": 1}),
        ("gpt2", {"n_layer": 6}),
    ],
)
def test_variants_of_a_family(family: str, changes: dict[str, Any]) -> None:
    model = HookedModel(tiny(family, **changes))
    inputs = padded(model.model, "left")
    for reading in (few(inputs), everywhere(inputs)):
        agree(model, many_masks(model), reading)


@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "bart", "falcon_h1"])
def test_bf16_is_as_near_to_its_own_forward_as_rounding_allows(family: str) -> None:
    """Another number of rows may round otherwise: by less than bf16 itself rounds."""
    model = HookedModel(tiny(family, dtype=torch.bfloat16))
    exact = HookedModel(tiny(family))
    inputs = padded(model.model, "left")
    masks = many_masks(model)
    for reading in (few(inputs), everywhere(inputs)):
        (swept,) = sweep(model, masks, [reading])
        log_p, _ = read_off(logits_under(model, masks, reading), reading)
        in_fp32, _ = read_off(logits_under(exact, masks, reading), reading)
        rounding = (log_p - in_fp32).abs().mean()
        assert swept.log_p.dtype == torch.float32
        assert 0 < rounding < 0.2
        assert (swept.log_p - log_p).abs().mean() <= rounding


def pooled(model: HookedModel, inputs: dict[str, Tensor]) -> Fill:
    return mean_fill(model, [inputs_for(model.model, 4, 11, seed=3)])


def per_position(model: HookedModel, inputs: dict[str, Tensor]) -> Fill:
    return mean_fill(model, [inputs_for(model.model, 4, 9, seed=3)], per_position=True)


def resampled(model: HookedModel, inputs: dict[str, Tensor]) -> Fill:
    return resample_fill(model, inputs, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fill", [pooled, per_position, resampled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", [*KINDS, "opt", "llama", "t5", "jamba"])
def test_every_fill(family: str, fill: Callable[..., Fill]) -> None:
    model = HookedModel(tiny(family))
    inputs = padded(model.model, "none" if fill is resampled else "right")
    for reading in (few(inputs), everywhere(inputs)):
        agree(model, many_masks(model)[::2], reading, fill(model, inputs))


@pytest.mark.parametrize("family", TWO_STACKS)
def test_decoder_rows_may_share_a_row_of_the_encoder(family: str) -> None:
    model = HookedModel(tiny(family))
    inputs = padded(model.model, "right")
    rows = torch.tensor([1, 0, 0, 2, 1])
    inputs["decoder_input_ids"] = inputs_for(model.model, 5, 8, seed=7)["decoder_input_ids"]
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    inputs["decoder_attention_mask"][3, -2:] = 0
    shared = replace(everywhere(inputs), source_rows=rows)
    agree(model, many_masks(model), shared)


def test_key_value_groups_stand_for_their_heads() -> None:
    model = HookedModel(tiny("llama"))
    masks = [Mask(), Mask([KVGroup(0, 1), FFN(1)]), Mask([Head(0, 2), Head(0, 3), FFN(1)])]
    reading = few(padded(model.model, "none"))
    agree(model, masks, reading)
    (swept,) = sweep(model, masks, [reading])
    assert torch.equal(swept.log_p[1], swept.log_p[2])


@pytest.mark.parametrize("family", ["opt", "llama", "bart", "mamba2", "bloom"])
def test_inside_a_context_the_model_is_measured_as_it_stands(family: str) -> None:
    model = HookedModel(tiny(family))
    outer = Mask(model.components[1::3])
    masks = many_masks(model)[::5] + [Mask(model.components)]
    inputs = padded(model.model, "left")
    gates = {site.name: torch.tensor(0.5) for site in model.sites[::2]}
    for reading in (few(inputs), everywhere(inputs)):
        with model.ablated(outer):
            agree(model, masks, reading)
            (inside,) = sweep(model, masks, [reading])
        (both,) = sweep(model, [mask | outer for mask in masks], [reading])
        torch.testing.assert_close(inside.log_p, both.log_p, rtol=0, atol=1e-5)
        with model.gated(gates):
            agree(model, masks, reading)
        fill = pooled(model, inputs)
        with model.ablated(outer, fill):
            agree(model, masks, reading)


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "falcon_h1"])
def test_what_a_context_does_at_each_position_it_goes_on_doing(family: str) -> None:
    model = HookedModel(tiny(family, attention="eager"))
    inputs, masks = padded(model.model, "none"), many_masks(model)[::3]
    generator = torch.Generator().manual_seed(0)
    gates = {
        site.name: torch.rand((9, site.width) if site.kind == "head" else (9,), generator=generator)
        for site in model.sites
    }
    fill = per_position(model, inputs)
    patterns = [name for name in model.hook_names if name.endswith("pattern")]
    for reading in (few(inputs), everywhere(inputs)):
        with model.gated(gates):
            agree(model, masks, reading)
        with model.ablated(Mask([model.components[-1]]), fill), model.capture(patterns):
            agree(model, masks, reading)


def test_a_hook_of_the_user_s_own_acts_once() -> None:
    model = HookedModel(tiny("opt"))
    inputs, masks = padded(model.model, "left"), many_masks(model)[::3]
    projection = model.model.model.decoder.layers[1].self_attn.out_proj
    projection.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    projection.register_forward_hook(lambda module, args, out: out + 0.3)
    for reading in (few(inputs), everywhere(inputs)):
        agree(model, masks, reading)


def test_readings_may_differ_in_everything() -> None:
    model = HookedModel(tiny("opt"))
    readings = [few(padded(model.model, "none"))]
    readings += [everywhere(inputs_for(model.model, rows, pos)) for rows, pos in ((1, 5), (4, 12))]
    masks = many_masks(model)
    for reading, swept in zip(readings, sweep(model, masks, readings), strict=True):
        log_p, _ = read_off(logits_under(model, masks, reading), reading)
        torch.testing.assert_close(swept.log_p, log_p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", [1, 200_000])
@pytest.mark.parametrize("family", ["opt", "gpt2", "bart", "mamba"])
def test_small_pieces_make_the_same_whole(family: str, memory: int) -> None:
    """Rows of one mask apart, masks apart, logits apart: whatever fits."""
    model = HookedModel(tiny(family))
    masks = many_masks(model)[::6]
    left, plain = padded(model.model, "left"), padded(model.model, "none")
    asked = [(few(left), "zero"), (everywhere(left), "zero")]
    asked += [(read(plain), resampled(model, plain)) for read in (few, everywhere)]
    for reading, fill in asked:
        (swept,) = sweep(model, masks, [reading], fill=fill, memory=memory)
        (whole,) = sweep(model, masks, [reading], fill=fill)
        torch.testing.assert_close(swept.log_p, whole.log_p, rtol=0, atol=1e-5)
        assert torch.equal(swept.best, whole.best)


def test_next_tokens_reads_what_is_no_padding() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    reading = next_tokens({"input_ids": ids, "attention_mask": mask})
    assert reading.positions.tolist() == [[0, 2], [1, 0], [1, 1]]
    assert reading.targets.tolist() == [6, 8, 9]
    assert len(next_tokens({"input_ids": ids}).targets) == 6
    # Of an encoder-decoder, the tokens of the decoder.
    decoder = {"decoder_input_ids": ids[:, ::2], "decoder_attention_mask": mask[:, ::2]}
    reading = next_tokens({"input_ids": ids, "attention_mask": mask} | decoder)
    assert reading.positions.tolist() == [[1, 0]]
    assert reading.targets.tolist() == [9]


def test_the_caller_s_gradient_mode_is_its_own() -> None:
    model = HookedModel(tiny("opt"))
    readings = [few(padded(model.model, "none"))] * 2
    sweeping = sweep(model, [Mask()], readings)
    next(sweeping)
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        swept = next(sweeping)
        assert torch.is_inference_mode_enabled()
    swept.log_p.requires_grad_()  # no inference tensor
    assert not any(parameter.grad is not None for parameter in model.model.parameters())


def test_nothing_is_written_to() -> None:
    model = HookedModel(tiny("llama"))
    inputs = padded(model.model, "left")
    reading = few(inputs)
    before = {name: x.clone() for name, x in inputs.items()}
    weights = {name: p.clone() for name, p in model.model.named_parameters()}
    list(sweep(model, many_masks(model), [reading], fill=pooled(model, inputs)))
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    assert all(torch.equal(p, weights[n]) for n, p in model.model.named_parameters())


def test_refusals_say_what_to_do() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))

    def ask(masks: list[Mask], model: HookedModel = model, **options: Any) -> None:
        list(sweep(model, masks, [replace(reading, **options)]))

    for masks, options, words in [
        ([], {}, "a sweep over no masks asked for: give at least one"),
        ([Mask([Head(3, 0)])], {}, "no head L3H0 in opt: layers run 0–2"),
        ([Mask([Mixer(0)])], {}, "no mixer L0M in opt"),
        ([Mask()], {"positions": torch.tensor([[0, 9]] * 6)}, "position [0, 9] of a batch of [3,"),
        ([Mask()], {"positions": torch.tensor([[3, 0]] * 6)}, "position [3, 0]"),
        ([Mask()], {"positions": torch.tensor([[0, -1]] * 6)}, "position [0, -1]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            ask(masks, **options)
    model.model.train()
    with pytest.raises(ValueError, match=r"training mode asked for: call \.eval\(\)"):
        ask([Mask()])
    bare = HookedModel(tiny("bert-bare"))
    with pytest.raises(ValueError, match="BertModel asked for: it has no language-model head"):
        ask([Mask()], bare)


@pytest.mark.usefixtures("unchecked")
def test_arguments_of_another_kind_are_refused() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))
    with pytest.raises(ValueError, match="no fill 'mean': use 'zero'"):
        list(sweep(model, [Mask()], [reading], fill="mean"))
    with pytest.raises(ValueError, match="is no mask"):
        list(sweep(model, [Head(0, 1)], [reading]))
    for changes, words in [
        ({"positions": torch.empty(0, 2).long()}, r"give at least one \(row, position\)"),
        ({"targets": torch.tensor([1])}, "1 targets at 6 positions"),
    ]:
        with pytest.raises(ValueError, match=words):
            list(sweep(model, [Mask()], [replace(reading, **changes)]))


def test_a_fill_that_does_not_fit_is_refused() -> None:
    model = HookedModel(tiny("opt"))
    fill = mean_fill(model, [inputs_for(model.model, 4, 5)], per_position=True)
    for reading in (few(padded(model.model, "none")), everywhere(padded(model.model, "none"))):
        with pytest.raises(ValueError, match="use a pooled mean"):
            list(sweep(model, [Mask([Head(2, 1)])], [reading], fill=fill))
