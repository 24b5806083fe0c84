"""Tasks: prompts are lm-eval's to the letter, sides never overlap, mistakes are named by line."""

import json
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from probes.task_names import BUILTIN, BUILTIN_FOLDER, quiet, task_objects
from probes.tasks import Example, load_tasks

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {files}
output_type: multiple_choice
{splits}
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - metric: acc
"""


def rows(prefix, count):
    return [
        {"q": f"{prefix} {i}", "options": ["yes", "no", f"{prefix}{i}"], "answer": i % 3}
        for i in range(count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def own_task(folder, name="mine", text=YAML, **data):
    """A YAML task and one jsonl file per keyword (split → rows); the YAML's path."""
    folder.mkdir(exist_ok=True)
    for split, records in data.items():
        write(folder / f"{name}.{split}.jsonl", records)
    files = json.dumps({split: f"{name}.{split}.jsonl" for split in data})
    words = {"train": "training", "dev": "validation", "test": "test"}
    splits = "\n".join(f"{words[split]}_split: {split}" for split in data)
    path = folder / f"{name}.yaml"
    path.write_text(text.format(name=name, files=files, splits=splits))
    return path


def lm_evals_requests(task, shots, seed, limit):
    """doc id → [(context, continuation)], as lm-eval's own harness would send them."""
    with quiet(), redirect_stderr(StringIO()):
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(seed)
        task.build_all_requests(limit=limit)
    found = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance.args)
    return found


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_tasks_are_balanced_and_small(name):
    sides = {split: load_tasks([name], 5, split=split)[0] for split in ("test", "selection")}
    assert sides["test"].source == "test"
    assert sides["selection"].source == "train"
    for task in sides.values():
        assert len(task.examples) >= 400
        places = Counter(example.gold for example in task.examples)
        expected = len(task.examples) / len(task.examples[0].choices)
        assert all(abs(count - expected) < 0.15 * expected for count in places.values())
        for example in task.examples:
            assert len(set(example.choices)) == len(example.choices) == len(places)
    test, selection = ({example.context for example in task.examples} for task in sides.values())
    assert not test & selection


def test_builtin_tasks_come_from_files_that_are_on_one_side():
    source = json.loads((BUILTIN_FOLDER / "SOURCE.json").read_text())
    assert not set(source["files"]["test"]) & set(source["files"]["train"])
    assert sum(path.stat().st_size for path in BUILTIN_FOLDER.iterdir() if path.is_file()) < 3e6


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_prompts_are_lm_evals(name):
    for shots in (0, 3, 5):
        (task,) = load_tasks([name], shots, limit=7)
        expected = lm_evals_requests(task_objects(name)[name], shots, 1234, 7)
        assert {e.doc_id: list(e.pairs) for e in task.examples} == expected
        assert all(len(example.context) < 1100 for example in task.examples)


@pytest.mark.parametrize("name", ["pair_mapping", "call_mapping"])
@pytest.mark.parametrize("shots", [1, 2, 5, 8])
def test_mappings_show_the_answer_whatever_the_shots(name, shots):
    (task,) = load_tasks([name], shots, limit=100)
    where = Counter()
    for example in task.examples:
        query = example.context.splitlines()[-1]
        shown = example.context.splitlines()[:-1]
        assert len(shown) == shots
        answer = query + example.choices[example.gold]
        assert answer in shown
        assert not any(query + c in shown for c in example.choices if query + c != answer)
        where[shown.index(answer)] += 1
    # The place of the answer tells nothing either.
    assert len(where) == min(shots, 5)


def test_the_query_is_in_no_demonstration():
    for task in load_tasks(["code_continuation", "identifier_recall", "minimal_pairs"], 8):
        for example in task.examples:
            assert example.group == example.doc_id // 5
        (plain,) = load_tasks([task.name], 0)
        for shown, bare in zip(task.examples, plain.examples, strict=True):
            assert shown.context.endswith(bare.context)
            assert bare.context.strip() not in shown.context[: -len(bare.context)]


def test_more_shots_than_demonstrations_are_refused():
    with pytest.raises(ValueError, match="9 shots asked for: .* carry 8 demonstrations each"):
        load_tasks(["pair_mapping"], 9)
    with pytest.raises(ValueError, match="-1 shots asked for"):
        load_tasks(["pair_mapping"], -1)


def test_limit_takes_the_first(tmp_path):
    whole, part = (load_tasks(["pair_mapping"], 5, limit=n)[0].examples for n in (None, 20))
    assert whole[:20] == part
    with pytest.raises(ValueError, match="a limit of 0 examples"):
        load_tasks(["pair_mapping"], 5, limit=0)


def test_all_builtin_tasks_by_default():
    assert tuple(task.name for task in load_tasks(limit=1)) == BUILTIN
    with pytest.raises(ValueError, match="task pair_mapping asked for twice"):
        load_tasks(["pair_mapping", "pair_mapping"], limit=1)


def test_unknown_task_names_what_there_is():
    with pytest.raises(
        ValueError, match="no task pair_maping .did you mean pair_mapping.*"
    ) as info:
        load_tasks(["pair_maping"])
    message = str(info.value)
    assert "\n" not in message
    assert all(name in message for name in BUILTIN)
    assert "./my_tasks" in message
    with pytest.raises(ValueError, match="no task file nowhere/a.yaml"):
        load_tasks(["nowhere/a.yaml"])


def test_own_folder_and_file(tmp_path):
    path = own_task(tmp_path / "tasks", train=rows("a", 8), test=rows("b", 5))
    own_task(tmp_path / "tasks", name="other", train=rows("c", 8), test=rows("d", 6))
    folder, one = load_tasks([str(tmp_path / "tasks")], 2), load_tasks([str(path)], 2)
    assert [task.name for task in folder] == ["mine", "other"]
    assert one[0] == folder[0]
    assert one[0].metrics == ("acc",)
    example = one[0].examples[2]
    assert example.pairs[2] == (example.context, " b2")
    assert (example.gold, example.doc_id, example.shots, example.lengths) == (2, 2, 2, (3, 2, 2))
    assert example.context.endswith("\n\nQ: b 2\nA:")


@pytest.mark.parametrize("seed", [0, 1234])
def test_own_prompts_are_lm_evals(tmp_path, seed):
    path = own_task(tmp_path, train=rows("a", 30), test=rows("b", 12))
    (task,) = load_tasks([str(path)], 3, seed=seed)
    expected = lm_evals_requests(task_objects(str(path))["mine"], 3, seed, None)
    assert {e.doc_id: list(e.pairs) for e in task.examples} == expected


def test_parquet_and_single_files_are_read(tmp_path):
    import pandas as pd

    pd.DataFrame(rows("p", 9)).to_parquet(tmp_path / "all.parquet")
    text = YAML.replace("dataset_path: json", "dataset_path: parquet")
    text = text.format(name="mine", files="all.parquet", splits="test_split: train")
    (tmp_path / "mine.yaml").write_text(text)
    (task,) = load_tasks([str(tmp_path)])
    assert task.source == "half of train"
    assert len(task.examples) == 5


@pytest.mark.parametrize(
    ("splits", "test", "selection"),
    [
        ({"train", "dev", "test"}, "test", "train"),
        ({"train", "dev"}, "dev", "train"),
        ({"dev", "test"}, "test", "dev"),
        ({"test"}, "half of test", "the other half of test"),
        ({"dev"}, "half of dev", "the other half of dev"),
    ],
)
def test_sides_never_overlap(tmp_path, splits, test, selection):
    data = {split: rows(split, 14) for split in sorted(splits)}
    path = own_task(tmp_path, **data)
    shown = {}
    for split, source in (("test", test), ("selection", selection)):
        for shots in (0, 4):
            (task,) = load_tasks([str(path)], shots, split=split)
            assert task.source == source
            for example in task.examples:
                *demonstrations, query = example.context.split("\n\n")
                assert len(demonstrations) == shots
                assert all(not d.startswith(query) for d in demonstrations)
                shown.setdefault(split, set()).update(d.split("\n")[0] for d in demonstrations)
            shown[split, shots] = {
                e.context.split("\n\n")[-1].split("\n")[0] for e in task.examples
            }
    assert shown["test", 0] == shown["test", 4]
    assert not shown["test", 0] & shown["selection", 0]
    reported = shown["test", 0]
    assert not reported & (shown["test"] | shown["selection"])
    # Another seed draws other demonstrations, never other sides.
    (again,) = load_tasks([str(path)], 4, seed=7)
    assert {e.doc_id for e in again.examples} == {
        e.doc_id for e in load_tasks([str(path)], 0)[0].examples
    }


def test_demonstrations_from_the_reported_split_halve_it(tmp_path):
    text = YAML.replace("{splits}", "{splits}\nfewshot_split: test")
    path = own_task(tmp_path, text=text, train=rows("a", 8), test=rows("b", 12))
    (test,) = load_tasks([str(path)], 3)
    (selection,) = load_tasks([str(path)], 3, split="selection")
    assert (test.source, selection.source) == ("half of test", "train")
    reported = {f"Q: b {example.doc_id}" for example in test.examples}
    assert len(reported) == 6
    for example in test.examples:
        assert not reported & set("\n".join(example.context.split("\n\n")[:-1]).split("\n"))


def test_too_few_demonstrations_to_draw_from(tmp_path):
    path = own_task(tmp_path, train=rows("a", 3), test=rows("b", 3))
    with pytest.raises(ValueError, match="3 shots asked for: task mine has 3 demonstrations"):
        load_tasks([str(path)], 3)


def test_greedy_answers_as_in_lambada(tmp_path):
    text = YAML.replace("multiple_choice", "loglikelihood").replace("doc_to_choice: options\n", "")
    text = text.replace("doc_to_target: answer", 'doc_to_target: " {{{{options[answer]}}}}"')
    path = own_task(tmp_path, text=text, train=rows("a", 8), test=rows("b", 3))
    (task,) = load_tasks([str(path)], 1)
    assert [example.choices for example in task.examples] == [(" yes",), (" no",), (" b2",)]


def test_generated_answers_are_scored_where_exact_match_is_the_metric(tmp_path):
    text = YAML.replace("multiple_choice", "generate_until")
    text = text.replace("doc_to_choice: options\n", "").replace(
        "metric: acc", "metric: exact_match"
    )
    text = text.replace("doc_to_target: answer", "doc_to_target: options")
    path = own_task(tmp_path, text=text, train=rows("a", 8), test=rows("b", 3))
    (task,) = load_tasks([str(path)], 1)
    assert task.examples[2].choices == (" yes", " no", " b2")
    assert task.examples[2].golds == (0, 1, 2)
    own_task(
        tmp_path, text=text.replace("exact_match", "bleu"), train=rows("a", 2), test=rows("b", 3)
    )
    with pytest.raises(
        ValueError, match="task mine is graded by bleu: only acc, acc_norm, exact_m"
    ):
        load_tasks([str(path)], 1)


def test_contexts_that_differ_as_in_winogrande(tmp_path):
    (tmp_path / "code.py").write_text(
        "def number(doc):\n    return doc['answer']\n\n"
        "def contexts(doc):\n    return [doc['q'] + ' ' + o for o in doc['options']]\n\n"
        "def rest(doc):\n    return 'is right'\n"
    )
    text = YAML.replace('"Q: {{{{q}}}}\\nA:"', "!function code.number")
    text = text.replace("doc_to_choice: options", "doc_to_choice: !function code.contexts")
    text = text.replace("doc_to_target: answer", "doc_to_target: !function code.rest")
    path = own_task(tmp_path, text=text, train=rows("a", 8), test=rows("b", 3))
    (task,) = load_tasks([str(path)], 1)
    example = task.examples[1]
    assert example.gold == 1
    assert example.choices == (" is right",) * 3
    assert [c.split("\n\n")[-1] for c in example.contexts] == ["b 1 yes", "b 1 no", "b 1 b1"]
    assert example.context == example.contexts[1]
    expected = lm_evals_requests(task_objects(str(path))["mine"], 1, 0, None)
    assert {e.doc_id: list(e.pairs) for e in task.examples} == expected


def test_a_task_with_rules_of_its_own_grades_by_them(tmp_path):
    (tmp_path / "code.py").write_text(
        "def grade(doc, results):\n    return {'acc': float(results[0][0] > -1), 'other': 3}\n"
    )
    text = YAML + "process_results: !function code.grade\n"
    path = own_task(tmp_path, text=text, train=rows("a", 8), test=rows("b", 3))
    grade = load_tasks([str(path)])[0].examples[0].grade
    assert grade is not None
    assert grade([(-0.5, True), (0.0, True), (0.0, True)]) == {"acc": 1.0, "other": 3}
    own_task(tmp_path, text=text.replace("metric: acc", "metric: f1"), test=rows("b", 3))
    with pytest.raises(ValueError, match="task mine is graded by f1"):
        load_tasks([str(path)])


def test_perplexity_tasks_have_no_answers(tmp_path):
    text = YAML.replace("multiple_choice", "loglikelihood_rolling")
    text = text.replace("metric: acc", "metric: word_perplexity").replace("answer", "q")
    path = own_task(tmp_path, text=text.replace("doc_to_choice: options\n", ""), test=rows("b", 3))
    with pytest.raises(ValueError, match="task mine is of type loglikelihood_rolling"):
        load_tasks([str(path)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"q": "x", "options": ["a", "b"], "answer": 1', "line 3: no JSON: Expecting ',' delim"),
        ("[1, 2]", r"line 3: no JSON object: \[1, 2\]"),
        ('{"q": 5, "options": ["a"], "answer": 0}', "line 3: field q is a number here and text in"),
        ('{"q": "x", "options": ["a", "b", "c"], "answer": 7}', "document 2: the answer 7 is none"),
        (b'{"q": "\xff"}', "line 3: no UTF-8 text"),
    ],
)
def test_malformed_lines_are_named(tmp_path, bad, message):
    path = own_task(tmp_path, train=rows("a", 8), test=rows("b", 2))
    with (tmp_path / "mine.test.jsonl").open("ab") as file:
        file.write((bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    with pytest.raises(ValueError, match=message) as info:
        load_tasks([str(path)])
    assert "\n" not in str(info.value)
    assert "mine" in str(info.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: mine\n  doc_to_text: [", "mine.yaml, line 2: no YAML: mapping values"),
        ("- one\n- two\n", "mine.yaml: no task file: give `key: value` lines"),
        ("dataset_path: json\n", "no task in .*: give a folder with lm-eval YAML files"),
        (
            YAML.replace("Q: {{{{q}}}}", "Q: {{{{question}}}}"),
            "task mine: .*'question' is undefined",
        ),
        (YAML + "\nfewshot_split: shown\n", "fewshot_split shown has no data: data_files give t"),
    ],
)
def test_malformed_yaml_is_named(tmp_path, text, message):
    path = own_task(tmp_path, text=text, train=rows("a", 8), test=rows("b", 2))
    for name in (str(path), str(tmp_path)):
        with pytest.raises(ValueError, match=message) as info:
            load_tasks([name])
        assert "\n" not in str(info.value)


def test_missing_data_and_double_names(tmp_path):
    path = own_task(tmp_path, train=rows("a", 8), test=rows("b", 2))
    (tmp_path / "copy.yaml").write_text(path.read_text())
    with pytest.raises(ValueError, match="mine.yaml and .*copy.yaml both define task mine"):
        load_tasks([str(tmp_path)])
    (tmp_path / "mine.test.jsonl").unlink()
    with pytest.raises(ValueError, match="names data file mine.test.jsonl, which is neither in"):
        load_tasks([str(path)])
    (tmp_path / "mine.test.jsonl").write_text("")
    with pytest.raises(ValueError, match="mine.test.jsonl is empty"):
        load_tasks([str(path)])


def test_json_lists_are_read_and_their_entries_named(tmp_path):
    path = own_task(tmp_path, train=rows("a", 8), test=rows("b", 2))
    data = tmp_path / "mine.test.jsonl"
    data.write_text(json.dumps(rows("b", 4), indent=1))
    assert len(load_tasks([str(path)])[0].examples) == 4
    data.write_text(json.dumps([*rows("b", 4), 3]))
    with pytest.raises(ValueError, match="entry 5: no JSON object: 3"):
        load_tasks([str(path)])
    data.write_text('[\n{"q": }\n]')
    with pytest.raises(ValueError, match="line 2: no JSON: Expecting value"):
        load_tasks([str(path)])


def test_answers_count_from_zero():
    with pytest.raises(ValueError, match="t document 3: answer 2 of 2 choices"):
        Example("x", ("a", "b"), 2, 3, "t")


def test_importing_is_light_and_loading_is_silent():
    code = (
        "import sys, logging; logging.basicConfig(level=0, stream=sys.stderr)\n"
        "from probes.tasks import load_tasks\n"
        "assert not {'lm_eval', 'datasets', 'torch'} & set(sys.modules)\n"
        "logging.getLogger().setLevel(logging.INFO)\n"
        "load_tasks(['pair_mapping'], 5, limit=3)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""


def test_a_drawn_sample_takes_whole_texts_and_another_seed_takes_others():
    def drawn(sample: int | None) -> list[Example]:
        (task,) = load_tasks(("pair_mapping",), 5, split="selection", limit=20, sample=sample)
        return list(task.examples)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert [e.doc_id for e in first] == [e.doc_id for e in again]
    assert {e.group for e in first} != {e.group for e in other}
    assert sorted(e.doc_id for e in first) == [e.doc_id for e in first]
    assert [len([e for e in first if e.group == g]) for g in {e.group for e in first}] == [5] * 4
    assert [e.doc_id for e in drawn(None)] == list(range(20))
