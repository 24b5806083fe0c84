"""Which documents of a task are reported, which are to choose by, and which are shown?

The rule stands in `probes.tasks`; here it meets lm-eval's task objects. Texts that belong together
(`dependent_by` of a task's metadata, the scenes of the built-in tasks) stay together where a part
of a side is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from probes.task_names import BUILTIN, explained

Doc = dict[str, Any]

HALVES = "the halves of a split"
"""Seed of the halves: one for all studies, lest another seed report what this one selected on."""


@dataclass(frozen=True)
class Side:
    """Documents of a data split, some of them, and what they are in words."""

    documents: Any
    ids: Sequence[int]
    source: str


@dataclass(frozen=True)
class Sides:
    test: Side
    selection: Side
    pool: Sequence[Doc] | None
    """Where demonstrations are drawn from, if not where lm-eval would draw them."""


def sides_of(task: Any) -> Sides:
    """Which documents are reported, which are for choosing, which are shown."""
    from lm_eval.api.samplers import ContextSampler, FirstNSampler

    config, shown = task.config, task.fewshot_cfg
    reported = config.test_split if task.has_test_docs() else config.validation_split
    # lm-eval's rule: samples, else the few-shot split, else training, validation, test.
    drawn_from = shown.split
    if drawn_from is None and shown.samples is None:
        drawn_from = config.training_split or config.validation_split or config.test_split
    # A sampler of the task's own knows what it does with the document it is given.
    pooled = drawn_from == reported and type(task.sampler) in (ContextSampler, FirstNSampler)
    test = task.eval_docs
    selection = None
    if config.training_split not in (None, reported):
        selection = (task.training_docs(), str(config.training_split))
    elif config.validation_split not in (None, reported):
        selection = (task.validation_docs(), str(config.validation_split))
    if selection is not None and not pooled:
        documents, words = selection
        return Sides(
            Side(test, range(len(test)), str(reported)),
            Side(documents, range(len(documents)), words),
            None,
        )
    order = Random(HALVES).sample(range(len(test)), len(test))
    first, second = sorted(order[: len(test) // 2]), sorted(order[len(test) // 2 :])
    if selection is None:
        chosen = Side(test, first, f"the other half of {reported}")
    else:
        chosen = Side(selection[0], range(len(selection[0])), selection[1])
    return Sides(
        Side(test, second, f"half of {reported}"),
        chosen,
        [dict(test[i]) for i in first] if pooled else None,
    )


def drawn(name: str, task: Any, side: Side, limit: int | None, sample: int) -> list[int]:
    """`limit` of a side's ids, ascending: whole texts, in random order, until there are enough."""
    metadata = task.config.metadata or {}
    texts: Sequence[Any]
    if name in BUILTIN:
        texts = list(side.documents["scene"])
    elif "dependent_by" in metadata:
        texts = numbered(name, side.documents, metadata["dependent_by"])
    else:
        texts = range(len(side.documents))
    of_text: dict[Any, list[int]] = {}
    for i in side.ids:
        of_text.setdefault(texts[i], []).append(i)
    order = Random(f"{name} {sample}").sample(list(of_text.values()), len(of_text))
    return sorted([i for ids in order for i in ids][:limit])


def numbered(name: str, documents: Any, paths: str) -> list[int]:
    """For every document the number of its values under `paths` ("idx.a idx.b"), by appearance."""
    with explained(f"task {name}: {paths} of its metadata"):
        keys = list(zip(*(_under(documents, path) for path in paths.split()), strict=True))
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def _under(documents: Any, path: str) -> list[Any]:
    field, *keys = path.split(".")
    values = list(documents[field])
    for key in keys:
        values = [value[key] for value in values]
    return values
