"""How well does a model regress in context, by number of examples, and against which baseline?

With ξ(i) the squared error of the prediction after i examples (mean over the coordinates of y) and
0 the prediction 0, on the same prompts,

    S = Σ_i (ξ_model(i) − ξ_0(i)) / Σ_i (ξ_base(i) − ξ_0(i)),    sums over prompts and seeds too

is 1 for the baseline itself, 0 for predicting 0, below 0 for worse, above 1 for better than the
baseline (Campbell, Lojo et al. 2024, arXiv 2411.03945, who divide by errors of other prompts).

Its interval is that of `two_stages`, over prompts and over seeds: a prompt that is drawn brings the
errors of the model, of the baseline and of 0 along.

Where it misleads: S is a share of what the baseline gains, so it means nothing without the
baseline's name; against a weak baseline all models look alike. A few prompts with large y decide.
Least squares on targets that are not linear (mlp, tree) has errors without a finite mean where the
number of examples is near that of coordinates: take ridge there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from probes.two_stages import Part, TwoStages, two_stages

if TYPE_CHECKING:
    import pandas as pd


class Score(NamedTuple):
    """S against the named baseline, and how sure it is."""

    value: float
    low: float
    high: float
    stderr: float
    baseline: str
    gain: float
    """What the baseline gains over 0, summed over points: the denominator, a prompt."""
    prompts: int
    seeds: int


def squared_error_by_examples(
    predictions: Float[Tensor, "*batch point y_dim"], ys: Float[Tensor, "*batch point y_dim"]
) -> Float[Tensor, "*batch point"]:
    """Squared error of each prediction, mean over the coordinates of y; point i has i examples."""
    return (predictions - ys).square().mean(dim=-1)


def icl_regression_score(
    model_err: Float[Tensor, "batch point"],
    base_err: Float[Tensor, "batch point"],
    zero_err: Float[Tensor, "batch point"],
) -> float:
    """S on these prompts; give the last point alone where only the last is scored.

    ValueError where the baseline gains nothing over 0: such a denominator has no meaning.
    """
    gain = float((zero_err - base_err).double().sum())
    if not gain > 0:
        raise ValueError(
            f"a baseline whose squared error is {-gain:.3g} above that of predicting 0 divides no "
            "score: name one that beats 0 on these prompts"
        )
    return float((zero_err - model_err).double().sum()) / gain


def score_by_seed(
    model_err: Float[Tensor, "seed batch point"],
    base_err: Float[Tensor, "*own batch point"],
    zero_err: Float[Tensor, "*own batch point"],
) -> list[float]:
    """S of every seed; its prompts are shared, or its own where the others have a seed axis too."""
    bases, zeros = (e.expand_as(model_err) for e in (base_err, zero_err))
    return [icl_regression_score(*errors) for errors in zip(model_err, bases, zeros, strict=True)]


def score_interval(
    model_err: Float[Tensor, "seed batch point"],
    base_err: Float[Tensor, "*own batch point"],
    zero_err: Float[Tensor, "*own batch point"],
    generator: Generator,
    *,
    baseline: str,
    level: float = 0.95,
    resamples: int = 2000,
) -> Score:
    """S of a model trained from several seeds, with the interval of `two_stages`.

    Args:
        base_err: [batch point] where all seeds answer the same prompts, else [seed batch point].
        baseline: the name of the denominator; kept with the number.

    ValueError where the baseline gains less over 0 than two standard errors of its gain.
    """
    gains, bases = _sums(zero_err - model_err), _sums(zero_err - base_err)
    _check_gain(bases, baseline)
    two = two_stages([(1, gains)], bases, generator, resamples)
    return _score(two, level, bases, baseline, len(gains))


def score_difference(
    a_err: Float[Tensor, "seed_a batch point"],
    b_err: Float[Tensor, "seed_b batch point"],
    base_err: Float[Tensor, "batch point"],
    zero_err: Float[Tensor, "batch point"],
    generator: Generator,
    *,
    baseline: str,
    level: float = 0.95,
    resamples: int = 2000,
) -> Score:
    """S of a − S of b on the same prompts, which are drawn for both at once; seeds of a and of b
    are drawn apart. ValueError as in `score_interval`."""
    bases = _sums(zero_err - base_err)
    _check_gain(bases, baseline)
    terms = [(1, _sums(zero_err - a_err)), (-1, _sums(zero_err - b_err))]
    two = two_stages(terms, bases, generator, resamples)
    return _score(two, level, bases, baseline, min(len(a_err), len(b_err)))


def score_frame(
    model_errs: Mapping[str, Float[Tensor, "seed batch point"]],
    base_errs: Mapping[str, Float[Tensor, "..."]],
    zero_err: Float[Tensor, "*own batch point"],
    generator: Generator,
    *,
    level: float = 0.95,
) -> pd.DataFrame:
    """`score_interval` of every model against every baseline: one row each, columns model and those
    of `Score`. value, low, high and stderr are nan where the baseline does not beat 0."""
    import pandas as pd

    rows = []
    for model, model_err in model_errs.items():
        for name, base_err in base_errs.items():
            bases = _sums(zero_err - base_err)
            if _beats_zero(bases):
                score = score_interval(
                    model_err, base_err, zero_err, generator, baseline=name, level=level
                )
            else:
                nan = float("nan")
                size = bases.numel(), len(model_err)
                score = Score(nan, nan, nan, nan, name, float(bases.mean()), *size)
            rows.append({"model": model, **score._asdict()})
    return pd.DataFrame(rows)


def error_frame(
    errors: Float[Tensor, "seed batch point"],
    *,
    level: float = 0.95,
    shared_prompts: bool = True,
) -> pd.DataFrame:
    """Squared error after each number of examples: columns examples, value, low, high, stderr.

    The interval is that of the score with the closed forms of both variances, of a mean.
    """
    import pandas as pd

    errors = errors.double().cpu()
    seeds, prompts, points = errors.shape
    by_prompt = errors.mean(0) if shared_prompts else errors
    of_prompts = by_prompt.var(dim=-2) / prompts
    if not shared_prompts:
        of_prompts = of_prompts.mean(0) / seeds
    of_seeds = errors.mean(1).var(dim=0) / seeds if seeds > 1 else torch.zeros(points)
    rows = []
    for i in range(points):
        own = not shared_prompts and seeds > 1
        two = TwoStages(
            float(errors[:, :, i].mean()),
            Part(float(of_prompts[i]), prompts - 1),
            [Part(float(of_seeds[i]), seeds - 1)] if seeds > 1 else [],
            own,
        )
        half = two.half(level)
        ends = {"low": two.value - half, "high": two.value + half}
        rows.append({"examples": i, "value": two.value, **ends, "stderr": two.variance**0.5})
    return pd.DataFrame(rows)


def _sums(differences: Float[Tensor, "*own batch point"]) -> Float[Tensor, "*own batch"]:
    """Over points; what is drawn are prompts."""
    return differences.double().sum(-1).cpu()


def _beats_zero(bases: Float[Tensor, "*own batch"]) -> bool:
    values = bases.flatten()
    spread = float(values.std()) if len(values) > 1 else 0.0
    return float(values.mean()) > 2 * spread / len(values) ** 0.5


def _score(
    two: TwoStages, level: float, bases: Float[Tensor, "*own batch"], baseline: str, seeds: int
) -> Score:
    half = two.half(level)
    return Score(
        value=two.value,
        low=two.value - half,
        high=two.value + half,
        stderr=two.variance**0.5,
        baseline=baseline,
        gain=float(bases.mean()),
        prompts=bases.numel(),
        seeds=seeds,
    )


def _check_gain(bases: Float[Tensor, "*own batch"], baseline: str) -> None:
    if not _beats_zero(bases):
        raise ValueError(
            f"{baseline} gains {float(bases.mean()):.3g} a prompt over predicting 0, less than two "
            "standard errors of that: name a baseline that beats 0 on these prompts"
        )
