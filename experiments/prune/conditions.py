"""On which examples is a pruning run chosen, and on which is it reported?

A condition is a task at one number of shots with the demonstrations of one seed. It has a selection
side, drawn by the seed, and a reporting side, which all seeds share but for their demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ablate.components import FFN, Component, Head, Mixer
from experiments.prune.measured import Key
from probes.bansal14 import UNSPACED
from probes.readings import reading_of
from probes.scoring import prepare
from probes.task_names import BUILTIN
from probes.tasks import Task, load_tasks

if TYPE_CHECKING:
    from ablate import HookedModel
    from ablate.sweep import Reading
    from experiments.prune.study import Pruning
    from probes.examples import Example
    from probes.scoring import Prepared
    from probes.tasks import Split

BOS = {"tokenizer": None, "always": True, "never": False}
KINDS: dict[str, type] = {"heads": Head, "ffns": FFN, "mixers": Mixer}


@dataclass(frozen=True, eq=False)
class Condition:
    """One task at one number of shots, with examples to choose by and others to report on.

    Attributes:
        selection: with all their choices.
        answers: the same examples with their right answers only, an example a row: for gradients.
        right: the same again, with what they share read once: for many masks.
        test: the reporting examples; one object for all seeds that ask the same prompts.
        unseen: whether the task stays out of every aggregate.
    """

    key: Key
    selection: Prepared
    answers: Prepared
    right: Prepared
    test: Prepared
    unseen: bool

    @property
    def name(self) -> str:
        """What its shards are called."""
        return "-".join(map(str, self.key))

    @property
    def chance(self) -> float:
        """Expected accuracy of a blind guess; 0 where the answer is to be produced, not chosen."""
        right = [len(e.golds or (e.gold,)) / len(e.choices) for e in self.test.examples]
        return sum(share for share in right if share < 1) / len(right)

    @property
    def truncated(self) -> int:
        """Prompts that lost their beginning."""
        return self.selection.n_truncated + self.test.n_truncated

    def readings(self, model: HookedModel) -> list[Reading]:
        """The right answers, as forwards and what is read of them."""
        answers = self.answers
        return [reading_of(model, b, answers.layout, shared=False) for b in answers.batches]

    @property
    def read(self) -> list[Example]:
        """The example of each row of the readings, in their order."""
        rows = []
        for batch in self.answers.batches:
            row = (batch.slots[batch.entry_slot] // batch.ids.shape[1]).tolist()
            owner = dict(zip(row, batch.entry_owner.tolist(), strict=True))
            rows += [self.answers.examples[owner[i]] for i in range(len(batch.ids))]
        return rows


def units_of(study: Pruning, model: HookedModel) -> dict[str, tuple[Component, ...]]:
    """The components of every unit asked for; ValueError for one that the model has not."""
    found: dict[str, tuple[Component, ...]] = {
        unit: tuple(c for c in model.components if isinstance(c, kind))
        for unit, kind in KINDS.items()
    }
    found["groups"] = tuple(model.kv_groups)
    there = [unit for unit, components in found.items() if components]
    for unit in study.units:
        if not found[unit]:
            raise ValueError(f"{model.name} has no {unit}: it has {', '.join(there)}")
    asked: Sequence[str] = study.units or [unit for unit in there if unit != "groups"]
    return {unit: found[unit] for unit in asked}


def conditions_of(study: Pruning, model: HookedModel) -> list[Condition]:
    """Every condition, tokenised; ValueError for what cannot be asked of this model."""
    found = []
    tests: dict[tuple[object, ...], Prepared] = {}
    for shots in study.shots:
        for seed in study.all_seeds:
            chosen, shown = (_tasks(study, shots, seed, split) for split in ("selection", "test"))
            for (selection, unseen), (test, _) in zip(chosen, shown, strict=True):
                prompts = (test.name, shots, *((e.contexts or e.context) for e in test.examples))
                if prompts not in tests:
                    tests[prompts] = _prepared(study, model, test.examples)
                found.append(
                    Condition(
                        Key(test.name, shots, seed),
                        _prepared(study, model, selection.examples),
                        _answers(study, model, selection, seed),
                        _prepared(study, model, [_right(e) for e in selection.examples]),
                        tests[prompts],
                        unseen,
                    )
                )
    return found


def _tasks(study: Pruning, shots: int, seed: int, split: Split) -> list[tuple[Task, bool]]:
    """The tasks of one side, each with whether it is unseen."""
    found: list[tuple[Task, bool]] = []
    for names, unseen in ((study.tasks or BUILTIN, False), (study.unseen, True)):
        if names:
            found += [(task, unseen) for task in _loaded(study, names, shots, seed, split)]
    names = [task.name for task, _ in found]
    for task, _ in found:
        if names.count(task.name) > 1:
            raise ValueError(f"task {task.name} in --tasks and in --unseen: name it in one of them")
        limit = study.limit_of(split)
        if limit is not None and not study.fewer and len(task.examples) < limit:
            side = "to choose by" if split == "selection" else "to report on"
            option = "limit" if split == "selection" else "report-limit"
            raise ValueError(
                f"--{option} {limit} asked for: task {task.name} has {len(task.examples)} "
                f"examples {side} ({task.source}); give a lower limit, or --fewer to take what "
                "there is"
            )
    return found


def _loaded(
    study: Pruning,
    names: Sequence[str],
    shots: int,
    seed: int,
    split: Split,
    *,
    leading_space: bool = True,
) -> Iterator[Task]:
    yield from load_tasks(
        names,
        shots,
        split=split,
        limit=study.limit_of(split),
        sample=seed if split == "selection" else None,
        seed=seed,
        data=study.data,
        leading_space=leading_space and study.leading_space,
    )


def _answers(study: Pruning, model: HookedModel, task: Task, seed: int) -> Prepared:
    """Right answers alone; without their blank where the paper's code left it out."""
    if study.convention == "reference" and study.leading_space and task.name in UNSPACED:
        (task,) = _loaded(study, [task.name], task.shots, seed, "selection", leading_space=False)
    return _prepared(study, model, task.examples, answers_only=True)


def _right(example: Example) -> Example:
    """The question with its right answer as the only choice."""
    context, choice = example.pairs[example.gold]
    return replace(
        example,
        context=context,
        choices=(choice,),
        gold=0,
        contexts=(),
        lengths=(),
        golds=(),
        grade=None,
        question=None,
    )


def _prepared(
    study: Pruning,
    model: HookedModel,
    examples: Sequence[Example],
    *,
    answers_only: bool = False,
) -> Prepared:
    # A row is an example where gradients are taken or donors stand in: no two share a beginning.
    by_row = answers_only or study.fill == "resample"
    config: Any = model.model.config
    return prepare(
        model,
        examples,
        answers_only=answers_only,
        bos=BOS[study.bos],
        strict=study.overlong == "refuse",
        layout="rows" if by_row and not config.is_encoder_decoder else None,
    )
