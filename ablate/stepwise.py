"""What should go next, now that so much is gone?

A one-shot ranking scores every component in the whole model. That overrates what can go: of two
heads that do the same, each alone costs nothing, so both are near the bottom, and without either
the model is lost. Here scores are taken again after every step, with R already removed:

    rescored   |∂L/∂ξ_c| of the model without R (`ablate.importance`), one backward a step
    greedy     L(without R ∪ {c}), exact (`ablate.effects`), one sweep a step

The lowest go, and the ranking is the order in which they went. Michel et al. (2019, §4) and Bansal
et al. (2023, §4.3) prune by one-shot scores; backward elimination is the older word for greedy.
Where it misleads: greedy is no better than its examples (it fits their noise: report on others),
and it looks one step ahead only; a pair that could go together, but not one by one, it never finds.
Gradients see less: a component so sure of itself that its gradient vanishes goes early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ablate.components import Component
from ablate.effects import leave_one_out
from ablate.importance import Convention, answer_importance
from ablate.masks import Mask
from ablate.pruning import Quota, Ranking, nested_masks, ranked
from ablate.sweep import Reading

if TYPE_CHECKING:
    from ablate.fills import Fill
    from ablate.hooked import HookedModel


def rescored(
    model: HookedModel,
    readings: Iterable[Reading],
    components: Sequence[Component],
    counts: Sequence[int],
    *,
    convention: Convention = "gate",
    quota: Quota = "global",
    fill: Literal["zero"] | Fill = "zero",
    checkpointing: bool = False,
    memory: int | None = None,
) -> Ranking:
    """`components` by gradient importance, taken again at every step on what is left.

    One backward of every reading for each of `counts` above 0: the numbers removed, ascending. The
    gradient is that of fading to zero; `fill` stands in for what is gone already. `counts` and
    `quota` are those of `stepwise`, `checkpointing` and `memory` those of `answer_importance`.

    Raises what `stepwise` and `answer_importance` raise.
    """
    _require_apart(model, components)
    readings = list(readings)

    def scores(gone: Mask, left: Ranking) -> Mapping[Component, float]:
        with model.ablated(gone, fill=fill):
            importance = answer_importance(
                model, readings, components=left, checkpointing=checkpointing, memory=memory
            )
        return importance.scores(convention)

    return stepwise(components, counts, scores, quota=quota)


def greedy(
    model: HookedModel,
    readings: Iterable[Reading],
    components: Sequence[Component],
    *,
    counts: Sequence[int] | None = None,
    quota: Quota = "global",
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> Ranking:
    """`components` by exact loss: at every step the one goes without which the loss is lowest.

    The loss is the mean over examples of each one's mean −log p, as in `ablate.effects`. One at a
    time, N components take a sweep over N + 1, N, … 3 masks, N(N + 1)/2 and N − 2 in all: 72 heads
    are 2,698 masks. With `counts` (the numbers removed, ascending) each step removes as many as the
    next count needs, for about len(counts) · N masks. Under a layer quota a step takes one of every
    layer at least, with or without `counts`.

    Raises what `stepwise` and `leave_one_out` raise.
    """
    _require_apart(model, components)
    readings = list(readings)

    def losses(gone: Mask, left: Ranking) -> Mapping[Component, float]:
        found = leave_one_out(model, readings, components=left, base=gone, fill=fill, memory=memory)
        return dict(zip(left, found.without.mean(0).tolist(), strict=True))

    counts = range(1, len(components)) if counts is None else counts
    return stepwise(components, counts, losses, quota=quota)


def stepwise(
    components: Sequence[Component],
    counts: Sequence[int],
    scores: Callable[[Mask, Ranking], Mapping[Component, float]],
    *,
    quota: Quota = "global",
) -> Ranking:
    """`components` in the order in which they go, lowest scores first, scored again at each count.

    Args:
        components: what may go; equal scores keep this order.
        counts: how many of the N are gone after each step, ascending, as `removed_count` gives them
            for shares; 0 and repeated counts are no steps.
        scores: (what is gone, what is left) → the score of at least what is left.
        quota: that of `nested_masks`; "layer" reads a count n as the share n/N of every layer.

    `nested_masks` of the ranking, at those shares and by this quota, are what was gone after each
    step (by layers of unlike sizes: at the shares n/N). What is left after the last count keeps the
    order of the last scores; with no step at all they are those of the whole model.

    Raises ValueError for no components, counts that do not ascend within 0 … N, and scores that are
    not finite.
    """
    if not components:
        raise ValueError("a stepwise ranking of no components asked for: give at least one")
    if any(a > b for a, b in zip([0, *counts], [*counts, len(components)], strict=True)):
        raise ValueError(
            f"counts {', '.join(map(str, counts))} of {len(components)} components asked for: "
            "let them ascend from 0 or more to no more than there are"
        )
    gone: list[Component] = []
    left = tuple(components)
    scored = False
    for count in counts:
        share = count / len(components)
        (size,) = map(len, nested_masks(tuple(components), [share], quota=quota))
        if size == len(gone):
            continue
        left, scored = _by_score(left, scores(Mask(gone), left)), True
        # What is gone comes first in every layer, so it is in the mask too.
        (mask,) = nested_masks((*gone, *left), [share], quota=quota)
        gone += [component for component in left if component in mask]
        left = tuple(component for component in left if component not in mask)
    return (*gone, *(left if scored else _by_score(left, scores(Mask(gone), left))))


def _by_score(left: Ranking, scores: Mapping[Component, float]) -> Ranking:
    return ranked({component: scores[component] for component in left})


def _require_apart(model: HookedModel, components: Sequence[Component]) -> None:
    """A component removes what no other one does: a head is not ranked beside its group."""
    owner: dict[Component, Component] = {}
    for component in components:
        for part in model.expand(Mask([component])):
            if part in owner:
                raise ValueError(
                    f"{owner[part]} and {component} asked for in one ranking: both remove {part}; "
                    "give each once, heads or their groups"
                )
            owner[part] = component
