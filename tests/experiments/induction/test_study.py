"""The study of induction heads from its command to its numbers, on models whose heads are known."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ablate import Head, HookedModel
from ablate.components import parse_component
from experiments.__main__ import main
from experiments.run_folder import RunFolder
from probes.induction import EVERY, induction_scan
from probes.masking import removed_sets
from tests.experiments.tiny_opt import write_tiny_opt
from tests.families import tiny
from tests.induction_model import VOCAB, crowded_opt, induction_llama, induction_opt

ROWS = ("--repeats", "2", "--lengths", "6", "8", "--seeds", "5")
FEW = ("--draws", "2", "--windows", "4")
# Of the random heads drawn with this seed none is the one that the induction head is built on.
SEED = 5
PLANTED = {"opt": (Head(0, 0), Head(1, 1)), "llama": (Head(0, 0), Head(1, 3))}
"""The previous-token head and the induction head."""
FIGURES = {"scores", "criterion", "distance", "attention", "positions", "masked"}


def study(model: Path, runs: Path, *options: str) -> tuple[Path, dict]:
    out = io.StringIO()
    words = ["induction", "--model", str(model), "--runs", str(runs), *FEW, *options]
    with contextlib.redirect_stdout(out):
        assert main(words) == 0
    line = json.loads(out.getvalue().splitlines()[-1])
    return Path(line["run"]), line


def table(run: Path) -> pd.DataFrame:
    """Mean scores, a row a component."""
    metrics = pd.read_parquet(run / "metrics.parquet").query("part == 'score'")
    return metrics.pivot(index="component", columns="metric", values="value")


def judgement(run: Path) -> pd.DataFrame:
    metrics = pd.read_parquet(run / "metrics.parquet").query("part == 'criterion'")
    return metrics.pivot(index="component", columns="metric", values="value")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints without a tokenizer, and one OPT with one."""
    root = tmp_path_factory.mktemp("models")
    induction_opt().save_pretrained(root / "opt")
    induction_llama().save_pretrained(root / "llama")
    shutil.copytree(root / "opt", root / "worded")
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", model_max_length=50
    ).save_pretrained(root / "worded")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module", params=["opt", "llama"])
def circuit(request, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """(name, folder of the run, last line)"""
    runs = tmp_path_factory.mktemp("runs")
    return request.param, *study(folders[request.param], runs, *ROWS, "--seed", str(SEED))


def test_exactly_the_planted_head_passes(circuit):
    name, run, line = circuit
    previous, induction = map(str, PLANTED[name])
    assert line["induction_heads"] == [induction]
    assert line["headline"].startswith(f"1 of {line['heads']} heads is an induction head (")
    assert f": {induction};" in line["headline"]
    assert line["rows"] == 10
    scores = table(run)
    assert scores.loc[induction, "prefix_matching"] == pytest.approx(1, abs=1e-3)
    assert scores.loc[induction, "attribution"] > 10
    assert scores.drop(index=induction)["prefix_matching"].max() < 0.1
    assert scores.loc[previous, "previous_token"] == pytest.approx(1, abs=1e-3)
    assert scores.drop(index=previous)["previous_token"].max() < 0.3
    assert scores.loc[induction, "ov"] == pytest.approx(1, abs=1e-5)
    assert scores.loc[induction, "qk_matching"] == pytest.approx(1, abs=1e-5)
    # W_QK and W_OV are both the identity of 25 dimensions: √25 / (√25 · √25)
    assert scores.loc[induction, "k_composition"] == pytest.approx(0.2, abs=1e-3)
    assert judgement(run).loc[induction, "q"] <= 0.05


def test_masking_it_leaves_nothing_and_masking_others_everything(circuit, folders):
    name, run, line = circuit
    previous, induction = PLANTED[name]
    sets = removed_sets(
        HookedModel.from_pretrained(str(folders[name])), [induction], draws=2, seed=SEED
    )
    assert len(sets) == 2 + 2 * 2
    assert not any(previous in one.heads for one in sets)
    assert line["left_without_them"]["copy_gain"]["share"] == pytest.approx(0, abs=1e-3)
    metrics = pd.read_parquet(run / "metrics.parquet").query("part == 'masked'")
    gain = metrics.query("metric == 'copy_gain' and against == 'whole'").set_index("set")
    assert gain.loc["induction", "left"] == pytest.approx(0, abs=1e-3)
    assert gain.loc["random", "left"] == pytest.approx(1, abs=1e-3)
    assert gain.loc["layer_matched", "left"] == pytest.approx(1, abs=1e-3)
    second = metrics.query("metric == 'second_copy_loss' and against == 'whole'").iloc[0]
    assert second["baseline"] < 1e-3
    assert second["baseline"] + second["value"] == pytest.approx(np.log(VOCAB), abs=1e-3)
    at = pd.read_parquet(run / "metrics.parquet").query("part == 'position'")
    assert at.query("set == 'induction'")["value"].to_numpy() == pytest.approx(
        np.log(VOCAB), abs=1e-3
    )
    assert at.query("set == 'whole' and copy == 1")["value"].max() < 1e-3
    alone = pd.read_parquet(run / "metrics.parquet").query("part == 'alone'")
    rise = alone.set_index("component")["value"]
    assert rise[str(induction)] == pytest.approx(np.log(VOCAB), abs=1e-2)
    assert rise[str(previous)] > np.log(VOCAB)  # it then finds nothing, and looks all the same
    others = rise.drop([str(previous), str(induction)])
    assert others.abs().max() < 1e-3


def test_the_scan_is_that_of_the_rows_stated(circuit, folders):
    name, run, _ = circuit
    scan = pd.read_parquet(run / "scan.parquet")
    model = HookedModel.from_pretrained(str(folders[name]))
    ours = induction_scan(
        model,
        lengths=(6, 8),
        repeats=2,
        seeds=range(SEED, SEED + 5),
        spacing="varied",
        scores=EVERY,
    )
    keys = ["component", "seed", "length", "score"]
    weights = scan["seed"].isna()
    assert set(scan[weights]["score"]) == {"ov", "k_composition", "qk_matching"}
    theirs = scan[~weights].set_index(keys)["value"]
    ours = ours.set_index(keys)["value"]
    assert len(theirs) == len(ours)
    assert (theirs - ours).abs().max() < 1e-6


def test_metrics_are_tidy(circuit):
    _, run, line = circuit
    metrics = pd.read_parquet(run / "metrics.parquet")
    assert {"part", "metric", "value"} <= set(metrics.columns)
    assert set(metrics["part"]) == {"score", "criterion", "masked", "alone", "position"}
    scores = metrics.query("part == 'score'")
    assert not scores.duplicated(["component", "metric"]).any()
    scan = pd.read_parquet(run / "scan.parquet")
    means = scan.groupby(["component", "score"])["value"].mean()
    theirs = scores.set_index(["component", "metric"])["value"]
    assert theirs.loc[means.index].to_numpy() == pytest.approx(means.to_numpy(), nan_ok=True)
    masked = metrics.query("part == 'masked'")
    assert not masked.duplicated(["metric", "set", "against", "k"]).any()
    passed = metrics.query("part == 'criterion' and metric == 'induction' and value == 1")
    assert passed["component"].tolist() == line["induction_heads"]


def test_the_page_has_the_viewer_and_needs_no_network(circuit):
    name, run, line = circuit
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "Attention on random tokens that repeat" in html
    assert f"{PLANTED[name][1]}" in html
    assert line["headline"].split(";")[0] in html.replace("&gt;", ">")
    assert not re.search(r"https?://|<link|<iframe|url\(|@import|\bfetch\(", html)
    assert not re.search(r"src=\"(?!data:)", html)
    assert "default-src 'none'" in html
    figures = {path.stem for path in (run / "figures").glob("*.png")}
    assert figures == FIGURES
    assert html.count("data:image/png;base64") == len(FIGURES)


def test_the_second_call_answers_at_once(circuit, folders, monkeypatch, capsys):
    name, run, line = circuit
    monkeypatch.delattr("experiments.induction.study.Induction.run")
    words = ["--model", str(folders[name]), "--runs", str(run.parent.parent), *FEW, *ROWS]
    assert main(["induction", *words, "--seed", str(SEED)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line


@pytest.mark.parametrize("spacing", ["fixed", "varied"])
def test_heads_that_lack_one_thing_are_rejected(spacing: str, tmp_path: Path):
    """In blocks of 8 that stand back to back the key is 7 positions back."""
    crowded_opt(7).save_pretrained(tmp_path / "crowded")
    rows = ("--repeats", "2", "--lengths", "8", "--seeds", "8", "--seed", "8")
    run, line = study(tmp_path / "crowded", tmp_path, *rows, "--spacing", spacing)
    assert line["induction_heads"] == ["L1H1"]
    found = judgement(run)
    offset = found.loc["L0H2"]
    assert offset["prefix_matching_control"] == pytest.approx(offset["prefix_matching"], abs=1e-3)
    assert offset["attribution_low"] > 0
    assert offset["positional"] == 1
    assert offset["matches"] == 0
    if spacing == "fixed":
        assert offset["prefix_matching"] == pytest.approx(1, abs=1e-3)
    else:
        assert offset["prefix_matching"] < 0.3
    copier, matcher = found.loc["L0H1"], found.loc["L1H2"]
    assert copier["prefix_matching"] < 1e-3
    assert (copier["matches"], copier["copies"]) == (0, 1)
    assert matcher["prefix_matching"] == pytest.approx(1, abs=1e-3)
    assert (matcher["matches"], matcher["copies"]) == (1, 0)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "but their attribution is not above 0: L1H2." in html
    assert ("score from position alone: L0H2." in html) == (spacing == "fixed")


def test_the_reference_beside_weights(folders, tmp_path: Path):
    options = ("--convention", "reference", "--spacing", "fixed", "--by", "ov", "--copying", "0.5")
    run, line = study(folders["llama"], tmp_path, *ROWS, *options)
    assert line["induction_heads"] == ["L1H3"]
    assert "ov > 0.5" in line["criterion"]
    scores = table(run)
    # 6 and 8 queries of the second copy; its last one also counts the first token, which nothing
    # follows that is looked for.
    assert scores.loc["L1H3", "prefix_matching_reference"] == pytest.approx(1, abs=0.02)
    assert scores["copying_reference"].between(0, 1).all()
    assert {"ov_low", "ov_high"} <= set(judgement(run).columns)


def test_by_the_copying_score_of_tokens_that_do_not_repeat_it_does_not_copy(folders, tmp_path):
    """Where nothing matches the head looks everywhere alike: no token is raised above others."""
    run, line = study(folders["opt"], tmp_path, *ROWS, "--by", "copying")
    assert line["induction_heads"] == []
    assert line["headline"].startswith("no head of 6 is an induction head")
    assert line["headline"].endswith("the best prefix matching is 1.00, of L1H1")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "but their copying is not above 0: L1H1." in html
    assert "No head passes, so none is masked." in html


def test_text_is_read_where_it_is_given(folders, tmp_path: Path):
    """24 words in a circle: after one round all is known, from the head alone."""
    order = random.Random(0).sample(range(1, VOCAB), VOCAB - 1)
    text = tmp_path / "circle.txt"
    text.write_text(" ".join(f"t{word}" for word in order * 30))
    options = ("--text", str(text), "--vocabulary", "corpus-frequency", "--drop", "0")
    run, line = study(folders["worded"], tmp_path, *ROWS, *options, "--seed", str(SEED))
    assert line["induction_heads"] == ["L1H1"]
    left = line["left_without_them"]
    assert set(left) == {"copy_gain", "icl_score"}
    assert left["icl_score"]["share"] == pytest.approx(0, abs=1e-3)
    masked = pd.read_parquet(run / "metrics.parquet").query("metric == 'icl_score'")
    assert set(masked["rows"]) == {4}
    assert masked["baseline"].min() < -1
    assert "Attention on text" in (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("tiny"))


def test_the_papers_rows(tiny_opt: Path, tmp_path: Path):
    options = ("--preset", "paper", "--lengths", "3", "5", "4", "--seeds", "8", "--batch", "4")
    run, line = study(tiny_opt, tmp_path, *options)
    scan = pd.read_parquet(run / "scan.parquet")
    dealt = scan.dropna(subset=["seed"]).groupby("seed")["length"].unique().map(list).to_dict()
    assert dealt == {seed: [(3, 5, 4)[seed % 3]] for seed in range(8)}
    assert {"prefix_matching_reference", "copying_reference"} <= set(scan["score"])
    assert line["rows"] == 8
    config = json.loads((run / "config.json").read_text())["options"]
    assert (config["vocabulary"], config["spacing"]) == ("merge-rank", "fixed")


@pytest.fixture(scope="module")
def not_killed(folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    runs = tmp_path_factory.mktemp("runs")
    return study(folders["opt"], runs, *ROWS, "--batch", "2", "--seed", str(SEED))


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_a_killed_run_resumes_to_the_same_numbers(
    folders, not_killed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
):
    """Three batches of seeds, then masking."""
    whole, line = not_killed
    keep = RunFolder.keep
    kept = []

    def dies(self, key, frame):
        keep(self, key, frame)
        kept.append(key)
        if len(kept) == shards:
            raise KeyboardInterrupt

    # Pictures are made after everything is measured.
    monkeypatch.setattr("experiments.induction.figures.figures", lambda findings: {})
    options = (*ROWS, "--batch", "2", "--seed", str(SEED))
    monkeypatch.setattr(RunFolder, "keep", dies)
    words = ["--model", str(folders["opt"]), "--runs", str(tmp_path / "runs"), *FEW, *options]
    assert main(["induction", *words]) == 130
    again = tmp_path / "runs" / "induction" / whole.name
    assert not (again / "metrics.parquet").exists()
    if shards == 4:
        rows = set(pd.read_parquet(again / "partial" / "masked.parquet")["row"])
        # Seeds that had no say in the choice of heads.
        assert rows == {f"seed {SEED + 5 + i}, length {n}" for i in range(5) for n in (6, 8)}
    monkeypatch.setattr(RunFolder, "keep", lambda *args: (kept.append(args[1]), keep(*args)))
    _, resumed = study(folders["opt"], tmp_path / "runs", *options)
    assert sorted(kept) == [
        "alone",
        "masked",
        *(f"scan {SEED + done}" for done in (0, 2, 4)),
    ]  # none twice
    assert resumed["headline"] == line["headline"]
    for name in ("metrics", "scan"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(again / f"{name}.parquet"), pd.read_parquet(whole / f"{name}.parquet")
        )


JUDGED = {"llama": 8, "falcon_h1": 8, "jamba": 4, "t5": 16, "bart": 16}
"""Heads of self attention."""


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "mamba", "jamba", "falcon_h1", "llama"])
def test_every_family(family: str, tmp_path: Path):
    tiny(family).save_pretrained(tmp_path / family)
    rows = ("--repeats", "3", "--lengths", "4", "5", "--seeds", "5")
    run, line = study(tmp_path / family, tmp_path, *rows, "--matching", "0")
    assert line["heads"] == JUDGED.get(family, 0)
    scan = pd.read_parquet(run / "scan.parquet")
    stacks = {"t5": {"encoder", "decoder", "cross"}, "bart": {"encoder", "decoder", "cross"}}
    assert set(scan["stack"]) == stacks.get(family, {""})
    mixers = {"mamba": {"Mixer"}, "jamba": {"Head", "Mixer"}, "falcon_h1": {"Head", "Mixer"}}
    assert set(scan["kind"]) == mixers.get(family, {"Head"})
    figures = {path.stem for path in (run / "figures").glob("*.png")}
    maps = {f"scores_{stack}" if stack else "scores" for stack in stacks.get(family, {""})}
    if "Mixer" in set(scan["kind"]):
        maps |= {"scores_mixers"}
    if family == "mamba":
        maps -= {"scores"}
    assert {name for name in figures if name.startswith("scores")} == maps
    why = {"bert": "has a direct path to logits", "mamba": "no attention heads"}
    if family in why:
        assert why[family] in line["headline"]
        assert len(line["headline"].splitlines()) == 1
    if "cross" in set(scan["stack"]):
        cross = scan.query("stack == 'cross'")
        assert not cross["score"].str.contains("distance|later|previous").any()
        assert "entropy" in set(cross["score"])


def test_beside_a_pruning_run(tiny_opt: Path, tmp_path: Path):
    out = io.StringIO()
    words = ["prune", "--model", str(tiny_opt), "--runs", str(tmp_path), "--units", "heads"]
    words += ["--tasks", "pair_mapping", "--limit", "4", "--report-limit", "4"]
    words += ["--shots", "0", "2", "--seeds", "1", "--fractions", "0", "0.5"]
    with contextlib.redirect_stdout(out):
        assert main([*words, "--rankings", "importance"]) == 0
    pruned = json.loads(out.getvalue().splitlines()[-1])["run"]
    run, _ = study(tiny_opt, tmp_path, *ROWS, "--prune-run", pruned)
    assert (run / "figures" / "importance.png").stat().st_size > 5_000
    metrics = pd.read_parquet(run / "metrics.parquet")
    importance = pd.read_parquet(Path(pruned) / "metrics.parquet").query("part == 'importance'")
    assert not importance.duplicated(["component", "shots"]).any()
    overlap = metrics.query("part == 'overlap'")
    scores = ("prefix_matching", "attribution", "copying", "ov", "previous_token")
    assert sorted(zip(overlap["shots"], overlap["score"], strict=True)) == sorted(
        (shots, score) for shots in (0, 2) for score in scores
    )
    means = table(run)
    for row in overlap.to_dict("records"):
        own = importance[importance["shots"] == row["shots"]].set_index("component")["value"]
        k = int(row["k"])
        assert k == 1  # 30 % of four heads
        assert row["components"] == 4
        common = set(own.nlargest(k).index) & set(means[row["score"]].nlargest(k).index)
        assert row["value"] == len(common) / k
        assert row["p"] == pytest.approx(stats.hypergeom(4, k, k).sf(len(common) - 1))
        ordered = means.loc[own.index, row["score"]]
        assert row["spearman"] == pytest.approx(stats.spearmanr(own, ordered).statistic)
    capacity = metrics.query("part == 'capacity'")
    assert set(capacity["ranking"]) == {"0 shots", "2 shots", "random"}
    own = importance[importance["shots"] == 2].set_index("component")["value"].sort_values()
    matching = means.loc[own.index, "prefix_matching"].to_numpy()
    left = [matching[removed:].sum() / matching.sum() for removed in range(5)]
    curve = capacity[capacity["ranking"] == "2 shots"].sort_values("removed")["value"]
    assert curve.to_numpy() == pytest.approx(left)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "Importance for tasks and induction scores" in html


REFUSED = [
    (["--lengths", "40"], "give lengths up to"),
    (["--repeats", "4", "--lengths", "6"], "ordinary tokens; give lengths up to 4"),
    (["--repeats", "2", "--lengths", "20"], "positions for 50 tokens; give lengths up to 16"),
    (["--lengths", "1"], "--lengths 1"),
    (["--seeds", "1", "--lengths", "4"], "--seeds 1: 1 rows"),
    (["--seeds", "0"], "--seeds 0"),
    (["--seed", str(2**64 - 1)], "--seed 18446744073709551615"),
    (["--repeats", "1"], "--repeats 1"),
    (["--draws", "1"], "--draws 1"),
    (["--windows", "1"], "--windows 1"),
    (["--drop", "0.5"], "--drop 0.5"),
    (["--matching", "1.5"], "--matching 1.5"),
    (["--level", "0"], "--level 0"),
    (["--limit", "3"], "--limit asked for"),
    (["--convention", "reference"], "give --spacing fixed"),
    (["--convention", "reference", "--spacing", "fixed", "--bos", "none"], "leave --bos"),
    (["--vocabulary", "merge-rank"], "has no tokenizer"),
    (["--preset", "paper"], "has no tokenizer"),
    (["--vocabulary", "corpus-frequency"], "give --text"),
    (["--text", "nowhere.txt"], "nowhere.txt"),
    (["--prune-run", "nowhere"], "no finished run of `ablate prune` there"),
    (["--model", "no-such-model"], "no-such-model"),
    (["--by", "nothing"], "--by"),
    (["--copying", "nan"], "--copying nan"),
]


def refused(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    assert main(["induction", *words, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_line_and_leaves_nothing(options, said, folders, tmp_path, capsys):
    model = [] if "--model" in options else ["--model", str(folders["opt"])]
    refused([*model, *options], said, tmp_path, capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"t1 \xff t2", "not UTF-8 at byte 3"), (b"t1 t2 t3", "window"), (b"", "window")],
    ids=["not UTF-8", "short", "empty"],
)
def test_text_that_cannot_be_read(content: bytes, said: str, folders, tmp_path: Path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    refused(["--model", str(folders["worded"]), "--text", str(text)], said, tmp_path, capsys)


def test_text_without_a_tokenizer(folders, tmp_path: Path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("t1 t2")
    words = ["--model", str(folders["opt"]), "--text", str(text)]
    refused(words, "no tokenizer to read it with", tmp_path, capsys)


def test_runs_of_something_else(circuit, folders, tmp_path: Path, capsys):
    name, run, _ = circuit
    words = ["--model", str(folders[name]), "--prune-run"]
    refused([*words, str(run)], "that is no run of `ablate prune`", tmp_path, capsys)
    record = {"study": "prune", "options": {"model": "another"}}
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.json").write_text(json.dumps(record))
    refused([*words, str(other)], "that run pruned another", tmp_path, capsys)
    record["options"]["model"] = str(folders[name])
    (other / "config.json").write_text(json.dumps(record))
    pd.DataFrame({"part": ["importance"], "unit": "heads", "component": "L7H0"}).to_parquet(
        other / "metrics.parquet"
    )
    refused([*words, str(other)], "the importance of 1 heads", tmp_path, capsys)
    (other / "metrics.parquet").unlink()
    refused([*words, str(other)], "no finished run", tmp_path, capsys)


@pytest.mark.parametrize("family", ["bert", "mamba", "t5"])
def test_the_reference_is_of_decoders(family: str, tmp_path: Path, capsys):
    tiny(family).save_pretrained(tmp_path / family)
    capsys.readouterr()
    words = ["--model", str(tmp_path / family), "--convention", "reference", "--spacing", "fixed"]
    refused(words, "heads of decoders", tmp_path, capsys)


def test_heads_of_the_last_line_are_components(circuit):
    _, run, line = circuit
    assert [str(parse_component(name)) for name in line["induction_heads"]] == line[
        "induction_heads"
    ]


def test_weights_that_are_not_finite(tmp_path: Path, capsys):
    model = induction_opt()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    capsys.readouterr()  # transformers' bar
    refused(["--model", str(tmp_path / "model")], "are not finite", tmp_path, capsys)


def test_a_damaged_pruning_run(folders: dict[str, Path], tmp_path: Path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.parquet").write_bytes(b"no parquet")
    words = ["--model", str(folders["opt"]), "--prune-run", str(run)]
    for content, said in (("{", "cannot be read"), ("{}", "cannot be read")):
        (run / "config.json").write_text(content)
        refused(words, said, tmp_path, capsys)
    pd.DataFrame({"x": [1]}).to_parquet(run / "metrics.parquet")
    refused(words, "no run of `ablate prune`", tmp_path, capsys)
