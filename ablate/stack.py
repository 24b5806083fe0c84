"""Run any part of a model from a stored residual stream: what are the logits from block i on?

A model is a stack: resid_0 = embed(tokens), resid_{i+1} = block_i(resid_i), logits = head(resid_N).
`record` runs the model's own forward once and keeps, for every block, the other arguments it was
given, by reference. A segment is then nothing but calls of the model's own modules with these, so
on the recorded batch embed, run_blocks and head in a row equal the full forward bit for bit; hooks
on submodules fire, accelerate moves offloaded weights, and gradients flow, as they do there.

    recorded = record(model, {"input_ids": ids, "attention_mask": mask}, keep=[3])
    clean = recorded.head(recorded.run_blocks(3, recorded.n_blocks, recorded.resid(3)))

Where it misleads. The arguments belong to the recorded tokens: another batch needs another record.
On other rows (`tile`, `select`) or at chosen positions the mathematics is the same, but matrix
kernels may round differently for another number of rows: 1e-6 of the largest activation in fp32. In
training mode dropout and layer drop make no two forwards equal; a replay is one more.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ablate.anatomy import Anatomy, UnknownArchitecture
from ablate.calls import Call, answered, outputs, residual
from ablate.components import Stack
from ablate.parts import Part


@dataclass(frozen=True, eq=False, repr=False)
class Recorded:
    """One stack of a loaded model with the arguments of one forward: ready to be run in parts.

    What is kept: references to the arguments (masks and position tables, which the blocks share;
    nothing is copied), and for each residual stream named in `keep` one [batch, pos, d_model]
    tensor, of the model's dtype, where the forward left it. No other activation.
    """

    model: nn.Module
    part: Part
    calls: tuple[Call, ...]
    kept: Mapping[int, Tensor]
    shape: tuple[int, int, int]
    """(batch, pos, d_model) of the recorded forward."""
    trunk: str
    """The module from whose answer the model's own forward makes logits."""
    answer: type | None
    """The class of that answer; None where there are no logits."""
    attention: str | None
    """The attention implementation, for which the masks were made."""
    rows: Int[Tensor, "rows"] | None = None

    @property
    def n_blocks(self) -> int:
        """N; the residual streams are 0..N."""
        return len(self.calls)

    @property
    def batch(self) -> int:
        """Number of rows that a residual stream has here."""
        return self.shape[0] if self.rows is None else len(self.rows)

    def resid(self, block: int) -> Float[Tensor, "rows pos d_model"]:
        """The recorded input of `block`; `resid(n_blocks)` is the output of the last one.

        The tensor of the forward itself (or the selected rows of it): not to be written to.
        Raises LookupError for a residual stream that `record` was not told to keep.
        """
        if block not in self.kept:
            raise LookupError(
                f"resid({block}) was not kept, only {sorted(self.kept)}: record with"
                f" keep=[..., {block}], or run_blocks up to it"
            )
        kept = self.kept[block]
        return kept if self.rows is None else kept[self.rows.to(kept.device)]

    def run_blocks(
        self,
        first: int,
        end: int,
        resid: Float[Tensor, "rows pos d_model"],
        rows: Int[Tensor, "rows"] | Sequence[int] | None = None,
        *,
        checkpoint: bool = False,
    ) -> Float[Tensor, "rows pos d_model"]:
        """resid_first -> resid_end through blocks first..end-1; differentiable.

        `rows` tells which recorded example each row of `resid` belongs to, as in `select`.
        `checkpoint` forgets what is inside a block and computes it again in the backward pass.
        Raises ValueError for a segment or a shape that does not fit the recording.
        """
        if rows is not None:
            return self.select(rows).run_blocks(first, end, resid, checkpoint=checkpoint)
        if not 0 <= first <= end <= self.n_blocks:
            raise ValueError(f"blocks {first} to {end}: a segment lies within 0 to {self.n_blocks}")
        if tuple(resid.shape) != (self.batch, *self.shape[1:]):
            raise ValueError(
                f"resid of shape {list(resid.shape)}, recorded {[self.batch, *self.shape[1:]]}: use"
                " tile() or select() for other rows, record() again for other tokens"
            )
        if (now := _attention(self.model)) != self.attention:
            raise ValueError(
                f"recorded under {self.attention} attention, the model is now set to {now}, which"
                " takes other masks: record() again"
            )
        state: tuple[Any, ...] = (resid,)
        for call in self.calls[first:end]:
            state = call.run(state, checkpoint)
        return state[0]

    def head(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        positions: Int[Tensor, "n 2"] | Bool[Tensor, "rows pos"] | None = None,
    ) -> Float[Tensor, "..."]:
        """resid_N -> logits [rows, pos, vocab], or [n, vocab] at (row, position) pairs.

        Final norm and output projection, if any, then the model's own forward with the result
        given to it as its base model's answer: multipliers, soft caps and biases of the logits are
        the family's. A mask of positions is read row by row. `resid` may have any number of rows.
        Raises ValueError where there are no logits: in an encoder, in a model without a head.
        """
        if self.part.stack == "encoder":
            raise ValueError("head of an encoder: it makes no logits; record stack='decoder'")
        if self.answer is None:
            raise ValueError(
                f"head of {type(self.model).__name__}: it has none that its anatomy knows; load the"
                " model with its language-model head"
            )
        if positions is not None:
            where = positions.nonzero() if positions.dtype == torch.bool else positions
            row, position = where.to(resid.device).unbind(-1)
            resid = resid[row, position].unsqueeze(0)
        answer = self.answer(last_hidden_state=self.part.close(resid))
        logits = answered(self.model, self.trunk, answer).logits
        return logits if positions is None else logits[0]

    def select(self, rows: Int[Tensor, "rows"] | Sequence[int]) -> Recorded:
        """The same arguments for other rows: row r of a residual stream is example rows[r].

        Rows may repeat, be left out and come in any order. Each argument follows by the rule of
        its name (`ablate.calls`), copied once however many blocks share it.
        Raises ValueError for rows that do not exist and for an argument without a rule.
        """
        index = torch.as_tensor(rows)
        if index.ndim != 1 or index.dtype == torch.bool or index.is_floating_point():
            raise ValueError(
                f"rows of shape {list(index.shape)} and {index.dtype}: give a list of row numbers"
            )
        if len(index) == 0 or not 0 <= int(index.min()) <= int(index.max()) < self.batch:
            raise ValueError(
                f"rows {index.tolist()}: give at least one, each within 0 to {self.batch - 1}"
            )
        done: dict[int, Any] = {}
        calls = tuple(call.select(index, self.batch, done) for call in self.calls)
        chosen = index if self.rows is None else self.rows[index.to(self.rows.device)]
        return replace(self, calls=calls, rows=chosen)

    def tile(self, copies: int) -> Recorded:
        """The same arguments for the batch repeated: row c * batch + b is example b of copy c.

        So several variants, one removed component each, go through a segment at once.
        """
        if copies < 1:
            raise ValueError(f"{copies} copies of the batch: make at least 1")
        return self.select(torch.arange(self.batch).repeat(copies))


def record(
    hf_model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    keep: Iterable[int] = (0,),
    stack: Stack | None = None,
    anatomy: Anatomy | None = None,
    gradients: bool = False,
    upto: int | None = None,
) -> Recorded:
    """Run the model's own forward on `inputs`, short of the logits, and keep how it went.

    `keep` names residual streams: i is the input of block i, N the output of the last block.
    `upto` runs only the blocks below it (at least one) and keeps of the others how they are called.
    `stack` is "encoder" or "decoder" where a model has both (default: the decoder). Runs without a
    cache, inside whatever hooks are installed, and without gradients unless they are asked for.

    Raises ValueError for what cannot be replayed: a block that does not run exactly once in its
    turn, a cache in the inputs, anything between or behind the blocks that the anatomy lacks.
    """
    part = Part.of(hf_model, stack, anatomy)
    tape = _Tape(hf_model, part, frozenset(keep))
    end = len(part.blocks) if upto is None else upto
    if not 1 <= end <= len(part.blocks):
        raise ValueError(f"upto={upto}: run at least block 0, and {len(part.blocks)} at most")
    if unknown := sorted(i for i in tape.keep if not 0 <= i <= end):
        raise ValueError(f"keep={unknown}: residual streams are 0 to {end}")
    handles: list[RemovableHandle] = []
    for i, block in enumerate(part.blocks):
        # First of the pre-hooks and last of the hooks: what others change, they change again.
        enter = partial(tape.enter, i)
        handles += [
            block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            block.register_forward_hook(partial(tape.leave, i)),
        ]
    for name in part.around:
        module = hf_model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(partial(tape.enter_trunk, name)),
            module.register_forward_hook(partial(tape.leave_trunk, name)),
        ]
    # A tensor made in inference mode could not take part in a later backward.
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), _left_out(tape, end):
        _forward(hf_model, inputs, handles)
        return tape.recorded()


def embed(
    hf_model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    stack: Stack | None = None,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """resid_0: what the model's own forward gives to its first block, where we leave it.

    Whatever a family does there is in it: positions, project_in, multipliers, a norm.
    """
    part = Part.of(hf_model, stack, anatomy)
    found: list[Tensor] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(residual(block, args, kwargs))
        if part.may_leave:
            raise _Leave

    block = part.blocks[0]
    hook = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    _forward(hf_model, inputs, [hook])
    return found[0]


@contextmanager
def _left_out(tape: _Tape, first: int) -> Iterator[None]:
    """Blocks from `first` on give back what the last one before them gave, without being run."""

    def give_back(*args: object, **kwargs: object) -> object:
        return tape.returned

    blocks = tape.part.blocks[first:]
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate's, where it offloads
    try:
        for block in blocks:
            block.__dict__["forward"] = give_back
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


class _Leave(Exception):
    """A forward has shown what we wanted to see: raised in our hooks, caught in `_forward`."""


def _forward(
    hf_model: nn.Module, inputs: Mapping[str, Any], handles: Iterable[RemovableHandle]
) -> None:
    """The model's own forward without a cache, under hooks that may leave it and are then gone."""
    uncached: dict[str, Any] = {}
    if "use_cache" in inspect.signature(hf_model.forward).parameters:
        uncached["use_cache"] = False
    try:
        with suppress(_Leave):
            hf_model(**{**inputs, **uncached})
    finally:
        for handle in handles:
            handle.remove()


@dataclass(eq=False)
class _Tape:
    """What the hooks of `record` write down while the forward runs."""

    model: nn.Module
    part: Part
    keep: frozenset[int]
    calls: list[Call] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    shape: tuple[int, int, int] = (0, 0, 0)
    last: tuple[Any, ...] = ()
    returned: Any = None
    trunk: str = ""
    answer: Any = None

    def enter(
        self, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if i != len(self.calls):
            self.refuse(f"runs block {i} after {len(self.calls)} blocks, not once in its turn")
        resid = residual(block, args, kwargs)
        if resid.ndim != 3:
            self.refuse(f"gives block {i} {list(resid.shape)}, not [batch, pos, d_model]")
        if i and not _same(resid, self.last[0]):
            self.refuse(f"changes the residual stream between blocks {i - 1} and {i}")
        self.calls.append(Call.cut(block, args, kwargs, self.last))
        batch, pos, d_model = resid.shape
        self.shape = (batch, pos, d_model)
        if i in self.keep:
            self.kept[i] = resid

    def leave(self, i: int, block: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        self.last, self.returned = outputs(returned), returned
        if i + 1 == len(self.part.blocks) and i + 1 in self.keep:
            self.kept[i + 1] = self.last[0]

    def enter_trunk(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.trunk = self.trunk or name  # the outermost that runs: OPT's head calls model.decoder

    def leave_trunk(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if name == self.trunk:
            self.answer = out
            if self.part.may_leave:
                raise _Leave

    def recorded(self) -> Recorded:
        if len(self.calls) != len(self.part.blocks):
            self.refuse(f"ran {len(self.calls)} of its {len(self.part.blocks)} blocks")
        answer: type | None = None
        if self.part.headed and hasattr(self.answer, "last_hidden_state"):
            answer = type(self.answer)
            closed = self.part.close(self.last[0])
            if not self.model.training and not _same(closed, self.answer.last_hidden_state):
                raise UnknownArchitecture(
                    f"{self.trunk} of {type(self.model).__name__} does more behind its blocks than"
                    " final norm and output projection: name them in anatomy="
                )
        return Recorded(
            model=self.model,
            part=self.part,
            calls=tuple(self.calls),
            kept=self.kept,
            shape=self.shape,
            trunk=self.trunk,
            answer=answer,
            attention=_attention(self.model),
        )

    def refuse(self, what: str) -> None:
        raise ValueError(
            f"{type(self.model).__name__} {what}: it cannot be run in parts"
            + (", call eval() first" if self.model.training else "")
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.allclose(a, b.to(a.device), rtol=0, atol=0, equal_nan=True)


def _attention(hf_model: nn.Module) -> str | None:
    return getattr(getattr(hf_model, "config", None), "_attn_implementation", None)
