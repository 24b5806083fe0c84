"""A model that needs two known heads, and no other, for its task: every method must find them."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from experiments.__main__ import main
from tests.induction_model import VOCAB, induction_opt

NEEDED = {"L0H0", "L1H1"}
METHODS = {
    *("importance", "aggregate", "aggregate (rank)", "aggregate (z)", "others"),
    *("highest partner", "lowest partner", "exact", "re-scored", "greedy"),
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}.train.jsonl
    test: {folder}/{name}.test.jsonl
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint and the folder of its three tasks: what followed this word before?"""
    model, tasks = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tasks")
    # Not saturated: gradients of a certain head would vanish.
    induction_opt(sharpness=8.0, gain=5.0).save_pretrained(model)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", model_max_length=50
    ).save_pretrained(model)
    for number, name in enumerate(("follow_a", "follow_b", "follow_c")):
        draw = random.Random(number)
        for split in ("train", "test"):
            rows = []
            for _ in range(24):
                seen = draw.sample(range(1, VOCAB), 16)
                at = draw.randrange(14)
                choices = [f"t{seen[at + 1]}", *(f"t{seen[i]}" for i in (at, 15))]
                context = " ".join(f"t{word}" for word in [*seen, seen[at]])
                rows.append(json.dumps({"context": context, "choices": choices, "gold": 0}))
            (tasks / f"{name}.{split}.jsonl").write_text("\n".join(rows))
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, folder=tasks))
    return model, tasks


def rankings(planted: tuple[Path, Path], runs: Path, *options: str) -> pd.DataFrame:
    model, tasks = planted
    words = ["prune", "--model", str(model), "--tasks", str(tasks), "--shots", "0", "--runs"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert (
            main(
                [*words, str(runs), "--limit", "24", "--report-limit", "24"]
                + ["--units", "heads", *options]
            )
            == 0
        )
    folder = Path(json.loads(out.getvalue().splitlines()[-1])["run"])
    return pd.read_parquet(folder / "rankings.parquet")


def most_important(frame: pd.DataFrame) -> Any:
    """The two heads that go last, by ranking, task and seed."""
    keys = ["ranking", "task", "seed"]
    last = frame.sort_values("place").groupby(keys).tail(2)
    return last.groupby(keys)["component"].agg(frozenset)


def test_every_method_that_knows_the_task_puts_the_needed_heads_first(
    planted: tuple[Path, Path], tmp_path: Path
):
    frame = rankings(planted, tmp_path, "--preset", "full", "--no-grid", "--seeds", "2")
    tops = most_important(frame)
    knowing = tops[tops.index.get_level_values("ranking").isin(METHODS)]
    assert set(knowing.index.get_level_values("ranking")) == METHODS
    assert set(knowing) == {frozenset(NEEDED)}
    assert set(tops["random"]) != {frozenset(NEEDED)}


@pytest.mark.parametrize(
    "options",
    [
        ("--convention", "token"),
        ("--convention", "reference"),
        ("--integrated", "8"),
        ("--checkpointing",),
        ("--fill", "mean"),
    ],
    ids=" ".join,
)
def test_every_convention_does(planted: tuple[Path, Path], tmp_path: Path, options):
    frame = rankings(planted, tmp_path, "--rankings", "importance", "--seeds", "1", *options)
    assert set(most_important(frame)) == {frozenset(NEEDED)}


def test_without_the_two_heads_nothing_is_left_and_with_them_nothing_is_lost(
    planted: tuple[Path, Path], tmp_path: Path
):
    words = ("--rankings", "importance", "--fractions", "0.5", "0.7", "--seeds", "1")
    rankings(planted, tmp_path, *words)
    (examples,) = tmp_path.rglob("examples.parquet")
    scores = pd.read_parquet(examples).groupby(["unit", "removed"]).score.mean()
    assert scores["whole", 0] > 0.9
    # Of 6 heads, the 4 that are not needed.
    assert scores["heads", 3] == scores["heads", 4] == scores["whole", 0]
    assert scores["alone", 1] < scores["whole", 0]
