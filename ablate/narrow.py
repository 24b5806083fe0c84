"""What does a block put out at a few positions, without computing it at all the others?

Where only a few predictions are read, the last block is needed at their positions only. Its keys
and values are needed everywhere, its queries, its FFN and its norms are not: three quarters of the
block. This is the way of the model's own generation: the block is called on the chosen positions
with a cache that answers with the keys and values of the whole row. Those come from a call of the
same block on the whole row, which is left as soon as it has handed them to its cache.

Exact for a block that reads other positions by attention alone and knows places by its arguments
(position_ids, position_embeddings, attention_mask): `can` says which. ALiBi and SSMs do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.anatomy import BY_POSITION_IDS
from ablate.calls import Call, Output, parameters

_QUERY_AXIS = {"attention_mask": 2, "position_ids": 1, "position_embeddings": 1}
"""Arguments with an entry per query position -> along which axis."""
_CACHES = ("past_key_values", "layer_past")
"""What families call the cache that a block is given."""

KeysValues = tuple[Tensor, Tensor]


def can(hf_model: nn.Module, call: Call) -> bool:
    """May this block be run at chosen positions only?"""
    config: Any = getattr(hf_model, "config", None)
    if getattr(config, "model_type", "") not in BY_POSITION_IDS:
        return False
    if config._attn_implementation not in ("eager", "sdpa") or not _cache_of(call.block):
        return False
    return all(
        name in _QUERY_AXIS or not isinstance(value, Tensor)
        for name, value in _named(call).items()
        if not isinstance(value, Output)
    )


@dataclass(frozen=True, eq=False)
class Narrow:
    """A block to be run at `positions` of each of its rows.

    Attributes:
        call: the call on whole rows.
        positions: [row, chosen], within the row; may repeat.
    """

    call: Call
    positions: Int[Tensor, "row chosen"]

    def pick(self, x: Float[Tensor, "row pos width"]) -> Float[Tensor, "row chosen width"]:
        """`x` at the chosen positions."""
        return _along(x, self.positions, 1)

    def keys_values(self, resid: Float[Tensor, "row pos d_model"]) -> KeysValues:
        """What the attention has to say about every position, whatever their FFN will do."""
        cache = _Handed()
        try:
            _with_cache(self.call, cache).run((resid,))
        except _Enough:
            return cache.found[0]
        raise ValueError(f"{type(self.call.block).__name__} handed nothing to its cache")

    def run(
        self,
        resid: Float[Tensor, "row chosen d_model"],
        known: KeysValues | None,
        length: int,
    ) -> Float[Tensor, "row chosen d_model"]:
        """The block at the chosen positions of rows of `length`; `resid` is its input there.

        `known` may be None where the block will not compute its attention.
        """

        def choose(name: str, value: Any) -> Any:
            if name == "attention_mask" and value is None:
                return _causal(self.positions.to(resid.device), length)
            if isinstance(value, Tensor) and name in _QUERY_AXIS:
                whole = value.expand(len(resid), *value.shape[1:])
                return _along(whole, self.positions, _QUERY_AXIS[name])
            return value

        call = self.call
        if "attention_mask" not in _named(call):
            call = replace(call, kwargs={**call.kwargs, "attention_mask": None})
        call = call.map(choose)
        if known is not None:
            call = _with_cache(call, _Known(known))
        return call.run((resid,))[0]


class _Enough(Exception):
    """The keys and values are there; what the block would do with them is not wanted."""


class _Handed:
    """A cache that takes what it is handed and ends the call."""

    def __init__(self) -> None:
        self.found: list[KeysValues] = []

    def update(self, keys: Tensor, values: Tensor, *rest: object, **more: object) -> KeysValues:
        self.found.append((keys, values))
        raise _Enough


class _Known:
    """A cache that knows every position of the rows already, the new ones included."""

    def __init__(self, known: KeysValues) -> None:
        self.known = known

    def update(self, keys: Tensor, values: Tensor, *rest: object, **more: object) -> KeysValues:
        return self.known


def _cache_of(block: nn.Module) -> str:
    names = parameters(block)
    return next((name for name in _CACHES if name in names), "")


def _with_cache(call: Call, cache: object) -> Call:
    name, names = _cache_of(call.block), parameters(call.block)
    if name in names[: len(call.args)]:
        at = names.index(name)
        return replace(call, args=(*call.args[:at], cache, *call.args[at + 1 :]))
    return replace(call, kwargs={**call.kwargs, name: cache})


def _named(call: Call) -> dict[str, Any]:
    """The arguments of a call by name; of a tuple, its first element stands for all."""
    named = dict(zip(parameters(call.block), call.args, strict=False)) | call.kwargs
    return {n: v[0] if isinstance(v, tuple) and v else v for n, v in named.items()}


def _along(x: Tensor, positions: Int[Tensor, "row chosen"], axis: int) -> Tensor:
    """x[row, ..., positions[row], ...] for every row."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = positions.shape
    size = list(x.shape)
    size[axis] = positions.shape[1]
    return x.gather(axis, positions.to(x.device).view(shape).expand(size))


def _causal(positions: Int[Tensor, "row chosen"], length: int) -> Tensor:
    """[row, 1, chosen, pos]: True where a position may be seen; what no mask at all stands for."""
    keys = torch.arange(length, device=positions.device)
    return (keys <= positions[..., None])[:, None]
