"""How well does a model regress in context, by number of examples, and against which baseline?

With ξ(i) the squared error of the prediction after i examples (mean over the coordinates of y) and
0 the prediction 0, on the same prompts,

    S = Σ_i (ξ_model(i) − ξ_0(i)) / Σ_i (ξ_base(i) − ξ_0(i)),    sums over prompts too

is 1 for the baseline itself, 0 for predicting 0, below 0 for worse, above 1 for better than the
baseline (Campbell, Lojo et al. 2024, arXiv 2411.03945, who divide by errors of other prompts).

Where it misleads: S is a share of what the baseline gains, so it means nothing without the
baseline's name; against a weak baseline all models look alike. A few prompts with large y decide.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


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
