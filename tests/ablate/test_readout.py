"""Log-probabilities at chosen places: those of plain logits, in any order and any pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablate import readout
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.readout import Wanted, log_p_of, read, target_log_p
from ablate.stack import record
from ablate.sweep import sweep
from tests.ablate.one_by_one import everywhere, few, logits_under, padded, read_off
from tests.families import TWO_STACKS, tiny

ROWS, POS = 4, 6


@given(
    places=st.lists(
        st.tuples(st.integers(0, ROWS - 1), st.integers(0, POS - 1)), min_size=1, max_size=20
    )
)
def test_what_is_wanted_is_found_again(places: list[tuple[int, int]]) -> None:
    positions = torch.tensor(places)
    wanted = Wanted.of(positions, torch.arange(len(places)), (ROWS, POS))
    resid = torch.arange(float(ROWS * POS)).view(ROWS, POS, 1)
    asked = torch.tensor([row * POS + position for row, position in places])
    assert len(wanted.slots) == len(set(places)), "a place is computed once"
    assert torch.equal(wanted.pick(resid)[wanted.slot_of, 0], asked)
    most = max(len({p for r, p in places if r == row}) for row in range(ROWS))
    assert wanted.chosen.shape == (ROWS, most)
    for row in {row for row, _ in places}:
        here = sorted({p for r, p in places if r == row})
        assert wanted.chosen[row].tolist() == here + here[-1:] * (most - len(here))
    chosen = resid[torch.arange(ROWS)[:, None], wanted.chosen]
    assert torch.equal(wanted.narrowed(chosen)[wanted.slot_of, 0], asked)


@pytest.mark.parametrize("normalised", [1, 30, 2**21])
def test_target_log_p_is_log_softmax_and_arg_max(
    normalised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "NORMALISED", normalised)  # 1, 3 and all slots at a time
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 10, generator=generator)
    slot = torch.tensor([6, 0, 3, 3, 0, 5, 2, 3, 6])  # unsorted, repeated, some left out
    target = logits.argmax(-1)[slot]
    target[::2] = (target[::2] + 1) % 10
    log_p, best = target_log_p(logits, slot, target)
    torch.testing.assert_close(log_p, logits.log_softmax(-1)[slot, target])
    assert best.tolist() == [False, True] * 4 + [False]


def test_of_equal_logits_the_first_is_the_arg_max() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    slot = torch.tensor([0, 0, 0, 1, 1])
    _, best = target_log_p(logits, slot, torch.tensor([2, 1, 3, 0, 3]))
    assert best.tolist() == [False, True, False, True, False]
    log_p, best = target_log_p(torch.full((1, 3), torch.nan), slot[:1], torch.tensor([0]))
    assert log_p.isnan().all()
    assert not best.any(), "not a number is no answer"


def test_bf16_logits_are_normalised_in_fp32() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    slot, target = torch.arange(3), torch.tensor([4, 5, 6])
    log_p, _ = target_log_p(logits, slot, target)
    assert torch.equal(log_p, logits.float().log_softmax(-1)[slot, target])


@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
@pytest.mark.parametrize("family", ["opt-350m", "gemma2", "t5"])
def test_many_streams_in_pieces(family: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "SLOTS", 1)
    monkeypatch.setattr(readout, "LOGITS", at_once * 61)
    model: Any = tiny(family)
    inputs = padded(model, "left")
    recorded = record(model, inputs, keep=[2, 3] if family == "opt-350m" else [2])
    resid = recorded.resid(2)
    sizes = []
    head = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: sizes.append(out[..., 0].numel())
    )
    for reading in (few(inputs), everywhere(inputs)):
        wanted = Wanted.of(reading.positions, reading.targets, recorded.shape[:2])
        streams = [resid, resid * 0.5, resid.flip(0)]
        with torch.no_grad():
            logits = torch.stack([recorded.head(stream) for stream in streams])
            sizes.clear()
            log_p, best = read(recorded, [wanted.pick(x) for x in streams], wanted, 2**30)
        expected = read_off(logits, reading)
        torch.testing.assert_close(log_p, expected[0], rtol=0, atol=1e-5)
        assert torch.equal(best, expected[1])
        assert max(sizes) <= at_once
        assert sum(sizes) == 3 * len(wanted.slots), "no logits but those that are read"
    head.remove()


def test_memory_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("opt")
    inputs = padded(model, "none")
    recorded = record(model, inputs, keep=[3])
    reading = everywhere(inputs)
    wanted = Wanted.of(reading.positions, reading.targets, recorded.shape[:2])
    sizes = []
    model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.nbytes))
    with torch.no_grad():
        read(recorded, [wanted.pick(recorded.resid(3))] * 4, wanted, 16 * 61 * 5)
    assert max(sizes) == 5 * 61 * 4


@pytest.mark.parametrize("family", ["opt", "gemma2", "falcon_h1", *TWO_STACKS])
def test_log_p_of_has_the_gradients_of_a_plain_forward(family: str) -> None:
    model: Any = tiny(family)
    hooked, inputs = HookedModel(model), padded(model, "left")
    reading = few(inputs)
    row, position = reading.positions.unbind(1)
    weights = [p for p in model.parameters() if p.requires_grad]
    with hooked.ablated(Mask(hooked.components[:2])):
        log_p = log_p_of(model, inputs, reading.positions, reading.targets)
        found = torch.autograd.grad(log_p.sum(), weights, allow_unused=True)
        plain = model(**inputs).logits.log_softmax(-1)[row, position, reading.targets]
        expected = torch.autograd.grad(plain.sum(), weights, allow_unused=True)
    torch.testing.assert_close(log_p, plain, rtol=0, atol=1e-5)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_log_p_of_is_what_a_sweep_reads() -> None:
    model = HookedModel(tiny("llama"))
    reading = few(padded(model.model, "none"))
    log_p = log_p_of(model.model, reading.inputs, reading.positions, reading.targets)
    (swept,) = sweep(model, [Mask()], [reading])
    torch.testing.assert_close(log_p.detach(), swept.log_p[0], rtol=0, atol=1e-6)
    expected, _ = read_off(logits_under(model, [Mask()], reading), reading)
    torch.testing.assert_close(log_p.detach(), expected[0], rtol=0, atol=1e-5)
