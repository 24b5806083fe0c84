"""How did the real forward call a block, and how is that call made again?

A call is block(resid, *args, **kwargs). Everything but the residual stream (masks, positions,
rotary tables, alibi) is a function of the tokens alone, so the recorded objects themselves serve
again. One exception: what a block returns besides the residual stream and the next block takes
(T5 hands the position bias of its block 0 on in this way) is taken from the block before where
that one is run too, and from the recording where it is not.

For other rows of the recorded batch the arguments are indexed, by name and number of axes, never
by size alone: a position table can be exactly as long as the batch is large. What has no rule here
is refused; a new family's argument is one line in `BATCHED`.

What the model does behind its blocks, scalings and soft caps of the logits included, is not written
down here either: `answered` has the model's own forward do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from ablate.hooks import execution_device

BATCHED: dict[str, tuple[int, ...]] = {
    "attention_mask": (2, 4),
    "mamba_attention_mask": (2,),
    "encoder_attention_mask": (2, 4),
    "encoder_hidden_states": (3,),
    "position_ids": (2,),
    "position_embeddings": (3,),
    "position_bias": (4,),
    "encoder_decoder_position_bias": (4,),
    "alibi": (3, 4),
}
"""Arguments with one entry per example -> the numbers of axes with which axis 0 is the batch."""


@dataclass(frozen=True, eq=False)
class Output:
    """In the place of an argument: output `index` of the block before (0 is the residual stream).

    `recorded` is what that was in the real forward, for a segment that begins with this block.
    """

    index: int
    recorded: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """One call of `block` as the real forward made it, with the residual stream cut out."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def cut(
        cls,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: tuple[Any, ...] = (),
    ) -> Call:
        """The call a forward pre-hook sees; `before` is what the block before returned.

        Raises ValueError for a cache: every replay would append to it.
        """
        resid = residual(block, args, kwargs)

        def place(name: str, value: Any) -> Any:
            if isinstance(value, Cache):
                raise ValueError(
                    f"{type(block).__name__} was given a cache as {name!r}: leave it out of the"
                    " inputs, a replay would append to it"
                )
            if value is resid:
                return Output(0)
            if isinstance(value, Tensor):
                for index, output in enumerate(before):
                    if index and value is output:
                        return Output(index, value)
            return value

        return cls(block, args, kwargs).map(place)

    def run(self, before: tuple[Any, ...], checkpoint: bool = False) -> tuple[Any, ...]:
        """(resid, ...) -> (resid, ...): call the block with the outputs of the one before.

        The residual stream is brought to where the block computes. `checkpoint` forgets what is
        inside the block and computes it again in the backward pass.
        """
        before = (beside(self.block, before[0]), *before[1:])

        def fill(_: str, value: Any) -> Any:
            if not isinstance(value, Output):
                return value
            return before[value.index] if value.index < len(before) else value.recorded

        now = self.map(fill)
        if checkpoint:
            # Stopped early, the second run would leave offloaded weights where it stopped.
            with set_checkpoint_early_stop(False):
                made = checkpointed(self.block, *now.args, use_reentrant=False, **now.kwargs)
            return outputs(made)
        return outputs(self.block(*now.args, **now.kwargs))

    def select(self, rows: Int[Tensor, "rows"], batch: int, done: dict[int, Any]) -> Call:
        """The same call for rows of the `batch` it was recorded with.

        `done` maps the id of an argument to its expansion, so that blocks go on sharing masks.
        Raises ValueError for an argument that has no rule.
        """

        def expand(name: str, value: Any) -> Any:
            if isinstance(value, Output):
                known = value.recorded
                return value if known is None else replace(value, recorded=expand(name, known))
            if id(value) not in done:
                done[id(value)] = _expand(name, value, batch, rows)
            return done[id(value)]

        return self.map(expand)

    def map(self, change: Callable[[str, Any], Any]) -> Call:
        """The same call with `change(name, leaf)` in the place of every leaf."""
        names = parameters(self.block)
        names += [""] * (len(self.args) - len(names))
        args = tuple(_map(change, n, a) for n, a in zip(names, self.args, strict=False))
        kwargs = {name: _map(change, name, a) for name, a in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)


def _map(change: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(change, name, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(change, name, item) for item in value)
    return change(name, value)


def _expand(name: str, value: Any, batch: int, rows: Int[Tensor, "rows"]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        size = value.shape[0] if value.ndim else 1
        if value.ndim in BATCHED.get(name, ()):
            if size == batch == 1:
                return value.expand(len(rows), *value.shape[1:])  # a view: no memory
            if size == batch:
                return value[rows.to(value.device)]
            if name == "alibi" and value.ndim == 3 and size % batch == 0:  # [batch * head, ...]
                return value.unflatten(0, (batch, -1))[rows.to(value.device)].flatten(0, 1)
        if size == 1:
            return value
    what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"argument {name!r} ({what}) of the blocks: there is no rule by which it follows the batch"
        f" of {batch}; run whole recorded batches, or name it in ablate.calls.BATCHED"
    )


def parameters(block: nn.Module) -> list[str]:
    """Names of the positional arguments of a block, the residual stream first."""
    return list(_parameters(type(block)))


@cache
def _parameters(block: type[nn.Module]) -> tuple[str, ...]:
    signature = inspect.signature(block.forward)
    named = [n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(named[1:])  # without self


def residual(block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments: the first one."""
    return args[0] if args else kwargs[parameters(block)[0]]


def outputs(returned: Any) -> tuple[Any, ...]:
    """(residual stream, whatever else) of what a block returned."""
    return tuple(returned) if isinstance(returned, tuple | list) else (returned,)


def beside(module: nn.Module, x: Tensor) -> Tensor:
    """`x` on the device where the module computes; unmoved if it has no weights."""
    return x if next(module.parameters(), None) is None else x.to(execution_device(module))


def answered(hf_model: nn.Module, path: str, answer: Any) -> Any:
    """What the model's own forward returns when its submodule at `path` answers with `answer`.

    The forward of a causal model asks its base model and turns the answer into logits; here it does
    only the latter, in its own code. No module is touched: forward gets another `self`.
    """
    forward: Any = type(hf_model).forward
    given: dict[str, Any] = {"return_dict": True}
    if "encoder_outputs" in inspect.signature(forward).parameters:
        # T5 would run its encoder; it only passes this on to the decoder, which has answered.
        given["encoder_outputs"] = BaseModelOutput(last_hidden_state=answer.last_hidden_state)
    hook = getattr(hf_model, "_hf_hook", None)  # accelerate's, for tensors of the model itself
    if hook is not None:
        hook.pre_forward(hf_model)
    try:
        return forward(_Answered(hf_model, path.split("."), answer), **given)
    finally:
        if hook is not None:
            hook.post_forward(hf_model, ())


class _Answered:
    """A module as its own forward sees it, except that the submodule at `path` has answered."""

    def __init__(self, module: nn.Module, path: Sequence[str], answer: object) -> None:
        self._module, self._path, self._answer = module, path, answer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if self._path and name == self._path[0]:
            return _Answered(value, self._path[1:], self._answer)
        return value

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._answer
