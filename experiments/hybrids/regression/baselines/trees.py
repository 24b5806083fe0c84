"""What do regression trees say that were grown on the points before this one?

    tree            greedy splits of the squared error until every leaf is pure
    tree-4          the same to depth 4, that of the paper's task
    tree-signs      the same as `tree` on sign(x): the task asks for nothing else (Garg et al. 2022)
    boosted         100 trees, each on what those before it left, with XGBoost's defaults

Grown by scikit-learn, a fit for every prefix of every prompt: on one core about 0.6 milliseconds
a tree and, at the 101 points of the paper's task, 55 a boosted hundred.
`boosted` is HistGradientBoosting with XGBoost's learning rate 0.3, depth 6, one point a leaf and
λ = 1; a prompt has fewer points than its 255 bins, so its splits are the exact ones. It begins at
the mean of y where XGBoost 1.6 begins at 0.5.

Where it misleads: equally good splits (always there among few points) are settled by chance, here
from `seed`, so single predictions are not comparable between implementations; averages are.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.tree import DecisionTreeRegressor
from threadpoolctl import threadpool_limits
from torch import Tensor

Rows = Float[np.ndarray, "point column"]


def tree(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    *,
    depth: int | None = None,
    signs: bool = False,
    seed: int = 0,
) -> Float[Tensor, "batch point y_dim"]:
    """One tree on the points before, of at most `depth`."""
    prompts = zip(_rows(xs.sign() if signs else xs), _rows(ys), strict=True)
    return _as(ys, [_trees(x, y, depth, seed) for x, y in prompts])


def boosted_trees(
    xs: Float[Tensor, "batch point x_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    *,
    seed: int = 0,
) -> Float[Tensor, "batch point y_dim"]:
    """Boosted trees on the points before, with XGBoost's defaults; outputs of y apart."""
    prompts = zip(_rows(xs), _rows(ys), strict=True)
    return _as(ys, [_boosted(x, y, seed) for x, y in prompts])


def _trees(xs: Rows, ys: Rows, depth: int | None, seed: int) -> Rows:
    predictions = np.zeros_like(ys)
    for i in range(1, len(xs)):
        grown = DecisionTreeRegressor(max_depth=depth, random_state=seed).fit(xs[:i], ys[:i])
        predictions[i] = grown.predict(xs[i : i + 1])[0]
    return predictions


def _boosted(xs: Rows, ys: Rows, seed: int) -> Rows:
    predictions = np.zeros_like(ys)
    with threadpool_limits(1):  # a hundred points are too few to share
        for i in range(1, len(xs)):
            for output in range(ys.shape[1]):
                grown = HistGradientBoostingRegressor(
                    learning_rate=0.3,
                    max_iter=100,
                    max_depth=6,
                    max_leaf_nodes=64,  # no limit: depth 6 has no more
                    min_samples_leaf=1,
                    l2_regularization=1.0,
                    random_state=seed,
                ).fit(xs[:i], ys[:i, output])
                predictions[i, output] = grown.predict(xs[i : i + 1])[0]
    return predictions


def _rows(values: Float[Tensor, "batch point column"]) -> Float[np.ndarray, "batch point column"]:
    return values.double().cpu().numpy()


def _as(ys: Tensor, found: list[Rows]) -> Tensor:
    return torch.from_numpy(np.stack(found)).to(ys)
