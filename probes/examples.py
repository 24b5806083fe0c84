"""Which answers are right, and by which rule?

One labelled question is an `Example`; its `marks` follow from the nats ℓ_c of its choices:

    acc          arg-max ℓ_c is a right choice
    acc_norm     arg-max ℓ_c / characters of c is
    exact_match  every token of a right choice is the most likely one
    em, f1       ReCoRD's: the chosen entity against all right ones, as texts and as words
    acc_all      MultiRC's: all examples of one question are right (`all_right`)

A task with a rule of its own (`Example.grade`) has the metrics that the rule gives. Where it
misleads: `acc` of MultiRC counts answers, while the SuperGLUE papers, and Bansal et al., report
`acc_all`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

METRICS = ("acc", "acc_norm", "exact_match", "em", "f1", "acc_all")
"""What is computed of each example; of a task with rules of its own, those it has."""
REQUIRED = METRICS[:3]
"""One of these every task must have: studies compare by them."""


@dataclass(frozen=True)
class Example:
    """One labelled question: which of `choices` follows `context`?

    Attributes:
        context: the whole prompt, demonstrations included.
        choices: continuations as they are appended to it; a single one is to be produced greedily.
        gold: the number of the right one.
        doc_id: the document's number in its data split.
        task, shots: where the example comes from.
        group: examples of one group share demonstrations or a passage: their errors are not
            independent.
        contexts: one context per choice, for tasks that vary the context and keep the
            continuation (Winogrande); empty where `context` is shared.
        lengths: what `acc_norm` divides by; empty: the characters of each choice.
        golds: every right choice, for tasks that have several; empty: `gold` only.
        grade: the task's own rule, from one (nats, is-arg-max) per choice; None: arg-max.
        question: the question that this is one of the answers to; None: it is a whole question
            itself, or a limit cut some answers off.
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
    question: int | None = None

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
            # lm-eval hands some metrics on as parts, to be put together over all documents.
            parts = (tuple, list)
            return best, {
                metric: float(own[metric])
                for metric in METRICS
                if metric in own and not isinstance(own[metric], parts)
            }
        if len(golds) == len(self.choices):
            return (best if exact else -1), {"acc": exact, "exact_match": exact}
        lengths = self.lengths or tuple(len(choice) for choice in self.choices)
        normed = int((nats / np.asarray(lengths)).argmax())
        acc, acc_norm = float(best in golds), float(normed in golds)
        return best, {"acc": acc, "acc_norm": acc_norm, "exact_match": exact}


def all_right(
    examples: Sequence[Example], acc: Float[np.ndarray, "example"]
) -> Float[np.ndarray, "example"]:
    """1 or 0 at the first example of every question, by whether all of its examples are right.

    nan elsewhere, so that a mean over examples is the mean over questions.
    """
    questions: dict[tuple[str, int, int], list[int]] = {}
    for i, example in enumerate(examples):
        if example.question is not None:
            key = (example.task, example.shots, example.question)
            questions.setdefault(key, []).append(i)
    found = np.full(len(examples), np.nan)
    for ids in questions.values():
        found[ids[0]] = acc[ids].min()
    return found
