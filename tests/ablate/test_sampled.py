"""A model's rows as a population: the effects are those of the full sweep, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ablate import HookedModel, KVGroup, Mask
from ablate.effects import leave_one_out
from ablate.importance import answer_importance
from ablate.racing import race
from ablate.sampled import drawn_from, sweep_costs
from ablate.sampling import sample_effects
from ablate.sweep import Reading, next_tokens
from tests.families import tiny, tokens


def readings_of(rows: int = 24) -> list[Reading]:
    """Two readings of unlike length."""
    return [
        next_tokens({"input_ids": tokens(batch=rows // 3, pos=9)}),
        next_tokens({"input_ids": tokens(batch=rows - rows // 3, pos=7, seed=1)}),
    ]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("family", ["opt", "llama", "mamba"])
def test_effects_of_some_rows_are_those_of_the_full_sweep(family: str):
    model = HookedModel(tiny(family))
    readings = readings_of()
    full = leave_one_out(model, readings)
    drawn, effects = drawn_from(model, readings, generator())
    chosen = (model.components[1], model.components[-1])
    found = effects(np.array([20, 3, 7]), chosen)
    expected = full.effects[[20, 3, 7]][:, [1, len(model.components) - 1]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    gate = answer_importance(model, readings).gate
    np.testing.assert_allclose(drawn.gradient, -gate, rtol=1e-5)


@pytest.mark.parametrize("gradient", [True, False])
def test_the_whole_population_is_the_full_sweep(gradient: bool):
    model = HookedModel(tiny("opt"))
    readings = readings_of()
    means = leave_one_out(model, readings).effects.double().mean(0)
    drawn, effects = drawn_from(model, readings, generator(), gradient=gradient)
    found = sample_effects(drawn, effects, 24)
    np.testing.assert_allclose(found.value, means, atol=1e-6)
    result = race(drawn, effects, "bottom", 4)
    weakest = means.argsort()[:4]
    assert set(result.those("in")) == {model.components[i] for i in weakest}


def test_units_are_means_over_their_rows_and_count_by_them():
    model = HookedModel(tiny("opt"))
    readings = readings_of()
    labels = [5] * 4 + [2] * 10 + [9] * 10
    drawn, effects = drawn_from(model, readings, generator(), components=model.heads, units=labels)
    full = leave_one_out(model, readings, components=model.heads).effects.double()
    np.testing.assert_allclose(effects(np.array([1]), model.heads)[0], full[:4].mean(0), atol=1e-6)
    np.testing.assert_allclose(sample_effects(drawn, effects, 3).value, full.mean(0), atol=1e-6)


def test_a_group_is_estimated_by_all_its_heads():
    model = HookedModel(tiny("llama"))
    group = KVGroup(0, 0)
    heads = list(model.expand(Mask([group])))
    assert len(heads) > 1
    drawn, _ = drawn_from(model, readings_of(), generator(), components=[group, *heads])
    assert drawn.gradient is not None
    np.testing.assert_allclose(drawn.gradient[:, 0], drawn.gradient[:, 1:].sum(1), rtol=1e-5)


def test_costs_are_the_branches_that_run_again():
    model = HookedModel(tiny("opt"))  # three layers of four heads
    costs = sweep_costs(model, model.components)
    assert costs.effect == (5, 5, 5, 5, 4, 3, 3, 3, 3, 2, 1, 1, 1, 1, 0)
    assert (costs.whole, costs.gradient) == (6, 12)


def test_labels_that_do_not_fit_are_refused():
    model = HookedModel(tiny("opt"))
    with pytest.raises(ValueError, match="3 labels of units for 24 rows"):
        drawn_from(model, readings_of(), generator(), units=[0, 1, 2])
