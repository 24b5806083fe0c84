"""What would a known algorithm have answered, given the points a model had been shown?

    BASELINES["lasso"](prompts)      [batch point y_dim]: point i from the i points before it

Each reads `xs` and `ys` of the prompts and nothing else; `bayes` and `parity-pooled` also read what
law the prompts have (k, the noise), never the functions drawn from it. Before the first point all
say 0, but for parity's: the mean over all supports. `baselines_for` lists those that have a meaning
for a task, slow ones too; PAPER_BASELINE is what the paper divides its score by, if an algorithm.

                                                           a prefix of the paper's prompts costs
    linear      zero, averaging, least squares, ridge      4 µs
    lasso       five α                                     30 µs at α = 0.1, 110 at 0.001
    neighbours  3 nearest, retrieval                       2 µs
    bayes       linear, sparse, quadratic, chebyshev,
                parity, recall                             70 µs (sparse; the others far less)
    trees       trees, boosted trees (scikit-learn)        0.6 ms, boosted 55 ms
    networks    Garg et al.'s two layers, raw and scaled   5 ms

in time of one processor; what takes many milliseconds is in SLOW, for a study to take fewer prompts
of.

Where it misleads: the published scores divide by errors of other prompts, some of them by errors of
a trained model (trees: GPT-2; parity: Mamba), which no algorithm here stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.hybrids.regression.baselines import (
    bayes,
    lasso,
    linear,
    neighbours,
    networks,
    trees,
)
from experiments.hybrids.regression.prompts import Prompts

Baseline = Callable[[Prompts], Float[Tensor, "batch point y_dim"]]

RIDGE = 1.0
"""λ of `ridge`; with label noise of this variance it is Bayes-optimal on linear prompts."""
NEIGHBOURS = 3


def _bayes_linear(prompts: Prompts) -> Tensor:
    return _normal_weights(prompts.xs, prompts)


def _bayes_quadratic(prompts: Prompts) -> Tensor:
    return _normal_weights(prompts.xs.double().square(), prompts)


def _normal_weights(features: Tensor, prompts: Prompts) -> Tensor:
    noise = _noise(prompts)
    if noise:
        return linear.ridge(features, prompts.ys, noise**2)
    return linear.least_squares(features, prompts.ys)


def _bayes_sparse(prompts: Prompts) -> Tensor:
    k = prompts.hidden["support"].shape[1]
    return bayes.sparse_posterior_mean(prompts.xs, prompts.ys, k, _noise(prompts))


def _bayes_chebyshev(prompts: Prompts) -> Tensor:
    top = 2 + prompts.hidden["coefficients"].shape[1]
    return bayes.chebyshev_posterior_mean(prompts.xs, prompts.ys, top, _noise(prompts))


def _bayes_parity(prompts: Prompts) -> Tensor:
    k = prompts.hidden["support"].shape[1]
    return bayes.parity_posterior_mean(prompts.xs, prompts.ys, k, _noise(prompts))


def _pooled_parity(prompts: Prompts) -> Tensor:
    k = prompts.hidden["support"].shape[1]
    return bayes.parity_pooled(prompts.xs, prompts.ys, k, _noise(prompts))


def _noise(prompts: Prompts) -> float:
    return float(prompts.hidden["noise"])


BAYES: Mapping[str, Baseline] = {
    "linear": _bayes_linear,
    "sparse": _bayes_sparse,
    "quadratic": _bayes_quadratic,
    "chebyshev": _bayes_chebyshev,
    "parity": _bayes_parity,
    "parity-batch": _bayes_parity,
    "mqar": lambda prompts: neighbours.exact_retrieval(prompts.xs, prompts.ys),
}
"""task -> its Bayes-optimal predictor, where one can be computed."""


def _best(prompts: Prompts) -> Tensor:
    if prompts.task not in BAYES:
        raise ValueError(
            f"no Bayes-optimal predictor of task {prompts.task}: take one of {', '.join(BAYES)}"
        )
    return BAYES[prompts.task](prompts)


def _lasso(alpha: float) -> Baseline:
    return lambda prompts: lasso.lasso(prompts.xs, prompts.ys, alpha)


BASELINES: Mapping[str, Baseline] = {
    "zero": lambda p: linear.zero(p.xs, p.ys),
    "averaging": lambda p: linear.averaging(p.xs, p.ys),
    "least-squares": lambda p: linear.least_squares(p.xs, p.ys),
    "ridge": lambda p: linear.ridge(p.xs, p.ys, RIDGE),
    "lasso-1": _lasso(1.0),
    "lasso-0.1": _lasso(0.1),
    "lasso-0.01": _lasso(0.01),
    "lasso": _lasso(0.001),
    "lasso-0.0001": _lasso(0.0001),
    "neighbours": lambda p: neighbours.nearest_neighbours(p.xs, p.ys, NEIGHBOURS),
    "retrieval": lambda p: neighbours.retrieval(p.xs, p.ys),
    "network": lambda p: networks.network(p.xs, p.ys),
    "network-scaled": lambda p: networks.network(p.xs, p.ys, scaled=True),
    "tree": lambda p: trees.tree(p.xs, p.ys),
    "tree-4": lambda p: trees.tree(p.xs, p.ys, depth=4),
    "tree-signs": lambda p: trees.tree(p.xs, p.ys, signs=True),
    "boosted": lambda p: trees.boosted_trees(p.xs, p.ys),
    "parity-pooled": _pooled_parity,
    "bayes": _best,
}
"""name -> predictor. `lasso` is that of the paper's notebook, α = 0.001."""

SLOW = frozenset({"network", "network-scaled", "boosted"})
"""A millisecond and more for each point of each prompt."""

PAPER_BASELINE: Mapping[str, str] = {
    "linear": "least-squares",
    "sparse": "lasso",
    "mlp": "network",
}
"""task -> the paper's denominator, an algorithm. Its trees are divided by its GPT-2, parity by its
Mamba; associative recall has no score in its table."""

_LINEAR = ("zero", "averaging", "least-squares", "ridge")
_FOR: Mapping[str, tuple[str, ...]] = {
    "linear": (*_LINEAR, "neighbours", "bayes"),
    "sparse": (*_LINEAR, "lasso-0.1", "lasso-0.01", "lasso", "neighbours", "bayes"),
    "mlp": (*_LINEAR, "neighbours", "network", "network-scaled"),
    "mlp-normalised": (*_LINEAR, "neighbours", "network", "network-scaled"),
    "tree": ("zero", "least-squares", "neighbours", "tree", "tree-4", "tree-signs", "boosted"),
    "parity": ("zero", "least-squares", "neighbours", "bayes"),
    "parity-batch": ("zero", "least-squares", "neighbours", "bayes", "parity-pooled"),
    "mqar": ("zero", "averaging", "neighbours", "retrieval", "bayes"),
    "classification": (*_LINEAR, "neighbours", "network"),
    "quadratic": (*_LINEAR, "neighbours", "network", "bayes"),
    "chebyshev": ("zero", "least-squares", "neighbours", "network", "bayes"),
    "chebyshev-roots": ("zero", "least-squares", "neighbours", "network"),
}


def baselines_for(task: str) -> tuple[str, ...]:
    """The baselines that have a meaning for a task, `zero` first. ValueError for an unknown one."""
    if task not in _FOR:
        raise ValueError(f"no baselines for task {task!r}: take one of {', '.join(_FOR)}")
    return _FOR[task]


def predictions(
    prompts: Prompts, names: tuple[str, ...] | None = None
) -> dict[str, Float[Tensor, "batch point y_dim"]]:
    """What every baseline (of the task, unless given) says of the same prompts."""
    names = baselines_for(prompts.task) if names is None else names
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"no baseline {unknown[0]!r}: take some of {', '.join(BASELINES)}")
    with torch.no_grad():
        return {name: BASELINES[name](prompts) for name in names}
