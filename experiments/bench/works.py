"""What has to be computed, by us and by everybody else, on exactly which inputs?

    sweep            leave-one-out loss over every position of rows of random tokens
    sweep-answers    leave-one-out loss of the last few tokens of such rows
    choices          leave-one-out nats of every choice; demonstrations drawn per example
    choices-shared   the same; several examples share their demonstrations
    importance       gradient importance of every head for the last few tokens of rows
    induction        four attention scores of every head on rows that repeat themselves
    reset-…          a training step of students of reset layers (`retraining.py`)
    hybrid-…         a selective scan, a training step of a small hybrid (`hybrids.py`)
    forward          the loss of one plain forward (only where there is no peer)
    sweep-layer      leave-one-out over the heads of the middle layer (likewise)

A work is values of a table, in nats: [1 + component, row or choice], whole model first, for sweeps
and choices; [row, head] for importance; for induction shares of attention: [score, row, head];
[student] for resets; `hybrids.py` says it for hybrids.
Where a full sweep takes the peers too long, both sides measure the same subset of components,
spread evenly over layers, heads and FFNs in their true proportion. This makes our ratio smaller,
not larger: what we do once weighs more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from ablate.components import Component, Head
from experiments.bench.arithmetic import (
    Sequences,
    Slots,
    Weights,
    fewest_forward,
    fewest_gradients,
    fewest_leave_one_out,
    forward,
    scans,
)
from probes.tasks import Example, Task
from probes.tokenising import encode_pairs

if TYPE_CHECKING:
    from ablate import HookedModel

Kind = Literal["sweep", "choices", "importance", "induction", "reset", "hybrid", "forward"]
Name = Literal[
    "sweep",
    "sweep-answers",
    "choices",
    "choices-shared",
    "importance",
    "induction",
    "reset-lm",
    "reset-hidden",
    "reset-all-train",
    "reset-seeds",
    "hybrid-scan",
    "hybrid-step",
    "forward",
    "sweep-layer",
]
KINDS: dict[Name, Kind] = {
    "sweep": "sweep",
    "sweep-answers": "sweep",
    "choices": "choices",
    "choices-shared": "choices",
    "importance": "importance",
    "induction": "induction",
    "reset-lm": "reset",
    "reset-hidden": "reset",
    "reset-all-train": "reset",
    "reset-seeds": "reset",
    "hybrid-scan": "hybrid",
    "hybrid-step": "hybrid",
    "forward": "forward",
    "sweep-layer": "sweep",
}
COMPARED: dict[str, tuple[Name, ...]] = {
    "sweep": ("sweep", "sweep-answers"),
    "choices": ("choices", "choices-shared"),
    "importance": ("importance",),
    "induction": ("induction",),
    "reset": ("reset-lm", "reset-hidden", "reset-all-train", "reset-seeds"),
    "hybrid": ("hybrid-scan", "hybrid-step"),
}
"""The works that a word of the command line asks for."""
ALONE: dict[str, tuple[Name, ...]] = {
    "sweep": ("forward", "sweep-layer"),
    "choices": (),
    "importance": ("importance",),
    "induction": ("induction",),
    "reset": (),
    "hybrid": (),
}
APART = ("reset", "hybrid")
"""Words with models of their own, measured when they are named."""
"""The same for a model that is measured without a peer."""
SHOTS = 5
COPIES = 4
"""Of the block that a row of the induction work repeats."""


@dataclass(frozen=True, eq=False)
class Work:
    """One work on one model: what a contender is handed.

    Attributes:
        rows: token ids, for all but choices; a BOS opens each row.
        scored: how many of the last tokens of each row are read.
        examples: labelled questions, for choices.
        components: what is removed, one at a time; for importance and induction, the heads.
        students: (layer, seed) of what is reset and retrained.
        sizes: width and layers of a hybrid.
    """

    name: Name
    rows: Int[np.ndarray, "row pos"]
    scored: int
    examples: tuple[Example, ...]
    components: tuple[Component, ...]
    students: tuple[tuple[int, int], ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        """Which functions compute it."""
        return KINDS[self.name]

    @property
    def label(self) -> str:
        """Its name in tables: an induction work is one of several lengths, a scan too."""
        if self.kind == "induction" or self.name == "hybrid-scan":
            return f"{self.name}-{self.rows.shape[1]}"
        return self.name


@dataclass(frozen=True)
class Cost:
    """What a work costs, in floating-point operations, and how much of it there is."""

    fewest: int
    peer: int
    """Of any peer: one forward a component and request, without padding."""
    grouped: int
    """Of lm-eval's model, which reads requests that differ in their last token once."""
    tokens: int
    """Tokens of the inputs, once; for every student, of resets."""
    of_peers: Mapping[str, int] = field(default_factory=dict)
    """Of peers that do not all do the same."""
    head_blocks: float = math.nan
    """h: the head's forward in blocks' forwards, for resets."""


def requests(model: HookedModel, examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """(context and continuation ids, ids of the continuation) of every choice, in order."""
    pairs = [pair for example in examples for pair in example.pairs]
    encoded = encode_pairs(model.tokenizer, pairs)
    return [([*head, *tail], len(tail)) for head, tail in encoded]


def cost(model: HookedModel, work: Work) -> Cost:
    """Operations of `work`; only the shapes of `model` are looked at."""
    weights = Weights.of(model)
    if work.kind == "induction":
        fewest, peer = scans(weights, *work.rows.shape)
        return Cost(fewest, peer, peer, work.rows.size)
    if work.kind == "reset":
        from experiments.bench.retraining import head_blocks, operations

        once = operations(weights, work)
        h, tokens = head_blocks(weights, work), work.rows.size * len(work.students)
        return Cost(once["ours"], max(once.values()), 0, tokens, once, h)
    sequences = _sequences(model, work)
    slots = Slots.of(sequences)
    tokens = sum(len(ids) for ids, _ in sequences)
    once = forwards(weights, model, work)
    if work.kind == "choices":
        distinct = {tuple(ids[:-1]) for ids, _ in sequences}
        grouped = sum(forward(weights, 1, len(ids)) for ids in distinct)
    else:
        grouped = once
    if work.kind == "forward":
        return Cost(once, once, once, tokens)
    if work.kind == "importance":
        return Cost(fewest_gradients(weights, slots), 3 * once, 3 * once, tokens)
    times = 1 + len(work.components)
    fewest = fewest_leave_one_out(weights, slots, work.components)
    assert fewest_forward(weights, slots) <= once
    return Cost(fewest, times * once, times * grouped, tokens)


def forwards(weights: Weights, model: HookedModel, work: Work) -> int:
    """Operations of the plain forwards over all inputs, with logits at every position."""
    if work.kind == "choices":
        return sum(forward(weights, 1, len(ids) - 1) for ids, _ in requests(model, work.examples))
    return forward(weights, *work.rows.shape)


def spread(model: HookedModel, count: int) -> tuple[Component, ...]:
    """`count` of the model's components, evenly over layers, heads and FFNs in proportion."""
    everything = model.components
    if count >= len(everything):
        return everything
    others = [c for c in everything if not isinstance(c, Head)]
    share = max(1, round(count * len(others) / len(everything))) if others else 0
    chosen = {*_even(model.heads, count - share), *_even(others, share)}
    return tuple(c for c in everything if c in chosen)


def _even(items: Sequence[Component], count: int) -> list[Component]:
    """`count` items in the middles of as many equal stretches (rounded down: the lower layer)."""
    stretch = len(items) / count if count else 0.0
    return [items[int((i + 0.5) * stretch - 0.5)] for i in range(count)]


def token_rows(model: HookedModel, rows: int, length: int, seed: int) -> Int[np.ndarray, "row pos"]:
    """Random ordinary tokens behind a BOS. ValueError for rows longer than the context."""
    config: Any = model.model.config
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and length > room:
        raise ValueError(f"--length {length}: {model.name} reads {room} tokens; give fewer")
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, config.vocab_size, (rows, length))
    ids[:, 0] = _bos(config)
    return ids


def repeated_rows(
    model: HookedModel, rows: int, length: int, seed: int
) -> Int[np.ndarray, "row pos"]:
    """COPIES of a block of distinct ordinary tokens behind a BOS, cut to `length`.

    Raises ValueError for blocks larger than the vocabulary.
    """
    config: Any = model.model.config
    block = -(-(length - 1) // COPIES)
    if block > config.vocab_size - 3:
        raise ValueError(
            f"--induction-lengths {length}: {model.name} has {config.vocab_size} tokens, too few "
            f"for {block} distinct ones; give less"
        )
    generator = np.random.default_rng(seed)
    ids = np.empty((rows, length), int)
    for row in ids:
        drawn = 3 + generator.choice(config.vocab_size - 3, block, replace=False)
        row[0], row[1:] = _bos(config), np.tile(drawn, COPIES)[: length - 1]
    return ids


def _bos(config: Any) -> int:
    return config.bos_token_id if isinstance(config.bos_token_id, int) else 0


def questions(tasks: Sequence[str], count: int, seed: int, *, shared: bool) -> tuple[Example, ...]:
    """Of each task, `count` examples that share no demonstrations, or whole groups of as many.

    Raises ValueError where a task has not enough, or no groups at all.
    """
    from probes.tasks import load_tasks

    return tuple(
        example
        for task in load_tasks(tasks, SHOTS, seed=seed)
        for example in _grouped(task, count, shared)
    )


def _grouped(task: Task, count: int, shared: bool) -> list[Example]:
    groups: dict[int, list[Example]] = {}
    for example in task.examples:
        groups.setdefault(example.group, []).append(example)
    if shared and all(len(group) == 1 for group in groups.values()):
        raise ValueError(
            f"--tasks {task.name}: none of its examples share demonstrations; "
            "give pair_mapping or call_mapping"
        )
    chosen: list[Example] = []
    for group in groups.values():
        chosen += group if shared else group[:1]
        if len(chosen) >= count:
            return chosen
    raise ValueError(f"--limit {count}: {task.name} has {len(chosen)} such examples; give fewer")


def _sequences(model: HookedModel, work: Work) -> Sequences:
    if work.kind == "choices":
        return requests(model, work.examples)
    return [(row.tolist(), work.scored) for row in work.rows]
