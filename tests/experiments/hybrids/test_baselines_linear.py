"""Averaging, least squares and ridge, prefix by prefix against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.hybrids.regression.baselines.linear import averaging, least_squares, ridge, zero
from experiments.hybrids.regression.tasks import TASKS, sample
from tests.experiments.hybrids.prefixes import by_prefix, degenerate, drawn, gain


@pytest.mark.parametrize("name", degenerate())
def test_least_squares_is_numpys_smallest_solution_at_every_prefix(name):
    xs, ys = degenerate()[name]
    expected = by_prefix(xs, ys, lambda x, y: np.linalg.pinv(x, rcond=1e-10) @ y)
    np.testing.assert_allclose(least_squares(xs, ys), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("penalty", [1e-4, 0.25, 30.0])
def test_ridge_is_the_closed_form_at_every_prefix(name, penalty):
    xs, ys = degenerate()[name]
    expected = by_prefix(
        xs, ys, lambda x, y: np.linalg.solve(x.T @ x + penalty * np.eye(5), x.T @ y)
    )
    np.testing.assert_allclose(ridge(xs, ys, penalty), expected, rtol=1e-8, atol=1e-8)


def test_averaging_is_the_mean_of_products():
    xs, ys = drawn(3, 9, 4, 2)
    expected = by_prefix(xs, ys, lambda x, y: (x[:, :, None] * y[:, None]).mean(0))
    np.testing.assert_allclose(averaging(xs, ys), expected, rtol=1e-12, atol=1e-12)


def test_zero_says_zero():
    xs, ys = drawn(2, 3, 4, 2)
    assert zero(xs, ys).tolist() == [[[0.0, 0.0]] * 3] * 2


def test_least_squares_in_single_precision_stays_at_the_rounding_of_its_input():
    xs, _ = drawn(200, 41, 20)
    weights = torch.randn(200, 20, 1, generator=torch.Generator().manual_seed(1)).double()
    ys = xs @ weights
    rough = least_squares(xs.float(), ys.float())
    assert rough.dtype == torch.float32
    assert float((rough[:, 21:] - ys[:, 21:]).abs().max()) < 1e-2  # condition numbers of 10³
    assert float((rough[:, 21:] - ys[:, 21:]).abs().median()) < 1e-5


def test_a_rounded_plane_stays_a_plane():
    # Noise of 10⁻⁸ across the plane would be amplified without bound if it counted as a direction.
    prompts = sample(
        TASKS["linear"], 30, torch.Generator().manual_seed(0), points=30, shift="half-subspace"
    )
    error = (least_squares(prompts.xs, prompts.ys) - prompts.ys)[:, 12:]
    assert float(error.abs().max()) < 1e-3


@pytest.mark.parametrize(("task", "expected"), [("linear", 610.0), ("sparse", 91.5)])
def test_denominators_of_least_squares_are_the_closed_forms(task, expected):
    # Error d − i before d points and 0 after: Σ = d(d − 1)/2 + d(N − d), times k/d if sparse.
    prompts = sample(TASKS[task], 600, torch.Generator().manual_seed(0))
    found, error = gain(prompts, least_squares(prompts.xs, prompts.ys))
    assert abs(found - expected) < 4 * error
    assert error < expected / 20


def test_a_penalty_of_0_is_refused():
    xs, ys = drawn(1, 3, 2)
    with pytest.raises(ValueError, match="penalty 0.*ask for least squares"):
        ridge(xs, ys, 0.0)


def test_one_point_is_nothing_to_learn_from():
    xs, ys = drawn(2, 1, 3)
    for said in (least_squares(xs, ys), ridge(xs, ys, 1.0), averaging(xs, ys)):
        assert said.shape == (2, 1, 1)
        assert not said.any()
