"""Nearest neighbours against scikit-learn, and retrieval against a lookup."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neighbors import KNeighborsRegressor

from experiments.hybrids.regression.baselines.neighbours import (
    exact_retrieval,
    nearest_neighbours,
    retrieval,
)
from experiments.hybrids.regression.tasks import TASKS, sample
from tests.experiments.hybrids.prefixes import drawn


def test_neighbours_are_scikit_learns_at_every_prefix():
    xs, ys = drawn(4, 12, 3, 2)
    found = nearest_neighbours(xs, ys, 3)
    for b in range(4):
        for i in range(1, 12):
            oracle = KNeighborsRegressor(min(i, 3), algorithm="brute").fit(xs[b, :i], ys[b, :i])
            np.testing.assert_allclose(found[b, i], oracle.predict(xs[b, i : i + 1])[0], rtol=1e-12)
    assert not found[:, 0].any()


def test_neighbours_are_averaged_not_added():
    xs, _ = drawn(2, 6, 3)
    ones = torch.ones(2, 6, 1, dtype=torch.float64)
    assert nearest_neighbours(xs, ones)[:, 1:].tolist() == [[[1.0]] * 5] * 2


def test_of_points_equally_far_the_earlier_count():
    xs = torch.zeros(1, 5, 2)
    ys = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[None, :, None]
    expected = [0.0, 1.0, 1.5, 7 / 3, 7 / 3]
    torch.testing.assert_close(nearest_neighbours(xs, ys)[0, :, 0], torch.tensor(expected))


def test_more_neighbours_than_points():
    xs, ys = drawn(2, 3, 2)
    torch.testing.assert_close(nearest_neighbours(xs, ys, 9)[:, 2], ys[:, :2].mean(1))


def test_retrieval_is_a_lookup_in_associative_recall():
    prompts = sample(TASKS["mqar"], 64, torch.Generator().manual_seed(0))
    asked = prompts.hidden["index"]
    expected = prompts.ys[torch.arange(64), asked]
    assert torch.equal(retrieval(prompts.xs, prompts.ys)[:, -1], expected)
    assert torch.equal(expected, prompts.ys[:, -1])


def test_retrieval_takes_the_largest_product_and_exact_retrieval_a_copy():
    xs = torch.tensor([[[1.0, 0], [0, 1], [0.6, 0.8], [1, 0], [0, 1.00000006]]])
    ys = torch.tensor([[[1.0], [2], [3], [4], [5]]])
    assert retrieval(xs, ys)[0, :, 0].tolist() == [0.0, 1.0, 2.0, 1.0, 2.0]
    assert exact_retrieval(xs, ys)[0, :, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 2.0]
