"""The pruning study from its command to its numbers, on a model made in the test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from ablate import HookedModel, Mask
from experiments.__main__ import main
from experiments.corpora import Document
from experiments.prune import HeadPruning, most_costly
from experiments.tokens import train_tokenizer
from probes.scoring import score_choices
from probes.tasks import load_tasks

LIMIT = 10


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    documents = [Document("a", "def read(self):\n    value = self.value\n" * 20)]
    tokenizer = train_tokenizer([d.text for d in documents], 300, folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        init_std=0.3,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    runs = tmp_path_factory.mktemp("runs")
    return _run(model_folder, runs, capsys=None)


def _arguments(model_folder: Path, runs: Path) -> list[str]:
    return [
        *("prune", "--model", str(model_folder), "--runs", str(runs)),
        *("--tasks", "pair_mapping", "minimal_pairs", "--limit", str(LIMIT)),
        *("--shots", "0", "2", "--fractions", "0", "0.25", "0.5", "0.75"),
    ]


def _run(model_folder: Path, runs: Path, capsys: None) -> tuple[Path, dict]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(_arguments(model_folder, runs)) == 0
    line = json.loads(out.getvalue().splitlines()[-1])
    return Path(line["run"]), line


def test_the_last_line_says_what_the_metrics_say(run: tuple[Path, dict]):
    path, line = run
    metrics = pd.read_parquet(path / "metrics.parquet")
    assert set(metrics.part) == {
        *("importance", "average", "curve", "alone", "removable", "critical")
    }
    row = metrics[(metrics.part == "removable") & (metrics.ranking == "importance")].iloc[0]
    assert line["removable"] == row.value
    assert line["removable_interval"] == [row.low, row.high]
    assert line["heads"] == 4
    assert str(line["removable"]) in line["headline"]
    assert all(name in line["headline"] for name in line["critical"])
    assert {p.name for p in (path / "figures").iterdir()} == {
        *("summary.png", "importance.png", "accuracy.png", "alone.png")
    }
    assert (path / "report.html").stat().st_size > 10_000


def test_accuracies_are_those_of_the_masked_model(run: tuple[Path, dict], model_folder: Path):
    """The oracle: load the model again and score by hand what the study says it scored."""
    path, _ = run
    examples = pd.read_parquet(path / "examples.parquet")
    model = HookedModel.from_pretrained(str(model_folder))
    (task,) = load_tasks(["pair_mapping"], 2, split="test", limit=LIMIT)
    alone = examples[
        (examples.task == "pair_mapping") & (examples.shots == 2) & (examples.split == "test")
    ]
    for component, rows in alone[alone.ranking == "alone"].groupby("component"):
        with model.ablated(Mask.parse(str(component))):
            by_hand = score_choices(model, task.examples)
        assert rows.acc.tolist() == by_hand.acc.tolist()
        nats = [-row[gold] for row, gold in zip(by_hand.loglik, by_hand.gold, strict=True)]
        assert rows.loss.to_numpy() == pytest.approx(np.array(nats), abs=1e-4)


def test_selection_and_reporting_examples_are_different_documents(model_folder: Path):
    chosen, reported = (
        {e.context + str(e.choices) for t in load_tasks(shots=2, split=side) for e in t.examples}
        for side in ("selection", "test")
    )
    assert chosen
    assert reported
    assert not chosen & reported


def test_rankings_come_from_selection_examples_alone(run: tuple[Path, dict]):
    path, _ = run
    metrics = pd.read_parquet(path / "metrics.parquet")
    curve = metrics[metrics.part == "curve"]
    # Three random orders, each a whole curve; every curve starts at the same unmasked model.
    assert curve[curve.ranking == "random"].seed.nunique() == 3
    starts = curve[curve.removed == 0].groupby(["task", "shots"]).value.nunique()
    assert (starts == 1).all()
    assert sorted(curve.removed.unique()) == [0, 1, 2, 3]


def test_the_same_command_answers_at_once(run, model_folder: Path, capsys):
    path, line = run
    before = (path / "metrics.parquet").stat().st_mtime_ns
    assert main(_arguments(model_folder, path.parent.parent)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert (path / "metrics.parquet").stat().st_mtime_ns == before


def test_a_killed_run_resumes_to_the_same_numbers(
    run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, _ = run
    scored = HeadPruning._scored
    calls = []

    def dies(self, folder, model, condition, *rest):
        calls.append(condition.key)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return scored(self, folder, model, condition, *rest)

    monkeypatch.setattr(HeadPruning, "_scored", dies)
    assert main(_arguments(model_folder, tmp_path)) == 130
    again = tmp_path / "prune" / path.name
    assert not (again / "metrics.parquet").exists()
    monkeypatch.setattr(HeadPruning, "_scored", scored)
    assert main(_arguments(model_folder, tmp_path)) == 0
    pd.testing.assert_frame_equal(
        pd.read_parquet(again / "metrics.parquet"), pd.read_parquet(path / "metrics.parquet")
    )


def test_most_costly_breaks_ties_by_the_loss():
    rows = []
    for component, acc, loss in [("L0H0", 0.5, 1.0), ("L0H1", 0.5, 3.0), ("L1H0", 0.9, 9.0)]:
        rows.append(
            {"ranking": "alone", "component": component, "task": "a", "shots": 0}
            | {"acc": acc, "loss": loss}
        )
    assert [str(h) for h in most_costly(pd.DataFrame(rows), 2)] == ["L0H1", "L0H0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--fractions", "0.5", "1.5"], "--fractions 1.5"),
        (["--shots", "-1"], "--shots"),
        (["--shots", "0", "0"], "once"),
        (["--fractions", "0"], "above 0"),
        (["--limit", "1"], "--limit 1"),
        (["--shots", "99"], "99 shots"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: list[str], words: str, model_folder: Path, tmp_path: Path, capsys
):
    model = [] if "--model" in options else ["--model", str(model_folder)]
    assert main(["prune", *model, *options, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_model_with_nan_weights_is_named(model_folder: Path, tmp_path: Path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    model = OPTForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    arguments = ["prune", "--model", str(broken), "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--tasks", "pair_mapping", "--limit", "4"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nan" in error
    assert "pair_mapping document" in error
