"""What can be asked about a line of Python, so that one answer is right and others are wrong?

    continuations    up to two lines of code; which line comes next?
    identifiers      a line up to a name; which name in scope comes next?
    minimal_pairs    up to two lines of code; which of two next lines is valid?

Each goes through a file and yields, row by row, the questions that can be asked there, with every
wrong answer that would do. `experiments/scenes.py` chooses among them.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from experiments.corpora import Document

SCOPE_ROWS = 60
"""A name is in scope when it stands in this many rows before the query."""


@dataclass(frozen=True)
class Question:
    """A query, its answer and the wrong ones, at a row of a file (counted from 1).

    `answered_by` is the number of the demonstration that holds the answer, if one does.
    """

    row: int
    query: str
    answer: str
    wrong: tuple[str, ...] = ()
    answered_by: int | None = None


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


def continuations(document: Document, random: Random) -> Iterator[list[Question]]:
    """Up to two lines of code; which line comes next? The wrong ones stand elsewhere in the file,
    as deeply indented and nearly as long."""
    lines = code_lines(document.text)
    by_indent: dict[int, list[Line]] = {}
    for line in lines.values():
        by_indent.setdefault(line.indent, []).append(line)
    for row, line in lines.items():
        query = _lines_before(lines, row)
        if query is None or not 10 <= len(line.text.strip()) <= 50:
            continue
        rivals = {
            other.text
            for other in by_indent[line.indent]
            if other.text not in (line.text, *query.split("\n")) and abs(other.row - row) > 8
        }
        alike = sorted(rivals, key=lambda text: (abs(len(text) - len(line.text)), text))[:40]
        if len(alike) >= 3:
            yield [Question(row, query, f"\n{line.text}", tuple(f"\n{text}" for text in alike))]


def _lines_before(lines: dict[int, Line], row: int) -> str | None:
    """The two rows before, or the one, as far as they are short statements."""
    if row - 1 not in lines:
        return None
    query = "\n".join(lines[r].text for r in (row - 2, row - 1) if r in lines)
    return query if len(query) <= 110 else None


def identifiers(document: Document, random: Random) -> Iterator[list[Question]]:
    """A line up to a name; which name in scope comes next? The wrong ones are in scope too, and
    attributes compete with attributes. Several questions a line."""
    lines = code_lines(document.text)
    heard: list[tuple[int, str, bool]] = []
    for row, line in lines.items():
        names = [
            (token, i > 0 and line.tokens[i - 1].string == ".")
            for i, token in enumerate(line.tokens)
            if token.type == tokenize.NAME and is_telling(token.string)
        ]
        scope = {(name, dotted) for at, name, dotted in heard if row - SCOPE_ROWS <= at}
        found = []
        for token, dotted in names:
            query = line.text[: token.start[1]]
            rivals = sorted(
                name for name, other in scope if other == dotted and name not in line.text
            )
            known = (token.string, dotted) in scope and token.string not in query
            if known and 6 <= len(query.strip()) <= 50 and len(rivals) >= 3:
                # Blanks at the end of the query belong to the answer, where tokenizers put them.
                blank = query[len(query.rstrip()) :]
                wrong = tuple(blank + name for name in rivals)
                found.append(Question(row, query.rstrip(), blank + token.string, wrong))
        if found:
            yield found
        heard += [(row, token.string, dotted) for token, dotted in names]


def is_telling(word: str) -> bool:
    """Whether a word is a name that says something: no keyword, no `self`, not too short."""
    return len(word) >= 3 and not keyword.iskeyword(word) and word not in ("self", "cls")


def minimal_pairs(document: Document, random: Random) -> Iterator[list[Question]]:
    """Up to two lines of code; which of two next lines is valid? The other breaks the syntax."""
    lines = code_lines(document.text)
    statements = _statements(document.text) if lines else {}
    for row, line in lines.items():
        query = _lines_before(lines, row)
        if query is None or not 12 <= len(line.text.strip()) <= 60:
            continue
        first, raw = statements[row]
        for wrong in corruptions(line, random):
            if not _parses("\n".join([*raw[: row - first], wrong, *raw[row - first + 1 :]])):
                yield [Question(row, query, f"\n{line.text}", (f"\n{wrong}",))]
                break


def _statements(text: str) -> dict[int, tuple[int, list[str]]]:
    """Row → (first row, rows) of the statement at the top level of the file that it belongs to."""
    raw = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        last = node.end_lineno or node.lineno
        found |= dict.fromkeys(range(first, last + 1), (first, raw[first - 1 : last]))
    return found


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


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
        before, after = text[: token.start[1]], text[token.end[1] :]
        # Two blanks in a row would give a dropped operator away.
        return before + new + (after[1:] if not new and before.endswith(" ") else after)

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
