"""The score against its definition, and intervals against closed forms and in a simulation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from probes import two_stages
from probes.regression import (
    error_frame,
    icl_regression_score,
    score_by_seed,
    score_difference,
    score_frame,
    score_interval,
    squared_error_by_examples,
)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def errors(
    seeds: int,
    prompts: int,
    generator: Generator,
    *,
    spread: float = 0.0,
    noise: float = 0.05,
    own: bool = False,
    truth: float = 0.95,
) -> tuple[Tensor, Tensor, Tensor]:
    """model, base and zero errors of one point whose expected S is `truth`: 0 has heavy-tailed
    errors, the baseline none, seeds spread by `spread`, prompts (and both together) by `noise`."""
    shape = (seeds, prompts) if own else (prompts,)
    zero = torch.randn(*shape, 5, generator=generator).square().sum(-1)
    seed = spread * torch.randn(seeds, 1, generator=generator)
    prompt = noise * torch.randn(shape, generator=generator)
    both = 0.3 * noise * torch.randn(seeds, prompts, generator=generator)
    model = zero * (1 - truth - seed - prompt - both)
    return model[..., None], torch.zeros_like(zero)[..., None], zero[..., None]


# The score ----------------------------------------------------------------------------------------
def test_squared_error_is_the_mean_over_coordinates_of_y() -> None:
    predictions = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    ys = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    assert squared_error_by_examples(predictions, ys).tolist() == [[2.5, 4.5]]


def test_score_of_the_baseline_is_one_and_of_zero_is_zero() -> None:
    ys = torch.randn(50, 7, 2, generator=seeded())
    base_err = squared_error_by_examples(0.5 * ys, ys)
    zero_err = squared_error_by_examples(torch.zeros_like(ys), ys)
    assert icl_regression_score(base_err, base_err, zero_err) == 1.0
    assert icl_regression_score(zero_err, base_err, zero_err) == 0.0
    perfect = torch.zeros_like(zero_err)
    assert icl_regression_score(perfect, base_err, zero_err) == pytest.approx(4 / 3)  # 1 / (1 − ¼)
    assert icl_regression_score(2 * zero_err, base_err, zero_err) < 0


def test_score_by_the_definition() -> None:
    model, base, zero = torch.rand(3, 4, 5, generator=seeded()) + torch.tensor([0.5, 0, 1]).reshape(
        3, 1, 1
    )
    above = sum(float(model[j, i] - zero[j, i]) for j in range(4) for i in range(5))
    below = sum(float(base[j, i] - zero[j, i]) for j in range(4) for i in range(5))
    assert icl_regression_score(model, base, zero) == pytest.approx(above / below)


@pytest.mark.parametrize("own", [False, True])
def test_score_by_seed(own: bool) -> None:
    model, base, zero = errors(3, 40, seeded(), spread=0.1, own=own)
    scores = score_by_seed(model, base, zero)
    for k in range(3):
        b, z = (base[k], zero[k]) if own else (base, zero)
        assert scores[k] == icl_regression_score(model[k], b, z)
    whole = score_interval(model, base, zero, seeded(), baseline="exact").value
    if own:  # seeds with larger denominators weigh more
        totals = zero.sum((1, 2)).double()
        expected = float((totals * torch.tensor(scores)).sum() / totals.sum())
    else:
        expected = sum(scores) / 3
    assert whole == pytest.approx(expected, rel=1e-6)


# The interval -------------------------------------------------------------------------------------
def test_baseline_and_zero_are_certain() -> None:
    """Pairing: with the same errors above and below, there is nothing to be unsure of."""
    _, base, zero = errors(3, 60, seeded())
    for err, value in ((base, 1.0), (zero, 0.0)):
        score = score_interval(
            err.expand(3, -1, -1), base, zero, seeded(), baseline="least squares"
        )
        assert (score.low, score.value, score.high) == pytest.approx((value, value, value))
        assert score.baseline == "least squares"
        assert (score.prompts, score.seeds) == (60, 3)
        assert score.gain == pytest.approx(float(zero.mean()))


def test_parts_of_the_variance_against_closed_forms() -> None:
    model, base, zero = errors(4, 500, seeded(3), spread=0.05)
    gains, bases = (zero - model).sum(-1).double(), (zero - base).sum(-1).double()
    found = two_stages.two_stages([(1, gains)], bases, seeded(), 8000)
    value, mean = found.value, bases.mean()
    linear = (gains.mean(0) - value * bases) / mean  # what one prompt adds to S, times n
    assert found.prompts.variance == pytest.approx(float(linear.var() / 500), rel=0.06)
    per_seed = torch.tensor(score_by_seed(model, base, zero)).double()
    assert found.seeds[0].variance == pytest.approx(float(per_seed.var() / 4), rel=0.06)
    assert found.variance == found.prompts.variance + found.seeds[0].variance
    freedom = found.variance**2 / (
        found.prompts.variance**2 / 499 + found.seeds[0].variance ** 2 / 3
    )
    expected = stats.t.ppf(0.975, freedom) * math.sqrt(found.variance)
    assert found.half(0.95) == pytest.approx(expected)


def test_own_prompts_are_not_counted_twice() -> None:
    model, base, zero = errors(5, 300, seeded(5), spread=0.05, own=True)
    gains, bases = (zero - model).sum(-1).double(), (zero - base).sum(-1).double()
    found = two_stages.two_stages([(1, gains)], bases, seeded(), 4000)
    assert found.variance == max(found.prompts.variance, found.seeds[0].variance)
    linear = (gains - found.value * bases) / bases.mean()
    assert found.prompts.variance == pytest.approx(float(linear.var(1).mean() / 1500), rel=0.08)
    assert found.seeds[0].variance == pytest.approx(float(linear.mean(1).var() / 5), rel=0.1)


def test_one_seed_has_no_spread_over_seeds() -> None:
    model, base, zero = errors(1, 200, seeded())
    score = score_interval(model, base, zero, seeded(), baseline="exact")
    linear = (zero - model)[0, :, 0].double() - score.value * zero[:, 0].double()
    expected = float(linear.std()) / float(zero.mean()) / math.sqrt(200)
    assert score.stderr == pytest.approx(expected, rel=0.06)
    assert score.high - score.value == pytest.approx(1.972 * score.stderr, rel=1e-3)


def test_many_prompts_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, zero = errors(3, 600, seeded())
    whole = score_interval(model, base, zero, seeded(), baseline="exact")
    monkeypatch.setattr(two_stages, "MOST_BLOCKS", 130)  # 600 is no multiple of it
    blocks = score_interval(model, base, zero, seeded(), baseline="exact")
    assert blocks.value == whole.value
    assert blocks.stderr == pytest.approx(whole.stderr, rel=0.25)


@pytest.mark.parametrize(
    ("seeds", "spread", "own", "least"),
    [
        (1, 0.0, False, 0.90),
        (2, 0.0, False, 0.90),
        (3, 0.02, False, 0.86),
        (5, 0.004, False, 0.90),
        (5, 0.02, False, 0.89),
        (3, 0.02, True, 0.88),
        (5, 0.0, True, 0.92),
    ],
)
def test_coverage(seeds: int, spread: float, own: bool, least: float) -> None:
    """The expected S lies within a nominal 95 % interval about that often."""
    generator, held, draws = seeded(11), 0, 200
    for _ in range(draws):
        found = errors(seeds, 128, generator, spread=spread, own=own)
        score = score_interval(*found, generator, baseline="exact", resamples=200)
        held += score.low <= 0.95 <= score.high
    assert least <= held / draws


# Two models ---------------------------------------------------------------------------------------
def test_a_difference_is_surer_than_its_parts() -> None:
    """Prompts are drawn for both models at once, and what they share cancels."""
    model, base, zero = errors(4, 300, seeded(), noise=0.2)
    better = model - 0.05 * zero
    found = score_difference(better, model, base, zero, seeded(), baseline="exact")
    assert found.value == pytest.approx(0.05, abs=1e-6)
    alone = score_interval(model, base, zero, seeded(), baseline="exact")
    assert found.stderr < 0.3 * alone.stderr
    same = score_difference(model, model, base, zero, seeded(), baseline="exact")
    assert same.value == 0
    assert same.low < 0 < same.high  # the seeds of both are drawn apart


# Tables and curves --------------------------------------------------------------------------------
def test_score_frame_has_every_model_against_every_baseline() -> None:
    model, base, zero = errors(2, 100, seeded())
    useless = zero + 0.1
    frame = score_frame(
        {"llama": model, "zero": zero.expand(2, -1, -1)},
        {"exact": base, "useless": useless},
        zero,
        seeded(),
    ).set_index(["model", "baseline"])
    assert len(frame) == 4
    assert frame.loc[("zero", "exact"), "value"] == 0
    assert frame.loc[("llama", "exact"), "value"] == pytest.approx(0.95, abs=0.02)
    against_nothing = frame.loc[("llama", "useless")]
    assert math.isnan(against_nothing["value"])
    assert math.isnan(against_nothing["high"])
    assert against_nothing["gain"] == pytest.approx(-0.1, rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_error_frame_against_the_score_machinery(shared: bool) -> None:
    """A mean is a ratio with 1 below: the closed forms and the bootstrap must agree."""
    values = torch.rand(4, 250, 3, generator=seeded()) + torch.linspace(0, 0.3, 4).reshape(4, 1, 1)
    frame = error_frame(values, shared_prompts=shared)
    assert frame["examples"].tolist() == [0, 1, 2]
    for i in range(3):
        gains = values[..., i].double()
        ones = torch.ones(250) if shared else torch.ones(4, 250)
        found = two_stages.two_stages([(1, gains)], ones.double(), seeded(), 6000)
        assert frame["value"][i] == pytest.approx(found.value)
        assert frame["stderr"][i] == pytest.approx(found.variance**0.5, rel=0.05)
        assert frame["high"][i] - frame["value"][i] == pytest.approx(found.half(0.95), rel=0.12)


def test_error_frame_of_one_seed_is_students_t_over_prompts() -> None:
    values = torch.rand(1, 30, 1, generator=seeded())
    row = error_frame(values).iloc[0]
    x = values[0, :, 0].double().numpy()
    low, high = stats.t.interval(0.95, 29, x.mean(), x.std(ddof=1) / math.sqrt(30))
    assert (row["low"], row["high"]) == pytest.approx((low, high))


# Bad input ----------------------------------------------------------------------------------------
def test_a_baseline_that_gains_nothing_divides_nothing() -> None:
    model, base, zero = errors(2, 50, seeded())
    with pytest.raises(ValueError, match="divides no score: name one that beats 0"):
        icl_regression_score(model[0], zero, zero)
    with pytest.raises(ValueError, match="least squares gains -0.1 a prompt over predicting 0"):
        score_interval(model, zero + 0.1, zero, seeded(), baseline="least squares")
    by_chance = zero + torch.randn(50, 1, generator=seeded(1))
    with pytest.raises(ValueError, match="two standard errors"):
        score_difference(model, model, by_chance, zero, seeded(), baseline="noise")
