"""What can a decoder do with an encoder that it was not trained with?

A student here is put together: the decoder and the head of the base, the encoder of another model,
which reads the same ids, and perhaps a linear map between the two (`Joined`). It is trained the
plain way (`whole.retrain_whole`), judged on the same held-out rows and against the same loss as
the base's other students. What is trained is one of

    places    fresh cross-attention, in the treatment's places
    bridge    h ↦ W h + b from the encoder's width to the decoder's, all else as it was
    decoder   every weight of the decoder, its embedding and head among them

Where the widths differ, the keys and values of every cross-attention get inputs of the new width,
drawn by the base's own initialiser. A bridge begins as the identity where the widths are equal: its
first loss is that of the encoder put in as it is. Else W ~ N(0, 1/d_enc), which keeps the size of
the states.

Where it misleads: the norms behind the cross-attention are not part of it (`ablate.places`) and
stay as they were trained, for the old encoder, unless the decoder is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.parts import decoder_inputs
from ablate.placement import load
from ablate.places import block_at, places_of
from ablate.reset import train_only_
from experiments.reset.learning.session import Session
from experiments.reset.learning.treatments import Treatment, starts
from experiments.reset.learning.whole import retrain_whole


class Joined(nn.Module):
    """A decoder that reads a frozen encoder of another model, perhaps through a bridge."""

    def __init__(self, model: nn.Module, encoder: nn.Module, bridge: nn.Linear | None) -> None:
        super().__init__()
        self.model, self.encoder, self.bridge = model, encoder, bridge

    def forward(
        self,
        input_ids: Int[Tensor, "batch source"],
        decoder_input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch source"] | None = None,
        use_cache: bool = False,
    ) -> Any:
        """What the base's own forward answers, its encoder having been exchanged."""
        with torch.no_grad():
            answer = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states: Float[Tensor, "batch source d_model"] = answer.last_hidden_state
        if self.bridge is not None:
            states = self.bridge(states)
        given = {"decoder_input_ids": decoder_input_ids}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
        return self.model(**decoder_inputs(given, states), use_cache=use_cache)


def retrain_foreign(
    session: Session,
    treatment: Treatment,
    checkpoint: Path | None = None,
    *,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> pd.DataFrame:
    """One student with the encoder in `treatment.encoder`; the ledger's rows.

    Raises ValueError for a model without an encoder.
    """
    like = next(session.model.parameters())
    encoder = encoder_of(treatment.encoder, str(like.dtype).removeprefix("torch."))
    made = joined(session.model, encoder.to(like.device), treatment, session.initial)
    return retrain_whole(session, treatment, checkpoint, model=made, progress=progress)


def joined(
    base: nn.Module, encoder: nn.Module, treatment: Treatment, initial: Any = None
) -> Joined:
    """The student as it begins: frozen but for what the treatment trains. `base` stays as it is.

    Raises ValueError where the cross-attention is kept, no bridge made, and the widths differ.
    """
    with torch.no_grad():
        model = copy.deepcopy(base).requires_grad_(False)
        own, other = width_of(model), width_of(encoder)
        bridge = None
        if treatment.scope == "bridge":
            bridge = _bridge(own, other, treatment.seed, next(model.parameters()))
        elif own != other:
            _widen_(model, other, treatment)
        named = dict(model.named_parameters())
        for name, tensor in starts(model, treatment, initial).items():
            named[name].copy_(tensor)
    if treatment.scope == "decoder":
        host: Any = model
        host.get_decoder().requires_grad_(True)
        host.get_output_embeddings().requires_grad_(True)
    elif treatment.trains:
        train_only_(model, treatment.trains)
    encoder.requires_grad_(False)
    return Joined(model, encoder, bridge).eval()


def width_of(model: nn.Module) -> int:
    """Width of the residual stream."""
    config: Any = getattr(model, "config")  # noqa: B009 (nn.Module's getattr is Tensor)
    return int(config.hidden_size)


@lru_cache(maxsize=2)
def encoder_of(weights: str, dtype: str) -> nn.Module:
    """The frozen encoder of the model in a folder or on the hub; the last two are kept.

    Raises ValueError for a model without an encoder.
    """
    model: Any = load(weights, dtype=dtype)[0]
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"the encoder of {weights} asked for: it has none; give an encoder-decoder"
        )
    return model.get_encoder().eval().requires_grad_(False)


def _bridge(own: int, other: int, seed: int, like: Tensor) -> nn.Linear:
    bridge = nn.Linear(other, own, device=like.device, dtype=like.dtype)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.eye(own)
    if own != other:
        weight = torch.randn(own, other, generator=generator) / other**0.5
    bridge.weight.copy_(weight)
    bridge.bias.zero_()
    return bridge


def _widen_(model: nn.Module, width: int, treatment: Treatment) -> None:
    """Keys and values of every cross-attention read states of another width; their weights are
    not set yet: the treatment resets them."""
    places = places_of(model, "cross")
    if left := [place for place in places if place not in treatment.resets]:
        raise ValueError(
            f"an encoder of width {width} for a decoder that reads {width_of(model)} asked for:"
            f" {left[0]} is kept and cannot read it; reset it too, or train a bridge"
        )
    for place in places:
        block = block_at(model, place)
        assert block.row.cross is not None
        for path in (block.row.cross.k, block.row.cross.v):
            old: Any = block.module.get_submodule(path)
            new = nn.Linear(width, old.out_features, old.bias is not None)
            new = new.to(old.weight.device, old.weight.dtype).requires_grad_(False)
            block.module.set_submodule(path, new)
