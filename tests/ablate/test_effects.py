"""Leave-one-out: by hand, on a circuit whose effects are known, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ablate.components import FFN, Component, Head, KVGroup, Mixer
from ablate.effects import leave_one_out
from ablate.fills import mean_fill
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.sweep import Reading, next_tokens
from tests.ablate.one_by_one import few, logits_under, padded, read_off
from tests.families import TWO_STACKS, tiny
from tests.induction_model import VOCAB, induction_opt, repeated_tokens

SECOND = VOCAB  # tokens from here on are predicted inside the second copy


def second_copy(count: int = 4) -> Reading:
    reading = next_tokens({"input_ids": repeated_tokens(count)})
    inside = (reading.positions[:, 1] >= SECOND) & (reading.positions[:, 1] < 2 * VOCAB - 2)
    return replace(reading, positions=reading.positions[inside], targets=reading.targets[inside])


@pytest.mark.parametrize("family", ["opt", "llama", "t5", "jamba"])
def test_equals_the_mean_loss_of_each_row_by_hand(family: str) -> None:
    model = HookedModel(tiny(family))
    readings = [few(padded(model.model, padding)) for padding in ("none", "left")]
    found = leave_one_out(model, readings)
    assert found.components == model.components
    assert found.whole.shape == (6,)
    masks = [Mask(), *(Mask([component]) for component in model.components)]
    for number, reading in enumerate(readings):
        log_p, _ = read_off(logits_under(model, masks, reading), reading)
        for row in range(3):
            loss = -log_p[:, reading.positions[:, 0] == row].mean(1).double()
            example = 3 * number + row
            assert found.whole[example] == pytest.approx(float(loss[0]), abs=1e-5)
            torch.testing.assert_close(found.without[example], loss[1:], rtol=0, atol=1e-5)
            effects = loss[1:] - loss[0]
            torch.testing.assert_close(found.effects[example], effects, rtol=0, atol=2e-5)


def test_the_circuit_is_found_and_nothing_else() -> None:
    """Written by hand: without L1H1 the model is blind among the tokens; others do nothing."""
    model = HookedModel(induction_opt())
    found = leave_one_out(model, [second_copy(2), second_copy(1)])
    loss = dict(zip(found.components, found.without.T, strict=True))
    assert found.whole.max() < 1e-3
    for component, without in loss.items():
        if component == Head(1, 1):
            # Blind: all tokens alike. (24 may occur; the model does not know BOS cannot.)
            torch.testing.assert_close(without, torch.full((3,), math.log(VOCAB)).double())
        elif component == Head(0, 0):
            assert without.min() > 1
        else:
            assert torch.equal(without, found.whole)
    scores = found.scores()
    assert scores[Head(1, 1)] == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert scores[FFN(1)] == 0


def test_components_and_fill_are_handed_on() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))
    fill = mean_fill(model, [reading.inputs])
    chosen = [FFN(2), Head(0, 3)]
    found = leave_one_out(model, iter([reading]), components=chosen, fill=fill, memory=10**6)
    assert found.components == tuple(chosen)
    log_p, _ = read_off(logits_under(model, [Mask([c]) for c in chosen], reading, fill), reading)
    there = reading.positions[:, 0] == 2
    torch.testing.assert_close(
        found.without[2], -log_p[:, there].double().mean(1), rtol=0, atol=1e-5
    )


BASES: dict[str, list[Component]] = {
    "opt": [Head(0, 1), FFN(1), Head(2, 0)],
    "llama": [KVGroup(0, 1), FFN(0)],
    "t5": [Head(0, 2, "encoder"), FFN(1, "decoder"), Head(1, 0, "cross")],
    "mamba": [Mixer(0)],
}


@pytest.mark.parametrize("family", BASES)
def test_what_the_base_removes_is_gone_all_along(family: str) -> None:
    model = HookedModel(tiny(family))
    base = Mask(BASES[family])
    reading = few(padded(model.model, "none"))
    found = leave_one_out(model, [reading], base=base)
    assert found.components == tuple(c for c in model.components if c not in model.expand(base))
    masks = [base, *(base | Mask([component]) for component in found.components)]
    log_p, _ = read_off(logits_under(model, masks, reading), reading)
    for row in range(3):
        loss = -log_p[:, reading.positions[:, 0] == row].mean(1).double()
        assert found.whole[row] == pytest.approx(float(loss[0]), abs=1e-5)
        torch.testing.assert_close(found.without[row], loss[1:], rtol=0, atol=1e-5)
    assert not torch.allclose(found.whole, leave_one_out(model, [reading]).whole)


def test_what_is_gone_already_is_refused_and_half_a_group_is_not() -> None:
    model = HookedModel(tiny("llama"))
    readings = [few(padded(model.model, "none"))]
    for base, component in [
        (Mask([FFN(1)]), FFN(1)),
        (Mask([KVGroup(0, 1)]), Head(0, 3)),
        (Mask([Head(0, 2), Head(0, 3)]), KVGroup(0, 1)),
    ]:
        with pytest.raises(ValueError, match=f"effect of {component} asked for, which the base"):
            leave_one_out(model, readings, components=[Head(1, 0), component], base=base)
    half = leave_one_out(model, readings, components=[KVGroup(0, 1)], base=Mask([Head(0, 2)]))
    both = leave_one_out(model, readings, components=[KVGroup(0, 1)])
    assert torch.equal(half.without, both.without)
    assert not torch.equal(half.whole, both.whole)


def test_the_frame_is_tidy() -> None:
    model = HookedModel(tiny("bart"))
    found = leave_one_out(model, [few(padded(model.model, "none"))])
    frame = found.frame()
    assert list(frame.columns) == [
        "component",
        "kind",
        "stack",
        "layer",
        "metric",
        "value",
        "stderr",
    ]
    assert frame.component.tolist() == [str(c) for c in model.components]
    assert frame.value.tolist() == pytest.approx(list(found.scores().values()))
    by_hand = found.effects.std(0) / 3**0.5
    assert frame.stderr.tolist() == pytest.approx(by_hand.tolist())
    one = replace(found, whole=found.whole[:1], without=found.without[:1]).frame()
    assert one.stderr.isna().all()


def test_what_has_no_loss_is_refused() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))
    with pytest.raises(ValueError, match="leave-one-out over no readings"):
        leave_one_out(model, [])
    for row in (0, 2):  # the last one too, of which no entry tells
        there = reading.positions[:, 0] != row
        part = replace(reading, positions=reading.positions[there], targets=reading.targets[there])
        with pytest.raises(ValueError, match=f"nothing is read of row {row} of reading 1"):
            leave_one_out(model, [reading, part])
    with pytest.raises(ValueError, match="no head L7H0"):
        leave_one_out(model, [reading], components=[Head(7, 0)])
    with pytest.raises(ValueError, match="no head L7H0"):
        leave_one_out(model, [reading], base=Mask([Head(7, 0)]))
    with pytest.raises(ValueError, match="leave-one-out of no components asked for"):
        leave_one_out(model, [reading], components=[])
    with pytest.raises(ValueError, match="no components beside the base mask asked for"):
        leave_one_out(model, [reading], base=Mask(model.components))
    for memory in (0, -1):
        with pytest.raises(ValueError, match=f"a sweep in {memory} bytes asked for"):
            leave_one_out(model, [reading], memory=memory)


def test_rows_of_the_decoder_count_not_those_of_the_encoder() -> None:
    for family in TWO_STACKS:
        model = HookedModel(tiny(family))
        inputs = padded(model.model, "none")
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:2]
        reading = Reading(
            inputs, torch.tensor([[0, 1], [1, 2]]), torch.tensor([3, 4]), torch.tensor([2, 0])
        )
        assert leave_one_out(model, [reading]).whole.shape == (2,)
        with pytest.raises(ValueError, match="nothing is read of row 1"):
            leave_one_out(model, [replace(reading, positions=torch.tensor([[0, 1], [0, 2]]))])


def test_a_loss_that_is_not_finite_names_row_and_mask() -> None:
    model = HookedModel(tiny("opt"))
    reading = few(padded(model.model, "none"))
    fill = mean_fill(model, [reading.inputs])
    fill.values["blocks.2.hook_mlp_out"][:] = math.inf  # broken under one mask only
    with pytest.raises(ValueError, match="of row 0 of reading 0 is nan under the mask 'L2F'"):
        leave_one_out(model, [reading], fill=fill)
    with torch.no_grad():
        model.model.model.decoder.layers[1].fc2.bias[0] = math.nan
    with pytest.raises(ValueError, match="of row 0 of reading 0 is nan under the mask ''"):
        leave_one_out(model, [reading])
