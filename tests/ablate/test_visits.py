"""A mask costs what lies above its lowest component: rows and tokens are counted, not seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ablate.components import FFN, Component, Head
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.sweep import Reading, sweep
from ablate.visits import Known, watched
from tests.ablate.one_by_one import everywhere, few, padded
from tests.families import inputs_for, output_of, tiny

B, T = 3, 9
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Tokens that went through each module, by path."""
    tokens: Counter[str] = Counter()
    handles = []
    for path, module in model.named_modules():

        def count(m: Any, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            tokens[path] += x[..., 0].numel()

        if "layers." in path or path == "lm_head":
            handles.append(module.register_forward_hook(count, with_kwargs=True))
    yield tokens
    for handle in handles:
        handle.remove()


def work(model: HookedModel, masks: list[Mask], reading: Reading) -> Counter[str]:
    """Tokens through each module, in rows of T, beyond the recorded forward and the measuring."""
    with counted(model.model) as recording:
        list(sweep(model, [Mask()], [reading]))
    sweeping = sweep(model, masks, [reading, reading])
    next(sweeping)  # measures
    with counted(model.model) as tokens:
        next(sweeping)
    for path, count in recording.items():
        if path != "lm_head":
            tokens[path] -= count
    return tokens


def layer(tokens: Counter[str], number: int, *names: str) -> list[int]:
    return [tokens[f"model.decoder.layers.{number}.{name}".rstrip(".")] for name in names]


def test_nothing_below_a_component_and_no_other_head_beside_it_is_computed() -> None:
    model = HookedModel(tiny("opt"))
    reading = everywhere(padded(model.model, "none"))
    heads: list[Component] = [Head(1, 0), Head(1, 2), Head(1, 3)]
    tokens = work(model, [Mask([head]) for head in heads], reading)
    rows = 3 * B * T
    assert layer(tokens, 0, "", "fc1", *(f"self_attn.{name}" for name in ATTENTION)) == [0] * 6
    # In their own block they begin at W_O: queries, keys and values are those of the whole model.
    assert layer(tokens, 1, "", "fc1") == [rows] * 2
    assert layer(tokens, 1, *(f"self_attn.{name}" for name in ATTENTION)) == [0, 0, 0, rows]
    assert layer(tokens, 2, "fc1", *(f"self_attn.{name}" for name in ATTENTION)) == [rows] * 5
    assert tokens["lm_head"] == rows


def test_an_ffn_s_own_block_begins_at_its_projection() -> None:
    model = HookedModel(tiny("opt"))
    tokens = work(model, [Mask([FFN(1)])], everywhere(padded(model.model, "none")))
    assert layer(tokens, 1, *(f"self_attn.{name}" for name in ATTENTION)) == [0, 0, 0, B * T]
    assert layer(tokens, 2, "self_attn.q_proj") == [B * T]


def test_the_end_is_computed_where_it_is_read() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))
    masks = [Mask([Head(1, 0)]), Mask([Head(2, 1)]), Mask([FFN(2)])]
    tokens = work(model, masks, reading)
    read, chosen = 5, 3 * 2  # different places; three rows, each with as many as the longest
    assert tokens["lm_head"] == 3 * read
    # Of the mask from below, keys and values of all tokens, the rest at the chosen positions.
    assert layer(tokens, 2, "self_attn.k_proj", "self_attn.v_proj") == [B * T + chosen] * 2
    assert layer(tokens, 2, "self_attn.out_proj", "fc1") == [3 * chosen] * 2
    assert layer(tokens, 1, "fc1") == [B * T]


def test_the_whole_model_s_logits_are_made_if_asked_for() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))
    assert work(model, [Mask([Head(1, 0)])], reading)["lm_head"] == 5
    assert work(model, [Mask([Head(1, 0)]), Mask(), Mask()], reading)["lm_head"] == 10


def test_masks_that_agree_share_their_way() -> None:
    model = HookedModel(tiny("opt"))
    reading = everywhere(padded(model.model, "none"))
    low, middle, high = Head(0, 0), Head(1, 1), FFN(2)
    masks = [Mask([low]), Mask([low, middle]), Mask([low, middle, high]), Mask([low])]
    tokens = work(model, masks, reading)
    assert [layer(tokens, i, "")[0] // (B * T) for i in range(3)] == [1, 2, 3]
    assert tokens["lm_head"] == 3 * B * T
    alike = [Mask([low])] * 50
    assert work(model, alike, reading) == work(model, alike[:1], reading)


@pytest.mark.parametrize(
    ("family", "inside"),
    [
        ("llama", "self_attn.q_proj"),
        ("gpt2", "attn.c_attn"),
        ("gpt_neox", "attention.query_key_value"),
        ("bert", "attention.self.query"),
        ("bart", "encoder.layers.1.self_attn.q_proj"),
        ("t5", "SelfAttention.q"),
        ("falcon", "self_attention.query_key_value"),
        ("mamba2", "mixer.in_proj"),
        ("jamba", "mamba.in_proj"),
        ("falcon_h1", "mamba.in_proj"),
        ("falcon_h1", "self_attn.k_proj"),
    ],
)
def test_rows_that_leave_the_whole_model_do_not_compute_their_mixing_again(
    family: str, inside: str
) -> None:
    model = HookedModel(tiny(family))
    reading = everywhere(inputs_for(model.model))
    there = [m for path, m in model.model.named_modules() if path.endswith(inside)][-1]
    (path,) = (path for path, m in model.model.named_modules() if m is there)
    site = next(s for s in model.sites if path.startswith(f"{s.block}.") and s.kind != "ffn")
    calls = []
    with there.register_forward_hook(lambda *_: calls.append(0)):
        output_of(model.model, dict(reading.inputs))
        whole = len(calls)
        list(sweep(model, [Mask([c]) for c in site.components], [reading]))
    assert whole == 1
    assert len(calls) <= 2 + (family == "t5"), "beyond the forward that is recorded"


def test_where_a_module_does_more_behind_its_projection_it_is_called_whole() -> None:
    """Bloom adds the residual inside its attention: known z would not be its answer."""
    model: Any = tiny("bloom")
    hooked = HookedModel(model)
    with watched(model, hooked.sites) as known:
        output_of(model, inputs_for(model))
    assert {one.ends_in for one in known.values()} == {""}
    for family, ends in (("opt", "y"), ("mamba", "y"), ("bert", "x"), ("t5", "y")):
        model = tiny(family)
        with watched(model, HookedModel(model).sites) as known:
            output_of(model, inputs_for(model))
        assert {one.ends_in for one in known.values()} == {ends}, family
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_part_of_a_projection_is_not_the_projection() -> None:
    x, y = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    for answer, ends in ((y[:, :2], ""), (y + 0, ""), (x, ""), (y.view_as(y), "y")):
        known = Known(nn.Identity(), nn.Identity())
        known.entered(known.out, (x,))
        known.projected(known.out, (x,), y)
        known.answered(known.owner, (), (answer, None))
        assert known.ends_in == ends
        assert known.rest == (None,)


def test_inside_a_context_nothing_is_taken_for_known() -> None:
    model = HookedModel(tiny("opt"))
    reading = everywhere(padded(model.model, "none"))
    with model.ablated(Mask([Head(0, 0)])):
        tokens = work(model, [Mask([Head(1, 0)])], reading)
    assert layer(tokens, 1, "self_attn.q_proj") == [B * T]
    assert layer(tokens, 0, "self_attn.q_proj") == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_keep_the_model_s_dtype(dtype: torch.dtype) -> None:
    model = HookedModel(tiny("llama", dtype=dtype))
    seen = set()
    model.model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    list(sweep(model, [Mask([Head(0, 1)]), Mask([FFN(0)])], [few(padded(model.model, "left"))]))
    assert seen == {dtype}
