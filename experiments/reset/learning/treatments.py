"""What is done to one student: what is reset, by which law, what is trained towards what?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ablate.reset import Place, fresh_all
from experiments.reset.names import Start, Target

Scope = Literal["places", "all", "scratch", "random-context", "bridge", "decoder"]

SAID = ("all", "bridge", "decoder")
"""Scopes that say themselves what is trained."""


@dataclass(frozen=True)
class Treatment:
    """What is done to one student.

    Attributes:
        arm: of the protocol, A0 to A13.
        resets: places that get weights by `law`; none for a control without a reset.
        trains: places that are trained.
        seed: of the fresh weights.
        rate: peak learning rate.
        scope: places: the base's other weights are frozen. all: everything is trained. scratch:
            everything is fresh and trained. random-context: everything is fresh, `trains` trained.
            bridge: a new linear map from the encoder to the decoder is trained. decoder: all of the
            decoder is.
        variant: of the arm, in a word, where it has several.
        encoder: where another model's encoder is in place of the base's own, its folder.
    """

    arm: str
    resets: tuple[Place, ...]
    trains: tuple[Place, ...]
    law: Start = "init"
    target: Target = "lm"
    seed: int = 0
    rate: float = 2e-3
    scope: Scope = "places"
    variant: str = ""
    encoder: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks that are not the base's any more, lowest first."""
        return tuple(sorted({place.layer for place in (*self.resets, *self.trains)}))

    @property
    def is_fitted(self) -> bool:
        """Whether its first weights are made from data."""
        return self.law == "linear" and bool(self.resets)

    @property
    def together(self) -> tuple[Any, ...]:
        """Students for whom this is equal can be stacked."""
        return (self.arm, self.layers, self.trains, self.target)

    @property
    def name(self) -> str:
        """What it is in one string: equal for equal treatments only."""
        resets, trains = (",".join(map(str, p)) for p in (self.resets, self.trains))
        return (
            f"{self.arm} {resets or '-'} {trains or '-'} {self.law} {self.target} {self.scope} "
            f"{self.variant or '-'} {self.encoder or '-'} {self.seed} {self.rate:g}"
        )

    def columns(self) -> dict[str, Any]:
        """Its columns in the ledger; layer is −1 where no single block is meant."""
        places = self.resets or self.trains
        one = len({(p.layer, p.stack) for p in places}) == 1
        return {
            "arm": self.arm,
            "stack": places[0].stack if places else "",
            "layer": places[0].layer if one else -1,
            "layers": " ".join(map(str, sorted({p.layer for p in places}))),
            "part": places[0].part if places else "model",
            "variant": self.variant,
            "trains": self.scope if self.scope in SAID else " ".join(map(str, self.trains)),
            "law": self.law if self.resets or self.scope != "places" else "none",
            "target": self.target,
            "seed": self.seed,
            "rate": self.rate,
            "name": self.name,
        }


def starts(
    model: nn.Module, treatment: Treatment, initial: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights a student begins with, by name in the model: only those that are reset.

    Raises ValueError as `fresh_all` does, and for the law linear, which a session fits.
    """
    if not treatment.resets:
        return {}
    if treatment.law == "linear":
        raise ValueError(
            f"the law linear for {treatment.resets[0]} in arm {treatment.arm}: it is fitted to"
            " batches of a session with one base and its own encoder; use another law"
        )
    return fresh_all(model, treatment.resets, treatment.law, treatment.seed, initial=initial)
