"""The maker of the built-in tasks: what it asks is true, and it makes the same again."""

import ast
import json
import re
from itertools import pairwise
from random import Random

import pytest

from experiments.corpora import Document
from experiments.make_tasks import TaskMaking, halves
from experiments.questions import (
    code_lines,
    continuations,
    corruptions,
    identifiers,
    is_telling,
    minimal_pairs,
)
from experiments.scenes import DEMONSTRATIONS, QUERIES, mapping, scenes

# The names of a stretch of eight classes recur in it and nowhere else.
FILE = "".join(
    f"""
class Part{i}:
    def step_{i}(self, mode="r{i}"):
        '''Docstrings are no code.'''
        count_{i} = {i}
        total_{i} = [count_{i}, (mode, {i})]
        {topic}_store(total_{i}, mode)
        again_{i} = (total_{i}, [mode])
        found_{i} = {topic}_find({topic}_key, again_{i})
        if found_{i} in again_{i}:
            {topic}_close(found_{i}, mode)
        return [found_{i}, ({topic}_last, {i})]
"""
    for i in range(56)
    for topic in [["acorn", "birch", "cedar", "daisy", "elder", "fern", "ginger"][i // 8]]
)
DOCUMENT = Document("reader.py", FILE)


def asked(ask):
    """Every question about the file."""
    return [question for options in ask(DOCUMENT, Random(0)) for question in options]


def test_code_lines_are_statements_on_a_row_of_their_own():
    text = "x = 1\n'''text'''\ny = (1,\n     2)\nif x:  # why\n    pass\n"
    assert {row: line.text for row, line in code_lines(text).items()} == {
        1: "x = 1",
        5: "if x:  # why",
        6: "    pass",
    }
    assert code_lines("def broken(:\n") == {}


@pytest.mark.parametrize("ask", [continuations, identifiers, minimal_pairs])
def test_answers_are_what_the_file_says(ask):
    rows = FILE.splitlines()
    questions = asked(ask)
    assert len(questions) > 50
    for question in questions:
        before = "\n".join(rows[: question.row])
        assert question.query + question.answer in before
        assert question.answer not in question.wrong
        assert len(set(question.wrong)) == len(question.wrong)
        assert len(question.wrong) == 1 if ask is minimal_pairs else len(question.wrong) >= 3


def test_only_one_of_a_minimal_pair_is_valid():
    rows = FILE.splitlines()
    for question in asked(minimal_pairs)[::4]:
        (wrong,) = question.wrong
        broken = [*rows[: question.row - 1], wrong[1:], *rows[question.row :]]
        with pytest.raises(SyntaxError):
            ast.parse("\n".join(broken))


def test_corruptions_change_the_line_in_more_than_one_way():
    (line,) = code_lines("found = read(path, [mode])\n").values()
    found = {wrong for seed in range(40) for wrong in corruptions(line, Random(seed))}
    assert line.text not in found
    assert {"found = read(path, [mode]", "found read(path, [mode])"} <= found
    assert any(len(wrong) > len(line.text) for wrong in found)


def test_names_in_scope_stand_before_the_query():
    rows = FILE.splitlines()
    for question in asked(identifiers):
        before = "\n".join(rows[: question.row - 1])
        assert all(name.strip() in before for name in (question.answer, *question.wrong))


def names(text):
    return {word for word in re.findall(r"[A-Za-z_]\w+", text) if is_telling(word)}


@pytest.mark.parametrize(("ask", "wrong"), [(continuations, 3), (identifiers, 3)])
def test_scenes_show_the_names_they_ask_for(ask, wrong):
    found = list(scenes(DOCUMENT, ask, Random(0), wrong=wrong, gap=2))
    assert len(found) >= 5
    for scene in found:
        assert len(scene.demonstrations) == DEMONSTRATIONS
        assert len(scene.queries) == QUERIES
        at = [question.row for question in scene.demonstrations]
        assert all(b - a >= 2 for a, b in pairwise([*at, scene.queries[0].row]))
        shown = "\n".join(d.query + d.answer for d in scene.demonstrations)
        last = "\n".join(d.query + d.answer for d in scene.demonstrations[-QUERIES:])
        for query in scene.queries:
            assert query.query.strip() not in shown
            assert len(query.wrong) == wrong
            fresh = names(last) - names(query.query)
            assert fresh & names(query.answer)
            assert sum(bool(fresh & names(text)) for text in query.wrong) <= 1


def test_pairs_need_no_names():
    (scene, *_) = scenes(DOCUMENT, minimal_pairs, Random(0), wrong=1)
    assert all(len(query.wrong) == 1 for query in scene.queries)


def test_a_mapping_is_a_function_and_its_wrong_labels_are_shown():
    words = [a + b + "x" for a in "abcdefghij" for b in "aeiou"]
    scene = mapping(words, "{} =", " {}", Random(0))
    pairs = {pair.query: pair.answer for pair in scene.demonstrations}
    assert len(pairs) == len(set(pairs.values())) == DEMONSTRATIONS
    for query in scene.queries:
        assert pairs[query.query] == query.answer
        shown = {pair.answer for pair in scene.demonstrations[-QUERIES:]}
        assert set(query.wrong) < shown
        assert query.answered_by is not None
        assert scene.demonstrations[query.answered_by].query == query.query


def test_sides_share_no_file_and_have_as_much_text():
    documents = [Document(f"{i}.py", "x" * (i + 1)) for i in range(20)]
    sides = halves(documents)
    sizes = [sum(len(document.text) for document in side) for side in sides.values()]
    assert abs(sizes[0] - sizes[1]) <= 1
    assert sorted(sides["test"] + sides["train"], key=lambda d: len(d.text)) == documents


def test_the_same_corpus_and_seed_make_the_same_bytes(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    names = [f"{a}{b}{c}" for a in "abcdefg" for b in "aeiou" for c in "mn"]
    short = FILE[: FILE.index("class Part24")]
    for i in range(40):
        text = short.replace("Part", f"P{i}x").replace("_", f"_{i}")
        (corpus / f"{i}.py").write_text(text + "".join(f"{name} = {i}\n" for name in names) * 3)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        written = TaskMaking(folder=folder, corpus=str(corpus), test=2, train=1).run()
    assert written["minimal_pairs.test.jsonl"] == 2 * QUERIES
    names = sorted(path.name for path in first.iterdir())
    assert len(names) == 11
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    line = json.loads((first / "pair_mapping.train.jsonl").read_text().splitlines()[0])
    assert set(line) == {"file", "demonstrations", "queries"}
    with pytest.raises(ValueError, match="99999 scenes of code_continuation asked for the test"):
        TaskMaking(folder=first, corpus=str(corpus), test=99999).run()
