"""Which predictions are read from a batch, and what does a residual stream say of them?

    log p(target) = logit(target) − log Σ_v exp logit(v)

Logits are formed at the positions that are read and nowhere else, each once however many targets
are asked of it, and for many streams in one product; few exist at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ablate.anatomy import Anatomy, anatomy_of
from ablate.components import Stack
from ablate.parts import Part, decoder_inputs, stacks_of
from ablate.placement import resident
from ablate.stack import Recorded, record

LOGITS = 2**22
"""Logits formed at a time: they stay in the cache."""
SLOTS = 512
"""Slots taken at a time at least: fewer would wait for the weights of a large vocabulary."""
NORMALISED = 2**21
"""Logits normalised at a time: they stay in the cache."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The predictions to read from a batch.

    Attributes:
        slots: the different (row, position) pairs, row by row.
        slot_of: for every entry, its slot.
        targets: for every entry, its token.
        chosen: for every row, the positions of its slots, the last one repeated to equal length.
        place_of: for every slot, its (row, place among the chosen).
    """

    slots: Int[Tensor, "slot 2"]
    slot_of: Int[Tensor, "entry"]
    targets: Int[Tensor, "entry"]
    chosen: Int[Tensor, "batch chosen"]
    place_of: Int[Tensor, "slot 2"]

    @classmethod
    def of(
        cls,
        positions: Int[Tensor, "entry 2"],
        targets: Int[Tensor, "entry"],
        shape: tuple[int, int],
    ) -> Wanted:
        """`positions` are (row, position) in a batch of `shape`.

        Raises ValueError for a position outside it, for none, and for another number of targets.
        """
        if positions.ndim != 2 or positions.shape[1] != 2 or not len(positions):
            raise ValueError(
                f"positions of shape {list(positions.shape)}: give at least one (row, position)"
            )
        if len(targets) != len(positions):
            raise ValueError(f"{len(targets)} targets at {len(positions)} positions: give one each")
        if int(targets.min()) < 0:
            raise ValueError(
                f"target {int(targets.min())} asked for: tokens count from 0; leave positions that"
                " are not to be read out, instead of labelling them −100"
            )
        if int(positions.min()) < 0 or not bool((positions < torch.tensor(shape)).all()):
            outside = positions[((positions < 0) | (positions >= torch.tensor(shape))).any(1)]
            raise ValueError(
                f"position {outside[0].tolist()} of a batch of {list(shape)}: (row, position) "
                "count from 0"
            )
        slots, slot_of = positions.unique(dim=0, return_inverse=True)
        row, position = slots.unbind(1)
        counts = torch.bincount(row, minlength=shape[0])
        place = torch.arange(len(slots)) - (counts.cumsum(0) - counts)[row]
        chosen = torch.zeros(shape[0], int(counts.max()), dtype=torch.long)
        last = torch.zeros(shape[0], dtype=torch.long)
        last.scatter_reduce_(0, row, position, "amax")
        chosen[:] = last[:, None]
        chosen[row, place] = position
        return cls(slots, slot_of, targets, chosen, torch.stack([row, place], 1))

    def pick(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "slot d_model"]:
        """The slots of a stream at all positions."""
        row, position = self.slots.to(resid.device).unbind(1)
        return resid[row, position]

    def narrowed(self, resid: Float[Tensor, "batch chosen d"]) -> Float[Tensor, "slot d"]:
        """The slots of a stream at the chosen positions."""
        row, place = self.place_of.to(resid.device).unbind(1)
        return resid[row, place]


def read(
    recorded: Recorded,
    streams: Sequence[Float[Tensor, "slot d_model"]],
    wanted: Wanted,
    memory: int,
) -> tuple[Float[Tensor, "stream entry"], Bool[Tensor, "stream entry"]]:
    """(log p of every target, whether it is the arg-max) for each stream, in fp32 on the CPU."""
    head, at_once = _head_of(recorded, memory)
    # Entries slot by slot, stream by stream: then a piece of the slots is a piece of the entries.
    order = wanted.slot_of.argsort(stable=True)
    count, entries = len(wanted.slots), len(order)
    starts = count * torch.arange(len(streams))[:, None]
    slot = (starts + wanted.slot_of[order]).flatten()
    target = wanted.targets[order].repeat(len(streams))
    log_p, best = torch.empty(len(slot)), torch.empty(len(slot), dtype=torch.bool)
    resid = torch.cat(list(streams))
    with resident(nn.ModuleList([*recorded.part.closing, head])):
        for first in range(0, len(resid), at_once):
            logits = recorded.head(resid[None, first : first + at_once])[0]
            a, b = torch.searchsorted(slot, torch.tensor([first, first + len(logits)])).tolist()
            log_p[a:b], best[a:b] = target_log_p(logits, slot[a:b] - first, target[a:b])
    back = torch.empty(entries, dtype=torch.long)
    back[order] = torch.arange(entries)
    shape = len(streams), entries
    return log_p.view(shape)[:, back], best.view(shape)[:, back]


def logits_of(
    recorded: Recorded,
    streams: Sequence[Float[Tensor, "slot d_model"]],
    wanted: Wanted,
    memory: int,
) -> tuple[Float[Tensor, "stream entry output"]]:
    """The logits themselves at every entry of each stream, in fp32 on the CPU."""
    head, at_once = _head_of(recorded, memory)
    resid = torch.cat(list(streams))
    with resident(nn.ModuleList([*recorded.part.closing, head])):
        parts = [recorded.head(some[None])[0].float().cpu() for some in resid.split(at_once)]
    return (torch.cat(parts).unflatten(0, (len(streams), -1))[:, wanted.slot_of],)


def _head_of(recorded: Recorded, memory: int) -> tuple[nn.Module, int]:
    """(the output projection, slots whose logits are formed at a time)."""
    model: Any = recorded.model
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"predictions of {type(model).__name__} asked for: it has no language-model head"
        )
    outputs = head.weight.shape[0]
    return head, max(1, min(max(SLOTS, LOGITS // outputs), memory // 16 // outputs))


def log_p_of(
    hf_model: nn.Module,
    inputs: Mapping[str, Any],
    positions: Int[Tensor, "entry 2"],
    targets: Int[Tensor, "entry"],
    anatomy: Anatomy | None = None,
    *,
    checkpointing: bool = False,
) -> Float[Tensor, "entry"]:
    """log p of each target at its (row, position), differentiable, from the model as it stands.

    `checkpointing` forgets what is inside the blocks and computes it again in the backward.
    """
    if checkpointing:
        recorded, resid = _checkpointed(hf_model, inputs, anatomy or anatomy_of(hf_model))
    else:
        n_blocks = len(Part.of(hf_model, None, anatomy).blocks)
        recorded = record(hf_model, inputs, keep=[n_blocks], anatomy=anatomy, gradients=True)
        resid = recorded.resid(recorded.n_blocks)
    wanted = Wanted.of(positions, targets, recorded.shape[:2])
    logits = recorded.head(resid, wanted.slots)
    return target_log_p(logits, wanted.slot_of, wanted.targets)[0]


def _checkpointed(
    hf_model: nn.Module, inputs: Mapping[str, Any], anatomy: Anatomy
) -> tuple[Recorded, Float[Tensor, "batch pos d_model"]]:
    """(the last stack, what comes out of its blocks). Transformers' own checkpointing works in
    training mode only, where dropout does too; here the forward is recorded without gradients, then
    each block called again as it was called."""
    stacks = stacks_of(hf_model, anatomy)
    for stack in stacks[:-1]:
        recorded, resid = _replayed(hf_model, inputs, stack, anatomy)
        inputs = decoder_inputs(inputs, recorded.part.close(resid))
    return _replayed(hf_model, inputs, stacks[-1], anatomy)


def _replayed(
    hf_model: nn.Module, inputs: Mapping[str, Any], stack: Stack, anatomy: Anatomy
) -> tuple[Recorded, Float[Tensor, "batch pos d_model"]]:
    recorded = record(hf_model, inputs, stack=stack, anatomy=anatomy)
    start = recorded.resid(0)
    return recorded, recorded.run_blocks(0, recorded.n_blocks, start, checkpoint=True)


def target_log_p(
    logits: Float[Tensor, "slot vocab"], slot: Int[Tensor, "entry"], target: Int[Tensor, "entry"]
) -> tuple[Float[Tensor, "entry"], Bool[Tensor, "entry"]]:
    """(log p of `target` at `slot`, whether it is the arg-max), in fp32; differentiable."""
    slot, target = slot.to(logits.device), target.to(logits.device)
    order = slot.argsort(stable=True)
    at_once = max(1, NORMALISED // logits.shape[-1])
    ends = torch.arange(0, len(logits) + at_once, at_once, device=slot.device)
    ends = torch.searchsorted(slot[order], ends).tolist()
    log_p, best = [], []
    for number, part in enumerate(logits.split(at_once)):
        entries = order[ends[number] : ends[number + 1]]
        where, token = slot[entries] - number * at_once, target[entries]
        values = part.float()
        log_p.append(values.log_softmax(-1)[where, token])
        best.append(_is_first_largest(values.detach(), where, token))
    back = order.argsort()
    return torch.cat(log_p)[back], torch.cat(best)[back]


def _is_first_largest(
    values: Float[Tensor, "slot vocab"], where: Int[Tensor, "entry"], token: Int[Tensor, "entry"]
) -> Bool[Tensor, "entry"]:
    """values[where].argmax(-1) == token. arg-max is slow on a CPU, the maximum is not: only where
    the token has it, a tie with an earlier one is to be excluded."""
    best = values[where, token] == values.amax(-1)[where]
    ties = best.nonzero()[:, 0]
    best[ties] = values[where[ties]].argmax(-1) == token[ties]
    return best
