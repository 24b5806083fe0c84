"""A block at a few positions equals the block everywhere, read there; `can` says where it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ablate.anatomy import BY_POSITION_IDS
from ablate.narrow import Narrow, can
from ablate.stack import record
from tests.ablate.one_by_one import padded
from tests.families import FAMILIES, inputs_for, tiny

NARROWED = tuple(f for f in FAMILIES if tiny(f).config.model_type in BY_POSITION_IDS)
POSITIONS = torch.tensor([[8, 3], [2, 2], [5, 8]])  # of three rows; one repeats


def tree(model: Any) -> dict[str, Tensor]:
    """Two branches behind a common beginning: 0–3, then 4–6 or 7–8, told by mask and positions."""
    inputs = inputs_for(model, 3, 9)
    seen = torch.ones(9, 9).tril().bool()
    seen[7:, 4:7] = False
    mask = torch.zeros(3, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5]]).expand(3, -1)
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": ids}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["none", "left", "tree"])
@pytest.mark.parametrize("family", NARROWED)
def test_equals_the_whole_block_at_these_positions(
    family: str, layout: str, attention: str
) -> None:
    model: Any = tiny(family, attention=attention)
    inputs = tree(model) if layout == "tree" else padded(model, layout)
    recorded = record(model, inputs, keep=[0])
    for call in (recorded.calls[0], recorded.calls[-1]):
        assert can(model, call)
        with torch.no_grad():
            resid = recorded.resid(0)
            (whole, *_) = call.run((resid,))
            narrow = Narrow(call, POSITIONS)
            known = narrow.keys_values(resid)
            found = narrow.run(narrow.pick(resid), known, 9)
        expected = torch.stack([whole[row, at] for row, at in enumerate(POSITIONS)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [3, 20])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_is_kept(family: str, window: int) -> None:
    model: Any = tiny(family, sliding_window=window)
    recorded = record(model, padded(model, "left"), keep=[0])
    call, resid = recorded.calls[0], recorded.resid(0)
    narrow = Narrow(call, POSITIONS)
    with torch.no_grad():
        whole = call.run((resid,))[0]
        found = narrow.run(narrow.pick(resid), narrow.keys_values(resid), 9)
    expected = torch.stack([whole[row, at] for row, at in enumerate(POSITIONS)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_keys_and_values_are_taken_before_the_block_does_more() -> None:
    model: Any = tiny("opt")
    recorded = record(model, padded(model, "none"), keep=[2])
    layer, called = model.model.decoder.layers[2], []
    layer.fc1.register_forward_hook(lambda *_: called.append("fc1"))
    layer.self_attn.out_proj.register_forward_hook(lambda *_: called.append("out_proj"))
    keys, values = Narrow(recorded.calls[2], POSITIONS).keys_values(recorded.resid(2))
    assert not called
    heads = keys.transpose(1, 2).flatten(2)
    normed = layer.self_attn_layer_norm(recorded.resid(2))
    torch.testing.assert_close(heads, layer.self_attn.k_proj(normed))
    assert values.shape == keys.shape


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NARROWED])
def test_other_families_may_not(family: str) -> None:
    """They know places by ALiBi, by recurrence, or look to both sides."""
    model: Any = tiny(family)
    assert not can(model, record(model, padded(model, "left")).calls[-1])


def test_an_argument_without_a_rule_forbids_it() -> None:
    model: Any = tiny("llama")
    call = record(model, padded(model, "left")).calls[-1]
    call.kwargs["alibi"] = torch.zeros(12, 1, 9)
    assert not can(model, call)
    model.config._attn_implementation = "flash_attention_2"
    assert not can(model, record(tiny("llama"), padded(model, "left")).calls[-1])
