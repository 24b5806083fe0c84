"""How much does the loss rise when one component is removed, for every component?

    effect(c, e) = L(e; without c) − L(e)

L(e) is the mean of −log p over the predictions read from example e, a row of a batch. This is the
oracle that gradient importance estimates (Bansal et al. 2023, eq. 7, with the loss for P): exact,
signed, with interactions between components left out, since each goes alone. With a `base` mask B
the model without B takes the place of the whole one:

    effect(c, e) = L(e; without B ∪ {c}) − L(e; without B)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ablate.components import Component
from ablate.masks import Mask
from ablate.sweep import Reading, sweep

if TYPE_CHECKING:
    import pandas as pd

    from ablate.fills import Fill
    from ablate.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Loss of every example whole and without each component, in nats a prediction.

    Attributes:
        components: the columns.
        whole: [example]; without the base mask, if there was one.
        without: [example, component]; without the base mask and the component.
    """

    components: tuple[Component, ...]
    whole: Float[Tensor, "example"]
    without: Float[Tensor, "example component"]

    @property
    def effects(self) -> Float[Tensor, "example component"]:
        """Rise of the loss; below 0 where the model is better off without the component."""
        return self.without - self.whole[:, None]

    def scores(self) -> dict[Component, float]:
        """Mean effect over examples of each component."""
        return dict(zip(self.components, self.effects.mean(0).tolist(), strict=True))

    def frame(self) -> pd.DataFrame:
        """Tidy rows: component, kind, stack, layer, metric, value, stderr."""
        import pandas as pd

        effects = self.effects.double()
        n = len(effects)
        # The standard error of one example is unknown, not zero.
        spread = effects.std(0) / n**0.5 if n > 1 else torch.full_like(effects[0], torch.nan)
        return pd.DataFrame(
            {
                "component": [str(c) for c in self.components],
                "kind": [type(c).__name__ for c in self.components],
                "stack": [c.stack for c in self.components],
                "layer": [c.layer for c in self.components],
                "metric": "loss_increase",
                "value": effects.mean(0).tolist(),
                "stderr": spread.tolist(),
            }
        )


def leave_one_out(
    model: HookedModel,
    readings: Iterable[Reading],
    *,
    components: Sequence[Component] | None = None,
    base: Mask = Mask(),  # noqa: B008  a frozen value
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> LeaveOneOut:
    """Every component (or those given) removed alone, exactly, in one sweep.

    What is in `base` is removed all along; its components have no effect left, so they are left out
    of the default and refused in a list.

    The examples are the rows of `readings`, in order. Raises what `sweep` raises, and ValueError
    for no components, a component that is in `base`, a row of which nothing is read, and a loss
    that is not finite.
    """
    chosen = _chosen(model, components, base)
    masks = [base, *(base | Mask([component]) for component in chosen)]
    readings = list(readings)
    losses = []
    for number, (reading, swept) in enumerate(
        zip(readings, sweep(model, masks, readings, fill=fill, memory=memory), strict=True)
    ):
        row = reading.positions[:, 0].cpu()
        counts = torch.bincount(row, minlength=reading.batch)
        if not counts.all():
            raise ValueError(
                f"nothing is read of row {int((counts == 0).nonzero()[0])} of reading {number}: "
                "name a position of every row"
            )
        total = torch.zeros(len(masks), len(counts), dtype=torch.float64)
        loss = -total.index_add(1, row, swept.log_p.double()) / counts
        if not loss.isfinite().all():
            mask, example = (~loss.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"the loss of row {example} of reading {number} is {float(loss[mask, example])} "
                f"under the mask '{masks[mask]}': check the weights and the dtype"
            )
        losses.append(loss.T)
    if not losses:
        raise ValueError("leave-one-out over no readings asked for: give at least one")
    table = torch.cat(losses)
    return LeaveOneOut(chosen, table[:, 0], table[:, 1:])


def _chosen(
    model: HookedModel, components: Sequence[Component] | None, base: Mask
) -> tuple[Component, ...]:
    """Those given, or all; in either case not what `base` removes."""
    gone = model.expand(base)
    if components is None:
        components = [c for c in model.components if c not in gone]
    for component in components:
        if model.expand(Mask([component])) <= gone:
            raise ValueError(
                f"the effect of {component} asked for, which the base mask removes already: "
                "leave it out of one of them"
            )
    if not components:
        left = " beside the base mask" if base else ""
        raise ValueError(f"leave-one-out of no components{left} asked for: give at least one")
    return tuple(components)
