r"""How much does the loss change on the way from a whole component to none of it?

    IG(c) = ∫₀¹ ∂L/∂ξ_c dξ ≈ (1/m) Σ_k ∂L/∂ξ_c at ξ = (k − ½)/m,   k = 1 … m

A component so sure of itself that ∂L/∂ξ vanishes at ξ = 1 has its gradient further down; the
first-order score misses it, this one does not. Two ways down:

- ``branch``: the gates of one site (the heads of one attention, one FFN, one mixer) move together,
  all others stay whole; Σ over its heads → L(whole) − L(without the site);
- ``model``: the gates of all components move together (Aumann–Shapley values; Sundararajan et al.
  2017, with the gates as inputs); Σ over components → L(whole) − L(without all).

With the sign of a gate's gradient: below 0 where the loss rises without the component. Where it
misleads: ``model`` passes through models in which little is left, far from any that one would use;
``branch`` costs m forwards and backwards a site, more than leave-one-out of everything. With few
steps neither adds up: where the sum is far from the difference of losses, take more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ablate.answers import counts, pieces, row_losses
from ablate.conventions import last_layers
from ablate.hooks import require_eval
from ablate.importance import Importance, backward, chosen_components, effects_of

if TYPE_CHECKING:
    from ablate.components import Component
    from ablate.hooked import HookedModel
    from ablate.sweep import Reading


def integrated_importance(
    model: HookedModel,
    readings: Iterable[Reading],
    *,
    steps: int,
    path: Literal["branch", "model"] = "branch",
    components: Sequence[Component] | None = None,
    checkpointing: bool = False,
    memory: int | None = None,
) -> Importance:
    """`ablate.importance.answer_importance` with integrated effects instead of first-order ones.

    `gate` is IG of one gate for the whole sequence, signed, `token` Σ_t |IG of the gate of token t|
    (not the mean of the absolute gradients). On a masked model what is removed stays removed on
    all of the way, and what stands in for it stays whole.

    Raises what `answer_importance` raises, and ValueError for fewer steps than 1 or another path.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps of an integrated gradient asked for: give at least 1")
    if path not in ("branch", "model"):
        raise ValueError(f"no path {path!r}: use 'branch' or 'model'")
    require_eval(model.model, "importance")
    chosen = chosen_components(model, components)
    # Gates that move together: those of each site, or of all.
    moved = [[site.name] for site in model.sites]
    if path == "model":
        moved = [[site.name for site in model.sites]]

    def run(one: Reading) -> None:
        backward(model, lambda: row_losses(model, one, checkpointing=checkpointing))

    gates, absolutes, tokens, predictions = [], [], [], []
    for piece in pieces(model, readings, memory, run, checkpointing=checkpointing):
        before = sum(map(len, gates))

        def losses(piece: Reading = piece) -> Tensor:
            return row_losses(model, piece, checkpointing=checkpointing)

        mean: dict[str, list[Tensor]] = {}
        for together in moved:
            mean |= _mean_gradients(model, losses, together, steps, before)
        gate, token = effects_of(model, mean, chosen)
        of_rows, of_entries = counts(piece)
        gates.append(gate)
        absolutes.append(token)
        tokens.append(of_rows)
        predictions.append(of_entries)
    if not gates:
        raise ValueError("importance of no examples asked for: give at least one reading")
    return Importance(
        chosen,
        torch.cat(gates),
        torch.cat(absolutes),
        torch.cat(tokens),
        torch.cat(predictions),
        last_layers(model.components),
    )


def _mean_gradients(
    model: HookedModel,
    losses: Callable[[], Tensor],
    together: Sequence[str],
    steps: int,
    before: int,
) -> dict[str, list[Tensor]]:
    """Site name -> mean over the way of ∂L/∂ξ, [batch, pos, width] each."""
    sums: dict[str, list[Tensor]] = {}
    for k in range(steps):
        _, gradients = backward(
            model, losses, at=dict.fromkeys(together, (k + 0.5) / steps), before=before
        )
        for name, found in gradients.items():
            parts = [gradient / steps for gradient in found]
            known = sums.get(name, [0] * len(parts))
            sums[name] = [a + b for a, b in zip(known, parts, strict=True)]
    return sums
