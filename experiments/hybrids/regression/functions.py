"""How are functions drawn, a whole batch at once, and what do they say of a point?

What is hidden from the model, class by class (f the function, one a prompt):

    linear, quadratic, classification
                             w [batch x_dim y_dim]
    sparse                   w, and support [batch k]
    mlp, mlp-normalised      W_1 [batch x_dim width], W_2 [batch width y_dim], any factor in W_2
    tree                     coordinate [batch inner], leaf [batch leaves y_dim], in heap order: the
                             children of node n are 2n + 1 (left, x ≤ 0) and 2n + 2 (right)
    parity, parity-batch     support [batch k]
    mqar                     values [batch pairs y_dim], index [batch]: the pair the last x repeats
    chebyshev                coefficients [batch order] of T_3, T_4, …, degree [batch]
    chebyshev-roots          roots [batch degree], factor [batch]

Supports are in ascending order. Coordinates that a curriculum switches off are 0 in x and in w, and
in no support; a tree may still ask for them, as in the reference, and is told "not > 0".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Int
from torch import Generator, Tensor

from experiments.hybrids.regression.task_table import Task

Hidden = dict[str, Tensor]
ROOT_JITTER = 0.2


class FunctionClass(NamedTuple):
    """Draw x, draw f, and f(x)."""

    xs: Callable[[Task, int, int, int, Generator], Tensor]
    """(task, batch, points, dims, generator) -> xs"""
    hidden: Callable[[Task, int, int, int, Generator], Hidden]
    """(task, batch, points, dims, generator) -> hidden"""
    ys: Callable[[Task, Mapping[str, Tensor], Tensor], Tensor]
    """(task, hidden, xs) -> ys"""
    linear_in: str = ""
    """The hidden tensor that y is proportional to."""
    shared: bool = False
    """One function for the whole batch."""


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _uniform(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device)


def _first(values: Tensor, dims: int, axis: int) -> Tensor:
    """The first `dims` coordinates kept, the others 0."""
    values.narrow(axis, dims, values.shape[axis] - dims).zero_()
    return values


# x ------------------------------------------------------------------------------------------------
def _gaussian_xs(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Tensor:
    return _first(_normal(generator, batch, points, task.d), dims, -1)


def _sign_xs(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Tensor:
    coins = _uniform(generator, batch, points, task.d) < 0.5
    return _first(1 - 2 * coins.float(), dims, -1)


def _interval_xs(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Tensor:
    return 2 * _uniform(generator, batch, points, task.d) - 1


def _sphere_xs(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Tensor:
    return _on_sphere(_gaussian_xs(task, batch, points, dims, generator), dims)


def _on_sphere(values: Tensor, dims: int) -> Tensor:
    return values * (math.sqrt(dims) / torch.linalg.vector_norm(values, dim=-1, keepdim=True))


# f ------------------------------------------------------------------------------------------------
def _weights(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    return {"w": _first(_normal(generator, batch, task.d, task.y_dim), dims, 1)}


def _support(task: Task, batch: int, dims: int, generator: Generator) -> Int[Tensor, "batch k"]:
    if task.k > dims:
        raise ValueError(
            f"{task.k} relevant coordinates of {dims} switched on in task {task.name}: "
            f"start the curriculum at dims ≥ {task.k}"
        )
    ranks = _uniform(generator, batch, task.d)[:, :dims]
    return ranks.topk(task.k, dim=1).indices.sort(dim=1).values


def _sparse_weights(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    support = _support(task, batch, dims, generator)
    kept = torch.zeros(batch, task.d, 1, device=generator.device)
    kept.scatter_(1, support[..., None], 1.0)
    return {"w": _normal(generator, batch, task.d, task.y_dim) * kept, "support": support}


def _parity_support(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    return {"support": _support(task, batch, dims, generator)}


def _network(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    w_1 = _first(_normal(generator, batch, task.d, task.width), dims, 1)
    return {"W_1": w_1, "W_2": _normal(generator, batch, task.width, task.y_dim)}


def _normalised_network(
    task: Task, batch: int, points: int, dims: int, generator: Generator
) -> Hidden:
    hidden = _network(task, batch, points, dims, generator)
    hidden["W_2"] *= math.sqrt(2 / task.width)
    return hidden


def _tree(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    leaves = 2**task.depth
    shape = (batch, leaves - 1)
    coordinate = torch.randint(task.d, shape, generator=generator, device=generator.device)
    return {"coordinate": coordinate, "leaf": _normal(generator, batch, leaves, task.y_dim)}


def _pairs(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    shape = (batch,)
    index = torch.randint(points - 1, shape, generator=generator, device=generator.device)
    values = _on_sphere(_normal(generator, batch, points - 1, task.y_dim), task.y_dim)
    return {"values": values, "index": index}


def _series(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    shape = (batch,)
    degree = torch.randint(3, task.depth + 1, shape, generator=generator, device=generator.device)
    orders = torch.arange(3, task.depth + 1, device=generator.device)
    coefficients = _normal(generator, batch, task.depth - 2) * (orders <= degree[:, None])
    return {"coefficients": coefficients, "degree": degree}


def _roots(task: Task, batch: int, points: int, dims: int, generator: Generator) -> Hidden:
    n = torch.arange(task.depth, device=generator.device)
    roots = torch.cos(math.pi * (n + 0.5) / task.depth)
    roots = roots + ROOT_JITTER * (2 * _uniform(generator, batch, task.depth) - 1)
    grid = torch.linspace(-1, 1, 401, device=generator.device)
    largest = (grid[None, :, None] - roots[:, None, :]).prod(-1).abs().amax(1)
    sign = 1 - 2 * (_uniform(generator, batch) < 0.5).float()
    return {"roots": roots, "factor": sign / largest}


# f(x) ---------------------------------------------------------------------------------------------
def _linear_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    return einsum(xs, hidden["w"], "batch point x_dim, batch x_dim y_dim -> batch point y_dim")


def _quadratic_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    return _linear_ys(task, hidden, xs.square())


def _sign_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    return 2 * (_linear_ys(task, hidden, xs) > 0).float() - 1


def _network_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(xs, hidden["W_1"]).relu_(), hidden["W_2"])


def _tree_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    coordinate, leaf = hidden["coordinate"], hidden["leaf"]
    right = xs > 0
    node = torch.zeros(xs.shape[:2], dtype=torch.long, device=xs.device)
    for _ in range(task.depth):
        asked = coordinate.gather(1, node)
        node = 2 * node + 1 + right.gather(2, asked[..., None])[..., 0].long()
    at = rearrange(node - (leaf.shape[1] - 1), "batch point -> batch point 1")
    return leaf.gather(1, at.expand(-1, -1, leaf.shape[-1]))


def _parity_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    chosen = hidden["support"][:, None].expand(-1, xs.shape[1], -1)
    return xs.gather(2, chosen).prod(dim=2, keepdim=True)


def _series_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    orders = torch.arange(3, task.depth + 1, device=xs.device)
    terms = torch.cos(orders * torch.acos(xs.clamp(-1, 1)))  # T_n(cos θ) = cos nθ
    return einsum(terms, hidden["coefficients"], "batch point n, batch n -> batch point")[..., None]


def _root_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    product = (xs - hidden["roots"][:, None]).prod(dim=-1)
    return (product * hidden["factor"][:, None])[..., None]


def _value_ys(task: Task, hidden: Mapping[str, Tensor], xs: Tensor) -> Tensor:
    """The values of the pairs in their order, then the one asked for; x decides nothing more."""
    values, at = hidden["values"], hidden["index"][:, None, None]
    return torch.cat([values, values.gather(1, at.expand(-1, 1, values.shape[-1]))], dim=1)


FUNCTIONS: Mapping[str, FunctionClass] = {
    "linear": FunctionClass(_gaussian_xs, _weights, _linear_ys, "w"),
    "sparse": FunctionClass(_gaussian_xs, _sparse_weights, _linear_ys, "w"),
    "mlp": FunctionClass(_gaussian_xs, _network, _network_ys, "W_2"),
    "mlp-normalised": FunctionClass(_gaussian_xs, _normalised_network, _network_ys, "W_2"),
    "tree": FunctionClass(_gaussian_xs, _tree, _tree_ys, "leaf"),
    "parity": FunctionClass(_sign_xs, _parity_support, _parity_ys),
    "parity-batch": FunctionClass(_sign_xs, _parity_support, _parity_ys, shared=True),
    "mqar": FunctionClass(_sphere_xs, _pairs, _value_ys, "values"),
    "classification": FunctionClass(_gaussian_xs, _weights, _sign_ys),
    "quadratic": FunctionClass(_gaussian_xs, _weights, _quadratic_ys, "w"),
    "chebyshev": FunctionClass(_interval_xs, _series, _series_ys, "coefficients"),
    "chebyshev-roots": FunctionClass(_interval_xs, _roots, _root_ys, "factor"),
}
