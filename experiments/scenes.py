"""What can be asked about a source file that the file's own earlier lines help to answer?

A *scene* is a stretch of one file: up to eight demonstrations in the order of the file, then five
queries that come after them and share them. Sharing is what makes a study cheap: the
demonstrations of five prompts are read once. Choices that compete with the answer come from the
same file, so that a word's frequency in Python at large does not give the answer away.

The one exception is the mapping, whose key → label pairs are drawn anew for every scene: nothing
but the demonstrations can answer it.

Where it misleads: five queries of a scene share a file and its style, so their errors are not
independent and a binomial standard error is somewhat too small.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from experiments.corpora import Document

DEMONSTRATIONS = 8
QUERIES = 5
SCOPE_ROWS = 60
"""A name is in scope when it stands in this many rows before the query."""


@dataclass(frozen=True)
class Question:
    """A query, its answer and the wrong choices, at a row of a file (counted from 1)."""

    row: int
    query: str
    answer: str
    wrong: tuple[str, ...] = ()
    answered_by: int | None = None


@dataclass(frozen=True)
class Scene:
    """Demonstrations and the queries that share them."""

    file: str
    demonstrations: tuple[Question, ...]
    queries: tuple[Question, ...]

    def record(self, random: Random) -> dict[str, object]:
        """As one JSON line; the place of the answer among the choices is drawn here."""
        return {
            "file": self.file,
            "demonstrations": [[d.query, d.answer] for d in self.demonstrations],
            "queries": [_shuffled(question, random) for question in self.queries],
        }


def _shuffled(question: Question, random: Random) -> dict[str, object]:
    choices = [question.answer, *question.wrong]
    random.shuffle(choices)
    found: dict[str, object] = {
        "row": question.row,
        "query": question.query,
        "choices": choices,
        "gold": choices.index(question.answer),
    }
    if question.answered_by is not None:
        found["answered_by"] = question.answered_by
    return found


@dataclass(frozen=True)
class Line:
    """A statement that fills one physical line: its row, its raw text, its tokens."""

    row: int
    text: str
    tokens: tuple[tokenize.TokenInfo, ...]

    @property
    def indent(self) -> int:
        """Columns before the first character."""
        return len(self.text) - len(self.text.lstrip())


def code_lines(text: str) -> dict[int, Line]:
    """Row → line, for every statement on a row of its own that is more than a string.

    Empty when the file is no valid Python (some test files are broken on purpose).
    """
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return {}
    raw = text.splitlines()
    lines: dict[int, Line] = {}
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            continue
        if token.type != tokenize.NEWLINE:
            statement.append(token)
            continue
        row = statement[0].start[0] if statement else 0
        one_row = statement and statement[-1].end[0] == row and row <= len(raw)
        if one_row and any(t.type != tokenize.STRING for t in statement):
            lines[row] = Line(row, raw[row - 1].rstrip(), tuple(statement))
        statement = []
    return lines


def scenes(
    document: Document, ask: Callable[[Document, Random], Iterator[Question]], random: Random
) -> Iterator[Scene]:
    """Cut the questions of a file, in order, into scenes whose demonstrations come first.

    A scene with a query that stands in one of its demonstrations is left out.
    """
    window: deque[Question] = deque(maxlen=DEMONSTRATIONS + QUERIES)
    fresh = -DEMONSTRATIONS
    for question in ask(document, random):
        window.append(question)
        fresh += 1
        if fresh < QUERIES:
            continue
        fresh = 0
        shown, asked = tuple(window)[:DEMONSTRATIONS], tuple(window)[DEMONSTRATIONS:]
        text = "\n".join(d.query + d.answer for d in shown)
        if not any(question.query.strip() in text for question in asked):
            yield Scene(document.path, shown, asked)


def continuations(document: Document, random: Random) -> Iterator[Question]:
    """Two lines of code; which line comes next? The wrong ones are as deeply indented."""
    lines = code_lines(document.text)
    by_indent: dict[int, list[Line]] = {}
    for line in lines.values():
        by_indent.setdefault(line.indent, []).append(line)
    last = 0
    for row, line in lines.items():
        before = [lines[r] for r in (row - 2, row - 1) if r in lines]
        query = "\n".join(previous.text for previous in before)
        if len(before) < 2 or row - 2 <= last or len(query) > 110:
            continue
        if not 12 <= len(line.text.strip()) <= 50:
            continue
        near = {previous.text for previous in before} | {line.text}
        rivals = [
            other.text
            for other in by_indent[line.indent]
            if other.text not in near and abs(other.row - row) > 8
        ]
        rivals = sorted(set(rivals), key=lambda text: abs(len(text) - len(line.text)))[:24]
        if len(rivals) >= 3:
            last = row
            wrong = tuple(f"\n{text}" for text in random.sample(rivals, 3))
            yield Question(row, query, f"\n{line.text}", wrong)


def identifiers(document: Document, random: Random) -> Iterator[Question]:
    """A line up to a name; which name in scope comes next? One question per line at most."""
    lines = code_lines(document.text)
    heard: list[tuple[int, str, bool]] = []
    for row, line in lines.items():
        names = [
            (i, token)
            for i, token in enumerate(line.tokens)
            if token.type == tokenize.NAME
            and not keyword.iskeyword(token.string)
            and len(token.string) >= 3
            and token.string not in ("self", "cls")
        ]
        scope = {(name, dotted) for at, name, dotted in heard if row - SCOPE_ROWS <= at < row}
        options = []
        for i, token in names:
            dotted = i > 0 and line.tokens[i - 1].string == "."
            query = line.text[: token.start[1]]
            rivals = sorted(
                name
                for name, other in scope
                if other == dotted and name != token.string and name not in line.text
            )
            known = (token.string, dotted) in scope and token.string not in query
            if known and 6 <= len(query.strip()) <= 50 and len(rivals) >= 3:
                options.append((query, token.string, rivals))
        if options:
            query, answer, rivals = random.choice(options)
            # Trailing blanks belong to the choice, where tokenizers put them.
            blank = query[len(query.rstrip()) :]
            wrong = tuple(blank + name for name in random.sample(rivals, 3))
            yield Question(row, query.rstrip(), blank + answer, wrong)
        heard += [
            (row, token.string, i > 0 and line.tokens[i - 1].string == ".") for i, token in names
        ]


_KEYWORDS = ("in", "is", "not", "and", "or", "if", "else", "for", "as", "import", "def", "with")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}


def corruptions(line: Line, random: Random) -> Iterator[str]:
    """Wrong versions of a line, one of each kind that applies, in random order.

    Kinds: a closing bracket dropped, doubled or of another shape; a keyword for another; an
    operator dropped; a colon too few or too many; one level of indentation off. Both longer and
    shorter lines come out, so that length alone does not tell.
    """
    text, tokens = line.text, line.tokens

    def replaced(token: tokenize.TokenInfo, new: str) -> str:
        return text[: token.start[1]] + new + text[token.end[1] :]

    kinds = {
        "bracket": [
            replaced(token, new)
            for token in _far_closers(tokens)
            for new in ("", token.string * 2, *sorted(set(")]}") - {token.string}))
        ],
        "keyword": [
            replaced(token, new)
            for token in tokens
            for new in _KEYWORDS
            if token.string in _KEYWORDS and new != token.string
        ],
        "operator": [
            replaced(token, "")
            for token in tokens[1:-1]
            if token.type == tokenize.OP and token.string in ("=", ",", "+", "==", ".", "%")
        ],
        "colon": [text[:-1] if text.endswith(":") else f"{text}:"],
        "indent": [f"    {text}", text[4:] if line.indent >= 4 else f"    {text}"],
    }
    found = [random.choice(versions) for versions in kinds.values() if versions]
    random.shuffle(found)
    yield from found


def _far_closers(tokens: Sequence[tokenize.TokenInfo]) -> list[tokenize.TokenInfo]:
    """Closing brackets with at least two tokens between them and the one they close."""
    opened: list[int] = []
    far = []
    for i, token in enumerate(tokens):
        if token.string in _CLOSERS:
            opened.append(i)
        elif token.string in _CLOSERS.values() and opened and i - opened.pop() > 2:
            far.append(token)
    return far


def minimal_pairs(document: Document, random: Random) -> Iterator[Question]:
    """Two lines of code; which of two third lines is valid? The other breaks the file's syntax."""
    lines = code_lines(document.text)
    raw = document.text.splitlines()
    last = 0
    for row, line in lines.items():
        before = [lines[r].text for r in (row - 2, row - 1) if r in lines]
        query = "\n".join(before)
        if len(before) < 2 or row - 2 <= last or len(query) > 110:
            continue
        if not 12 <= len(line.text.strip()) <= 60:
            continue
        for wrong in corruptions(line, random):
            if not _parses("\n".join([*raw[: row - 1], wrong, *raw[row:]])):
                last = row
                yield Question(row, query, f"\n{line.text}", (f"\n{wrong}",))
                break


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


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
