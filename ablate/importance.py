r"""Which heads, FFNs and mixers would the loss miss first, from one forward and one backward?

Every component's output is multiplied by a gate ξ = 1, one per example and token. With frozen
weights, one backward of the loss gives every ∂L/∂ξ at once; for a head it equals Σ_d z·∂L/∂z
(Michel et al. 2019, eq. 3; Bansal et al. 2023, eq. 8). Two conventions are in use:

- ``gate``: \|Σ_t ∂L/∂ξ_t\|, the effect of one gate for the whole sequence, to first order;
- ``token``: Σ_t \|∂L/∂ξ_t\|, the sum over tokens of absolute effects (the code of Bansal et al.).

The score of a component is the mean over examples of either, in nats per example: the loss of an
example is its own mean over its label tokens, so no score depends on the batch size. Where it
misleads: a saturated component (a head so sure of itself that its gradient vanishes) scores 0 and
still matters; leave-one-out is the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ablate.budget import SHARE, free_bytes, rows_that_fit, with_peak
from ablate.components import Component
from ablate.hooks import execution_device
from ablate.readout import log_p_of

if TYPE_CHECKING:
    import pandas as pd

    from ablate.hooked import HookedModel
    from ablate.sweep import Reading

GRADIENTS = 2**27
"""Bytes that activations kept for a backward may take on a CPU: more together are no faster."""

Convention = Literal["gate", "token"]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Importance:
    """First-order effects of every component on every example, in nats.

    Attributes:
        components: the columns, in the model's order.
        gate: ∂L/∂ξ of one gate for the whole sequence, signed; [example, component], fp32.
        token: Σ_t |∂L/∂ξ_t|; [example, component], fp32.
    """

    components: tuple[Component, ...]
    gate: Float[Tensor, "example component"]
    token: Float[Tensor, "example component"]

    def scores(self, convention: Convention = "gate") -> dict[Component, float]:
        """Mean over examples of each component's absolute effect."""
        means = self._effects(convention).mean(0).tolist()
        return dict(zip(self.components, means, strict=True))

    def frame(self) -> pd.DataFrame:
        """Tidy rows: component, kind, stack, layer, convention, metric, value, stderr."""
        import pandas as pd

        rows = []
        for convention in ("gate", "token"):
            effects = self._effects(convention)
            means = effects.mean(0).tolist()
            # The standard error of one example is unknown, not zero.
            if len(effects) > 1:
                spreads = (effects.std(0) / len(effects) ** 0.5).tolist()
            else:
                spreads = [float("nan")] * len(means)
            for component, mean, spread in zip(self.components, means, spreads, strict=True):
                rows.append(
                    {
                        "component": str(component),
                        "kind": type(component).__name__,
                        "stack": component.stack,
                        "layer": component.layer,
                        "convention": convention,
                        "metric": "importance",
                        "value": mean,
                        "stderr": spread,
                    }
                )
        return pd.DataFrame(rows)

    def _effects(self, convention: Convention) -> Float[Tensor, "example component"]:
        return self.gate.abs() if convention == "gate" else self.token


def gradient_importance(
    model: HookedModel,
    batches: Iterable[Batch],
    losses: Callable[[Batch], Float[Tensor, "example"]],
) -> Importance:
    """∂L/∂ξ of every head, FFN and mixer, for every example of `batches`.

    Args:
        model: the wrapped model; its weights get no gradients, and masks already in force count.
        batches: whatever `losses` accepts.
        losses: a batch → the loss of each of its examples, [example], differentiable; it calls
            the model as often as it likes, always with its examples along the first axis.

    Raises ValueError when a loss is not finite (with the example's number), and when `losses` gives
    anything but one differentiable loss an example.
    """
    gates, tokens = [], []
    count = 0
    for batch in batches:
        with _frozen(model), torch.enable_grad(), model.gate_gradients() as gradients:
            loss = losses(batch)
            _require_one_each(loss)
            _require_finite(loss.detach(), count)
            if loss.requires_grad:
                loss.sum().backward()
        if not any(gradients.values()):
            raise ValueError(
                "the loss does not depend on any head, FFN or mixer of this model: `losses` must "
                "call the model on the batch and return what it says of it"
            )
        signed, absolute = [], []
        for site in model.sites:
            # [batch, pos, width] per forward; a scorer may call the model more than once.
            found = [gradient.float() for gradient in gradients[site.name]]
            signed.append(sum((g.sum(1).cpu() for g in found), torch.zeros(1, site.width)))
            absolute.append(sum((g.abs().sum(1).cpu() for g in found), torch.zeros(1, site.width)))
        gates.append(torch.cat([s.expand(len(loss), -1) for s in signed], dim=1))
        tokens.append(torch.cat([a.expand(len(loss), -1) for a in absolute], dim=1))
        count += len(loss)
    if not count:
        raise ValueError("importance of no examples asked for: give at least one batch")
    return Importance(model.components, torch.cat(gates), torch.cat(tokens))


def answer_importance(
    model: HookedModel, readings: Iterable[Reading], *, memory: int | None = None
) -> Importance:
    """`gradient_importance` of what is read: the loss of a row is its mean −log p, as in
    `ablate.effects.leave_one_out`, which it estimates.

    The examples are the rows of `readings`, in order. As many go through together as `memory`
    (bytes beyond the model; None for half of what is free) holds by the measured peak of one.
    """
    return gradient_importance(
        model, _pieces(model, readings, memory), lambda reading: row_losses(model, reading)
    )


def row_losses(model: HookedModel, reading: Reading) -> Float[Tensor, "example"]:
    """Mean −log p of what is read from each row, in nats, differentiable."""
    log_p = log_p_of(model.model, reading.inputs, reading.positions, reading.targets, model.anatomy)
    row = reading.positions[:, 0].to(log_p.device)
    counts = torch.bincount(row, minlength=reading.batch)
    return -log_p.new_zeros(reading.batch).index_add(0, row, log_p) / counts


def _pieces(
    model: HookedModel, readings: Iterable[Reading], memory: int | None
) -> Iterator[Reading]:
    """The readings in pieces of rows that fit, by the measured peak of the first row of each
    greater length."""
    device = execution_device(model.model)
    config, weight = getattr(model.model, "config", None), next(model.model.parameters())
    key = "backward", getattr(config, "_attn_implementation", None), weight.dtype
    for reading in readings:
        room = memory if memory is not None else int(SHARE * free_bytes(device))
        length, per_row = model.measured.get(key, (0, 0))
        if reading.length > length and reading.batch > 1:
            one = reading.rows(0, 1)
            _, per_row = with_peak(
                lambda one=one: gradient_importance(model, [one], lambda r: row_losses(model, r)),
                device,
            )
            model.measured[key] = reading.length, per_row
        size = rows_that_fit(per_row, room, device, cache=GRADIENTS)
        for first in range(0, reading.batch, size):
            yield reading.rows(first, min(first + size, reading.batch))


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
