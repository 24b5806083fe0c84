r"""How do the first-order effects of a component on many examples and tokens become one score?

Every component's output is multiplied by a gate ξ = 1, one per example e and token t. From
∂L_e/∂ξ_t, where L_e is the example's own mean loss over the predictions read, three conventions:

- ``gate``: mean over e of \|Σ_t ∂L_e/∂ξ_t\|, the effect of one gate for the whole sequence (Michel
  et al. 2019, eq. 3), in nats per example;
- ``token``: mean over e of Σ_t \|∂L_e/∂ξ_t\|, absolute before the sum over tokens;
- ``reference``: Σ_e Σ_t \|∂L_e/∂ξ_t\| / Σ_e n_e, the arithmetic of the code of Bansal et al.
  (2023). n_e is the number of tokens of the example's forward (prompt and answer without its last
  token, padding not counted); in the *last layer* it is the number of predictions read.

The reference scores heads of decoders, one example a batch. That FFNs, mixers and key/value groups
follow its rule, that each stack of a two-stack model has a last layer (the decoder's, for cross
attention), and that tokens there are the decoder's, is ours. Where it misleads: with long prompts
and short answers the last layer's heads score hundreds of times what others do, for no other reason
than the divisor; and scores of different prompt lengths cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ablate.components import Component, Stack

if TYPE_CHECKING:
    import pandas as pd

Convention = Literal["gate", "token", "reference"]


@dataclass(frozen=True)
class Importance:
    """First-order (or integrated) effects of components on every example, in nats.

    Attributes:
        components: the columns.
        gate: ∂L/∂ξ of one gate for the whole sequence, signed; [example, component], fp32.
        token: Σ_t |∂L/∂ξ_t|; [example, component], fp32.
        tokens: real tokens of each example's forward; None where nobody counted them.
        predictions: predictions read from each example; None likewise.
        last_layers: number of the last layer of each stack of the model (of one with one stack: of
            the stack ""); None for the highest layer among `components`.
    """

    components: tuple[Component, ...]
    gate: Float[Tensor, "example component"]
    token: Float[Tensor, "example component"]
    tokens: Int[Tensor, "example"] | None = None
    predictions: Int[Tensor, "example"] | None = None
    last_layers: Mapping[Stack, int] | None = None

    @property
    def conventions(self) -> tuple[Convention, ...]:
        """Those that can be computed from what is known."""
        counted = self.tokens is not None and self.predictions is not None
        return ("gate", "token", "reference") if counted else ("gate", "token")

    def effects(self, convention: Convention = "gate") -> Float[Tensor, "example component"]:
        """Absolute effect of each component on each example, whose mean is the score.

        Raises ValueError for "reference", which has none: it is a ratio of sums over examples.
        """
        if convention == "gate":
            return self.gate.abs()
        if convention == "token":
            return self.token
        if convention == "reference":
            raise ValueError(
                "effects by example in the convention 'reference' asked for: it is a ratio of sums "
                "over all examples; use 'gate' or 'token'"
            )
        raise ValueError(f"no convention {convention!r}: use 'gate', 'token' or 'reference'")

    def scores(self, convention: Convention = "gate") -> dict[Component, float]:
        """One score a component.

        Raises ValueError for "reference" where tokens and predictions were not counted.
        """
        values, _ = self._estimates(convention)
        return dict(zip(self.components, values.tolist(), strict=True))

    def frame(self) -> pd.DataFrame:
        """Tidy rows: component, kind, stack, layer, convention, metric, value, stderr.

        Of every convention that can be computed. The standard error of a mean is that of examples
        drawn at random; of "reference" it is the ratio's, to first order (linearised).
        """
        import pandas as pd

        rows = []
        for convention in self.conventions:
            values, spreads = (part.tolist() for part in self._estimates(convention))
            for component, value, spread in zip(self.components, values, spreads, strict=True):
                rows.append(
                    {
                        "component": str(component),
                        "kind": type(component).__name__,
                        "stack": component.stack,
                        "layer": component.layer,
                        "convention": convention,
                        "metric": "importance",
                        "value": value,
                        "stderr": spread,
                    }
                )
        return pd.DataFrame(rows)

    def _estimates(
        self, convention: Convention
    ) -> tuple[Float[Tensor, "component"], Float[Tensor, "component"]]:
        """(score, its standard error), in fp64."""
        if convention == "reference":
            sums, divisors = self.token.double(), self._divisors().double()
            values = sums.sum(0) / divisors.sum(0)
            # R = ā / n̄: what an example adds to it is (a − R n) / n̄, to first order.
            parts = (sums - values * divisors) / divisors.mean(0)
        else:
            parts = self.effects(convention).double()
            values = parts.mean(0)
        # The standard error of one example is unknown, not zero.
        n = len(parts)
        spread = parts.std(0) / n**0.5 if n > 1 else torch.full_like(values, torch.nan)
        return values, spread

    def _divisors(self) -> Int[Tensor, "example component"]:
        """n_e of the reference: tokens, in the last layer predictions."""
        if self.tokens is None or self.predictions is None:
            raise ValueError(
                "convention 'reference' asked for without tokens and predictions by example: use "
                "answer_importance, which counts them, or the convention 'gate' or 'token'"
            )
        known = self.last_layers or last_layers(self.components)
        last = torch.tensor([c.layer == known[trunk(c.stack)] for c in self.components])
        return torch.where(last, self.predictions[:, None], self.tokens[:, None])


def last_layers(components: tuple[Component, ...]) -> dict[Stack, int]:
    """The highest layer of each stack; cross attention is in the decoder's."""
    highest: dict[Stack, int] = {}
    for component in components:
        stack = trunk(component.stack)
        highest[stack] = max(highest.get(stack, 0), component.layer)
    return highest


def trunk(stack: Stack) -> Stack:
    """The stack in whose layers a component is: the decoder's, for cross attention."""
    return "decoder" if stack == "cross" else stack
