"""How do students of many layers learn from one pass over the data?

One forward of the base, without gradients, gives every residual stream resid_0 … resid_N. A cohort
(K students of the same places) joins at its first replaced block L with resid_L for each of its
students; from there all cohorts climb together, each frozen block run once on their concatenated
streams, and the graph begins at L. With one block forward as the unit, N blocks and a head of h
blocks, all single-layer cohorts of K students cost per batch

    N + K Σ_L (2 (N − L) + 1 + 2h)   for the loss of the model's task
    N + 3 K N                        for the block's own output (no graph above L)

where one layer at a time costs K Σ_L (2N − L + 1 + 2h). Losses of different students share no
weight, so the gradient of their sum is the gradient of each.

    lm       mean loss over the batch's targets: cross-entropy in nats, of vectors squared errors
    hidden   E|out − y|² / E|y − x|² against the old block's output y for its input x: 1 for a block
             that does nothing, 0 for the old one
    logits   KL(old ‖ new) over the vocabulary, mean over the batch's targets, nats
    mix      lm + hidden

The logits are made, read and forgotten in chunks, their gradient with respect to the stream kept.
Dropout, if asked for, draws where weights are trained and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.components import Stack
from ablate.parts import Part, decoder_inputs
from ablate.placement import is_offloaded
from ablate.stack import Recorded, record
from ablate.students import Students
from experiments.objectives import Batch, is_predicted, target_losses
from experiments.reset.learning.parallel import ALONE, Share
from experiments.reset.learning.treatments import Target

CHUNK = 2**22
"""Logits made at a time."""
JOINED = 2**16
"""Coordinates of residual streams that are joined for one call of a frozen block on a CPU."""


@dataclass(eq=False)
class Cohort:
    """Students of the same places, trained towards one target.

    Attributes:
        blocks: layer -> its Students; all with as many students.
    """

    blocks: Mapping[int, Students]
    target: Target = "lm"

    @property
    def first(self) -> int:
        """The lowest replaced block."""
        return min(self.blocks)

    @property
    def count(self) -> int:
        """K."""
        return self.blocks[self.first].count

    def parameters(self) -> list[nn.Parameter]:
        """Stacked trained tensors of all its blocks."""
        return [
            p for _, s in sorted(self.blocks.items()) for p in s.parameters() if p.requires_grad
        ]

    def __post_init__(self) -> None:
        if self.target == "hidden" and len(self.blocks) > 1:
            raise ValueError(
                f"layers {sorted(self.blocks)} towards their old outputs: each is on its own then;"
                " give them as cohorts of one layer, or another target"
            )


@dataclass(frozen=True, eq=False)
class Pass:
    """One batch on its way through the base: its streams, and how they become logits.

    Attributes:
        share: the batch is this process's share of one.
    """

    model: nn.Module
    batch: Batch
    recorded: Recorded
    share: Share = ALONE

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Batch,
        stack: Stack | None = None,
        keep: Collection[int] | None = None,
        share: Share = ALONE,
    ) -> Pass:
        """The base's own forward of one stack; residual streams `keep` are kept, by default all."""
        with torch.no_grad():
            if keep is None:
                keep = range(depth(model, stack) + 1)
            upto = max([1, *keep])  # nothing above is run
            recorded = record(model, batch.inputs, keep=keep, stack=stack, upto=upto)
        return cls(model, batch, recorded, share)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.recorded.batch

    @cached_property
    def where(self) -> Int[Tensor, "n 2"] | None:
        """(row, position) of the predicted targets, where most positions predict nothing."""
        chosen = self.batch.predicted
        return chosen.nonzero() if float(chosen.float().mean()) < 0.6 else None

    @cached_property
    def predicted(self) -> int:
        """Targets predicted, in the shares of all processes."""
        return int(self.share.total(self.batch.predicted.sum()))

    @cached_property
    def offloaded(self) -> frozenset[int]:
        """Blocks whose weights accelerate fetches for every call."""
        blocks = [call.block for call in self.recorded.calls]
        if not any("_hf_hook" in module.__dict__ for module in (self.model, *blocks)):
            return frozenset()  # without a look at every weight
        return frozenset(i for i, block in enumerate(blocks) if is_offloaded(block))

    def tiled(self, copies: int) -> Recorded:
        """The recorded arguments for `copies` times the batch."""
        known = self.__dict__.setdefault("_tiled", {})
        if copies not in known:
            known[copies] = self.recorded if copies == 1 else self.recorded.tile(copies)
        return known[copies]

    def block(
        self, i: int, resid: Float[Tensor, "rows pos d_model"], students: nn.Module | None = None
    ) -> Float[Tensor, "rows pos d_model"]:
        """resid_i -> resid_{i+1} of any multiple of the batch, through the base or `students`.

        An offloaded block is fetched once more in the backward pass: else all that are above the
        students would be on the device at once.
        """
        call = self.tiled(len(resid) // self.rows).calls[i]
        if students is not None:
            call = replace(call, block=students)
        again = students is None and resid.requires_grad and i in self.offloaded
        return call.run((resid,), checkpoint=again)[0]

    def read(
        self, resid: Float[Tensor, "student row pos d_model"], rows: slice
    ) -> tuple[Float[Tensor, "student n output"], Int[Tensor, "n"] | Float[Tensor, "n output"]]:
        """resid_N of some rows of the batch, for every student, -> logits where something is
        predicted, and the targets there."""
        targets = self.batch.targets[rows]
        flat = resid.flatten(0, 1)
        if self.recorded.part.stack == "encoder":
            index = torch.arange(self.rows)[rows].repeat(len(resid))
            states = self.recorded.part.close(flat)
            given = decoder_inputs(_of_rows(self.batch.inputs, index), states)
            hf_model: Any = self.model
            logits = hf_model(**given, use_cache=False).logits
        elif self.where is not None:
            chosen = is_predicted(targets)
            at = chosen.nonzero()
            some = torch.cat([at + at.new_tensor([k * len(targets), 0]) for k in range(len(resid))])
            logits = self.recorded.head(flat, some.to(flat.device))
            logits = logits.unflatten(0, (len(resid), -1))
            return logits, targets[chosen].to(logits.device)
        else:
            logits = self.recorded.head(flat)
        logits = logits.unflatten(0, (len(resid), -1)).flatten(1, 2)
        return logits, targets.flatten(0, 1).to(logits.device)

    def chunks(self, students: int) -> list[slice]:
        """Rows of the batch whose logits, for that many students, fit in CHUNK."""
        config: Any = getattr(self.model, "config")  # noqa: B009 (nn.Module's getattr is Tensor)
        vocab = config.get_text_config().vocab_size
        per_row = self.batch.targets.shape[1] * vocab * students
        if self.where is not None:
            per_row = per_row * len(self.where) // self.batch.predicted.numel()
        size = max(1, CHUNK // max(1, per_row))
        return [slice(i, min(i + size, self.rows)) for i in range(0, self.rows, size)]


def needed(cohorts: Sequence[Cohort], n_blocks: int) -> set[int]:
    """The base's residual streams that these cohorts learn from."""
    streams = {cohort.first for cohort in cohorts}
    streams |= {cohort.first + 1 for cohort in cohorts if cohort.target in ("hidden", "mix")}
    return streams | {n_blocks for cohort in cohorts if cohort.target == "logits"}


def learn(
    passing: Pass, cohorts: Sequence[Cohort], *, dropout: bool = True
) -> list[Float[Tensor, "student"]]:
    """Losses of every student of every cohort; their gradients are added to the students' weights.

    Of a share of a batch they are what it adds to the losses and gradients of the whole batch.
    A loss that is not finite leaves gradients that are not finite in its own student alone.
    """
    with _learning(cohorts) if dropout else nullcontext():
        return _learn(passing, cohorts)


@contextmanager
def _learning(cohorts: Sequence[Cohort]) -> Iterator[None]:
    """What is trained in training mode, for as long as the context lasts."""
    trained = [s for cohort in cohorts for s in cohort.blocks.values() if s.trained()]
    for students in trained:
        students.train()
    try:
        yield
    finally:
        for students in trained:
            students.eval()


def _learn(passing: Pass, cohorts: Sequence[Cohort]) -> list[Float[Tensor, "student"]]:
    losses: list[Tensor] = [torch.empty(0)] * len(cohorts)
    streams: dict[int, Tensor] = {}
    local: list[Tensor] = []
    for i in range(min((c.first for c in cohorts), default=0), passing.recorded.n_blocks):
        _climb(passing, cohorts, streams, i)
        for c, cohort in enumerate(cohorts):
            if cohort.first == i and cohort.target in ("hidden", "mix"):
                x, y = passing.recorded.resid(i), passing.recorded.resid(i + 1)
                losses[c] = block_error(streams[c], x, y, cohort.count, passing.share)
                if cohort.target == "hidden":
                    losses[c].sum().backward()  # nothing above it is needed: forget it at once
                    losses[c] = losses[c].detach()
                    del streams[c]
                else:
                    local.append(losses[c].sum())
                    losses[c] = losses[c].detach()
    ends, gradients = [], []
    for c, stream in streams.items():
        found, gradient = _above(passing, stream, cohorts[c])
        mixed = cohorts[c].target == "mix"
        losses[c] = losses[c] + found.to(losses[c].device) if mixed else found
        ends.append(stream)
        gradients.append(gradient)
    if ends:
        ones = [torch.ones_like(loss) for loss in local]
        torch.autograd.backward([*ends, *local], [*gradients, *ones])
    return losses


@torch.no_grad()
def evaluate(passing: Pass, cohorts: Sequence[Cohort]) -> list[Float[Tensor, "student row"]]:
    """Summed loss of each row's targets, for every student of every cohort."""
    streams: dict[int, Tensor] = {}
    for i in range(min((c.first for c in cohorts), default=0), passing.recorded.n_blocks):
        _climb(passing, cohorts, streams, i)
    return [_row_sums(passing, streams[c], cohort.count) for c, cohort in enumerate(cohorts)]


@torch.no_grad()
def evaluate_base(passing: Pass) -> Float[Tensor, "row"]:
    """The same for the base itself."""
    return _row_sums(passing, passing.recorded.resid(passing.recorded.n_blocks), 1)[0]


def _climb(passing: Pass, cohorts: Sequence[Cohort], streams: dict[int, Tensor], i: int) -> None:
    """Take every cohort that is on its way, or joins here, through block i."""
    for group in _groups({c: s for c, s in streams.items() if i not in cohorts[c].blocks}):
        if len(group) == 1:
            streams[group[0]] = passing.block(i, streams[group[0]])
            continue
        joined = torch.cat([streams[c] for c in group])
        sizes = [len(streams[c]) for c in group]
        for c, out in zip(group, passing.block(i, joined).split(sizes), strict=True):
            streams[c] = out
    for c, cohort in enumerate(cohorts):
        if i in cohort.blocks:
            resid = streams.get(c)
            if resid is None:
                resid = passing.recorded.resid(i).repeat(cohort.count, 1, 1)
            streams[c] = passing.block(i, resid, cohort.blocks[i])


def _groups(streams: Mapping[int, Tensor]) -> list[list[int]]:
    """Cohorts whose streams go through a frozen block in one call.

    On a CPU no larger ones are joined than its caches hold with what a block makes of them: beyond
    that, a copy costs more than a call saves.
    """
    groups: list[list[int]] = []
    used = 0
    for c, stream in streams.items():
        if not groups or (stream.device.type == "cpu" and used + stream.numel() > JOINED):
            groups.append([])
            used = 0
        groups[-1].append(c)
        used += stream.numel()
    return groups


def block_error(
    out: Float[Tensor, "rows pos d_model"],
    x: Float[Tensor, "batch pos d_model"],
    y: Float[Tensor, "batch pos d_model"],
    count: int,
    share: Share = ALONE,
) -> Float[Tensor, "student"]:
    """E|out − y|² / E|y − x|² of each of `count` students, or what a share adds to it."""
    y = y.to(out.device, torch.float32)
    change = (y - x.to(out.device, torch.float32)).square().sum()
    change, size = share.total(torch.stack([change, change.new_tensor(y.numel())]))
    errors = out.float().unflatten(0, (count, -1)) - y
    return errors.square().sum((1, 2, 3)) / size / (change / size).clamp(min=1e-12)


def divergence(
    logits: Float[Tensor, "*n vocab"], old: Float[Tensor, "*n vocab"]
) -> Float[Tensor, "*n"]:
    """KL(old ‖ new) in nats."""
    mine, theirs = logits.float().log_softmax(-1), old.float().log_softmax(-1)
    return (theirs.exp() * (theirs - mine)).sum(-1)


def _above(
    passing: Pass, stream: Float[Tensor, "rows pos d_model"], cohort: Cohort
) -> tuple[Float[Tensor, "student"], Float[Tensor, "rows pos d_model"]]:
    """The losses read from the logits, and their gradient with respect to resid_N."""
    split = stream.detach().unflatten(0, (cohort.count, -1))
    gradient = torch.empty_like(split)
    losses = split.new_zeros(cohort.count, dtype=torch.float32)
    for rows in passing.chunks(cohort.count):
        piece = split[:, rows].requires_grad_()
        with torch.enable_grad():
            logits, targets = passing.read(piece, rows)
            if cohort.target == "logits":
                counted = is_predicted(targets)
                old = _old(passing, rows)[counted]
                found = divergence(logits[:, counted], old).sum(1) / passing.predicted
            else:
                found = _losses(logits, targets).sum(1) / passing.batch.unit / passing.predicted
            (gradient[:, rows],) = torch.autograd.grad(found.sum(), piece)
        losses += found.detach().to(losses.device)
    return losses, gradient.flatten(0, 1)


def _losses(
    logits: Float[Tensor, "student n output"],
    targets: Int[Tensor, "n"] | Float[Tensor, "n output"],
) -> Float[Tensor, "student n"]:
    flat = target_losses(logits.flatten(0, 1), torch.cat([targets] * len(logits)))
    return flat.unflatten(0, (len(logits), -1))


@torch.no_grad()
def _old(passing: Pass, rows: slice) -> Float[Tensor, "n vocab"]:
    return passing.read(passing.recorded.resid(passing.recorded.n_blocks)[None, rows], rows)[0][0]


def _row_sums(
    passing: Pass, stream: Float[Tensor, "rows pos d_model"], count: int
) -> Float[Tensor, "student row"]:
    split = stream.unflatten(0, (count, -1))
    found = []
    for rows in passing.chunks(count):
        logits, targets = passing.read(split[:, rows], rows)
        losses = _losses(logits, targets) / passing.batch.unit
        mine = passing.batch.targets[rows]
        if losses.shape[1] != mine.shape[0] * mine.shape[1]:  # one entry a predicted position
            row = is_predicted(mine).nonzero()[:, 0].to(losses.device)
        else:
            row = torch.arange(len(mine), device=losses.device).repeat_interleave(mine.shape[1])
        sums = losses.new_zeros(count, len(mine)).index_add_(1, row, losses)
        found.append(sums)
    return torch.cat(found, dim=1)


def _of_rows(inputs: Mapping[str, Tensor], index: Int[Tensor, "row"]) -> dict[str, Tensor]:
    return {name: tensor[index.to(tensor.device)] for name, tensor in inputs.items()}


def depth(model: nn.Module, stack: Stack | None = None) -> int:
    """N, the blocks of that stack."""
    return len(Part.of(model, stack, None).blocks)
