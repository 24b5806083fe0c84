"""The paper's tasks: prompts as its table has them, sides apart, and marks counted by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from probes.bansal14 import BANSAL14, CORRECTED, PRESETS, SHOTS, UNSPACED
from probes.examples import Example, all_right
from probes.task_names import task_objects, task_sources
from probes.tasks import load_tasks
from tests.probes.test_tasks import lm_evals_requests

RECORDS = Path(__file__).parent / "records"
ALL = (*PRESETS["bansal16"], "lambada_standard")
BRIDGE = "The bridge was built of stone. It replaced one of wood.\n"
CHOIR = (
    "The Heron Choir sang in the town of Brill. Its leader, Miss Oda Lane, wept.\n\n"
    "  - The choir sang in Brill.\n  - Tickets were free.\n"
)
SALT = "the cook looked for the salt , but the shelf was empty , and nobody knew who had taken the"
# Context and choices of the first reported record, written from the paper's table.
PROMPTS = {
    "arc_easy": (
        "Question: Which of these is a source of heat?\nAnswer:",
        (" A stone in shade", " A burning candle", " A cold lamp", " A wet towel"),
    ),
    "arc_challenge": (
        "Question: A ball rolls slower on sand than on ice. What differs most?\nAnswer:",
        (" Its mass", " Its colour", " Friction", " Gravity"),
    ),
    "openbookqa": (
        "Ice on a path melts when",
        (" it is swept", " salt is strewn", " a bird sings", " the clock strikes"),
    ),
    "hellaswag": (
        "Making tea: A kettle boils on a stove. A man",
        (
            " puts the stove in his pocket.",
            " pours the water over the leaves.",
            " counts the leaves in a forest.",
            " mails the kettle.",
        ),
    ),
    "piqa": (
        "Question: open a tight jar\nAnswer:",
        (" Whisper to the lid.", " Hold the lid under hot water."),
    ),
    "winogrande": (
        "The key would not turn in the lock because the key",
        (" was bent.", " was bent."),
    ),
    "boolq": (f"{BRIDGE}Question: is the bridge made of wood?\nAnswer:", (" no", " yes")),
    "cb": (
        "A: I hear the fair is on. B: I do not think it is.\n"
        "Question: the fair is on. True, False or Neither?\nAnswer:",
        (" True", " False", " Neither"),
    ),
    "copa": ("The pond froze because", (" the fish slept.", " the night was cold.")),
    "multirc": (
        "Sam baked two pies. One had plums, the other had pears.\n"
        "Question: What was in the pies?\nAnswer:",
        (" Plums\nIs the answer correct? no", " Plums\nIs the answer correct? yes"),
    ),
    "record": (
        CHOIR,
        tuple(
            f"  - {entity} thanked the choir with flowers"
            for entity in ("Brill", "Heron Choir", "Miss Oda Lane", "Oda Lane")
        ),
    ),
    "rte": (
        "The boat with the blue sail won.\nQuestion: A boat won. True or False?\nAnswer:",
        (" True", " False"),
    ),
    "wic": (
        "Sentence 1: The spring of the clock broke.\nSentence 2: In spring the snow melts.\n"
        "Question: Is the word 'spring' used in the same way in the two sentences above?\nAnswer:",
        (" no", " yes"),
    ),
    "wsc": (
        "Passage: Pia waved to Ute, and *she* waved back.\nQuestion: In the passage above, does "
        'the pronoun "*she*" refer to "*Ute*"?\nAnswer:',
        (" no", " yes"),
    ),
    "mathqa": (
        "Question: a shelf has 5 rows of 6 books . how many books are there ?\nAnswer:",
        (" 11", " 25", " 30", " 36", " 56"),
    ),
    "lambada_openai": (SALT, (" salt",)),
    "lambada_standard": (
        "the drum was loud , and she put her hands on her ears until he stopped the",
        (" drum",),
    ),
}
FIRST = dict(zip(PROMPTS, (1, 2, 1, 1, 1, 0, 0, 1, 1, 1, 2, 0, 0, 1, 2, 0, 0), strict=True))


def paper_tasks(names=ALL, shots=0, **options):
    return {task.name: task for task in load_tasks(names, shots, data=RECORDS, **options)}


def test_presets_are_the_papers_tasks():
    assert len(set(BANSAL14)) == 14
    assert PRESETS["bansal16"] == (*BANSAL14, "mathqa", "lambada_openai")
    assert tuple(paper_tasks(["bansal14"], limit=1)) == BANSAL14


def test_prompts_choices_and_answers_are_the_papers():
    for name, task in paper_tasks().items():
        first = next(e for e in task.examples if e.context == PROMPTS[name][0])
        assert first.choices == PROMPTS[name][1], name
        assert first.gold == FIRST[name], name
        assert first == task.examples[0]
    winogrande = paper_tasks(["winogrande"])["winogrande"].examples[0]
    assert winogrande.contexts[1] == "The key would not turn in the lock because the lock"


def test_brackets_of_hellaswag_are_removed():
    example = paper_tasks(["hellaswag"])["hellaswag"].examples[1]
    assert example.context == (
        "Drawing a map: How to draw a map. Begin with the coast. Use a pencil."
    )
    assert example.choices[3] == " Then sleep under it."


@pytest.mark.parametrize("shots", SHOTS)
def test_demonstrations_are_selection_examples_with_their_answers(shots):
    reported = paper_tasks(shots=shots)
    plain = paper_tasks()
    chosen = paper_tasks(split="selection")
    for name, task in reported.items():
        # The right pair: Winogrande's contexts differ, and `context` is the right one.
        right = {e.context + e.choices[e.gold] for e in chosen[name].examples}
        queries = {e.doc_id: e for e in plain[name].examples}
        for example in task.examples:
            query = queries[example.doc_id]
            assert example.choices == query.choices
            assert example.context.endswith(query.context)
            shown = example.context.removesuffix(query.context)
            found = [demonstration for demonstration in right if f"{demonstration}\n\n" in shown]
            assert len(found) == shots, name
            assert len(shown) == sum(len(demonstration) + 2 for demonstration in found)


def test_sides_never_share_a_record():
    sources = {}
    sides = [paper_tasks(split=split) for split in ("test", "selection")]
    for name in ALL:
        test, selection = (side[name] for side in sides)
        sources[name] = (test.source, selection.source)
        texts = [{(e.pairs, e.gold) for e in task.examples} for task in (test, selection)]
        assert not texts[0] & texts[1], name
    assert {n for n, s in sources.items() if s == ("test", "train")} == {
        *("arc_easy", "arc_challenge", "openbookqa", "mathqa")
    }
    assert sources["lambada_openai"] == ("half of test", "the other half of test")
    assert sources["lambada_standard"] == ("test", "validation")
    assert list(sources.values()).count(("validation", "train")) == 11


@pytest.mark.parametrize("name", sorted(set(ALL) - set(CORRECTED)))
def test_uncorrected_prompts_are_lm_evals(name):
    task = paper_tasks([name], 5)[name]
    expected = lm_evals_requests(task_objects(name, RECORDS)[name], 5, 0, None)
    assert {e.doc_id: list(e.pairs) for e in task.examples} == expected


def test_all_answers_of_a_question_must_be_right():
    examples = paper_tasks(["multirc"])["multirc"].examples
    assert [e.gold for e in examples] == [1, 1, 0, 1, 0, 1, 0]
    assert [e.question for e in examples] == [0, 0, 0, 1, 1, 2, 2]
    assert [e.group for e in examples] == [0, 0, 0, 0, 0, 1, 1]
    # One of three wrong, both right, one of two wrong: one question of three.
    acc = np.array([1, 1, 0, 1, 1, 0, 1.0])
    assert all_right(examples, acc).tolist()[::3] == [0.0, 1.0, pytest.approx(np.nan, nan_ok=True)]
    assert np.nanmean(all_right(examples, acc)) == pytest.approx(1 / 3)
    # In any order, with those of another task between.
    other = Example("x", ("a", "b"), 0, task="t")
    shuffled = [examples[i] for i in (6, 2, 4, 0, 5, 3, 1)]
    marks = all_right([*shuffled, other], np.array([1, 0, 1, 1, 0, 1, 1, 1.0]))
    assert np.nanmean(marks) == pytest.approx(1 / 3)
    assert np.isnan(marks[-1])


def test_a_question_cut_by_the_limit_is_no_question():
    examples = paper_tasks(["multirc"], limit=4)["multirc"].examples
    assert [e.question for e in examples] == [0, 0, 0, None]
    assert np.nansum(all_right(examples, np.ones(4))) == 1


def marks_of_choice(example, chosen):
    nats = np.full(len(example.choices), -9.0)
    nats[chosen] = -1
    return example.marks(nats, np.zeros(len(nats), dtype=bool))


def test_record_is_marked_by_the_best_of_its_right_entities():
    choir, ayr, quill, *_ = paper_tasks(["record"])["record"].examples
    assert (choir.gold, choir.golds) == (2, (2, 3))
    # Brill, Heron Choir, Miss Oda Lane, Oda Lane; the last two are right.
    marks = [marks_of_choice(choir, chosen) for chosen in range(4)]
    assert [predicted for predicted, _ in marks] == [0, 1, 2, 3]
    assert [m["em"] for _, m in marks] == [m["acc"] for _, m in marks] == [0, 0, 1, 1]
    assert [m["f1"] for _, m in marks] == [0, 0, 1, 1]
    assert ayr.golds == (0, 1)
    # Quill and Tom Quill are both right, the only entities.
    assert marks_of_choice(quill, 0)[1] == {"acc": 1, "em": 1, "f1": 1}


def test_record_counts_common_words():
    doc = {
        "entities": ["The Lark-Prize!", "Ivy Dean", "Ivy"],
        "answers": ["Ivy Dean", "Lark Prize"],
    }
    rule = task_objects("record", RECORDS)["record"].config.process_results
    # Ivy of Ivy Dean: P 1, R 1/2, f1 2/3. "LarkPrize" has no word in common with either.
    assert rule(doc, [(-3, False), (-2, False), (-1, False)]) == {
        "acc": 0,
        "em": 0,
        "f1": pytest.approx(2 / 3),
    }
    assert rule(doc, [(-1, False), (-2, False), (-3, False)])["f1"] == 0
    assert rule(doc | {"answers": ["a larkprize"]}, [(-1, False), (-2, False), (-3, False)]) == {
        "acc": 1,
        "em": 1,
        "f1": 1,
    }


def test_leading_space():
    spaced, bare = (paper_tasks(leading_space=space) for space in (True, False))
    for name, task in spaced.items():
        allowed = name not in ("record", "lambada_openai", "lambada_standard")
        assert (task.delimiter, bare[name].delimiter) == (" " if allowed else "", "")
        for one, other in zip(task.examples, bare[name].examples, strict=True):
            assert other.context == one.context
            if allowed:
                assert one.choices == tuple(f" {choice}" for choice in other.choices)
            else:
                assert one.pairs == other.pairs
    assert set(UNSPACED) < set(spaced)
    shown = paper_tasks(["arc_easy"], 1, leading_space=False)["arc_easy"].examples[0]
    assert "\nAnswer: " in shown.context
    with pytest.raises(ValueError, match="no choice of record, lambada_openai has one"):
        paper_tasks(["record", "lambada_openai"], leading_space=False)


def test_what_is_not_within_reach_is_one_line(tmp_path, monkeypatch):
    import datasets

    def nowhere(path, **_):
        raise ConnectionError(f"Couldn't reach '{path}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    for name in ("piqa", "copa"):
        with pytest.raises(ValueError, match=f"task {name}: its data is neither in the cache") as e:
            load_tasks([name])
        assert "\n" not in str(e.value)
        assert f"{name}/<split>.jsonl" in str(e.value)


def test_a_data_folder_that_lacks_something_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no data folder .*nowhere: give a folder"):
        load_tasks(["piqa"], data=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="piqa has no data: task piqa needs validation.jsonl and t"
    ):
        load_tasks(["piqa"], data=tmp_path)
    shutil.copytree(RECORDS / "piqa", tmp_path / "piqa")
    assert load_tasks(["piqa"], 5, data=tmp_path)[0].source == "validation"
    (tmp_path / "piqa" / "validation.parquet").touch()
    with pytest.raises(ValueError, match="split validation in validation.jsonl and validation.par"):
        load_tasks(["piqa"], data=tmp_path)
    (tmp_path / "piqa" / "validation.parquet").unlink()
    with pytest.raises(ValueError, match="6 shots asked for: task piqa has 6 demonstrations"):
        load_tasks(["piqa"], 6, data=tmp_path)
    (tmp_path / "piqa" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="piqa has validation: task piqa needs train.jsonl, with"):
        load_tasks(["piqa"], data=tmp_path)
    (tmp_path / "piqa" / "train.jsonl").write_text('{"goal": \n')
    with pytest.raises(ValueError, match="piqa/train.jsonl, line 1: no JSON"):
        load_tasks(["piqa"], data=tmp_path)
    with pytest.raises(ValueError, match="glue is a group of lm-eval: name its tasks one by one"):
        load_tasks(["glue"], data=tmp_path)


def test_records_without_a_field_are_one_line(tmp_path):
    shutil.copytree(RECORDS / "boolq", tmp_path / "boolq")
    lines = (tmp_path / "boolq" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["question"]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "boolq" / f"{split}.jsonl").write_text(text)
    with pytest.raises(ValueError, match="'question' is undefined") as error:
        load_tasks(["boolq"], data=tmp_path)
    assert "\n" not in str(error.value)


def test_parquet_parts_and_unneeded_splits(tmp_path):
    import pandas as pd

    folder = tmp_path / "arc_easy"
    folder.mkdir()
    for split in ("train", "test"):
        frame = pd.read_json(RECORDS / "arc_easy" / f"{split}.jsonl", lines=True)
        for i, part in enumerate((frame[:3], frame[3:])):
            part.to_parquet(folder / f"{split}-0000{i}-of-00002.parquet")
    (plain,) = load_tasks(["arc_easy"], 5, data=RECORDS)
    assert load_tasks(["arc_easy"], 5, data=tmp_path) == (plain,)


def test_files_that_decide_a_task_are_known():
    sources = task_sources("bansal14", RECORDS)
    assert RECORDS / "arc_easy" / "train.jsonl" in sources
    assert {path.name for path in sources} >= {"record.yaml", "rules.py", "validation.jsonl"}
    assert task_sources("piqa") == ()
    assert [path.name for path in task_sources("lambada_standard")] == [
        "lambada_standard.yaml",
        "lambada_openai.yaml",
    ]
