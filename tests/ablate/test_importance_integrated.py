"""Integrated gradients: their sums are exact differences, and saturation does not blind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablate import Head, HookedModel, KVGroup, Mask, Reading, mean_fill, next_tokens
from ablate.answers import row_losses
from ablate.importance import answer_importance
from ablate.integrated import integrated_importance
from tests.families import inputs_for, tiny
from tests.induction_model import VOCAB, induction_opt, repeated_tokens


def loss_without(model: HookedModel, reading: Reading, components, fill="zero") -> Tensor:
    with torch.no_grad(), model.ablated(Mask(components), fill):
        return row_losses(model, reading)


def gap(model: HookedModel, reading: Reading, steps: int) -> float:
    """Largest |Σ over components − (L(whole) − L(nothing left))|."""
    found = integrated_importance(model, [reading], steps=steps, path="model")
    rise = loss_without(model, reading, []) - loss_without(model, reading, model.components)
    return float((found.gate.sum(1) - rise).abs().max())


@pytest.mark.parametrize("family", ["opt", "gpt2", "bart"])
def test_all_gates_together_add_up_to_the_whole_model(family: str):
    model = HookedModel(tiny(family))
    reading = next_tokens(inputs_for(model.model, pos=5))
    coarse, fine = (gap(model, reading, steps) for steps in (6, 96))
    assert fine < 0.02
    assert fine < coarse / 5


def test_the_gates_of_a_branch_add_up_to_the_branch():
    model = HookedModel(tiny("gpt2"))
    reading = next_tokens(inputs_for(model.model, pos=5))
    found = integrated_importance(model, [reading], steps=48)
    whole = loss_without(model, reading, [])
    for site in model.sites:
        columns = [model.components.index(component) for component in site.components]
        rise = whole - loss_without(model, reading, site.components)
        torch.testing.assert_close(found.gate[:, columns].sum(1), rise, atol=1e-2, rtol=0)


@pytest.mark.parametrize("path", ["branch", "model"])
def test_one_step_is_the_gradient_half_way(path: str):
    model = HookedModel(tiny("opt"))
    reading = next_tokens(inputs_for(model.model))
    found = integrated_importance(model, [reading], steps=1, path=path)
    moved = [site for site in model.sites if path == "model" or site.name == model.sites[2].name]
    gates = model.unit_gates((2, 9), requires_grad=False)
    for site in moved:
        gates[site.name].fill_(0.5)
        gates[site.name].requires_grad_()
    with model.gated(gates):
        row_losses(model, reading).sum().backward()
    for site in moved:
        by_token = gates[site.name].grad.view(2, 9, -1)
        columns = [model.components.index(component) for component in site.components]
        torch.testing.assert_close(found.gate[:, columns], by_token.sum(1), atol=1e-5, rtol=1e-4)
        expected = by_token.abs().sum(1)
        torch.testing.assert_close(found.token[:, columns], expected, atol=1e-5, rtol=1e-4)


def test_tokens_are_integrated_before_the_absolute_value():
    model = HookedModel(tiny("opt"))
    reading = next_tokens(inputs_for(model.model))
    found = integrated_importance(model, [reading], steps=4, path="model")
    mean = {site.name: torch.zeros(2, 9, site.width) for site in model.sites}
    for ξ in (0.125, 0.375, 0.625, 0.875):
        gates = model.unit_gates((2, 9), requires_grad=False)
        for gate in gates.values():
            gate.fill_(ξ).requires_grad_()
        with model.gated(gates):
            row_losses(model, reading).sum().backward()
        for name, gate in gates.items():
            mean[name] += gate.grad.view(mean[name].shape) / 4
    expected = torch.cat([mean[site.name].abs().sum(1) for site in model.sites], 1)
    torch.testing.assert_close(found.token, expected, atol=1e-5, rtol=1e-4)
    assert found.components == model.components


def second_copies() -> Reading:
    """Reads what is predicted inside the second copy of the repeated tokens."""
    ids = repeated_tokens(count=1)
    every = next_tokens({"input_ids": ids})
    kept = every.positions[:, 1] >= VOCAB
    return Reading(every.inputs, every.positions[kept], every.targets[kept])


@pytest.mark.parametrize("path", ["branch", "model"])
def test_a_saturated_head_is_seen(path: str):
    model = HookedModel(induction_opt(sharpness=60, gain=200))
    reading, needed = second_copies(), Head(1, 1)
    rise = loss_without(model, reading, [needed]) - loss_without(model, reading, [])
    assert rise.min() > 3
    assert answer_importance(model, [reading]).scores()[needed] < 1e-6
    scores = integrated_importance(model, [reading], steps=40, path=path).scores()
    assert scores[needed] > 0.5
    if path == "branch":  # the only head of its layer that writes: all of the rise is its own
        assert scores[needed] == pytest.approx(float(rise.mean()), rel=0.05)
    others = [score for head, score in scores.items() if head not in (needed, Head(0, 0))]
    assert max(others) < 1e-3


def test_what_a_mask_removed_stays_removed_and_its_fill_stays_whole():
    model = HookedModel(tiny("gpt2"))
    reading = next_tokens(inputs_for(model.model, pos=7))
    fill = mean_fill(model, [inputs_for(model.model, seed=5)])
    removed = [Head(0, 1), Head(1, 2)]
    with model.ablated(Mask(removed), fill):
        found = integrated_importance(model, [reading], steps=64, path="model")
        kept = {
            site.name: torch.zeros(site.width if site.kind == "head" else ())
            for site in model.sites
        }
    # Nothing left but the fill: the gates at 0 before the fill stands in.
    with torch.no_grad(), model.gated(kept), model.ablated(Mask(removed), fill):
        nothing = row_losses(model, reading)
    columns = [model.components.index(head) for head in removed]
    assert (found.gate[:, columns] == 0).all()
    rise = loss_without(model, reading, removed, fill) - nothing
    torch.testing.assert_close(found.gate.sum(1), rise, atol=1e-2, rtol=0)


def test_groups_checkpointing_and_counts_go_along():
    model = HookedModel(tiny("llama"))
    reading = next_tokens(inputs_for(model.model, batch=3))
    chosen = [KVGroup(1, 0), Head(1, 0), Head(1, 1)]
    found = integrated_importance(
        model, [reading], steps=3, components=chosen, checkpointing=True, memory=1
    )
    torch.testing.assert_close(found.gate[:, 0], found.gate[:, 1:].sum(1), atol=1e-5, rtol=1e-4)
    plain = integrated_importance(model, [reading], steps=3)
    column = plain.components.index(Head(1, 0))
    torch.testing.assert_close(found.gate[:, 1], plain.gate[:, column], atol=1e-5, rtol=1e-4)
    assert found.tokens.tolist() == [9, 9, 9]
    assert found.predictions.tolist() == [8, 8, 8]
    assert set(found.frame().convention) == {"gate", "token", "reference"}


@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_refused():
    model = HookedModel(tiny("opt"))
    reading = next_tokens(inputs_for(model.model))
    with pytest.raises(ValueError, match="0 steps of an integrated gradient asked for"):
        integrated_importance(model, [reading], steps=0)
    with pytest.raises(ValueError, match="no path 'head': use 'branch' or 'model'"):
        integrated_importance(model, [reading], steps=2, path="head")
    with pytest.raises(ValueError, match="importance of no examples asked for"):
        integrated_importance(model, [], steps=2)
    model.model.train()
    with pytest.raises(ValueError, match="importance of a model in training mode"):
        integrated_importance(model, [reading], steps=2)
