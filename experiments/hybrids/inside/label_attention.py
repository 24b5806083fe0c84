"""Where do the heads and mixers of a hybrid look when it reads a prompt x₁, y₁, x₂, y₂, …?

With A the pattern (of a mixer: its implicit attention, `probes.implicit`), token by token:

    label           Σ A[x_i, k] over the earlier y's
    input           the same over the earlier x's
    own             A[x_i, x_i]
    previous        A[t, t − 1], of all tokens but the first
    pairing         A[y_i, x_i]: the part of it that goes from a y to its own x
    match           Σ A[x_q, k] over the y's behind the earlier copies of x_q
    duplicate       Σ A[x_q, k] over these copies
    match_shuffled  Σ A[x_q, k] over as many other earlier y's, chosen at random
    match_unasked   the keys of `match`, on prompts in which x_q is another prompt's, no copy

match, duplicate and their nulls count the x's that equal an earlier one, as vectors. In MQAR that
is the last x; elsewhere x's hardly ever repeat, and `asking_again` makes the last one a copy.
The component "even" is no part of the model: it attends to all before it alike, so its scores are
what position alone gives. A head that matches has match near 1 and both nulls near 0.

A prompt gives one number, its mean over queries; standard errors are over prompts. Where it
misleads: attention says where a head looks, not what it takes from there; that is what ablation is
for. A mixer's short convolution blurs its keys by a few tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from ablate.hooked import HookedModel
from experiments.hybrids.inside.ablations import ALL, pieces, ratio
from experiments.hybrids.regression.prompts import Prompts, interleaved
from probes.implicit import watched_mixers
from probes.rows import Rows, watched

if TYPE_CHECKING:
    import pandas as pd

EVEN = "even"
"""The component that attends to everything before it alike."""
PATTERNS = 2**25
"""Numbers of one layer's patterns at a time."""


class Part(NamedTuple):
    """A head or a mixer as the frame has it."""

    component: str
    kind: str
    layer: int
    head: int


Masses = dict[tuple[Part, str], Float[Tensor, "batch query"]]


def prompt_attention(
    model: HookedModel,
    prompts: Prompts,
    generator: torch.Generator,
    *,
    seed: int = 0,
    by_examples: Collection[str] = ("label",),
) -> pd.DataFrame:
    """Tidy rows: seed, component, kind, layer, head, examples, metric, value, stderr.

    `examples` is `ALL` for the mean over a prompt's queries; scores in `by_examples` have a row a
    number of examples besides. The head of a mixer is −1. Scores that no query has are left out.

    Args:
        generator: chooses the other y's of match_shuffled.

    Raises ValueError where neither attention nor mixer can be watched.
    """
    import pandas as pd

    masses: defaultdict[tuple[Part, str], list[Tensor]] = defaultdict(list)
    asking: defaultdict[str, list[Tensor]] = defaultdict(list)
    heads = max(site.width for site in model.sites if site.kind != "ffn")
    length = 2 * prompts.xs.shape[1]
    for some in pieces(prompts, max(2, PATTERNS // (heads * length**2))):
        wanted = relations(some, generator)
        for score, relation in wanted.items():
            asking[score].append(relation.any(-1))
        unasked = {"match_unasked": wanted.pop("match_unasked")}
        passes = [(some, wanted)]
        if unasked["match_unasked"].any():
            passes.append((_unasked(some, unasked["match_unasked"]), unasked))
        for shown, mine in passes:
            for key, mass in _masses(model, shown, mine).items():
                masses[key].append(mass)
    rows = []
    for (part, score), pieced in masses.items():
        has = torch.cat(asking[score])
        mass = torch.cat(pieced).double() * has
        for examples, queries in _groups(score, by_examples, length):
            count = has[:, queries].sum(1)
            there = count > 0
            if there.any():
                mean = mass[there][:, queries].sum(1) / count[there]
                rows.append((*part, examples, score, *ratio(mean, torch.ones_like(mean))))
    frame = pd.DataFrame(
        rows, columns=pd.Index([*Part._fields, "examples", "metric", "value", "stderr"])
    )
    frame.insert(0, "seed", seed)
    return frame


def relations(
    prompts: Prompts, generator: torch.Generator
) -> dict[str, Bool[Tensor, "batch query key"]]:
    """Score -> which keys of which queries it counts, token by token."""
    batch, points = prompts.xs.shape[:2]
    token = torch.arange(2 * points)
    query, key = token[:, None], token[None, :]
    from_x, to_x, before = query % 2 == 0, key % 2 == 0, key < query
    fixed = {
        "label": from_x & ~to_x & before,
        "input": from_x & to_x & before,
        "own": from_x & (key == query),
        "previous": key == query - 1,
        "pairing": ~from_x & (key == query - 1),
    }
    xs = prompts.xs.cpu()
    equal = (xs[:, :, None] == xs[:, None]).all(-1)
    copies = equal & torch.ones(points, points, dtype=torch.bool).tril(-1)
    found = {name: relation.expand(batch, -1, -1) for name, relation in fixed.items()}
    found["match"] = _from_x(copies, to=1)
    found["duplicate"] = _from_x(copies, to=0)
    found["match_shuffled"] = _from_x(_others(copies, generator), to=1)
    found["match_unasked"] = found["match"]
    return found


def asking_again(prompts: Prompts, generator: torch.Generator) -> Prompts:
    """The prompts with their last point a copy of an earlier one, chosen at random in each."""
    batch, points = prompts.xs.shape[:2]
    if points < 2:
        raise ValueError("prompts of 1 point to ask again of: give at least 2")
    again = torch.randint(points - 1, (batch,), generator=generator)
    row = torch.arange(batch)
    xs, ys = prompts.xs.clone(), prompts.ys.clone()
    xs[:, -1], ys[:, -1] = xs[row, again], ys[row, again]
    return replace(prompts, xs=xs, ys=ys, scored="last")


def _groups(score: str, by_examples: Collection[str], length: int) -> Iterator[tuple[int, slice]]:
    """(examples, the tokens whose queries are taken together)."""
    yield ALL, slice(0, length)
    if score in by_examples:
        for point in range(length // 2):
            yield point, slice(2 * point, 2 * point + 2)


def _from_x(
    points: Bool[Tensor, "batch point earlier"], to: int
) -> Bool[Tensor, "batch query key"]:
    """Point by point -> token by token: from x's, to x's (0) or y's (1)."""
    batch, size, _ = points.shape
    found = torch.zeros(batch, 2 * size, 2 * size, dtype=torch.bool)
    found[:, ::2, to::2] = points
    return found


def _others(
    copies: Bool[Tensor, "batch point earlier"], generator: torch.Generator
) -> Bool[Tensor, "batch point earlier"]:
    """For each query as many earlier points that are no copies, as far as there are any."""
    size = copies.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool).tril(-1)
    lots = torch.rand(copies.shape, generator=generator)
    lots = lots.masked_fill(copies | ~earlier, -1.0)
    place = lots.argsort(-1, descending=True).argsort(-1)
    return (place < copies.sum(-1, keepdim=True)) & (lots >= 0)


def _unasked(prompts: Prompts, asks: Bool[Tensor, "batch query key"]) -> Prompts:
    """x's that are copies give way to the same prompts' neighbours' x's at that place."""
    again = asks[:, ::2].any(-1).to(prompts.xs.device)
    others = prompts.xs.roll(1, 0)
    return replace(prompts, xs=torch.where(again[..., None], others, prompts.xs))


def _masses(
    model: HookedModel, prompts: Prompts, wanted: Mapping[str, Bool[Tensor, "batch query key"]]
) -> Masses:
    """Every part's attention on the keys of each score, query by query, in one forward."""
    hf: Any = model.model
    length = 2 * prompts.xs.shape[1]
    found: Masses = {}

    def see(rows: Rows) -> None:
        pattern = rows.pattern().cpu()
        for name, relation in wanted.items():
            here = relation[:, rows.first : rows.first + rows.queries, : pattern.shape[-1]]
            mass = einsum(pattern, here.float(), "b head q k, b q k -> head b q")
            for head, component in enumerate(rows.site.components):
                number = head if rows.site.kind == "head" else -1
                part = Part(str(component), type(component).__name__, component.layer, number)
                whole = found.setdefault((part, name), torch.zeros(relation.shape[:2]))
                whole[:, rows.first : rows.first + rows.queries] += mass[head]

    with _watched(model, see), torch.no_grad():
        hf.base_model(prompts=interleaved(prompts))
    even = torch.arange(1, length + 1)
    for name, relation in wanted.items():
        found[Part(EVEN, "", ALL, ALL), name] = relation.sum(-1) / even
    return found


@contextmanager
def _watched(model: HookedModel, see: Any) -> Iterator[None]:
    """Heads and mixers both, whichever there are."""
    kinds = {site.kind for site in model.sites}
    with ExitStack() as seeing:
        if "head" in kinds or "mixer" not in kinds:
            seeing.enter_context(watched(model, see))
        if "mixer" in kinds:
            seeing.enter_context(watched_mixers(model, see))
        yield
