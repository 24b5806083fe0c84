r"""How alike are two lists of scores?

Every measure is an inner product of features of the two lists of scores, ties kept as ties:

    spearman         average ranks, centred, of length 1
    kendall          signs of all pairwise differences, of length 1: tau-b
    overlap          members of the top k over √k; components tied across the border share what
                     places are left, so this is the mean overlap over random breaks of ties
    reference_order  the *order* (which component is at place 1, 2, …) in the place of the ranks:
                     what the script of Bansal et al. (2023) computed, here for comparison only.
                     It is near 0 for tasks that agree, unless importance rises with depth.

Only the overlap has a p-value, Σ_{x ≥ overlap} of the hypergeometric. A p-value of a rank
correlation says little: with 4608 heads, 0.04 is "significant".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Scores = Float[np.ndarray, "*rows component"]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's ρ of two lists of scores; nan if one is constant."""
    return _inner(rank_features, a, b)


def reference_order(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's ρ of the two *orders* (stable argsort): the defect, on purpose."""
    return _inner(order_features, a, b)


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's τ_b; nan if one list is constant."""
    x, y = _both(a, b)
    return float(np.asarray(stats.kendalltau(x, y))[0])


def top_overlap(a: ArrayLike, b: ArrayLike, k: int) -> tuple[float, float]:
    """Share of the top k that both have, and P(as much by chance), hypergeometric.

    With ties at the border the share is its mean over random breaks, and p is that of the whole
    number below: too large rather than too small.
    """
    x, y = _both(a, b)
    share = float(top_members(x, k) @ top_members(y, k)) / k
    return share, overlap_p(share, x.size, k)


def shared_top(a: ArrayLike, b: ArrayLike, share: float) -> dict[str, float]:
    """How much two lists of scores share: k (`share` of the components, at least one), components,
    overlap of the top k, expected (of chance), p, spearman."""
    x, y = _both(a, b)
    k = max(1, round(share * x.size))
    overlap, p = top_overlap(x, y, k)
    return {
        "k": k,
        "components": x.size,
        "overlap": overlap,
        "expected": k / x.size,
        "p": p,
        "spearman": spearman(x, y),
    }


def overlap_p(share: float, components: int, k: int) -> float:
    """P(X ≥ ⌊share · k⌋) for X common members of two random choices of k components."""
    common = np.floor(share * k + 1e-9)
    return float(stats.hypergeom.sf(common - 1, components, k, k))


def top_members(scores: Scores, k: int) -> Scores:
    """1 in the top k, 0 below; components tied at the border share the places left."""
    count = scores.shape[-1]
    if not 1 <= k <= count:
        raise ValueError(f"the top {k} of {count} components asked for: give 1 to {count}")
    border = np.partition(scores, count - k, axis=-1)[..., count - k, None]
    above, level = scores > border, scores == border
    left = k - above.sum(-1, keepdims=True)
    return above + level * (left / level.sum(-1, keepdims=True))


def rank_features(scores: Scores) -> Scores:
    """Average ranks, centred, of length 1 (nan where all are equal)."""
    return _unit(stats.rankdata(scores, axis=-1))


def order_features(scores: Scores) -> Scores:
    """The reference's: at each place of the sorted list the number of the component there."""
    return _unit(np.argsort(scores, axis=-1, kind="stable").astype(float))


def sign_features(scores: Scores) -> Scores:
    """The sign of the difference of every pair of components, of length 1."""
    first, second = np.triu_indices(scores.shape[-1], 1)
    signs = np.sign(scores[..., second] - scores[..., first])
    return _scaled(signs)


def _inner(features: Callable[[Scores], Scores], a: ArrayLike, b: ArrayLike) -> float:
    x, y = _both(a, b)
    return float(features(x) @ features(y))


def _both(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ValueError(
            f"scores of shapes {x.shape} and {y.shape}: give two lists of the same components"
        )
    return x, y


def _unit(values: Scores) -> Scores:
    return _scaled(values - values.mean(-1, keepdims=True))


def _scaled(values: Scores) -> Scores:
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(length > 0, values / length, np.nan)
