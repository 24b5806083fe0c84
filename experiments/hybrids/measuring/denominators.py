"""Which baseline is a score named after, and what does it say of these prompts?

The paper's, where that is an algorithm; the Bayes optimum, where it can be computed; for trees one
that sees the signs a tree asks for. A function class with none of these takes, of its baselines
that do not fit anew for every prefix, the one with the least error: never one that does worse than
predicting 0 (least squares does, near as many points as coordinates), which would turn a score
upside down.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from experiments.hybrids.regression.baselines import (
    BAYES,
    PAPER_BASELINE,
    SLOW,
    baselines_for,
    predictions,
)
from experiments.hybrids.regression.prompts import Prompts
from probes.regression import squared_error_by_examples

DENOMINATORS: Mapping[str, str] = {
    **dict.fromkeys(BAYES, "bayes"),
    **PAPER_BASELINE,
    "tree": "tree-signs",
}
"""Function class -> its baseline, where it does not depend on the prompts."""


def denominator(task: str, prompts: Prompts) -> tuple[str, Float[Tensor, "batch point"]]:
    """The baseline's name, and its squared errors of all points."""
    names = tuple(name for name in baselines_for(task) if name not in SLOW)
    said = predictions(prompts, (DENOMINATORS[task],) if task in DENOMINATORS else names)
    errors = {name: squared_error_by_examples(value, prompts.ys) for name, value in said.items()}
    best = min(errors, key=lambda name: float(errors[name].double().sum()))
    return best, errors[best]
