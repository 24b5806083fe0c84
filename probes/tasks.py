"""Which labelled examples does a task ask, and which of them may a ranking be chosen on?

Tasks are lm-eval's: its YAML files, prompts, few-shot sampling and metrics, run through its own
task objects, so that a prompt here is the prompt its harness would send. `probes/task_names.py`
says how a task is named, `probes/bansal14.py` which ones the paper has.

Selecting heads on the examples one reports is the classic mistake, so every task has two sides:

    test       what lm-eval reports on: the test split, else the validation split
    selection  the training split; else the validation split, unless that is reported; else half
               of the reported split, drawn once for all seeds, and `test` is then the other half

A demonstration is never the query and never a reported example: where a task would draw them from
the reported split, that split is halved too. `Task.source` says which case it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from probes.examples import METRICS, REQUIRED, Example
from probes.task_files import shortened
from probes.task_names import BUILTIN, explained, quiet, task_objects
from probes.task_sides import Doc, Side, drawn, numbered, sides_of

__all__ = ["METRICS", "Example", "Task", "load_tasks"]

Split = Literal["test", "selection"]


@dataclass(frozen=True)
class Task:
    """Labelled examples of one task, of one side, with one number of shots.

    Attributes:
        split: "test" (to report) or "selection" (to choose by); the two never overlap.
        source: the data split behind it, in words.
        metrics: what lm-eval computes for the task.
        delimiter: what stands between a prompt and each of its choices.
    """

    name: str
    shots: int
    split: Split
    source: str
    metrics: tuple[str, ...]
    examples: tuple[Example, ...]
    delimiter: str = ""


def load_tasks(
    names: Sequence[str] = (),
    shots: int = 0,
    *,
    split: Split = "test",
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    leading_space: bool = True,
) -> tuple[Task, ...]:
    """The named tasks (all built-in ones if none is named), in the order of their names.

    Args:
        names: built-in tasks, folders or files of your own, tasks of lm-eval, bansal14.
        shots: demonstrations before every query.
        split: "test" or "selection".
        limit: at most this many examples per task, the first ones, as lm-eval's `--limit`.
        sample: a seed: `limit` then takes whole texts in an order drawn by it, not the first ones.
        seed: of lm-eval's draw of demonstrations (its own command line uses 1234).
        data: a folder with `<task>/<split>.jsonl` for tasks whose data is on the hub: then nothing
            is fetched (probes/task_data.py).
        leading_space: False takes the blank from the choices that are scored, not from the
            demonstrations, where a task's definition puts it there (`Task.delimiter` is then "").
            Bansal et al.'s code did so for the importance of some tasks
            (`probes.bansal14.UNSPACED`), not for accuracy: other tokens, so other scores.

    Raises ValueError for an unknown task, a malformed file (with its line), a task without answers
    to score, data that is neither here nor within reach, more shots than there are demonstrations,
    and `leading_space=False` where no task has such a blank. Data on the hub is fetched only for a
    task of lm-eval named as such.
    """
    if shots < 0:
        raise ValueError(f"{shots} shots asked for: give 0 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} examples asked for: give 1 or more")
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"no data folder {data}: give a folder with <task>/<split>.jsonl")
    found: dict[str, Any] = {}
    for name in names or BUILTIN:
        for own_name, task in task_objects(name, data).items():
            if own_name in found:
                raise ValueError(f"task {own_name} asked for twice: name it once")
            found[own_name] = task
    tasks = tuple(
        _task(name, task, shots, split, limit, sample, seed) for name, task in found.items()
    )
    return tasks if leading_space else _unspaced(tasks)


def _unspaced(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """The tasks with choices that follow their context at once, where a blank stood between."""
    if not any(task.delimiter == " " for task in tasks):
        raise ValueError(
            "choices without their leading space asked for: no choice of "
            f"{', '.join(task.name for task in tasks)} has one that its definition puts there; "
            "leave the option out"
        )
    return tuple(
        replace(
            task,
            delimiter="",
            examples=tuple(
                replace(e, choices=tuple(c.removeprefix(" ") for c in e.choices))
                for e in task.examples
            ),
        )
        if task.delimiter == " "
        else task
        for task in tasks
    )


def _task(
    name: str,
    task: Any,
    shots: int,
    split: Split,
    limit: int | None,
    sample: int | None,
    seed: int,
) -> Task:
    _require_answers(name, task)
    with quiet():
        sides = sides_of(task)
    side = sides.test if split == "test" else sides.selection
    ids = side.ids[:limit] if sample is None else drawn(name, task, side, limit, sample)
    with quiet(), _sampling(name, task, shots, sides.pool, seed) as sampler:
        examples = tuple(
            _example(name, task, sampler, i, dict(side.documents[i]), shots) for i in ids
        )
    if not examples:
        raise ValueError(f"task {name} has no documents on its {split} side ({side.source})")
    # Only a delimiter that lm-eval puts there: an answer to produce may have its own blank.
    delimiter = "" if task.OUTPUT_TYPE == "loglikelihood" else task.config.target_delimiter
    examples = _related(name, task, side, examples)
    return Task(name, shots, split, side.source, tuple(task.aggregation()), examples, delimiter)


def _related(name: str, task: Any, side: Side, examples: Sequence[Example]) -> tuple[Example, ...]:
    """With `group` and `question`, by the fields that the task's metadata names for them."""
    metadata = task.config.metadata or {}
    found = tuple(examples)
    if "dependent_by" in metadata:
        groups = numbered(name, side.documents, metadata["dependent_by"])
        found = tuple(replace(example, group=groups[example.doc_id]) for example in found)
    if "all_right_by" in metadata:
        numbers = numbered(name, side.documents, metadata["all_right_by"])
        # A question that lost an answer, to a limit or to the other side, is no whole question.
        chosen = {example.doc_id for example in found}
        cut = {number for i, number in enumerate(numbers) if i not in chosen}
        found = tuple(
            example
            if numbers[example.doc_id] in cut
            else replace(example, question=numbers[example.doc_id])
            for example in found
        )
    return found


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
    foreign = callable(task.config.process_results) and not set(metrics) & set(REQUIRED)
    if free or foreign:
        raise ValueError(
            f"task {name} is graded by {', '.join(metrics)}: only {', '.join(REQUIRED)} are "
            "computed"
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
