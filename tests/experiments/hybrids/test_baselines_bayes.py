"""Bayes-optimal predictors by other routes to the same posterior, and against all baselines."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from experiments.hybrids.regression.baselines import BASELINES, BAYES, baselines_for
from experiments.hybrids.regression.baselines.bayes import (
    chebyshev_posterior_mean,
    parity_pooled,
    parity_posterior_mean,
    sparse_posterior_mean,
    supports,
)
from experiments.hybrids.regression.tasks import TASKS, Task, sample, small
from tests.experiments.hybrids.prefixes import gain


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(models, ys: np.ndarray, noise: float) -> float:
    """E y from every model's features, (before [i k], of the point [k]), and its likelihood."""
    evidence, said = [], []
    for before, now in models:
        covariance = before @ before.T + noise**2 * np.eye(len(before))
        log = multivariate_normal(cov=covariance).logpdf(ys) if len(ys) else 0.0
        evidence.append(log)
        said.append(now @ before.T @ np.linalg.solve(covariance, ys))
    share = np.exp(np.array(evidence) - max(evidence))
    return float(share @ np.array(said) / share.sum())


@pytest.mark.parametrize("noise", [0.3, 0.05])
def test_sparse_is_the_mixture_of_marginal_likelihoods(noise):
    task = Task("sparse", d=5, points=9, k=2)
    prompts = sample(task, 4, seeded())
    xs = prompts.xs.double()
    ys = prompts.ys.double() + noise * torch.randn(4, 9, 1, generator=seeded(1)).double()
    found = sparse_posterior_mean(xs, ys, 2, noise)
    for b, i in itertools.product(range(4), range(9)):
        x, y = xs[b].numpy(), ys[b, :i, 0].numpy()
        models = [(x[:i, list(s)], x[i, list(s)]) for s in itertools.combinations(range(5), 2)]
        assert float(found[b, i, 0]) == pytest.approx(mixture(models, y, noise), abs=1e-9)


@pytest.mark.parametrize("outputs", [1, 2])
def test_without_noise_supports_that_interpolate_share_the_belief(outputs):
    """The limit itself: weights that fit, N(ŵ; 0, I) / √det XᵀX after k points, nothing if off."""
    task = Task("sparse", d=6, points=8, k=3, y_dim=outputs)
    prompts = sample(task, 5, seeded())
    found = sparse_posterior_mean(prompts.xs, prompts.ys, 3)
    xs, ys = prompts.xs.double().numpy(), prompts.ys.double().numpy()
    for b, i in itertools.product(range(5), range(8)):
        before, y = xs[b, :i], ys[b, :i]
        log, said = [], []
        for s in itertools.combinations(range(6), 3):
            part = before[:, list(s)]
            weights = np.linalg.pinv(part) @ y
            fits = np.abs(part @ weights - y).max(initial=0) < 1e-3
            square = part @ part.T if i < 3 else part.T @ part
            density = -np.square(weights).sum() / 2 - outputs * np.linalg.slogdet(square)[1] / 2
            log.append(density if fits else -np.inf)
            said.append(xs[b, i, list(s)] @ weights)
        share = np.exp(np.array(log) - max(log))
        np.testing.assert_allclose(found[b, i], share @ np.array(said) / share.sum(), atol=2e-4)


def test_sparse_at_the_papers_size():
    # Errors 3, 2.90, 2.56, 2.17, then 0, and a denominator of 112.4 by another implementation.
    prompts = sample(TASKS["sparse"], 200, seeded())
    found = sparse_posterior_mean(prompts.xs, prompts.ys, 3)
    scale = 3 / float(prompts.ys.square().mean())
    assert abs(gain(prompts, found)[0] * scale - 112.4) < 2
    error = (found - prompts.ys).square().mean((0, 2)) * scale
    torch.testing.assert_close(error[:4], torch.tensor([3.0, 2.90, 2.56, 2.17]), rtol=0, atol=0.8)
    # After four points only the true support fits. Its weights carry the rounding of float32 times
    # the condition of a 3 × 3 matrix, now and then a large one.
    assert float(error[4:].max()) < 1e-3
    assert float((found - prompts.ys)[:, 6:].abs().max()) < 1e-4


def test_coordinates_that_are_off_are_in_no_support():
    task = Task("sparse", d=7, points=8, k=2)
    prompts = sample(task, 20, seeded(), dims=4)
    found = sparse_posterior_mean(prompts.xs, prompts.ys, 2)
    narrow = sparse_posterior_mean(prompts.xs[..., :4], prompts.ys, 2)
    torch.testing.assert_close(found, narrow)
    assert supports(4, 2, torch.device("cpu")).tolist() == [
        [0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="5 relevant coordinates of 4"):
        supports(4, 5, torch.device("cpu"))


def test_prompts_that_say_nothing_are_answered_by_0():
    xs = torch.randn(2, 6, 4, generator=seeded())
    assert not sparse_posterior_mean(xs, torch.zeros(2, 6, 1), 2).any()


@pytest.mark.parametrize("noise", [0.5, 0.1])
def test_chebyshev_is_the_mixture_over_degrees(noise):
    prompts = sample(Task("chebyshev", d=1, points=9, depth=6), 4, seeded())
    xs = prompts.xs.double()
    ys = prompts.ys.double() + noise * torch.randn(4, 9, 1, generator=seeded(1)).double()
    found = chebyshev_posterior_mean(xs, ys, 6, noise)
    for b, i in itertools.product(range(4), range(9)):
        basis = np.polynomial.chebyshev.chebvander(xs[b, :, 0].numpy(), 6)
        models = [(basis[:i, 3 : top + 1], basis[i, 3 : top + 1]) for top in range(3, 7)]
        expected = mixture(models, ys[b, :i, 0].numpy(), noise)
        assert float(found[b, i, 0]) == pytest.approx(expected, abs=1e-9)


def test_chebyshev_without_noise_knows_the_polynomial_after_its_coefficients():
    prompts = sample(TASKS["chebyshev"], 100, seeded())
    error = (BAYES["chebyshev"](prompts) - prompts.ys).abs()
    assert float(error[:, 25:].quantile(0.99)) < 1e-3


def test_parity_counts_the_supports_that_agree():
    task = Task("parity", d=5, points=12, k=2)
    prompts = sample(task, 6, seeded())
    found = parity_posterior_mean(prompts.xs, prompts.ys, 2)
    pooled = parity_pooled(prompts.xs, prompts.ys, 2)
    pairs = list(itertools.combinations(range(5), 2))
    signs, ys = prompts.xs.tolist(), prompts.ys[..., 0].tolist()
    for b, i in itertools.product(range(6), range(12)):
        right = [
            (p, q)
            for p, q in pairs
            if all(signs[b][j][p] * signs[b][j][q] == ys[b][j] for j in range(i))
        ]
        votes = [signs[b][i][p] * signs[b][i][q] for p, q in right]
        assert float(found[b, i, 0]) == pytest.approx(sum(votes) / len(votes), abs=1e-6)
    # Six prompts of different supports agree on none: the pool takes the least wrong, not 0 / 0.
    assert pooled.isfinite().all()


def test_pooled_parity_finds_the_shared_support_at_once():
    prompts = sample(TASKS["parity-batch"], 64, seeded())
    pooled = BASELINES["parity-pooled"](prompts)
    torch.testing.assert_close(pooled[:, 1:], prompts.ys[:, 1:])
    alone = BAYES["parity-batch"](prompts)
    assert float((alone - prompts.ys)[:, 1].square().mean()) > 0.5
    torch.testing.assert_close(alone[:, 40:], prompts.ys[:, 40:])


def test_noisy_parity_weighs_by_the_noise():
    xs = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [1.0, -1.0]]])
    ys = torch.tensor([[[0.2], [0.9], [0.0]]])
    found = parity_posterior_mean(xs, ys, 1, noise=0.7)
    # Support {0} says 1, 1, 1 and {1} says 1, −1, −1; they part at the second point.
    odds = math.exp((1.9**2 - 0.1**2) / (2 * 0.7**2))
    expected = [1.0, 0.0, (odds - 1) / (odds + 1)]
    torch.testing.assert_close(found[0, :, 0], torch.tensor(expected))


def test_recall_knows_the_value_of_a_key_it_has_seen_and_of_no_other():
    prompts = sample(TASKS["mqar"], 50, seeded())
    found = BAYES["mqar"](prompts)
    assert torch.equal(found[:, -1], prompts.ys[:, -1])
    assert not found[:, :-1].any()


SMALL = [small(name) for name in BAYES]
NOISY = [replace(small(name), shift="noisy:0.2") for name in ("linear", "sparse", "parity")]


@pytest.mark.parametrize("task", SMALL + NOISY, ids=lambda task: f"{task.name} {task.shift}")
def test_no_baseline_is_better_on_the_task_itself(task):
    prompts = sample(task, 400, seeded())
    best = (BAYES[task.name](prompts) - prompts.ys).square().double().mean((1, 2))
    for name in baselines_for(task.name):
        if name in (
            "parity-pooled",
            "network",
            "boosted",
        ):  # the first knows more, the rest are slow
            continue
        error = (BASELINES[name](prompts) - prompts.ys).square().double().mean((1, 2))
        worse = error - best
        assert float(worse.mean()) >= -3 * float(worse.std()) / math.sqrt(len(worse)), name


def test_label_noise_makes_the_linear_optimum_a_ridge():
    task = replace(small("linear"), shift="noisy:0.2")
    prompts = sample(task, 10, seeded())
    variance = 0.2 * 5
    xs, ys = prompts.xs.double(), prompts.ys.double()
    inverse = torch.linalg.inv(xs[:, :7].mT @ xs[:, :7] + variance * torch.eye(5).double())
    expected = (xs[:, 7:8] @ inverse @ xs[:, :7].mT @ ys[:, :7])[:, 0]
    torch.testing.assert_close(
        BAYES["linear"](prompts)[:, 7].double(), expected, rtol=1e-4, atol=1e-4
    )


def test_bayes_is_refused_where_nobody_knows_it():
    prompts = sample(small("tree"), 2, seeded())
    with pytest.raises(
        ValueError, match="no Bayes-optimal predictor of task tree: take one of lin"
    ):
        BASELINES["bayes"](prompts)
