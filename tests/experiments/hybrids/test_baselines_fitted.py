"""Networks and trees: one at a time by the plain way, and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.tree import DecisionTreeRegressor
from torch import nn

from experiments.hybrids.regression.baselines.networks import initial_weights, network
from experiments.hybrids.regression.baselines.trees import boosted_trees, tree
from experiments.hybrids.regression.tasks import sample, small
from tests.experiments.hybrids.prefixes import drawn


@pytest.mark.parametrize("scaled", [False, True])
def test_networks_are_those_trained_one_by_one(scaled):
    # More prefixes than train together, so that groups begin and end inside.
    xs, ys = (tensor.float() for tensor in drawn(3, 20, 4, 2))
    found = network(xs, ys, hidden=7, steps=12, rate=0.01, seed=5, scaled=scaled)
    start = initial_weights(3, 4, 7, 2, torch.Generator().manual_seed(5))
    for b in range(3):
        for i in (1, 2, 15, 16, 17, 19):
            model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
            with torch.no_grad():
                for parameter, first in zip(model.parameters(), start, strict=True):
                    value = first[b]
                    parameter.copy_(value.T if parameter.dim() == 2 else value[0])
            scale = ys[b, :i].square().mean().sqrt() if scaled else torch.tensor(1.0)
            adam = torch.optim.Adam(model.parameters(), lr=0.01)
            for _ in range(12):
                adam.zero_grad()
                nn.functional.mse_loss(model(xs[b, :i]), ys[b, :i] / scale).backward()
                adam.step()
            expected = model(xs[b, i]).detach() * scale
            torch.testing.assert_close(found[b, i], expected, rtol=1e-4, atol=1e-4)
    assert not found[:, 0].any()


def test_networks_start_as_torchs_linear_does():
    w_1, b_1, w_2, b_2 = initial_weights(200, 16, 25, 1, torch.Generator().manual_seed(0))
    for values, bound in ((w_1, 1 / 4), (b_1, 1 / 4), (w_2, 1 / 5), (b_2, 1 / 5)):
        assert float(values.abs().max()) <= bound
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_scaled_network_answers_in_proportion():
    xs, ys = (tensor.float() for tensor in drawn(2, 6, 3))
    once = network(xs, ys, scaled=True, steps=20)
    torch.testing.assert_close(network(xs, 8 * ys, scaled=True, steps=20), 8 * once)


def test_every_network_of_a_batch_learns():
    # The reference leaves the first of each batch untrained, predicting 0.
    prompts = sample(small("mlp-normalised"), 6, torch.Generator().manual_seed(0), points=20)
    xs = torch.cat([prompts.xs, prompts.xs[:, :1]], dim=1)  # the first point again, in the end
    ys = torch.cat([prompts.ys, prompts.ys[:, :1]], dim=1)
    error = (network(xs, ys, steps=300) - ys)[:, -1].square()
    assert (error < 0.2 * ys.square().mean((1, 2))[:, None]).all()


def test_gradients_are_not_needed_outside():
    xs, ys = (tensor.float() for tensor in drawn(1, 3, 2))
    with torch.no_grad():
        assert not network(xs, ys, steps=2).requires_grad


def test_trees_are_grown_on_the_points_before():
    xs, ys = drawn(2, 15, 3, 2)
    for depth in (None, 2):
        found = tree(xs, ys, depth=depth, seed=3)
        for b in range(2):
            for i in (1, 2, 9, 14):
                oracle = DecisionTreeRegressor(max_depth=depth, random_state=3)
                oracle.fit(xs[b, :i], ys[b, :i])
                np.testing.assert_allclose(found[b, i], oracle.predict(xs[b, i : i + 1])[0])
        assert not found[:, 0].any()


def test_a_tree_on_signs_knows_a_stump_after_both_sides():
    xs = torch.randn(3, 30, 2, generator=torch.Generator().manual_seed(0))
    ys = torch.where(xs[..., :1] > 0, 2.0, -1.0)
    assert torch.equal(tree(xs, ys, signs=True)[:, 20:], ys[:, 20:])
    assert not torch.equal(tree(xs, ys)[:, 1:], ys[:, 1:])  # a split off 0 errs near it


def test_boosting_shrinks_what_is_left_by_the_rate_and_the_penalty():
    # Two points: each tree puts each in a leaf of r / (1 + λ), λ = 1, and keeps 0.3 of that, so the
    # residual is (1 − 0.15)¹⁰⁰ of y less its mean after a hundred; after none it is all of it.
    xs = torch.tensor([[[-1.0], [1.0], [1.0]]])
    ys = torch.tensor([[[3.0], [7.0], [0.0]]]).double()
    found = boosted_trees(xs, ys)
    assert found[0, :2, 0].tolist() == [0.0, 3.0]
    assert float(found[0, 2, 0]) == pytest.approx(5 + 2 * (1 - 0.85**100), abs=1e-6)
