"""What does the model predict without each of many sets of components, exactly and all at once?

    log p(target | row up to position; mask)        for every mask and every prediction read

Masking one component after another costs a forward each. Here a mask costs what lies above its
lowest component, in large batches: all masks climb the recorded model together
(`ablate.upward`), masks that agree share their way (`ablate.variants`), the last block and the
vocabulary are computed only where a prediction is read (`ablate.narrow`, `ablate.readout`).
Nothing is approximated: every number is that of `model.ablated(mask)` up to rounding, 1e-6 of the
largest activation in fp32.

    reading = next_tokens({"input_ids": ids})
    for swept in sweep(model, [Mask([head]) for head in model.heads], [reading]):
        loss = -swept.log_p.mean(1)                     # [mask]

Where it misleads: rows of a batch must not see each other (no batch norm), and the model must be
in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ablate import narrow
from ablate.budget import SHARE, free_bytes
from ablate.components import Component
from ablate.hooks import execution_device, is_hooked, require_eval
from ablate.masks import Mask
from ablate.parts import Part, decoder_inputs, stacks_of
from ablate.placement import is_offloaded
from ablate.readout import Wanted, logits_of, read
from ablate.sites import Site
from ablate.stack import Recorded, record
from ablate.upward import Climb, Stage
from ablate.variants import Child, fork
from ablate.visits import watched

if TYPE_CHECKING:
    from ablate.fills import Fill
    from ablate.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class Reading:
    """One forward, and the predictions to read from it.

    Attributes:
        inputs: keyword tensors of the model's forward.
        positions: (row, position) of the logits to read, of the decoder where there are two
            stacks; may repeat.
        targets: the token whose log-probability is read there.
        source_rows: for an encoder-decoder, the row of `input_ids` that each decoder row belongs
            to, where several share one; None if they pair up.
    """

    inputs: Mapping[str, Any]
    positions: Int[Tensor, "entry 2"]
    targets: Int[Tensor, "entry"]
    source_rows: Int[Tensor, "batch"] | None = None

    @property
    def batch(self) -> int:
        """Rows of the forward, of the decoder where there are two stacks."""
        return len(self._ids)

    @property
    def length(self) -> int:
        """Positions of a row, both stacks together."""
        ids = {id(t): t for t in (self._ids, self.inputs.get("input_ids")) if t is not None}
        return sum(t.shape[1] for t in ids.values())

    def rows(self, first: int, end: int) -> Reading:
        """The reading of some of its rows: every input is cut along its first axis.

        Raises ValueError for rows that share a source and for an input that cannot be cut.
        """
        row = self.positions[:, 0]
        mine = (row >= first) & (row < end)
        positions = self.positions[mine] - torch.tensor([first, 0])
        return Reading(self.inputs_of(slice(first, end)), positions, self.targets[mine])

    def inputs_of(self, rows: slice | Int[Tensor, "row"]) -> dict[str, Any]:
        """The inputs of some rows: what has an entry a row is cut, what all rows share is not.

        Raises ValueError for rows that share a source and for an input that cannot be cut.
        """
        if self.source_rows is not None:
            raise ValueError("rows of a reading whose rows share sources: read them all at once")
        return {name: self._cut(name, value, rows) for name, value in self.inputs.items()}

    def _cut(self, name: str, value: Any, rows: slice | Int[Tensor, "row"]) -> Any:
        if isinstance(rows, slice) and rows.indices(self.batch) == (0, self.batch, 1):
            return value
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor) and value.ndim and len(value) == self.batch:
            return value[rows if isinstance(rows, slice) else rows.to(value.device)]
        if isinstance(value, Tensor) and (not value.ndim or len(value) == 1):
            return value  # a position table for all rows
        raise ValueError(f"input {name!r} has no entry for each of {self.batch} rows")

    @property
    def _ids(self) -> Tensor:
        for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
            if name in self.inputs:
                return self.inputs[name]
        raise ValueError(f"no tokens among the inputs {list(self.inputs)}: give input_ids")


@dataclass(frozen=True, eq=False)
class Swept:
    """What each mask makes of one reading.

    Attributes:
        log_p: log-probability of every target under every mask, in nats; [mask, entry], fp32.
        best: whether the target is the most likely token; [mask, entry].
    """

    log_p: Float[Tensor, "mask entry"]
    best: Bool[Tensor, "mask entry"]


def sweep(
    model: HookedModel,
    masks: Sequence[Mask],
    readings: Iterable[Reading],
    *,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> Iterator[Swept]:
    """Every mask on every reading: one Swept a reading, as soon as it is done.

    Args:
        masks: sets of components, the empty one allowed.
        fill: what stands in for removed activations, as in `HookedModel.ablated`. A fill with
            positions or examples must fit every reading.
        memory: bytes that may be allocated beyond the model and its recorded forward; None for
            half of what is free now. At least one row goes through a block at a time.

    Raises ValueError for no masks, no memory, a component the model lacks, a model in training
    mode, a position outside its row, and a model that cannot be run in parts.
    """
    expanded = _asked(model, masks, fill, memory)
    for reading in readings:
        with torch.inference_mode(False), torch.no_grad():
            log_p, best = _swept(model, expanded, reading, fill, _room(model, memory), read)
        yield Swept(log_p, best)  # out here: who asks goes on in their own gradient mode


def sweep_logits(
    model: HookedModel,
    masks: Sequence[Mask],
    inputs: Mapping[str, Any],
    positions: Int[Tensor, "entry 2"],
    *,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> Float[Tensor, "mask entry output"]:
    """What the head gives at (row, position) under every mask, in fp32 on the CPU.

    For a head of few outputs, such as a regressor's: of a vocabulary, `sweep` keeps what is asked
    about only. Arguments and errors are those of `sweep`.
    """
    expanded = _asked(model, masks, fill, memory)
    reading = Reading(inputs, positions, torch.zeros(len(positions), dtype=torch.long))
    with torch.inference_mode(False), torch.no_grad():
        return _swept(model, expanded, reading, fill, _room(model, memory), logits_of)[0]


def next_tokens(inputs: Mapping[str, Any]) -> Reading:
    """Reads every next token of every row (of the decoder, where there are two stacks); padded
    ones, by its attention mask, are left out."""
    stack = "decoder_" if "decoder_input_ids" in inputs else ""
    ids = inputs[f"{stack}input_ids"]
    real = inputs.get(f"{stack}attention_mask", torch.ones_like(ids)).bool().cpu()
    positions = (real[:, :-1] & real[:, 1:]).nonzero()
    row, position = positions.unbind(1)
    return Reading(inputs, positions, ids.cpu()[row, position + 1])


def _asked(
    model: HookedModel, masks: Sequence[Mask], fill: Literal["zero"] | Fill, memory: int | None
) -> list[Mask]:
    """The masks with all they stand for; ValueError for what `sweep` refuses."""
    if not masks:
        raise ValueError("a sweep over no masks asked for: give at least one, such as Mask()")
    if memory is not None and memory <= 0:
        raise ValueError(f"a sweep in {memory} bytes asked for: give 1 or more, or None to measure")
    require_eval(model.model, "a sweep")
    if isinstance(fill, str) and fill != "zero":
        raise ValueError(f"no fill {fill!r}: use 'zero', or collect one with mean_fill")
    return [model.expand(mask) for mask in masks]


def _room(model: HookedModel, memory: int | None) -> int:
    return memory if memory is not None else int(SHARE * free_bytes(execution_device(model.model)))


Answer = Callable[[Recorded, Sequence[Tensor], Wanted, int], tuple[Tensor, ...]]
"""(the last stack, streams at the slots, what is wanted, memory) -> tensors [stream, entry, ...]"""


def _swept(
    model: HookedModel,
    masks: Sequence[Mask],
    reading: Reading,
    fill: Literal["zero"] | Fill,
    memory: int,
    answer: Answer,
) -> tuple[Tensor, ...]:
    """What `answer` makes of every mask's stream: tensors [mask, entry, ...]."""
    plain = not is_hooked(model.model)  # another context's edits are made for whole rows
    stacks = _stacks(model)
    sites = [site for stack in stacks for site in stack]
    levels, _ = fork(masks, [_components(block) for block in sites])
    stages = _recorded(model, stacks, levels, reading, plain)
    end = stages[-1].recorded
    wanted = Wanted.of(reading.positions, reading.targets, end.shape[:2])
    last = end.calls[-1]
    narrows = plain and narrow.can(model.model, last) and wanted.chosen.shape[1] < end.shape[1] / 2
    climb = Climb(
        model.model,
        stages,
        fill,
        memory // 4,
        wanted.chosen if narrows else None,
        torch.device("cpu") if is_offloaded(model.model) else None,
        model.measured,
    )
    found: list[tuple[Tensor, ...]] = []
    whole = wanted.pick(end.resid(end.n_blocks))
    for group in _groups(len(masks), stages, memory // 2):
        levels, ends = fork([masks[i] for i in group], [_components(block) for block in sites])
        streams = {
            node: (wanted.narrowed(resid) if narrows else wanted.pick(resid)).to(whole.device)
            for node, resid in climb.run(levels).items()
        }
        streams[0] = whole
        nodes = sorted(set(ends))
        of_nodes = answer(end, [streams[node] for node in nodes], wanted, memory // 4)
        place = torch.tensor([nodes.index(node) for node in ends])
        found.append(tuple(values[place] for values in of_nodes))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _groups(masks: int, stages: Sequence[Stage], memory: int) -> list[range]:
    """Consecutive masks whose streams fit into memory together, before and behind a block; in a
    decoder, beside what each mask's encoder says to its rows."""
    of_one = said = 0
    for stage in stages:
        recorded, rows = stage.recorded, stage.source_rows
        start = recorded.resid(0)
        if rows is not None:
            before = stages[0].recorded.resid(0)
            said = len(rows) * before[0].nbytes
            of_one = max(of_one, before.nbytes + said)
        of_one = max(of_one, 2 * start.nbytes + said)
    at_once = max(1, memory // of_one)
    return [range(i, min(i + at_once, masks)) for i in range(0, masks, at_once)]


def _stacks(model: HookedModel) -> list[list[list[Site]]]:
    """The sites of every block of every stack, in the order in which they run."""
    found = []
    for stack in stacks_of(model.model, model.anatomy):
        part = Part.of(model.model, stack, model.anatomy)
        place = {id(block): i for i, block in enumerate(part.blocks)}
        blocks: list[list[Site]] = [[] for _ in part.blocks]
        for site in model.sites:
            if (i := place.get(id(model.model.get_submodule(site.block)))) is not None:
                blocks[i].append(site)
        found.append(blocks)
    return found


def _components(sites: Iterable[Site]) -> frozenset[Component]:
    return frozenset(component for site in sites for component in site.components)


def _recorded(
    model: HookedModel,
    stacks: Sequence[Sequence[Sequence[Site]]],
    levels: Sequence[Sequence[Child]],
    reading: Reading,
    plain: bool,
) -> list[Stage]:
    """The whole model's forward on the reading, with what the masks will ask of it."""
    stages: list[Stage] = []
    inputs, rows = dict(reading.inputs), reading.source_rows
    names = stacks_of(model.model, model.anatomy)
    level = iter(levels)
    for name, blocks in zip(names, stacks, strict=True):
        # Where a mask leaves the whole model, the stream and z are wanted; elsewhere neither.
        leaves = [any(c.parent == 0 and c.cut for c in next(level)) for _ in blocks]
        keep = [i for i, here in enumerate(leaves) if here] + [0, len(blocks)]
        watch = [s for here, of in zip(leaves, blocks, strict=True) if here for s in of]
        with watched(model.model, watch if plain else ()) as known:
            recorded = record(
                model.model, inputs, keep=set(keep), stack=name, anatomy=model.anatomy
            )
        source_rows = None
        if name == "decoder" and len(names) > 1:
            source_rows = rows if rows is not None else torch.arange(recorded.batch)
        stages.append(Stage(recorded, blocks, known, source_rows))
        if name == "encoder":
            states = recorded.part.close(recorded.resid(recorded.n_blocks))
            inputs = decoder_inputs(inputs, states, rows)
    return stages
