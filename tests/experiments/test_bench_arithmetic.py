"""Operations counted from shapes are those that torch counts on real forwards and backwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ablate import FFN, Head, HookedModel
from ablate.stack import record
from experiments.bench.arithmetic import (
    Slots,
    Weights,
    fewest_forward,
    fewest_gradients,
    fewest_leave_one_out,
    forward,
    scans,
)
from tests.families import inputs_for, tiny

ROWS, LENGTH = 2, 9
EVERY = Slots(ROWS * LENGTH, ROWS * LENGTH**2, ROWS * LENGTH, ROWS * LENGTH**2)
"""Every position read, and unfused attention, which computes the masked half as well."""


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture
def model() -> HookedModel:
    return HookedModel(tiny("opt", attention="eager", num_hidden_layers=4))


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_forward_is_what_torch_counts(family: str):
    model = HookedModel(tiny(family, attention="eager"))
    inputs = inputs_for(model.model, ROWS, LENGTH)
    found = counted(lambda: model.model(**inputs))
    assert forward(Weights.of(model), ROWS, LENGTH, causal=False) == found
    assert fewest_forward(Weights.of(model), EVERY) == found


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_whole_blocks_of_a_scan_are_what_torch_counts(family: str):
    """And the fewest lack the last block's values, mixing, output projection and FFN."""
    model = HookedModel(tiny(family, attention="eager"))
    ids = inputs_for(model.model, ROWS, LENGTH)["input_ids"]
    weights, hf = Weights.of(model), model.model
    base = counted(lambda: hf.base_model(ids))
    masked_half = weights.blocks * weights.attention(ROWS * LENGTH * (LENGTH - 1) // 2)
    fewest, whole = scans(weights, ROWS, LENGTH)
    assert whole == base - masked_half
    block = model.model.get_submodule(model.sites[-1].block)
    v_proj, o_proj = (
        next(m for n, m in block.named_modules() if n.endswith(name)).weight.numel()
        for name in ("v_proj", "out_proj" if family == "opt" else "o_proj")
    )
    pairs = ROWS * LENGTH * (LENGTH + 1) // 2
    spared = 2 * ROWS * LENGTH * (v_proj + o_proj + weights.ffn) + 2 * pairs * weights.d_attn
    assert whole - fewest == spared


def test_grouped_queries_and_gated_ffns_are_counted():
    model = HookedModel(tiny("llama", attention="eager"))
    found = counted(lambda: model.model(**inputs_for(model.model, ROWS, LENGTH)))
    assert found == forward(Weights.of(model), ROWS, LENGTH, causal=False)


def test_gradients_of_all_weights_take_three_forwards(model: HookedModel):
    inputs = inputs_for(model.model, ROWS, LENGTH)
    model.model.requires_grad_(True)
    found = counted(lambda: model.model(**inputs).logits.sum().backward())
    assert 3 * forward(Weights.of(model), ROWS, LENGTH, causal=False) == found


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_gradients_of_gates_end_at_z_of_block_0(layers: int):
    model = HookedModel(tiny("opt", attention="eager", num_hidden_layers=layers))
    model.model.requires_grad_(False)
    inputs = inputs_for(model.model, ROWS, LENGTH)

    def run():
        with model.gate_gradients():
            model.model(**inputs).logits.sum().backward()

    assert fewest_gradients(Weights.of(model), EVERY) == counted(run)


def test_a_component_costs_what_lies_above_it(model: HookedModel):
    weights = Weights.of(model)
    inputs = inputs_for(model.model, ROWS, LENGTH)
    recorded = record(model.model, inputs, keep=range(5))
    above = [
        counted(lambda i=i: recorded.head(recorded.run_blocks(i + 1, 4, recorded.resid(i + 1))))
        for i in range(4)
    ]
    for layer in range(4):
        ffn = fewest_leave_one_out(weights, EVERY, [FFN(layer)], whole=False)
        assert ffn == above[layer]
        head = fewest_leave_one_out(weights, EVERY, [Head(layer, 1)], whole=False)
        own = 2 * EVERY.slots * (8 * 32 + 2 * 32 * 48)  # z_h W_O[h], then both FFN matrices
        assert head == above[layer] + own


def test_only_read_positions_are_counted_in_the_last_block(model: HookedModel):
    weights = Weights.of(model)
    slots = Slots(slots=10, pairs=55, read=1, read_pairs=10)
    of_last = 2 * 10 * weights.key_value + 2 * (weights.query + weights.output + weights.ffn)
    of_last += 4 * 10 * 32 + 2 * weights.unembed
    assert fewest_leave_one_out(weights, slots, [FFN(2)], whole=False) == of_last
    assert fewest_leave_one_out(weights, slots, [FFN(3)], whole=False) == 2 * weights.unembed
    assert fewest_leave_one_out(weights, slots, [], whole=True) == fewest_forward(weights, slots)
    fewer = replace(slots, read=0, read_pairs=0)
    assert fewest_gradients(weights, fewer) < fewest_gradients(weights, slots)


def test_slots_count_shared_beginnings_once():
    sequences = [((1, 2, 3, 4), 1), ((1, 2, 3, 5), 1), ((1, 2, 6, 7, 8), 2), ((9, 2), 1)]
    beginnings = {
        ids[: i + 1] for ids, _ in sequences for i in range(len(ids) - 1)
    }  # the last id is predicted, not read
    read = {(1, 2, 3), (1, 2, 6), (1, 2, 6, 7), (9,)}
    assert Slots.of(sequences) == Slots(
        len(beginnings), sum(map(len, beginnings)), len(read), sum(map(len, read))
    )


def test_rows_without_sharing_are_causal_triangles():
    rows = torch.arange(20).reshape(2, 10).tolist()
    found = Slots.of([(row, 9) for row in rows])
    assert found == Slots(slots=18, pairs=2 * 45, read=18, read_pairs=2 * 45)


@pytest.mark.parametrize("family", ["mamba", "t5", "mixtral", "jamba"])
def test_what_cannot_be_counted_is_refused(family: str):
    with pytest.raises(ValueError, match="cannot be counted"):
        Weights.of(HookedModel(tiny(family)))
