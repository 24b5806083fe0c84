"""Chosen heads' patterns equal those that eager attention returns."""

from __future__ import annotations

import pytest
import torch

from ablate import FFN, Head, HookedModel
from probes import rows as rows_module
from probes.patterns import patterns_of
from tests.families import inputs_for, tiny


@pytest.mark.parametrize("family", ["opt", "llama", "bert"])
@pytest.mark.parametrize("chunk", [100, 2**20])
def test_patterns_are_eager_ones(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(rows_module.CHUNK, "cpu", chunk)
    model = HookedModel(tiny(family))
    ids = inputs_for(model.model)["input_ids"][:1]
    heads = [Head(1, 2), Head(0, 3), Head(1, 0)]
    found = patterns_of(model, {"": ids}, heads)
    assert list(found) == heads
    eager = tiny(family, attention="eager")(ids, output_attentions=True)
    for head in heads:
        expected = eager.attentions[head.layer][0, head.head]
        assert found[head].shape == expected.shape
        assert torch.allclose(found[head], expected, atol=1e-5)


def test_an_encoder_decoders_heads():
    model = HookedModel(tiny("bart"))
    inputs = inputs_for(model.model)
    ids, start = inputs["input_ids"][:1], inputs["decoder_input_ids"][:1]
    heads = [Head(0, 1, "encoder"), Head(1, 0, "decoder"), Head(1, 1, "cross")]
    found = patterns_of(model, {"encoder": ids, "decoder": start}, heads)
    assert [tuple(p.shape) for p in found.values()] == [
        (ids.shape[1], ids.shape[1]),
        (start.shape[1], start.shape[1]),
        (start.shape[1], ids.shape[1]),
    ]
    for pattern in found.values():
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)


def test_what_has_no_pattern_is_refused():
    model = HookedModel(tiny("opt"))
    ids = inputs_for(model.model)["input_ids"]
    with pytest.raises(ValueError, match="the pattern of L0F asked for"):
        patterns_of(model, {"": ids[:1]}, [FFN(0)])
    with pytest.raises(ValueError, match="the pattern of L0H9 asked for"):
        patterns_of(model, {"": ids[:1]}, [Head(0, 9)])
    with pytest.raises(ValueError, match="patterns on 2 rows asked for"):
        patterns_of(model, {"": ids}, [Head(0, 0)])
