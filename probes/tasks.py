"""Which labelled examples does a task ask, and which of them may a ranking be chosen on?

Tasks are lm-eval's: its YAML files, prompts, few-shot sampling and metrics, run through its own
task objects, so that a prompt here is the prompt its harness would send. `probes/task_names.py`
says how a task is named.

Selecting heads on the examples one reports is the classic mistake, so every task has two sides:

    test       what lm-eval reports on: the test split, else the validation split
    selection  the training split; else the validation split, unless that is reported; else half
               of the reported split, drawn once for all seeds, and `test` is then the other half

A demonstration is never the query and never a reported example: where a task would draw them from
the reported split, that split is halved too. `Task.source` says which case it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Literal

import numpy as np

from probes.task_files import shortened
from probes.task_names import BUILTIN, explained, quiet, task_objects

METRICS = ("acc", "acc_norm", "exact_match")
"""What is computed of each example; of a task with rules of its own, those it has."""
HALVES = "the halves of a split"
"""Seed of the halves: one for all studies, lest another seed report what this one selected on."""

Split = Literal["test", "selection"]
Doc = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One labelled question: which of `choices` follows `context`?

    Attributes:
        context: the whole prompt, demonstrations included.
        choices: continuations as they are appended to it; a single one is to be produced greedily.
        gold: the number of the right one.
        doc_id: the document's number in its data split.
        task, shots: where the example comes from.
        group: examples of one group share demonstrations, so their errors are not independent.
        contexts: one context per choice, for tasks that vary the context and keep the
            continuation (Winogrande); empty where `context` is shared.
        lengths: what `acc_norm` divides by; empty: the characters of each choice.
        golds: every right choice, for tasks that have several; empty: `gold` only.
        grade: the task's own rule, from one (nats, is-arg-max) per choice; None: arg-max.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    doc_id: int = 0
    task: str = ""
    shots: int = 0
    group: int = 0
    contexts: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    golds: tuple[int, ...] = ()
    grade: Callable[[Sequence[tuple[float, bool]]], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for gold in (self.gold, *self.golds):
            if not 0 <= gold < len(self.choices):
                raise ValueError(
                    f"{self.task or 'example'} document {self.doc_id}: answer {gold} of "
                    f"{len(self.choices)} choices; they count from 0"
                )

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(context, continuation) of every choice."""
        contexts = self.contexts or (self.context,) * len(self.choices)
        return tuple(zip(contexts, self.choices, strict=True))

    def marks(self, nats: np.ndarray, greedy: np.ndarray) -> tuple[int, Mapping[str, float]]:
        """(the choice taken, or −1 when no right answer was produced; metric → 0 or 1)."""
        golds = self.golds or (self.gold,)
        exact = float(any(greedy[gold] for gold in golds))
        best = int(nats.argmax())
        if self.grade is not None:
            pairs = list(zip(nats.tolist(), greedy.tolist(), strict=True))
            own = self.grade(pairs)
            return best, {metric: float(own[metric]) for metric in METRICS if metric in own}
        if len(golds) == len(self.choices):
            return (best if exact else -1), {"acc": exact, "exact_match": exact}
        lengths = self.lengths or tuple(len(choice) for choice in self.choices)
        normed = int((nats / np.asarray(lengths)).argmax())
        acc, acc_norm = float(best in golds), float(normed in golds)
        return best, {"acc": acc, "acc_norm": acc_norm, "exact_match": exact}


@dataclass(frozen=True)
class Task:
    """Labelled examples of one task, of one side, with one number of shots.

    Attributes:
        split: "test" (to report) or "selection" (to choose by); the two never overlap.
        source: the data split behind it, in words.
        metrics: what lm-eval computes for the task.
    """

    name: str
    shots: int
    split: Split
    source: str
    metrics: tuple[str, ...]
    examples: tuple[Example, ...]


def load_tasks(
    names: Sequence[str] = (),
    shots: int = 0,
    *,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Task, ...]:
    """The named tasks (all built-in ones if none is named), in the order of their names.

    Args:
        names: built-in tasks, folders or files of your own, tasks of lm-eval.
        shots: demonstrations before every query.
        split: "test" or "selection".
        limit: at most this many examples per task, the first ones, as lm-eval's `--limit`.
        seed: of lm-eval's draw of demonstrations (its own command line uses 1234).

    Raises ValueError for an unknown task, a malformed file (with its line), a task without answers
    to score, and more shots than there are demonstrations. Data on the hub is fetched only for a
    task of lm-eval named as such.
    """
    if shots < 0:
        raise ValueError(f"{shots} shots asked for: give 0 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} examples asked for: give 1 or more")
    found: dict[str, Any] = {}
    for name in names or BUILTIN:
        for own_name, task in task_objects(name).items():
            if own_name in found:
                raise ValueError(f"task {own_name} asked for twice: name it once")
            found[own_name] = task
    return tuple(_task(name, task, shots, split, limit, seed) for name, task in found.items())


def _task(name: str, task: Any, shots: int, split: Split, limit: int | None, seed: int) -> Task:
    _require_answers(name, task)
    sides = _sides(task)
    side = sides.test if split == "test" else sides.selection
    with quiet(), _sampling(name, task, shots, sides.pool, seed) as sampler:
        examples = tuple(
            _example(name, task, sampler, i, dict(side.documents[i]), shots)
            for i in side.ids[:limit]
        )
    if not examples:
        raise ValueError(f"task {name} has no documents on its {split} side ({side.source})")
    return Task(name, shots, split, side.source, tuple(task.aggregation()), examples)


def _require_answers(name: str, task: Any) -> None:
    """Refuse what has no labelled answer whose likelihood could be scored."""
    from lm_eval.api.task import ConfigurableTask

    kinds = ("multiple_choice", "loglikelihood", "generate_until")
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE not in kinds:
        raise ValueError(
            f"task {name} is of type {task.OUTPUT_TYPE}: answers are scored for {', '.join(kinds)}"
        )
    if task.config.doc_to_image or task.config.doc_to_audio:
        raise ValueError(f"task {name} shows images or sound: only text is scored")
    metrics = tuple(task.aggregation())
    free = task.OUTPUT_TYPE == "generate_until" and "exact_match" not in metrics
    foreign = callable(task.config.process_results) and not set(metrics) & set(METRICS)
    if free or foreign:
        raise ValueError(
            f"task {name} is graded by {', '.join(metrics)}: only {', '.join(METRICS)} are computed"
        )


@dataclass(frozen=True)
class _Side:
    """Documents of a data split, some of them, and what they are in words."""

    documents: Any
    ids: Sequence[int]
    source: str


@dataclass(frozen=True)
class _Sides:
    test: _Side
    selection: _Side
    pool: Sequence[Doc] | None
    """Where demonstrations are drawn from, if not where lm-eval would draw them."""


def _sides(task: Any) -> _Sides:
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
        return _Sides(
            _Side(test, range(len(test)), str(reported)),
            _Side(documents, range(len(documents)), words),
            None,
        )
    order = Random(HALVES).sample(range(len(test)), len(test))
    first, second = sorted(order[: len(test) // 2]), sorted(order[len(test) // 2 :])
    if selection is None:
        chosen = _Side(test, first, f"the other half of {reported}")
    else:
        chosen = _Side(selection[0], range(len(selection[0])), selection[1])
    return _Sides(
        _Side(test, second, f"half of {reported}"),
        chosen,
        [dict(test[i]) for i in first] if pooled else None,
    )


class _Sampler:
    """Draws through lm-eval's sampler, and draws again when that hands out the query itself.

    Refuses a demonstration without a right answer, which lm-eval would show with none, or with the
    last choice where its number is −1.
    """

    def __init__(self, name: str, task: Any, inner: Any) -> None:
        self.name = name
        self.task = task
        self.inner = inner
        self.query: Doc | None = None

    def sample(self, n: int, eval_doc: Doc | None = None, **kwargs: Any) -> list[Doc]:
        drawn = list(self.inner.sample(n, eval_doc=eval_doc, **kwargs))
        if self.query in drawn:
            drawn = list(self.inner.sample(n, eval_doc=self.query, **kwargs))
        for doc in drawn:
            self._require_answer(doc)
        return drawn

    def _require_answer(self, doc: Doc) -> None:
        task, shown = self.task, self.task.fewshot_cfg
        if shown.doc_to_target is None or task.multiple_input:
            return
        answer = task.doc_to_target(doc, shown.doc_to_target)
        choices = task.doc_to_choice(doc, shown.doc_to_choice) if shown.doc_to_choice else ()
        number = isinstance(answer, int) and bool(shown.doc_to_choice)
        if answer is None or (number and not 0 <= answer < len(choices)):
            raise ValueError(
                f"task {self.name}: the answer {answer!r} of a demonstration is none of its "
                f"{len(choices)} choices: correct doc_to_target of {shortened(repr(doc))}"
            )


@contextmanager
def _sampling(
    name: str, task: Any, shots: int, pool: Sequence[Doc] | None, seed: int
) -> Iterator[_Sampler]:
    """The task with a freshly seeded sampler, over `pool` if one is given; undone on exit."""
    own = task.sampler
    inner = own.set_rnd(seed) if pool is None else type(own)(list(pool), rnd=seed)
    size = len(inner.df)
    if shots and shots >= size:
        raise ValueError(
            f"{shots} shots asked for: task {name} has {size} demonstrations to draw from, the "
            "query perhaps among them; ask for fewer shots"
        )
    task.sampler = _Sampler(name, task, inner)
    try:
        yield task.sampler
    finally:
        task.sampler = own


def _example(name: str, task: Any, sampler: _Sampler, doc_id: int, doc: Doc, shots: int) -> Example:
    sampler.query = doc
    where = f"task {name}, document {doc_id}"
    answers: Any = None
    requests: Any = None
    options: Any = None
    with explained(where):
        prompt = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        if task.OUTPUT_TYPE == "generate_until":
            answers = _answers(task, doc)
        else:
            requests = task.construct_requests(doc, prompt, metadata=(name, doc_id, 1))
        if task.OUTPUT_TYPE == "multiple_choice":
            options = task.doc_to_choice(doc)
    common: dict[str, Any] = {
        "doc_id": doc_id,
        "task": name,
        "shots": shots,
        "group": doc["scene"] if name in BUILTIN else doc_id,
    }
    if task.OUTPUT_TYPE == "generate_until":
        choices = tuple(f"{task.config.target_delimiter}{answer}" for answer in answers)
        return Example(prompt, choices, 0, golds=tuple(range(len(choices))), **common)
    if task.OUTPUT_TYPE == "loglikelihood":
        return Example(prompt, (requests.args[1],), 0, **common)
    if not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
        raise ValueError(
            f"{where}: its choices are {options!r}; give a list of texts (doc_to_choice)"
        )
    pairs = [request.args[:2] for request in requests[: len(options)]]
    golds = _golds(name, task, doc_id, doc, options)
    shared = len({context for context, _ in pairs}) == 1
    own_rule = task.config.process_results
    grade: Any = partial(own_rule, doc) if callable(own_rule) else None
    return Example(
        pairs[golds[0]][0],
        tuple(continuation for _, continuation in pairs),
        golds[0],
        contexts=() if shared else tuple(context for context, _ in pairs),
        lengths=tuple(max(1, len(option)) for option in options),
        golds=golds if len(golds) > 1 else (),
        grade=grade,
        **common,
    )


def _answers(task: Any, doc: Doc) -> list[str]:
    """Every answer that a generation task accepts."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    return [str(answer) for answer in target] if isinstance(target, list) else [str(target)]


def _golds(name: str, task: Any, doc_id: int, doc: Doc, options: list[str]) -> tuple[int, ...]:
    """The numbers of the right choices, which templates give as text or as numbers."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    found = []
    for one in gold if isinstance(gold, list) else [gold]:
        number = options.index(one) if isinstance(one, str) and one in options else one
        if not isinstance(number, int) or not 0 <= number < len(options):
            raise ValueError(
                f"task {name}, document {doc_id}: the answer {one!r} is none of its "
                f"{len(options)} choices: correct doc_to_target"
            )
        found.append(number)
    return tuple(found)
