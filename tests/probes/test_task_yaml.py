"""A user's own YAML with a mistake in it ends in one line that names the file, never in lm-eval's
traceback."""

import json
from pathlib import Path

import pytest

from experiments import __main__ as cli
from probes.task_names import BUILTIN_FOLDER, task_sources
from probes.task_yaml import read_task_file
from probes.tasks import load_tasks
from tests.probes.test_tasks import YAML, own_task, rows, write


def refusal(path: Path, shots: int = 0) -> str:
    with pytest.raises(ValueError) as info:  # noqa: PT011  every caller looks at the text
        load_tasks([str(path)], shots)
    assert "\n" not in str(info.value)
    assert type(info.value) is ValueError
    return str(info.value)


def task_with(folder: Path, text: str = YAML, code: str = "", **changed) -> Path:
    """The task of `test_tasks`, with `changed` fields in the third document of its test split."""
    test = rows("b", 4)
    test[2] |= changed
    path = own_task(folder, text=text, train=rows("a", 8), test=test)
    (folder / "code.py").write_text(code)
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("doc_to_text:", "doc_to_txet:", "no key doc_to_txet (did you mean doc_to_text?)"),
        ("metric_list", "fewshot_config: {{sampelr: x}}\nmetric_list", "(did you mean sampler?)"),
        ("metric_list", "fewshot_config: first_n\nmetric_list", "fewshot_config is 'first_n'"),
        ("metric_list", "fewshot_config: {{sampler: x}}\nmetric_list", "sampler 'x', but no"),
        ("metric: acc", "metric: accc", "lm-eval has no metric accc (did you mean acc?)"),
        ("metric: acc", "metric: acc\n    aggregation: meen", "(did you mean mean?)"),
        ("  - metric: acc", "  - acc", "metric_list has 'acc'"),
        ("multiple_choice", "multiplechoice", "no output_type multiplechoice: give one of"),
        ("output_type", "group: mine\noutput_type", "a task with `group:`"),
        ("output_type", "description: 3\noutput_type", "description is 3: give a text"),
        ("dataset_kwargs:\n  data_files: {files}", "dataset_kwargs: x", "dataset_kwargs is 'x'"),
        ("data_files: {files}", "data_files: 7", "names data file 7, which is neither"),
        ("dataset_path: json\n", "", "no data: give dataset_path"),
        ("{splits}", "", "no split to report on: give test_split"),
        ("doc_to_choice: options\n", "", "no doc_to_choice: give a field's name"),
        ("doc_to_target: answer\n", "", "no doc_to_target: give a field's name"),
        ("doc_to_choice: options", "doc_to_choice: optoins", "from doc_to_choice a list of texts"),
        ("options", "!function nowhere.f", "cannot be imported: ImportError: Cannot import module"),
        ("options", "!function code.f", "cannot be imported: AttributeError: Module"),
        ("options", "!function broken.f", "cannot be imported: SyntaxError: "),
        ("options", "!function f", "cannot be imported: ValueError: Invalid function reference"),
        ("options", "!function code.number", "lm-eval stops at TypeError"),
        ("options", "!function code.fails", "lm-eval stops at KeyError: nope; it takes"),
        ("options", "!oops x", "no YAML: could not determine a constructor for the tag '!oops'"),
        ("output_type", "include: base.yaml\noutput_type", "includes base.yaml, and there is no f"),
        ("output_type", "include: mine.yaml\noutput_type", "remove one `include`"),
        (
            "output_type",
            "filter_list: [{{name: x, filter: [{{function: y}}]}}]\noutput_type",
            "'y'",
        ),
    ],
)
def test_a_word_that_lm_eval_does_not_know_is_named(tmp_path: Path, old, new, says):
    assert old in YAML
    code = "number = 3\n\ndef fails(doc):\n    return doc['nope']\n"
    path = task_with(tmp_path, text=YAML.replace(old, new), code=code)
    (tmp_path / "broken.py").write_text("def f(:\n")
    message = refusal(path)
    assert says in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("a: [", "base.yaml, line 1: no YAML"),
        ("- 1", "base.yaml: no task file"),
        ("doc_to_txet: q", "mine.yaml: lm-eval has no key doc_to_txet"),
        (b"a: \xff", "base.yaml: no UTF-8 text"),
        ("a: \0", "base.yaml: no YAML: unacceptable character"),
    ],
)
def test_mistakes_in_an_included_file(tmp_path: Path, base, says):
    path = task_with(tmp_path, text=YAML + "include: base.yaml\n")
    (tmp_path / "base.yaml").write_bytes(base if isinstance(base, bytes) else base.encode())
    assert says in refusal(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"options": ["a", 3, "c"]}, "line 3: field options is a list of a number and text: give"),
        (
            {"options": [1, 2, 3]},
            "line 3: field options is a list of a number here and a list of t",
        ),
        ({"options": ["a", None]}, "document 2: its choices are ['a', None]; give a list of texts"),
        ({"options": None}, "document 2: lm-eval stops at TypeError"),
        ({"answer": 10**30}, "mine.test.jsonl: no json with one type a field"),
        ({"more": {"a": 1}}, ""),
        ({"answer": 3}, "document 2: the answer 3 is none of its 3 choices"),
    ],
)
def test_documents_that_do_not_fit(tmp_path: Path, changed, says):
    path = task_with(tmp_path, **changed)
    if says:
        assert says in refusal(path)
    else:
        assert len(load_tasks([str(path)])[0].examples) == 4


def test_nested_fields_of_two_types(tmp_path: Path):
    records = [row | {"more": {"a": i or "x"}} for i, row in enumerate(rows("b", 4))]
    path = own_task(tmp_path, train=rows("a", 8), test=records)
    assert "mine.test.jsonl: no json with one type a field: Could not convert" in refusal(path)


@pytest.mark.parametrize("answer", [7, None])
def test_an_answer_out_of_range_in_the_first_document(tmp_path: Path, answer):
    test = rows("b", 4)
    test[0]["answer"] = answer
    assert "doc_to_target" in refusal(own_task(tmp_path, train=rows("a", 8), test=test))


@pytest.mark.parametrize("answer", [7, -1, None])
def test_a_demonstration_without_a_right_answer_is_refused(tmp_path: Path, answer):
    train = rows("a", 8)
    train[3]["answer"] = answer
    path = own_task(tmp_path, train=train, test=rows("b", 4))
    says = f"the answer {answer} of a demonstration is none of its 3 choices: .*'q': 'a 3'"
    with pytest.raises(ValueError, match=says):
        load_tasks([str(path)], 7)
    assert load_tasks([str(path)], 0)


def test_a_file_that_is_no_parquet(tmp_path: Path):
    (tmp_path / "all.parquet").write_text("no")
    text = YAML.replace("path: json", "path: parquet")
    path = tmp_path / "mine.yaml"
    path.write_text(text.format(name="mine", files="all.parquet", splits="test_split: train"))
    assert "all.parquet: no parquet with one type a field: Could not open" in refusal(path)


def test_the_file_that_is_named_is_the_one_that_is_read(tmp_path: Path):
    first = task_with(tmp_path)
    second = tmp_path / "zz.yaml"
    second.write_text(first.read_text().replace("Q:", "Asked:"))
    for path, begins in ((first, "Q:"), (second, "Asked:")):
        assert load_tasks([str(path)])[0].examples[0].context.startswith(begins)


def test_the_name_of_a_built_in_task_is_taken(tmp_path: Path):
    path = own_task(tmp_path, name="pair_mapping", train=rows("a", 8), test=rows("b", 4))
    assert f"{path}: task pair_mapping has the name of a built-in task" in refusal(path)
    assert len(load_tasks([str(BUILTIN_FOLDER / "pair_mapping.yaml")], limit=2)[0].examples) == 2


def test_includes_lie_beneath_and_are_sources(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    path = task_with(tmp_path, text=YAML.replace("multiple_choice", "!function code.f\ninclude: a"))
    (tmp_path / "a").write_text("include: deep/b\noutput_type: below\ntag: a\ntask_list: [x]\n")
    (tmp_path / "deep" / "b").write_text("tag: b\nrepeats: 3\n")
    file = read_task_file(path)
    assert file.config["output_type"].reference == "code.f"
    assert (file.config["tag"], file.config["repeats"]) == ("a", 3)
    assert "task_list" not in file.config
    names = ["mine.yaml", "a", "deep/b", "code.py"]
    assert [str(f.relative_to(tmp_path)) for f in file.files] == names
    data = ["mine.train.jsonl", "mine.test.jsonl"]
    assert [str(f.relative_to(tmp_path)) for f in task_sources(str(path))] == names + data


def test_sources_of_tasks_that_are_not_ones_own():
    assert BUILTIN_FOLDER / "pair_mapping.test.jsonl" in task_sources("pair_mapping")
    assert BUILTIN_FOLDER / "read.py" in task_sources("pair_mapping")
    assert task_sources("hellaswag") == ()


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = task_with(tmp_path / "tasks", text=YAML.replace("metric: acc", "metric: accc"))
    assert cli.main(["prune", "--tasks", str(path)]) == 2
    captured = capsys.readouterr()
    assert "lm-eval has no metric accc" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_lists_of_one_type_are_let_through(tmp_path: Path):
    records = [row | {"more": more} for row, more in zip(rows("b", 3), ([], [1, 2.5], None))]  # noqa: B905
    path = own_task(tmp_path, train=rows("a", 8), test=rows("b", 4))
    write(tmp_path / "mine.test.jsonl", records)
    assert json.loads((tmp_path / "mine.test.jsonl").read_text().splitlines()[1])["more"]
    assert len(load_tasks([str(path)])[0].examples) == 3
