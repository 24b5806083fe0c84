"""The pruning study from its command to its numbers, on a model made in the test."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import OPTForCausalLM

from ablate import Head, HookedModel, Mask
from experiments.__main__ import main
from experiments.prune.reporting import most_costly
from experiments.run_folder import RunFolder
from probes.scoring import score_choices
from probes.tasks import load_tasks
from tests.experiments.tiny_opt import write_tiny_opt

LIMIT = 10


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return study(model_folder, tmp_path_factory.mktemp("runs"))


def arguments(model_folder: Path, runs: Path, *options: str) -> list[str]:
    return [
        *("prune", "--model", str(model_folder), "--runs", str(runs)),
        *("--tasks", "pair_mapping", "minimal_pairs", "--limit", str(LIMIT), "--seeds", "2"),
        *("--report-limit", str(LIMIT)),
        *("--shots", "0", "2", "--fractions", "0", "0.25", "0.5", "0.75", *options),
    ]


def study(model_folder: Path, runs: Path, *options: str) -> tuple[Path, dict]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(arguments(model_folder, runs, *options)) == 0
    line = json.loads(out.getvalue().splitlines()[-1])
    return Path(line["run"]), line


def test_the_last_line_says_what_the_metrics_say(run: tuple[Path, dict]):
    path, line = run
    metrics = pd.read_parquet(path / "metrics.parquet")
    removable = metrics[(metrics.part == "removable") & (metrics.ranking == "importance")]
    row = removable[removable.unit == "heads"].iloc[0]
    assert line["removable"] == row.value
    assert line["heads"] == 4
    assert line["units"]["ffns"]["components"] == 2
    assert str(line["removable"]) in line["headline"]
    alone = metrics[(metrics.part == "alone") & metrics.component.isin(line["critical"])]
    assert len(alone) == len(line["critical"])
    for row in alone.to_dict("records"):  # what costs nothing is not said to cost most
        assert (str(row["component"]) in line["headline"]) == (row["value"] < 0)
    assert (path / "report.html").stat().st_size > 10_000
    assert (path / "figures" / "summary.png").exists()


def test_scores_are_those_of_the_masked_model(run: tuple[Path, dict], model_folder: Path):
    """The oracle: load the model again, mask it by hand as the rankings say, and score it."""
    path, _ = run
    examples = pd.read_parquet(path / "examples.parquet")
    rankings = pd.read_parquet(path / "rankings.parquet")
    model = HookedModel.from_pretrained(str(model_folder))
    assert model.tokenizer is not None
    (task,) = load_tasks(["pair_mapping"], 2, split="test", limit=LIMIT)
    condition = "task == 'pair_mapping' and shots == 2 and seed == 1"
    bos = len(model.tokenizer("").input_ids)
    of_condition = examples.query(condition).groupby(["unit", "ranking", "removed"])
    for key, rows in of_condition:
        unit, ranking, removed = cast("tuple[str, str, int]", key)
        if unit == "alone":
            continue
        order = rankings.query(condition)
        order = order[(order.unit == unit) & (order.ranking == ranking)]
        first = order.sort_values("place").component[: int(removed)]
        with model.ablated(Mask.parse(",".join(first))):
            by_hand = score_choices(model, task.examples)
        assert rows.score.tolist() == by_hand.acc.tolist()
        assert rows.doc_id.tolist() == by_hand.doc_id.tolist()
        nats = [-row[gold] for row, gold in zip(by_hand.loglik, by_hand.gold, strict=True)]
        tokens = [len(model.tokenizer(e.choices[e.gold]).input_ids) - bos for e in task.examples]
        assert rows.loss.to_numpy() == pytest.approx(np.array(nats) / tokens, abs=1e-4)


def test_a_cell_of_the_grid_is_the_two_masks_together(model_folder: Path, tmp_path: Path):
    path, _ = study(model_folder, tmp_path, "--grid", "--seeds", "1", "--shots", "0")
    examples = pd.read_parquet(path / "examples.parquet").query("task == 'minimal_pairs'")
    rankings = pd.read_parquet(path / "rankings.parquet").query("task == 'minimal_pairs'")
    model = HookedModel.from_pretrained(str(model_folder))
    (task,) = load_tasks(["minimal_pairs"], 0, split="test", limit=LIMIT)
    grid = examples[examples.unit == "grid"]
    assert set(grid.ranking) == {"importance", "aggregate"}
    for key, rows in grid.groupby(["ranking", "removed", "ffns"]):
        ranking, heads, ffns = cast("tuple[str, int, int]", key)
        both = Mask()
        for unit, count in (("heads", heads), ("ffns", ffns)):
            order = rankings[(rankings.unit == unit) & (rankings.ranking == ranking)]
            first = order.sort_values("place").component[: int(count)]
            both |= Mask.parse(",".join(first))
        with model.ablated(both):
            by_hand = score_choices(model, task.examples)
        assert rows.score.tolist() == by_hand.acc.tolist()
    assert (
        grid.groupby("ranking")[["removed", "ffns"]].nunique().to_numpy().tolist() == [[4, 2]] * 2
    )


def test_selection_and_reporting_examples_are_different_documents(model_folder: Path):
    chosen, reported = (
        {e.context + str(e.choices) for t in load_tasks(shots=2, split=side) for e in t.examples}
        for side in ("selection", "test")
    )
    assert chosen
    assert reported
    assert not chosen & reported


def test_each_seed_has_its_own_random_order_and_its_own_examples_to_choose_by(run):
    path, _ = run
    rankings = pd.read_parquet(path / "rankings.parquet").query("unit == 'heads'")
    orders = rankings.sort_values("place").groupby(["ranking", "task", "shots", "seed"]).component
    orders = orders.agg(tuple)
    random = orders["random"]
    assert random.groupby(["seed"]).nunique().tolist() == [1, 1]  # one for all tasks and shots
    assert orders["weights"].nunique() == 1  # knows nothing of tasks and seeds
    aggregate = orders["aggregate"]
    assert (aggregate.groupby(["shots", "seed"]).nunique() == 1).all()
    examples = pd.read_parquet(path / "examples.parquet")
    asked = examples.groupby(["task", "shots", "seed"]).doc_id.agg(
        lambda ids: tuple(sorted(set(ids)))
    )
    assert asked.groupby(["task", "shots"]).nunique().eq(1).all()  # the same to report on


def test_the_same_command_answers_at_once(run, model_folder: Path, capsys):
    path, line = run
    before = (path / "metrics.parquet").stat().st_mtime_ns
    assert main(arguments(model_folder, path.parent.parent)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert (path / "metrics.parquet").stat().st_mtime_ns == before


@pytest.mark.parametrize("shards", [3, 9, 20])
def test_a_killed_run_resumes_to_the_same_numbers(
    run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
):
    path, _ = run
    keep = RunFolder.keep
    kept = []

    def dies(self, key, frame):
        keep(self, key, frame)
        kept.append(key)
        if len(kept) == shards:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "keep", dies)
    assert main(arguments(model_folder, tmp_path)) == 130
    again = tmp_path / "prune" / path.name
    assert not (again / "metrics.parquet").exists()
    monkeypatch.setattr(RunFolder, "keep", keep)
    assert main(arguments(model_folder, tmp_path)) == 0
    for name in ("metrics", "examples", "rankings"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(again / f"{name}.parquet"), pd.read_parquet(path / f"{name}.parquet")
        )


def test_most_costly_breaks_ties_by_the_loss():
    rows = [
        {"component": component, "score_change": score, "loss_rise": loss}
        | {"task": "a", "shots": 0, "seed": 0}
        for component, score, loss in [("L0H0", -0.5, 1.0), ("L0H1", -0.5, 3.0), ("L1H0", 0, 9.0)]
    ]
    heads = (Head(0, 0), Head(0, 1), Head(1, 0))
    found = most_costly(pd.DataFrame(rows), {"heads": heads}, 2)
    assert found == {"heads": [Head(0, 1), Head(0, 0)]}


@pytest.mark.parametrize("fill", ["mean", "resample"])
def test_other_fills_change_what_is_removed_and_not_the_whole(
    run, fill: str, model_folder: Path, tmp_path: Path
):
    zero = pd.read_parquet(run[0] / "examples.parquet")
    path, _ = study(model_folder, tmp_path, "--fill", fill)
    other = pd.read_parquet(path / "examples.parquet")
    keys = ["unit", "ranking", "removed", "component", "task", "shots", "seed", "doc_id"]
    zero, other = (frame.sort_values(keys) for frame in (zero, other))
    whole, filled = (frame[frame.unit == "whole"].loss.to_numpy() for frame in (zero, other))
    assert filled == pytest.approx(whole, abs=1e-4)
    ours, theirs = (f.query("ranking == 'weights' and removed == 2") for f in (zero, other))
    assert len(ours) == len(theirs)
    assert np.abs(ours.loss.to_numpy() - theirs.loss.to_numpy()).max() > 1e-3


def test_a_smaller_checkpoint_says_what_the_masked_model_says(model_folder: Path, tmp_path: Path):
    smaller = tmp_path / "smaller"
    options = ("--export", str(smaller), "--export-mask", "L0H1,L1F")
    path, _ = study(model_folder, tmp_path / "runs", *options)
    metrics = pd.read_parquet(path / "metrics.parquet")
    sizes = metrics[metrics.part == "exported"].set_index(["model", "metric"]).value
    assert sizes["exported", "parameters"] < sizes["whole", "parameters"]
    assert sizes["exported", "largest_difference"] < 1e-5
    model = HookedModel.from_pretrained(str(smaller))
    (task,) = load_tasks(["pair_mapping"], 2, split="test", limit=LIMIT)
    examples = pd.read_parquet(path / "examples.parquet")
    rows = examples.query("unit == 'exported' and task == 'pair_mapping' and shots == 2")
    by_hand = score_choices(model, task.examples)
    assert rows[rows.seed == 0].score.tolist() == by_hand.acc.tolist()


def test_a_ranking_from_a_file_is_followed(run, model_folder: Path, tmp_path: Path):
    scores = tmp_path / "mine.csv"
    scores.write_text("component,value\nL0H0,4\nL0H1,1\nL1H0,2\nL1H1,3\n")
    path, _ = study(model_folder, tmp_path, "--ranking-files", str(scores))
    rankings = pd.read_parquet(path / "rankings.parquet").query("ranking == 'mine.csv'")
    order = rankings.sort_values("place").groupby(["task", "shots", "seed"]).component.agg(list)
    assert all(found == ["L0H1", "L1H0", "L1H1", "L0H0"] for found in order)


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
        (["--report-limit", "1"], "--report-limit 1"),
        (["--tasks", "pair_mapping", "--report-limit", "9999"], "--report-limit 9999"),
        (["--shots", "99"], "99 shots"),
        (["--tasks", "pair_mapping", "--limit", "100000"], "has 400 examples"),
        (["--tasks", "code_continuation", "--shots", "19"], "19 shots"),
        (["--units", "mixers"], "has no mixers"),
        (["--seeds", "0"], "--seeds 0"),
        (["--rankings"], "no ranking"),
        (["--ranking-files", "nowhere.csv"], "nowhere.csv"),
        (["--unseen", "pair_mapping"], "pair_mapping"),
        (["--fill", "mean", "--export", "x"], "--fill zero"),
        (["--export-mask", "L0H0"], "--export"),
        (["--export", "x", "--export-mask", "L9H0"], "L9H0"),
        (["--preset", "full", "--fill", "resample"], "greedy"),
        (["--integrated", "4", "--convention", "reference"], "--integrated"),
        (["--exact", "no", "--rankings", "exact"], "--exact no"),
        (["--tasks", "pair_mapping", "--rankings", "others", "partners"], "none of them orders"),
        (["--data", "nowhere"], "nowhere"),
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
    assert main([*arguments, "--tasks", "pair_mapping", "--limit", "4", "--report-limit", "4"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nan" in error
    assert "pair_mapping document" in error


def test_rankings_of_other_tasks_alone_have_their_figures(model_folder: Path, tmp_path: Path):
    words = ["prune", "--model", str(model_folder), "--tasks", "pair_mapping", "minimal_pairs"]
    words += ["--shots", "0", "--seeds", "1", "--limit", "4", "--report-limit", "4"]
    words += ["--fractions", "0", "0.5", "--rankings", "aggregate", "others", "--runs"]
    assert main([*words, str(tmp_path)]) == 0
    (figures,) = tmp_path.glob("prune/*/figures")
    assert (figures / "accuracy_heads.png").exists()


def test_an_export_of_nothing_keeps_the_study(model_folder: Path, tmp_path: Path, capsys):
    words = ["prune", "--model", str(model_folder), "--tasks", "pair_mapping", "--shots", "0"]
    words += ["--seeds", "1", "--limit", "8", "--report-limit", "8", "--units", "heads"]
    words += ["--fractions", "0", "0.1", "--rankings", "importance"]
    words += ["--export", str(tmp_path / "smaller"), "--runs", str(tmp_path / "runs")]
    assert main(words) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "no checkpoint was written" in line["headline"]
    assert not (tmp_path / "smaller").exists()
    assert "No checkpoint was written" in (Path(line["run"]) / "report.html").read_text()


def test_a_tokenizer_of_more_tokens_than_the_model_has(model_folder: Path, tmp_path: Path, capsys):
    model = HookedModel.from_pretrained(str(model_folder))
    model.model.resize_token_embeddings(50)
    model.model.save_pretrained(tmp_path / "small")
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(tmp_path / "small")
    words = ["prune", "--model", str(tmp_path / "small"), "--tasks", "pair_mapping"]
    assert main([*words, "--runs", str(tmp_path / "runs")]) == 2
    assert "has embeddings of 50 tokens" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
