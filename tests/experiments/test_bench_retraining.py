"""Retraining in the benchmark: the same losses by every way, the cost model, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.bench import retraining, shapes, workers
from experiments.bench.arithmetic import Weights
from experiments.bench.plan import sessions_of
from experiments.bench.study import Bench
from experiments.bench.works import Work
from experiments.readme import bench_block, newest
from tests.experiments.test_bench import InProcess
from tests.experiments.tiny_opt import write_tiny_opt

ROWS = np.random.default_rng(0).integers(3, 40, (2, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"))


def work(name: str, students: tuple[tuple[int, int], ...]) -> Work:
    return Work(name, ROWS, 0, (), (), students)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "students", "peers"),
    [
        ("reset-lm", ((0, 0), (1, 0)), (retraining.plain, retraining.every_gradient)),
        ("reset-hidden", ((0, 0), (1, 0)), (retraining.plain, retraining.plain_stopping)),
        ("reset-seeds", ((1, 0), (1, 1), (1, 2)), (retraining.plain,)),
    ],
)
def test_every_way_has_the_same_curves(name: str, students, peers, folder: Path) -> None:
    asked = work(name, students)
    runs = []
    for way in (retraining.ours, *peers):
        run = way(shapes.load(str(folder), "float32", "cpu", 0), asked)
        runs.append(np.stack([run() for _ in range(4)]))
    for curve in runs:
        assert curve.shape == (4, len(students))
        assert (np.diff(curve, axis=0) < 0).all()  # it learns
        assert np.abs(curve - runs[0]).max() < 1e-4
    assert len(set(np.round(runs[0][0], 5))) == len(students)  # and each is another


def test_without_head_and_attention_the_unit_costs_are_those_of_the_cost_model() -> None:
    n = 12
    bare = Weights(n, 1, 1, 1, 1, 0, 0, 1)
    sweep = tuple((layer, 0) for layer in range(n))
    unit = bare.block(ROWS.size, 0)
    lm = {k: v / unit for k, v in retraining.operations(bare, work("reset-lm", sweep)).items()}
    assert lm["plain"] == sum(2 * n - layer + 1 for layer in range(n))
    assert lm["every-gradient"] == 3 * n * n
    assert lm["ours"] == n - 1 + sum(2 * (n - layer) + 1 for layer in range(n))
    assert lm["plain"] / lm["ours"] == pytest.approx(1.3, abs=0.01)
    hidden = retraining.operations(bare, work("reset-hidden", sweep))
    assert hidden["plain"] / hidden["ours"] == (n + 3) / 4
    assert hidden["plain-stopping"] / hidden["ours"] == pytest.approx(2.375)
    seeds = retraining.operations(bare, work("reset-seeds", ((6, 0), (6, 1))))
    assert seeds["ours"] / unit == 6 + 2 * (2 * 6 + 1)
    # A head as large as a block: its forward and its stream's gradient, on both sides.
    headed = replace(bare, unembed=bare.token)
    assert retraining.head_blocks(headed, work("reset-lm", sweep)) == 1
    more = retraining.operations(headed, work("reset-lm", sweep))
    assert more["ours"] / unit == lm["ours"] + 2 * n
    assert more["every-gradient"] / unit == lm["every-gradient"] + 3 * n


def test_the_command_makes_a_row_of_every_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    InProcess.started = []
    monkeypatch.setattr(workers, "Worker", InProcess)
    words = ["bench", "reset", "--reset-models", str(folder), "--runs", str(tmp_path)]
    words += ["--length", "12", "--repeats", "2", "--threads", "1", "--reset-rows", "2"]
    assert main(words) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["work"], row["peer"]) for row in line["rows"]] == [
        ("reset-lm", "plain"),
        ("reset-hidden", "plain"),
        ("reset-hidden", "plain-stopping"),
        ("reset-all-train", "every-gradient"),
        ("reset-seeds", "plain"),
    ]
    for row in line["rows"]:
        assert row["max_difference"] < 1e-4
        assert row["head_blocks"] > 0
        assert row["bound"] >= 1  # of two blocks, the base's one is what sharing saves
    report = next(tmp_path.glob("bench/*/report.html")).read_text()
    assert "Retraining reaches 95% of its arithmetic bound in" in report
    assert "to 0.001 nat in 5 of 5 rows" in report
    found = newest(tmp_path, "reset")
    assert found is not None
    assert bench_block(found).count("\n|") == 6  # head, rule, four works


def test_where_all_layers_take_too_long_some_stand_for_them() -> None:
    study = Bench(works=("reset",), reset_models=("opt-256",), length=128, budget=0.05)
    asked = {session.work.name: session for session in sessions_of(study)}
    layers = [layer for layer, _ in asked["reset-lm"].work.students]
    assert layers[0] == 0
    assert layers[-1] == 11
    assert len(layers) < 12
    assert asked["reset-lm"].components == 12
    assert len(asked["reset-seeds"].work.students) == 3
