"""How do many masked streams climb through one model together?

The whole model runs once and is recorded. Then every block is visited once, from below: streams
that were cut lower down pass through it, streams that are cut here leave the whole model here, all
of them in a few large batches. An offloaded block is fetched once for its visit, however many
streams wait for it. An encoder-decoder is one climb through two stacks: behind the encoder a stream
goes on as its own answer of the encoder, which the decoder's blocks read.

How many rows are sent at once follows from what the first one was measured to allocate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.budget import rows_that_fit, with_peak
from ablate.placement import resident
from ablate.sites import Site
from ablate.stack import Recorded
from ablate.variants import Child
from ablate.visits import Known, Rows, Visit

if TYPE_CHECKING:
    from ablate.fills import Fill


@dataclass(frozen=True, eq=False)
class Stage:
    """One recorded stack with what may be cut in it.

    Attributes:
        sites: of each block.
        known: what the whole model computed at head and mixer sites; empty: may not be used.
        source_rows: which row of the stack before each row reads (of a decoder).
    """

    recorded: Recorded
    sites: Sequence[Sequence[Site]]
    known: Mapping[str, Known]
    source_rows: Int[Tensor, "batch"] | None = None


@dataclass(eq=False)
class Climb:
    """The way of a group of masks through the recorded stages.

    Attributes:
        memory: bytes that one piece may allocate.
        chosen: [batch, chosen] positions at which the last block is to be run; None for all.
        store: where streams wait; None for beside their block.
        measured: (kind of block, how it is run) -> (length, bytes a row); shared by all climbs.
    """

    hf_model: nn.Module
    stages: Sequence[Stage]
    fill: Literal["zero"] | Fill
    memory: int
    chosen: Int[Tensor, "batch chosen"] | None
    store: torch.device | None = None
    measured: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def run(
        self, levels: Sequence[Sequence[Child]]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """The streams behind the last block: node -> resid, at the chosen positions if given.

        `levels` are the children made by each block of all stages (`ablate.variants.fork`). The
        whole model, node 0, is not among the answers: its stream is recorded.
        """
        streams: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        level = iter(levels)
        for stage in self.stages:
            recorded = stage.recorded
            if stage.source_rows is not None:
                states = self._states(stage, streams)
                streams = {node: recorded.resid(0) for node in streams}
            expanded: dict[tuple[int, ...], dict[int, Any]] = {}
            for block in range(recorded.n_blocks):
                last = stage is self.stages[-1] and block == recorded.n_blocks - 1
                visit = Visit(
                    self.hf_model,
                    recorded,
                    block,
                    stage.sites[block],
                    stage.known,
                    self.fill,
                    self.chosen if last else None,
                    expanded,
                )
                children = next(level)
                streams = self._visited(visit, children, streams, states)
                if states:
                    states = {node: states[child.parent] for node, child in enumerate(children)}
        return streams

    def _states(self, stage: Stage, streams: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What the stack before says to the rows of `stage`, node by node, the whole model's
        included; nothing where it was not cut."""
        if not streams:
            return {}
        before = self.stages[self.stages.index(stage) - 1].recorded
        ends = {0: before.resid(before.n_blocks), **streams}
        assert stage.source_rows is not None
        with resident(nn.ModuleList(before.part.closing)):
            return {
                node: before.part.close(resid)[stage.source_rows.to(resid.device)]
                for node, resid in ends.items()
            }

    def _visited(
        self,
        visit: Visit,
        children: Sequence[Child],
        streams: Mapping[int, Tensor],
        states: Mapping[int, Tensor],
    ) -> dict[int, Tensor]:
        """The streams behind one block."""
        leaving = [n for n, child in enumerate(children) if child.parent == 0 and n > 0]
        passing = [n for n, child in enumerate(children) if child.parent != 0]
        if not leaving and not passing:
            return {}  # and an offloaded block is not fetched
        block = visit.recorded.calls[visit.block].block
        found: dict[int, Tensor] = {}
        with resident(block):
            for nodes, fresh in ((leaving, True), (passing, False)):
                if nodes:
                    found |= self._sent(visit, nodes, children, streams, states, fresh)
        return found

    def _sent(
        self,
        visit: Visit,
        nodes: Sequence[int],
        children: Sequence[Child],
        streams: Mapping[int, Tensor],
        states: Mapping[int, Tensor],
        fresh: bool,
    ) -> dict[int, Tensor]:
        """Send the parents' streams of `nodes` through the block, in pieces that fit."""
        batch = visit.recorded.batch
        whole = visit.recorded.resid(visit.block) if fresh else None

        def rows(some: Sequence[int], first: int, end: int) -> tuple[Rows, Tensor | None]:
            parents = [children[node].parent for node in some]
            inputs = [(streams[p] if whole is None else whole)[first:end] for p in parents]
            seen = [states[p][first:end] for p in parents] if states else []
            cuts = [children[node].cut for node in some for _ in range(first, end)]
            example = torch.arange(first, end).repeat(len(some))
            return (
                Rows(example, torch.cat(inputs), cuts, fresh),
                torch.cat(seen) if seen else None,
            )

        size = self._rows_at_once(visit, rows(nodes[:1], 0, 1), fresh)
        made: dict[int, Tensor] = {}
        for some, first, end in _pieces(nodes, batch, size):
            out = visit.run(*rows(some, first, end))
            if not made:
                room = out.new_empty((len(nodes), batch, *out.shape[1:]), device=self.store)
                made = dict(zip(nodes, room, strict=True))
            for node, of_node in zip(some, out.unflatten(0, (len(some), -1)), strict=True):
                made[node][first:end] = of_node
        return made

    def _rows_at_once(self, visit: Visit, one: tuple[Rows, Tensor | None], fresh: bool) -> int:
        """From the measured peak of a single row of this length or a longer one."""
        block = visit.recorded.calls[visit.block].block
        resid = one[0].resid
        kind = tuple(map(type, block.modules()))  # a decoder's block, or one with experts
        how = fresh, visit.positions is None, bool(one[0].cuts[0]), isinstance(visit.fill, str)
        key = kind, how, visit.recorded.attention, resid.dtype
        length, per_row = self.measured.get(key, (0, 0))
        device = visit.device
        if length < resid.shape[1]:
            _, per_row = with_peak(lambda: visit.run(*one), device)
            per_row += resid.nbytes
            self.measured[key] = resid.shape[1], per_row
        return rows_that_fit(per_row, self.memory, device, multiple=visit.recorded.batch)


def _pieces(
    nodes: Sequence[int], batch: int, size: int
) -> Iterator[tuple[Sequence[int], int, int]]:
    """(some nodes, first row, end row) of at most `size` rows, all rows of all nodes once."""
    if size >= batch:
        for i in range(0, len(nodes), size // batch):
            yield nodes[i : i + size // batch], 0, batch
        return
    for node in nodes:
        for first in range(0, batch, size):
            yield [node], first, min(first + size, batch)
