"""Hybrids in the benchmark: every way is the same function, the arithmetic, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.__main__ import main
from experiments.bench import hybrids, workers
from experiments.bench.plan import sessions_of
from experiments.bench.study import Bench
from experiments.bench.workers import Setting
from experiments.bench.works import Work
from experiments.hybrids.architecture.model import Hybrid
from experiments.readme import bench_block, newest
from tests.experiments.test_bench import InProcess

SIZES = (16, 1)


def setting(model: str) -> Setting:
    return Setting(model, "float32", "cpu", None, 0)


def work(name: str, rows: int, length: int) -> Work:
    return Work(name, np.zeros((rows, length), int), 0, (), (), sizes=SIZES)  # pyright: ignore[reportArgumentType]


def test_both_scans_are_one_function() -> None:
    asked = work("hybrid-scan", 3, 7)
    ours, theirs = (
        hybrids.prepared(contender, setting("64x16"), asked)() for contender in ("ours", "hf-mamba")
    )
    assert np.abs(ours).max() == 1
    assert np.abs(ours - theirs).max() < 1e-5
    assert hybrids.operations("64x16", asked)["ours"] == 22 * 3 * 7 * 64 * 16


@pytest.mark.parametrize(
    ("preset", "peer"), [("gpt2", "lean-gpt2"), ("mamba", "hf-mamba"), ("mambaformer", "hf-mamba")]
)
def test_every_way_has_the_same_curve(preset: str, peer: str) -> None:
    asked = work("hybrid-step", 8, 24)
    curves = []
    for contender in ("ours", peer):
        run = hybrids.prepared(contender, setting(preset), asked)
        curves.append(np.concatenate([run() for _ in range(3)]))
    ours, theirs = curves
    assert len(ours) == 3 * hybrids.steps_of(preset, asked)
    assert len(set(ours)) == len(ours)  # fresh prompts and other weights at each step
    assert np.abs(ours - theirs).max() < 1e-4 * ours.max()


def test_a_lean_gpt2_is_of_the_same_size() -> None:
    own = Hybrid(hybrids.config_of("gpt2", (32, 3)))
    lean = hybrids.LeanGPT2(32, 3)
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in lean.parameters())
    lean.take(own)
    prompts = torch.randn(2, 24, hybrids.D_X)
    torch.testing.assert_close(lean(prompts), own(prompts=prompts).logits)
    once = hybrids.operations("gpt2", work("hybrid-step", 4, 24))
    assert once["ours"] == once["lean-gpt2"]


def test_beside_another_model_only_times_are_compared() -> None:
    run = hybrids.prepared("lean-gpt2", setting("mamba"), work("hybrid-step", 2, 24))
    assert np.isnan(run()).all()


def test_the_command_makes_a_row_of_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    InProcess.started = []
    monkeypatch.setattr(workers, "Worker", InProcess)
    words = ["bench", "hybrid", "--runs", str(tmp_path), "--repeats", "1", "--hybrid-lengths", "5"]
    words += ["--hybrid-layers", "1", "--hybrid-width", "16", "--hybrid-rows", "2"]
    assert main([*words, "--hybrid-models", "gpt2", "mamba"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["work"], row["model"], row["peer"]) for row in line["rows"]] == [
        ("hybrid-scan-5", "64x16", "hf-mamba"),
        ("hybrid-scan-5", "64x16", "hf-mamba-kept"),
        ("hybrid-step", "gpt2", "lean-gpt2"),
        ("hybrid-step", "mamba", "lean-gpt2"),
        ("hybrid-step", "mamba", "hf-mamba"),
        ("hybrid-step", "mamba", "hf-mamba-kept"),
    ]
    same = [row for row in line["rows"] if (row["model"], row["peer"]) != ("mamba", "lean-gpt2")]
    assert all(row["bound"] == 1 and row["max_difference"] is not None for row in same)
    (other,) = [row for row in line["rows"] if row not in same]
    assert other["max_difference"] is None
    assert all((row["max_difference"] or 0) < 1e-4 for row in line["rows"])
    report = next(tmp_path.glob("bench/*/report.html")).read_text()
    assert re.search(r"Mamba in \d of 2 rows", report)
    assert "to 1e-05 of their largest entry in 2 of 2 rows" in report
    found = newest(tmp_path, "hybrid")
    assert found is not None
    assert bench_block(found).count("\n|") == 5  # head, rule, three works


def test_it_is_measured_when_it_is_named() -> None:
    asked = list(sessions_of(Bench(works=("hybrid",), hybrid_lengths=(3,), hybrid_rows=1)))
    assert [s.work.label for s in asked] == ["hybrid-scan-3", *3 * ["hybrid-step"]]
    assert asked[1].peers == ("lean-gpt2",)  # it has no mixer to replace
    with pytest.raises(ValueError, match=r"^--hybrid-lengths 0: give"):
        Bench(works=("hybrid",), hybrid_lengths=(0,))
    with pytest.raises(ValueError, match="no preset|gpt9"):
        list(sessions_of(Bench(works=("hybrid",), hybrid_models=("gpt9",))))
