"""Aggregates and ranks by eye and against scipy; magnitudes against a plain forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from ablate import FFN, Head, HookedModel, Mask
from ablate.rankings import (
    activation_magnitudes,
    average_ranks,
    combined,
    shuffled_ties,
    ties,
)
from tests.families import FAMILIES, inputs_for, tiny

A, B, C, D = Head(0, 0), Head(0, 1), Head(1, 0), Head(1, 1)
TABLES = {"x": {A: 1.0, B: 2.0, C: 3.0, D: 3.0}, "y": {A: 200.0, B: 100.0, C: 0.0, D: 100.0}}


def test_aggregates_by_eye():
    assert combined(TABLES) == {A: 100.5, B: 51.0, C: 1.5, D: 51.5}
    assert combined(TABLES, "rank") == {A: 2.5, B: 2.25, C: 2.25, D: 3.0}
    x, y = (stats.zscore(list(table.values())) for table in TABLES.values())
    assert list(combined(TABLES, "z").values()) == pytest.approx((x + y) / 2)


@pytest.mark.parametrize("how", ["rank", "z"])
def test_a_tasks_scale_moves_only_the_mean(how):
    larger = TABLES | {"y": {c: 1e6 * v for c, v in TABLES["y"].items()}}
    assert combined(larger, how) == pytest.approx(combined(TABLES, how))
    assert combined(larger) != pytest.approx(combined(TABLES))


def test_a_task_that_scores_all_alike_says_nothing():
    alike = {"flat": dict.fromkeys((A, B, C, D), 0.1 + 0.2)}
    assert combined(alike, "z") == dict.fromkeys((A, B, C, D), 0.0)
    both = combined(TABLES | alike, "rank")
    assert sorted(both, key=both.__getitem__)[-1] == D


def test_aggregates_refuse_what_does_not_match():
    with pytest.raises(ValueError, match="L1H1 is scored in one of 'x' and 'short' only"):
        combined(TABLES | {"short": {A: 1.0, B: 2.0, C: 3.0}})
    with pytest.raises(ValueError, match="no scores"):
        combined({})
    with pytest.raises(ValueError, match="L0H0 is inf"):
        combined({"x": {A: float("inf")}})


def test_ties_are_kept_and_broken_at_random_where_an_order_is_needed():
    tied = {A: 5.0, B: 1.0, C: 5.0, D: 1.0, FFN(0): 5.0}
    assert average_ranks(tied) == {A: 4.0, B: 1.5, C: 4.0, D: 1.5, FFN(0): 4.0}
    assert ties(tied) == [(B, D), (A, C, FFN(0))]
    assert ties(TABLES["y"]) == [(B, D)]
    generator = torch.Generator().manual_seed(0)
    orders = [shuffled_ties(tied, generator) for _ in range(2000)]
    assert all(set(order[:2]) == {B, D} for order in orders)
    for place in (2, 3, 4):  # each of the three is as often at each place: 4 standard errors
        share = np.mean([order[place] == A for order in orders])
        assert share == pytest.approx(1 / 3, abs=4 * (2 / 9 / 2000) ** 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_magnitude_is_the_mean_norm_over_real_tokens(family: str):
    model = HookedModel(tiny(family))
    batches = [
        inputs_for(model.model, padded=True),
        inputs_for(model.model, batch=3, pos=6, seed=1),
    ]
    found = activation_magnitudes(model, iter(batches))
    assert tuple(found) == model.components
    for site in model.sites:
        norms: dict[object, list[float]] = {c: [] for c in site.components}
        for batch in batches:
            with torch.no_grad(), model.capture([site.name]) as cache:
                model.model(**batch)
            kept = batch["attention_mask"]
            if site.stack in ("decoder", "cross"):
                kept = torch.ones_like(batch["decoder_input_ids"])
            for row, token in kept.nonzero().tolist():
                vectors = cache[site.name][row, token].reshape(site.width, -1)
                for component, vector in zip(site.components, vectors, strict=True):
                    norms[component].append(float(vector.norm()))
        for component in site.components:
            assert found[component] == pytest.approx(np.mean(norms[component]), rel=1e-5)


def test_activation_magnitude_sees_masks_in_force_and_refuses_nothing():
    model = HookedModel(tiny("opt"))
    batch = inputs_for(model.model)
    with model.ablated(Mask([FFN(0)])):
        changed = activation_magnitudes(model, [batch])
    whole = activation_magnitudes(model, [batch])
    assert changed[Head(0, 0)] == whole[Head(0, 0)]
    assert changed[Head(2, 0)] != whole[Head(2, 0)]
    with pytest.raises(ValueError, match="no tokens"):
        activation_magnitudes(model, [])
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match="not padding"):
        activation_magnitudes(model, [batch])
