"""Linear probes for w: against scikit-learn, closed forms, and streams that hold w by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from experiments.hybrids.inside import weight_probes as probed
from experiments.hybrids.inside.weight_probes import (
    PENALTIES,
    least_squares_weights,
    left_out,
    r_squared,
    ridge,
    weight_probes,
)
from tests.experiments.hybrids.hybrid_models import drawn, regressor


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def values(frame, metric):
    return frame[frame.metric == metric].set_index(["layer", "examples"]).value


def test_ridge_is_scikit_learns_with_the_penalty_that_leaves_least_error_one_out():
    x = torch.randn(16, 12, generator=generator(), dtype=torch.float64) + 1
    true = torch.randn(12, 3, generator=generator(1), dtype=torch.float64)
    y = x @ true + 2 * torch.randn(16, 3, generator=generator(2), dtype=torch.float64)
    weights, intercept = ridge(x, y)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    unit = float(s.square().mean())

    def brute_force(penalty):
        errors = []
        for n in range(16):
            keep = [i for i in range(16) if i != n]
            fit = Ridge(alpha=penalty * unit).fit(x[keep].numpy(), y[keep].numpy())
            errors.append(y[n] - torch.from_numpy(fit.predict(x[n : n + 1].numpy())[0]))
        return torch.stack(errors)

    for penalty in (1e-3, 1.0):
        found = left_out(u, s.square() / (s.square() + penalty * unit), y - y.mean(0))
        torch.testing.assert_close(found, brute_force(penalty))
    best = min(PENALTIES, key=lambda penalty: float(brute_force(penalty).square().sum()))
    fit = Ridge(alpha=best * unit).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(weights, torch.from_numpy(fit.coef_).T)
    torch.testing.assert_close(intercept, torch.from_numpy(fit.intercept_))


def test_w_is_found_where_it_is_and_nowhere_else(monkeypatch):
    model = regressor("rope-attention-swiglu-rms*2")
    fitted, held_out = drawn(count=200), drawn(count=150, seed=2)

    def streams(model, prompts, examples):
        noise = torch.randn(len(prompts.xs), 1, 16, generator=generator(3), dtype=torch.float64)
        mix = torch.randn(5, 16, generator=generator(4), dtype=torch.float64)
        there = prompts.hidden["w"].double().flatten(1)[:, None] @ mix
        return iter([noise, there + 3, there + noise])

    monkeypatch.setattr(probed, "_streams", streams)
    frame = weight_probes(model, fitted, held_out, generator(), seed=4)
    r2, shuffled = values(frame, "r2"), values(frame, "r2_shuffled")
    assert abs(r2[0, 11]) < 0.1
    assert r2[1, 11] == pytest.approx(1, abs=1e-3)
    assert 0.5 < r2[2, 11] < 0.99
    assert shuffled.abs().max() < 0.15
    assert set(frame.seed) == {4}


def test_least_squares_is_the_ceiling():
    prompts = drawn(count=300)
    true = prompts.hidden["w"].double().flatten(1)
    # Of d coordinates, i examples fix i: R² = i / d, then 1.
    for examples in (0, 2, 5, 11):
        found = least_squares_weights(prompts, examples)
        r2, stderr = r_squared(found, true, torch.zeros(5, dtype=torch.float64))
        assert r2 == pytest.approx(min(1, examples / 5), abs=4 * stderr + 1e-9)


def test_a_probe_reads_no_more_than_least_squares_of_a_model_that_knows_nothing():
    model = regressor("mamba-rms,attention-mamba_ffn-rms")
    frame = weight_probes(
        model, drawn(count=60), drawn(count=40, seed=2), generator(), examples=(0, 6)
    )
    assert set(frame.layer) == {-1, 0, 1, 2}
    assert set(frame.examples) == {0, 6}
    ceiling = values(frame, "r2_least_squares")
    assert ceiling[-1, 6] == pytest.approx(1)
    assert values(frame, "r2").max() < 0.9
    # Before the first block the stream has x alone.
    assert values(frame, "r2")[0].abs().max() < 0.2


def test_streams_are_read_where_x_stands():
    model, prompts = regressor("rope-attention-swiglu-rms*2"), drawn(count=4)
    first, *_ = probed._streams(model, prompts, (0, 7))
    expected = model.model.model.read_in(prompts.xs[:, [0, 7]])
    torch.testing.assert_close(first, expected.double())


def test_what_cannot_be_probed_is_said():
    model, prompts = regressor("rope-attention-swiglu-rms"), drawn(count=4)
    with pytest.raises(ValueError, match="0 to 11"):
        weight_probes(model, prompts, prompts, generator(), examples=(12,))
    with pytest.raises(ValueError, match="its prompts hide"):
        weight_probes(model, prompts, prompts, generator(), hidden="support")
    with pytest.raises(ValueError, match="at least 3"):
        weight_probes(model, drawn(count=2), prompts, generator())
