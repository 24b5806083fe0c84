"""The lasso, prefix by prefix against scikit-learn, and against its own optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from experiments.hybrids.regression.baselines import lasso as module
from experiments.hybrids.regression.baselines.lasso import lasso, solve
from experiments.hybrids.regression.tasks import TASKS, sample
from tests.experiments.hybrids.prefixes import by_prefix, degenerate, drawn, gain


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.01, 0.001])
def test_lasso_is_scikit_learns_at_every_prefix(name, alpha):
    xs, ys = (tensor[:3] for tensor in degenerate()[name])
    ys = ys[..., :1]

    def fit(x, y):
        oracle = Lasso(alpha=alpha, fit_intercept=False, max_iter=1_000_000, tol=1e-12)
        return oracle.fit(x, y[:, 0]).coef_[:, None]

    found = lasso(xs, ys, alpha)
    np.testing.assert_allclose(found, by_prefix(xs, ys, fit), rtol=0, atol=1e-4)


def test_lasso_fits_outputs_apart():
    xs, ys = drawn(2, 8, 4, 3)
    apart = torch.cat([lasso(xs, ys[..., j : j + 1], 0.1) for j in range(3)], dim=-1)
    assert torch.equal(lasso(xs, ys, 0.1), apart)


@pytest.mark.parametrize("alpha", [1.0, 0.01, 1e-4])
def test_lasso_at_the_papers_size_is_the_optimum(alpha, monkeypatch):
    monkeypatch.setattr(module, "DESCENTS", 1)  # and no second start is needed to reach it
    # Slopes and signs say so, whatever found it: |c − Gw| ≤ α, and = α sign(w) where w ≠ 0.
    prompts = sample(TASKS["sparse"], 4, torch.Generator().manual_seed(0))
    xs, ys = prompts.xs.double(), prompts.ys.double()
    for i in (1, 2, 7, 19, 20, 40):
        gram = xs[:, :i].mT @ xs[:, :i] / i
        cross = (xs[:, :i].mT @ ys[:, :i])[..., 0] / i
        weights = solve(gram, cross, ys[:, :i, 0].square().sum(1) / i, alpha)
        slope = cross - (gram @ weights[..., None])[..., 0]
        assert float((slope.abs() - alpha).max()) < 1e-6
        at_zero = weights == 0
        off = torch.where(at_zero, 0.0, slope - alpha * weights.sign())
        assert float(off.abs().max()) < 1e-6
        at_once = lasso(xs[:, : i + 1], ys[:, : i + 1], alpha)[:, i, 0]
        torch.testing.assert_close(at_once, (weights * xs[:, i]).sum(-1), rtol=0, atol=1e-4)


def test_denominators_of_the_lasso():
    # 100.4, 102.3 and 102.3 for α = 0.1, 0.01 and 0.001 on 400 prompts of another implementation.
    prompts = sample(TASKS["sparse"], 60, torch.Generator().manual_seed(0))
    scale = 3 / float(prompts.ys.square().mean())
    for alpha, expected in ((0.1, 100.4), (0.01, 102.3)):
        found, error = gain(prompts, lasso(prompts.xs, prompts.ys, alpha))
        assert abs(found * scale - expected) < 3


def test_a_large_alpha_says_zero_and_a_planted_support_is_found():
    prompts = sample(TASKS["sparse"], 10, torch.Generator().manual_seed(0))
    assert not lasso(prompts.xs, prompts.ys, 100.0).any()
    late = (lasso(prompts.xs, prompts.ys, 1e-4) - prompts.ys)[:, 30:]
    assert float(late.abs().max()) < 0.01


def test_no_penalty_and_one_point():
    xs, ys = drawn(1, 3, 2)
    with pytest.raises(ValueError, match="α = 0.*ask for least squares"):
        lasso(xs, ys, 0.0)
    assert lasso(xs[:, :1], ys[:, :1], 0.1).tolist() == [[[0.0]]]
