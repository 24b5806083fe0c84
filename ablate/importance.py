r"""Which heads, FFNs and mixers would the loss miss first, from one forward and one backward?

Every component's output is multiplied by a gate ξ = 1, one per example and token. With frozen
weights, one backward of the loss gives every ∂L/∂ξ at once; for a head it equals Σ_d z·∂L/∂z
(Michel et al. 2019, eq. 3; Bansal et al. 2023, eq. 8), summed in fp32 whatever the model's dtype.
The gate of a key/value group is one for all its heads: its gradient is the sum of theirs, token by
token. How these become scores: `ablate.conventions`.

The loss of an example is its own mean over its label tokens, so no score depends on the batch size.
On a masked model the scores are that model's: what is removed has none, whatever stands in for it.
Where it misleads: a saturated component (a head so sure of itself that its gradient vanishes)
scores 0 and still matters; `ablate.integrated` looks along the way to its removal, leave-one-out is
the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ablate.answers import counts, pieces, row_losses
from ablate.components import Component
from ablate.conventions import Convention, Importance, last_layers
from ablate.hooks import require_eval
from ablate.masks import Mask

if TYPE_CHECKING:
    from ablate.hooked import HookedModel
    from ablate.sites import Site
    from ablate.sweep import Reading

__all__ = [
    "Convention",
    "Importance",
    "answer_importance",
    "gradient_importance",
    "row_losses",
]

Batch = TypeVar("Batch")


def gradient_importance(
    model: HookedModel,
    batches: Iterable[Batch],
    losses: Callable[[Batch], Float[Tensor, "example"]],
    *,
    components: Sequence[Component] | None = None,
) -> Importance:
    """∂L/∂ξ of every head, FFN and mixer (or of `components`) for every example of `batches`.

    Args:
        model: the wrapped model; its weights get no gradients, and masks already in force count.
        batches: whatever `losses` accepts.
        losses: a batch → the loss of each of its examples, [example], differentiable; it calls
            the model as often as it likes, always with its examples along the first axis.
        components: heads, key/value groups, FFNs and mixers of this model; None for all but groups.

    Raises ValueError for a component the model lacks, layers in training mode, a loss that is not
    finite (with the example's number), and anything but one differentiable loss an example.
    """
    require_eval(model.model, "importance")
    chosen = chosen_components(model, components)
    gates, tokens = [], []
    count = 0
    for batch in batches:
        loss, gradients = backward(model, lambda batch=batch: losses(batch), before=count)
        gate, token = effects_of(model, gradients, chosen)
        gates.append(gate.expand(len(loss), -1))
        tokens.append(token.expand(len(loss), -1))
        count += len(loss)
    if not count:
        raise ValueError("importance of no examples asked for: give at least one batch")
    highest = last_layers(model.components)
    return Importance(chosen, torch.cat(gates), torch.cat(tokens), last_layers=highest)


def answer_importance(
    model: HookedModel,
    readings: Iterable[Reading],
    *,
    components: Sequence[Component] | None = None,
    checkpointing: bool = False,
    memory: int | None = None,
) -> Importance:
    """`gradient_importance` of what is read: the loss of a row is its mean −log p, as in
    `ablate.effects.leave_one_out`, which it estimates. Its tokens and predictions are counted.

    The examples are the rows of `readings`, in order. As many go through together as `memory`
    (bytes beyond the model; None for half of what is free) holds by the measured peak of one.
    `checkpointing` keeps one residual stream a block for the backward and computes what is inside
    the blocks again: less memory, for two forwards more.

    Raises what `gradient_importance` raises, and ValueError for a row of which nothing is read and
    for a model that cannot be run in parts.
    """
    counted = []

    def losses(reading: Reading) -> Tensor:
        return row_losses(model, reading, checkpointing=checkpointing)

    def cut() -> Iterator[Reading]:
        def run(one: Reading) -> None:
            backward(model, lambda: losses(one))

        for piece in pieces(model, readings, memory, run, checkpointing=checkpointing):
            counted.append(counts(piece))
            yield piece

    found = gradient_importance(model, cut(), losses, components=components)
    tokens, predictions = zip(*counted, strict=True)
    return replace(found, tokens=torch.cat(tokens), predictions=torch.cat(predictions))


def chosen_components(
    model: HookedModel, components: Sequence[Component] | None
) -> tuple[Component, ...]:
    """Those given, or all. Raises ValueError for none and for one that the model lacks."""
    if components is None:
        return model.components
    if not components:
        raise ValueError("importance of no components asked for: give at least one, or None (all)")
    model.expand(Mask(components))  # refuses what is not there
    return tuple(components)


def backward(
    model: HookedModel,
    losses: Callable[[], Float[Tensor, "example"]],
    *,
    at: Mapping[str, float] | None = None,
    before: int = 0,
) -> tuple[Float[Tensor, "example"], dict[str, list[Float[Tensor, "batch pos width"]]]]:
    """One forward and backward: (losses, site name -> ∂L/∂ξ of each forward), with the gates `at`
    these values (None: all at 1). `before` examples were run already: for messages."""
    with _frozen(model), torch.enable_grad(), model.gate_gradients(at) as gradients:
        loss = losses()
        _require_one_each(loss)
        _require_finite(loss.detach(), before)
        if loss.requires_grad:
            loss.sum().backward()
    if not any(gradients.values()):
        raise ValueError(
            "the loss does not depend on any head, FFN or mixer of this model: `losses` must "
            "call the model on the batch and return what it says of it"
        )
    return loss.detach(), gradients


def effects_of(
    model: HookedModel,
    gradients: Mapping[str, Sequence[Float[Tensor, "batch pos width"]]],
    components: Sequence[Component],
) -> tuple[Float[Tensor, "#example component"], Float[Tensor, "#example component"]]:
    """(Σ_t ∂L/∂ξ_t, Σ_t |∂L/∂ξ_t|) of each component, over all forwards; 0 where there is none."""
    place, signed, absolute = {}, [], []
    for site in model.sites:
        offered = *site.components, *site.groups
        place |= {component: len(place) + i for i, component in enumerate(offered)}
        # A scorer may call the model more than once.
        found = [_with_groups(site, gradient.float()) for gradient in gradients.get(site.name, ())]
        none = torch.zeros(1, len(offered))
        signed.append(sum((g.sum(1).cpu() for g in found), none))
        absolute.append(sum((g.abs().sum(1).cpu() for g in found), none))
    columns = [place[component] for component in components]
    rows = max(map(len, signed))
    gate, token = (
        torch.cat([part.expand(rows, -1) for part in parts], 1)[:, columns]
        for parts in (signed, absolute)
    )
    return gate, token


def _with_groups(
    site: Site, gradient: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos offered"]:
    """One gate moves all heads of a group: its gradient is the sum of theirs."""
    if not site.groups:
        return gradient
    split = rearrange(
        gradient, "batch pos (group head) -> batch pos group head", group=len(site.groups)
    )
    return torch.cat([gradient, split.sum(-1)], -1)


def _require_one_each(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.ndim != 1:
        shaped = isinstance(loss, Tensor)
        found = f"tensor of shape {tuple(loss.shape)}" if shaped else type(loss).__name__
        raise ValueError(
            f"losses gave a {found}: give one loss an example, a tensor [example] (its mean or sum "
            "hides the examples)"
        )


def _require_finite(loss: Float[Tensor, "example"], before: int) -> None:
    bad = (~torch.isfinite(loss)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"the loss of example {before + first} is {float(loss[first])}: importance needs "
            "finite losses; check the weights and the dtype (float16 overflows)"
        )


@contextmanager
def _frozen(model: HookedModel) -> Iterator[None]:
    """No weight asks for a gradient inside: half the backward, and no copy of the weights."""
    asking = [p for p in model.model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
