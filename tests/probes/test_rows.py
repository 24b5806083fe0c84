"""Rows seen in the forward equal the patterns that eager attention forms, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from ablate import HookedModel
from probes import fused
from probes import rows as rows_module
from probes.rows import Rows, watched
from tests.families import FAMILIES, inputs_for, output_of, tiny

ATTENDING = [name for name in FAMILIES if "mamba" not in name]


def patterns(model: HookedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's answer, and site -> the pattern put together from its rows."""
    seen: dict[str, list[Tensor]] = {}

    def see(rows: Rows) -> None:
        parts = seen.setdefault(rows.site.name, [])
        assert rows.first == sum(p.shape[2] for p in parts)
        parts.append(rows.pattern())
        assert torch.equal(rows.most(), rows.pattern().argmax(-1))

    with watched(model, see):
        output = output_of(model.model, inputs)
    joined = {}
    for name, parts in seen.items():
        width = max(p.shape[-1] for p in parts)
        joined[name] = torch.cat([pad(p, (0, width - p.shape[-1])) for p in parts], dim=2)
    return output, joined


@pytest.mark.parametrize("family", ATTENDING)
@pytest.mark.parametrize("chunk", [200, 2**20])
def test_rows_equal_the_eager_pattern(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(rows_module.CHUNK, "cpu", chunk)
    model = HookedModel(tiny(family))
    for padded in (False, True):
        inputs = inputs_for(model.model, padded=padded)
        whole = output_of(model.model, inputs)
        output, found = patterns(model, inputs)
        assert torch.equal(output, whole)
        eager = HookedModel(tiny(family, attention="eager"))
        names = {s.name: s.name.replace("hook_z", "hook_pattern") for s in model.sites}
        names = {name: names[name] for name in found}
        with eager.capture(names.values()) as cache:
            output_of(eager.model, inputs)
        assert set(found) == {s.name for s in model.sites if s.kind == "head"}
        if family == "falcon-rw":  # transformers adds ALiBi twice there under eager
            continue
        for name, pattern in found.items():
            assert torch.allclose(
                pattern, cache[names[name]], atol=1e-4 if "t5" in family else 1e-5
            )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gathered", [0, 10**6])
def test_entries_are_those_of_the_pattern(
    attention: str, gathered: int, monkeypatch: pytest.MonkeyPatch
):
    """Later keys, which nobody attends to, among them."""
    monkeypatch.setattr(fused, "GATHERED", gathered)
    model = HookedModel(tiny("llama", attention=attention))
    inputs = inputs_for(model.model)
    keys = torch.randint(-1, 9, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    checked = []

    def see(rows: Rows) -> None:
        entries = rows.at(keys)
        assert rows.queries == 9
        if attention == "sdpa":  # nothing of a pattern's size was formed for it
            assert ("scores" in vars(rows)) == bool(gathered)
        pattern = rows.pattern()
        for b, h, q, e in torch.cartesian_prod(*map(torch.arange, entries.shape)).tolist():
            key = int(keys[b, q, e])
            expected = pattern[b, h, q, key] if key >= 0 else 0.0
            assert entries[b, h, q, e] == pytest.approx(float(expected), abs=1e-6)
        checked.append(rows.site)

    with watched(model, see):
        output_of(model.model, inputs)
    assert len(checked) == 2


@pytest.mark.parametrize("family", ATTENDING)
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_entries_are_those_of_the_scores(
    family: str, padded: bool, monkeypatch: pytest.MonkeyPatch
):
    """Grouped keys, windows, masks, position biases: every family, a few queries at a time."""
    monkeypatch.setattr(fused, "GATHERED", 0)
    monkeypatch.setitem(rows_module.CHUNK, "cpu", 200)
    model = HookedModel(tiny(family))
    generator = torch.Generator().manual_seed(0)

    def see(rows: Rows) -> None:
        batch, _, _, width = (rows.asked.key if rows.asked else rows.scores).shape
        keys = rows.asked.key.shape[2] if rows.asked else width
        some = torch.randint(-1, keys, (batch, rows.queries, 4), generator=generator)
        entries, pattern = rows.at(some), rows.pattern()
        pattern = pad(pattern, (1, keys - pattern.shape[-1]))  # key −1 stands in front
        expected = pattern.gather(-1, 1 + some[:, None].expand(-1, pattern.shape[1], -1, -1))
        assert torch.allclose(entries, expected, atol=1e-6)

    with watched(model, see):
        output_of(model.model, inputs_for(model.model, padded=padded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_normaliser_is_that_of_all_scores(dtype: torch.dtype):
    """And it is there: without it every measure would form all scores."""
    model = HookedModel(tiny("opt", dtype=dtype))

    def see(rows: Rows) -> None:
        assert rows.asked is not None
        assert rows.asked.lse is not None
        assert torch.allclose(rows.asked.lse, rows.scores.logsumexp(-1), atol=1e-5)

    with watched(model, see):
        output_of(model.model, inputs_for(model.model))


def test_a_kernel_that_keeps_its_normaliser_to_itself(monkeypatch: pytest.MonkeyPatch):
    model = HookedModel(tiny("llama"))
    inputs = inputs_for(model.model)
    told = patterns(model, inputs)[1]
    monkeypatch.setattr(fused, "TELLING", ())
    untold = patterns(model, inputs)[1]
    assert all(torch.allclose(told[name], untold[name], atol=1e-6) for name in told)


@pytest.mark.parametrize("family", ["opt", "falcon", "t5", "gemma2"])
def test_nothing_is_left_behind_an_error(family: str):
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model)
    whole = output_of(model.model, inputs)

    def see(rows: Rows) -> None:
        raise LookupError("not today")

    with pytest.raises(LookupError, match="not today"), watched(model, see):
        output_of(model.model, inputs)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.model.modules()]
    assert not any(hooks)
    assert torch.equal(output_of(model.model, inputs), whole)


def test_what_cannot_be_watched_is_refused():
    with (
        pytest.raises(ValueError, match="mamba has no attention"),
        watched(HookedModel(tiny("mamba")), print),
    ):
        pass
    model = HookedModel(tiny("llama"))
    model.model.config._attn_implementation = "flex_attention"
    with (
        pytest.raises(ValueError, match="'flex_attention', which cannot be watched"),
        watched(model, print),
    ):
        pass


def test_an_attention_that_does_not_call_sdpa_is_reported():
    model = HookedModel(tiny("llama"))
    inputs = inputs_for(model.model)
    message, config = "seen 0 times, expected 1", model.model.config
    with pytest.raises(RuntimeError, match=message), watched(model, lambda rows: None):
        _ = setattr(config, "_attn_implementation", "eager"), output_of(model.model, inputs)


def test_another_call_of_sdpa_is_nobodys():
    model = HookedModel(tiny("llama"))
    seen: list[str] = []
    with watched(model, lambda rows: seen.append(rows.site.name)):
        output_of(model.model, inputs_for(model.model))
        x = torch.ones(1, 4, 3, 8)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert seen == [site.name for site in model.sites if site.kind == "head"]


def test_in_half_precision_rows_are_close():
    model = HookedModel(tiny("llama", dtype=torch.bfloat16))
    inputs = inputs_for(model.model)
    eager = HookedModel(tiny("llama", attention="eager", dtype=torch.bfloat16))
    ours, theirs = patterns(model, inputs)[1], patterns(eager, inputs)[1]
    assert all(torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5) for p in ours.values())
    first = model.sites[0].name  # further up the two streams differ
    assert torch.allclose(ours[first], theirs[first], atol=2e-2)
