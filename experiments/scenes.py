"""Which demonstrations make a question about a file easier, and can be shared by several?

A *scene* is a stretch of one file: up to eight demonstrations in the order of the file, then five
queries that come after them and share them. Sharing is what makes a study cheap: the
demonstrations of five prompts are read once. Where a file is asked about its names, the answer
holds a name that the last five demonstrations hold and the query does not, and so does one wrong
answer at most: without demonstrations the names of this file cannot be known.

The one exception is the mapping, whose key → label pairs are drawn anew for every scene: nothing
but the demonstrations can answer it.

Where it misleads: the five queries of a scene share a file and its style, so their errors are not
independent and a binomial standard error is somewhat too small.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from experiments.corpora import Document
from experiments.questions import Question, is_telling

DEMONSTRATIONS = 8
QUERIES = 5
REACH = 120
"""Rows from the last demonstration to the last query, at most."""

Ask = Callable[[Document, Random], Iterator[list[Question]]]
"""Goes through a file and yields the questions that can be asked at a row."""


@dataclass(frozen=True)
class Scene:
    """Demonstrations and the queries that share them."""

    file: str
    demonstrations: tuple[Question, ...]
    queries: tuple[Question, ...]

    def record(self, random: Random) -> dict[str, object]:
        """As one JSON line. Where answers stand among the choices is drawn here: every place once
        before any place twice, so that no place is right more often than another."""
        places: list[int] = []
        queries = []
        for question in self.queries:
            if not places:
                places = random.sample(range(len(question.wrong) + 1), len(question.wrong) + 1)
            queries.append(_placed(question, places.pop(), random))
        return {
            "file": self.file,
            "demonstrations": [[d.query, d.answer] for d in self.demonstrations],
            "queries": queries,
        }


def _placed(question: Question, place: int, random: Random) -> dict[str, object]:
    choices = random.sample(question.wrong, len(question.wrong))
    choices.insert(place, question.answer)
    found: dict[str, object] = {
        "row": question.row,
        "query": question.query,
        "choices": choices,
        "gold": place,
    }
    if question.answered_by is not None:
        found["answered_by"] = question.answered_by
    return found


def scenes(
    document: Document, ask: Ask, random: Random, *, wrong: int = 3, gap: int = 1
) -> Iterator[Scene]:
    """Scenes of a file, in order, whose questions have `wrong` wrong answers each.

    With three of them, questions are about names (see the module's docstring); with one, any
    question will do. Demonstrations stand at least `gap` rows apart.
    """
    rows = list(ask(document, random))
    start = 0
    while start < len(rows):
        shown: list[Question] = []
        asked: list[Question] = []
        first = last = start
        for at, options in enumerate(rows[start:], start):
            row = options[0].row
            if len(shown) < DEMONSTRATIONS:
                if not shown or row >= shown[-1].row + gap:
                    shown.append(random.choice(options))
                    first = at
                continue
            if len(asked) == QUERIES or row > shown[-1].row + REACH:
                break
            if row >= shown[-1].row + gap:
                asked += _chosen(options, shown, wrong, random)
                last = at
        if len(asked) == QUERIES:
            plain = tuple(replace(question, wrong=()) for question in shown)
            yield Scene(document.path, plain, tuple(asked))
            # The next demonstrations may have been queries here.
            start = max(start + 1, last - (first - start))
        elif len(shown) == DEMONSTRATIONS:
            start = max(start + 1, first - DEMONSTRATIONS // 2)
        else:
            break


def _chosen(
    options: Sequence[Question], shown: Sequence[Question], wrong: int, random: Random
) -> list[Question]:
    """One of the options with its wrong answers drawn, or none if no option fits."""
    text = "\n".join(question.query + question.answer for question in shown)
    known = _names("\n".join(q.query + q.answer for q in shown[-QUERIES:]))
    for question in random.sample(options, len(options)):
        if question.query.strip() in text:
            continue
        if wrong == 1:
            return [replace(question, wrong=(random.choice(question.wrong),))]
        fresh = known - _names(question.query)
        if not fresh & _names(question.answer):
            continue
        related = [answer for answer in question.wrong if fresh & _names(answer)]
        unrelated = [answer for answer in question.wrong if not fresh & _names(answer)]
        drawn = random.sample(related, min(1, len(related)))
        if len(unrelated) >= wrong - len(drawn):
            drawn += random.sample(unrelated, wrong - len(drawn))
            return [replace(question, wrong=tuple(drawn))]
    return []


def _names(text: str) -> set[str]:
    return {word for word in re.findall(r"[A-Za-z_]\w+", text) if is_telling(word)}


def vocabulary(documents: Sequence[Document]) -> list[str]:
    """Short lower-case names that stand at least three times in the documents, sorted."""
    counts: dict[str, int] = {}
    for document in documents:
        for word in re.findall(r"\b[a-z]{3,6}\b", document.text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, n in counts.items() if n >= 3 and not keyword.iskeyword(word))


def mapping(words: Sequence[str], key: str, label: str, random: Random) -> Scene:
    """A mapping invented on the spot: `key` and `label` are the two halves of a line.

    Every query asks for one of the last five pairs; the wrong choices are labels of the other
    four, so that knowing which labels occur does not help.
    """
    drawn: dict[str, str] = {}
    while len(drawn) < 2 * DEMONSTRATIONS:
        word = random.choice(words)
        drawn.setdefault(word[:2], word)
    names = list(drawn.values())
    pairs = [
        Question(0, key.format(name), label.format(value))
        for name, value in zip(names[:DEMONSTRATIONS], names[DEMONSTRATIONS:], strict=True)
    ]
    first = DEMONSTRATIONS - QUERIES
    queries = []
    for i in range(first, DEMONSTRATIONS):
        others = [pair.answer for j, pair in enumerate(pairs) if j >= first and j != i]
        wrong = tuple(random.sample(others, 3))
        queries.append(Question(0, pairs[i].query, pairs[i].answer, wrong, answered_by=i))
    random.shuffle(queries)
    return Scene("", tuple(pairs), tuple(queries))
