"""The benchmark from its command to its table; real processes where it is about processes."""

from __future__ import annotations

import json
import mmap
import os
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.__main__ import main, parse
from experiments.bench import shapes, workers
from experiments.bench.study import Bench
from experiments.bench.table import markdown, summary
from experiments.bench.works import Work
from experiments.config import command_line
from experiments.readme import bench_block, newest
from tests.experiments.tiny_opt import write_tiny_opt

SMALL = ["--rows", "2", "--length", "12", "--answers", "3", "--limit", "2", "--repeats", "2"]
SMALL += ["--importance-rows", "3", "--threads", "1", "--dtypes", "float32"]
SMALL += ["--induction-lengths", "24", "9", "--induction-rows", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_opt(tmp_path_factory.mktemp("model"))


class InProcess:
    """A worker that works here: the study's own logic needs no processes."""

    started: list[str]

    def __init__(self, contender: str, setting: workers.Setting, work: Work) -> None:
        self.started.append(f"{contender} {work.name}")
        self._setting = setting
        self._run = workers.prepared(contender, setting, work)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def run(self) -> workers.Measured:
        return workers.measured(self._run, torch.device(self._setting.device))

    def matmul_rate(self) -> float:
        return workers.matmul_rate(self._setting.device, self._setting.dtype, side=64)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    InProcess.started = []
    monkeypatch.setattr(workers, "Worker", InProcess)
    return InProcess


def bench(*words: str) -> list[str]:
    return ["bench", *words, *SMALL]


def test_processes_measure_what_a_process_measures(folder: Path, tmp_path: Path, capsys):
    """The whole command, with real workers."""
    words = bench("importance", "--models", str(folder), "--runs", str(tmp_path))
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    line = json.loads(printed[-1])
    assert "ceiling" in printed[0]
    (row,) = line["rows"]
    assert {"work", "model", "dtype", "peer", "ratio", "max_difference", "ceiling_share"} < set(row)
    assert (row["work"], row["dtype"], row["peer"]) == ("importance", "float32", "reference")
    assert row["max_difference"] < 1e-4
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["ours_peak_bytes"] > 50 * 2**20  # a whole process with torch in it
    assert row["bound"] > 1
    path = Path(line["run"])
    assert {p.stem for p in (path / "figures").iterdir()} == {"ratio", "time", "memory"}
    metrics = pd.read_parquet(path / "metrics.parquet")
    runs = metrics[metrics.metric == "seconds"]
    assert runs.groupby("side").run.apply(list).to_dict() == {"ours": [0, 1], "reference": [0, 1]}


def test_every_work_and_peer_makes_a_row(folder: Path, tmp_path: Path, in_process, capsys):
    assert main(bench("--models", str(folder), "--runs", str(tmp_path))) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    found = [(row["work"], row["peer"]) for row in rows]
    sweeps = [(w, p) for w in ("sweep", "sweep-answers") for p in ("hf-loop", "bridge")]
    choices = [
        (w, p) for w in ("choices", "choices-shared") for p in ("hf-loop", "hflm", "hflm-batched")
    ]
    scanning = ("bridge", "bridge-last", "hf-attentions")
    scans = [(f"induction-{n}", p) for n in (24, 9) for p in scanning]
    assert found == [*sweeps, *choices, ("importance", "reference"), *scans]
    assert all(row["max_difference"] < 1e-4 for row in rows)
    assert all(0 < row["bound"] < 100 for row in rows)
    report = next(tmp_path.glob("bench/*/report.html")).read_text()
    assert "arithmetic bound" in report
    folder_of_run = newest(tmp_path, "sweep")
    assert folder_of_run is not None
    block = bench_block(folder_of_run)
    assert "by `ablate bench --models" in block
    assert block.count("\n|") == 9  # head, rule, five works and two lengths of the sixth
    assert newest(tmp_path / "nowhere", "sweep") is None
    assert newest(tmp_path, "no such work") is None


def test_a_model_measured_alone_has_no_peer(folder: Path, tmp_path: Path, in_process, capsys):
    words = bench("--models", str(folder), "--alone", str(folder), "--runs", str(tmp_path))
    assert main(words) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["work"] for row in line["rows"]] == [
        *("forward", "sweep-layer", "importance"),
        *("induction-24", "induction-9"),
    ]
    for row in line["rows"]:
        assert row["peer"] is row["ratio"] is row["peak_memory_ratio"] is None
        assert row["tokens_per_second"] > 0
    assert line["rows"][1]["components"] == 2  # the heads of layer 1
    assert "tokens/s" in line["headline"]


def test_what_was_measured_before_is_not_measured_again(
    folder: Path, tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch, capsys
):
    words = bench("importance", "sweep", "--models", str(folder), "--runs", str(tmp_path))
    words += ["--peers", "reference", "hf-loop"]
    run = InProcess.run

    def dies(self: InProcess) -> workers.Measured:
        if self.started[-1].endswith("sweep"):
            raise ChildProcessError("hf-loop (sweep) was killed by SIGKILL")
        return run(self)

    monkeypatch.setattr(InProcess, "run", dies)
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("killed by SIGKILL")
    assert list(tmp_path.glob("bench/*/partial/importance*"))
    monkeypatch.setattr(InProcess, "run", run)
    in_process.started.clear()
    assert main(words) == 0
    assert not any("importance" in started for started in in_process.started)
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 3


def setting(model: str) -> workers.Setting:
    return workers.Setting(model, "float32", "cpu", 1, 0)


def forward_work() -> Work:
    return Work("forward", np.full((1, 8), 5), 1, (), ())


def test_a_worker_that_dies_is_one_line_and_no_wait(folder: Path):
    with workers.Worker(workers.OURS, setting(str(folder)), forward_work()) as worker:
        worker.wait_until_ready()
        assert worker.run().values.shape == (1, 1)
        os.kill(worker._process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(ChildProcessError, match=r"ours \(forward on .* SIGKILL \(out of mem"):
            worker.run()
        assert time.monotonic() - started < 5


def test_a_worker_says_why_it_cannot_load():
    lost = pytest.raises(ChildProcessError, match="no folder ./nowhere")
    with lost, workers.Worker(workers.OURS, setting("./nowhere"), forward_work()) as worker:
        worker.wait_until_ready()


def test_memory_is_the_runs_own():
    def run() -> np.ndarray:
        fresh = mmap.mmap(-1, 64 * 2**20)  # pages that no allocator has kept from before
        for _ in range(64):
            fresh.write(b"1" * 2**20)
        fresh.close()
        return np.ones(1)

    found = workers.measured(run, torch.device("cpu"))
    again = workers.measured(lambda: np.ones(1), torch.device("cpu"))
    assert found.peak - found.before == pytest.approx(64 * 2**20, rel=0.05)
    assert again.peak - again.before < 2**20


def test_turns_go_forwards_and_backwards():
    assert workers.turns(["a", "b", "c"], 3) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_models_never_leave_their_dtype(dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(shapes.SHAPES, "opt-tiny", {"layers": 2, "d_model": 16, "heads": 2})
    outline = shapes.outline("opt-tiny", dtype, 0)
    assert all(p.is_meta for p in outline.model.parameters())
    model, again = (shapes.load("opt-tiny", dtype, "cpu", 3).model for _ in range(2))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    logits = model(torch.tensor([[2, 5, 6]])).logits
    assert logits.shape == (1, 3, shapes.VOCAB)
    assert torch.isfinite(logits).all()


def test_a_dtype_the_device_lacks_is_refused():
    with pytest.raises(ValueError, match="dtype uint16 on cpu: .* give another of --dtypes"):
        workers.matmul_rate("cpu", "uint16", side=8)
    assert workers.matmul_rate("cpu", "bfloat16", side=64, tries=2) > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["paint"], "invalid choice 'paint'"),
        (["--models", "./no-such-model"], "no folder ./no-such-model"),
        (["--models", "stdlib-opt", "stdlib-opt"], "name each of them once"),
        (["--dtypes", "int8"], "invalid choice 'int8'"),
        (["--device-map", "cuda:7"], "this machine has"),
        (["--device-map", "auto"], "both sides run on one device"),
        (["sweep", "--length", "600"], "--length 600: stdlib-opt reads 512 tokens"),
        (["choices", "--limit", "1000"], "--limit 1000: pair_mapping has"),
        (["choices", "--tasks", "no_such_task"], "no_such_task"),
        (["sweep", "--peers", "hflm"], "nothing to measure"),
        (["--repeats", "0"], "--repeats 0"),
        (["--budget", "-1"], "--budget"),
        (["induction", "--induction-lengths", "513", "600"], "stdlib-opt reads 512 tokens"),
        (["--induction-lengths", "4"], "give lengths of at least 5"),
        (["--induction-lengths", "64", "64"], "64 64: name each of them once"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, says, tmp_path: Path, capsys):
    models = [] if "--models" in words else ["--models", "stdlib-opt"]
    assert main(["bench", *words, *models, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_command_is_written_as_it_is_read():
    words = ["bench", "sweep", "choices", "--models", "opt-768", "--repeats", "5"]
    study = parse(words)
    assert isinstance(study, Bench)
    assert study.works == ("sweep", "choices")
    assert parse(shlex.split(command_line("bench", study))[1:]) == study


def test_the_table_by_hand():
    """Ratios are taken round by round: 4/2, 9/3 and 4/4, median 2."""
    rows = []
    for run, (mine, theirs) in enumerate([(2.0, 4.0), (3.0, 9.0), (4.0, 4.0)]):
        for side, seconds in (("ours", mine), ("hf-loop", theirs)):
            rows += [(side, run, "seconds", seconds), (side, run, "growth_bytes", 1.0)]
        rows += [("ours", run, "peak_bytes", 100.0), ("hf-loop", run, "peak_bytes", 150.0 + run)]
        rows.append(("hf-loop", run, "max_difference", 1e-6 * run))
    once = {"operations": 60.0, "matmul_rate": 40.0, "tokens": 10, "components": 5}
    rows += [("ours", -1, name, float(value)) for name, value in once.items()]
    rows += [("ours", -1, "of_components", 6.0), ("hf-loop", -1, "operations", 90.0)]
    metrics = pd.DataFrame(rows, columns=["side", "run", "metric", "value"])
    metrics = metrics.assign(work="sweep", model="m", dtype="float32", peer="hf-loop")
    row = SimpleNamespace(**summary(metrics).iloc[0])
    assert (row.ratio, row.ratio_low, row.ratio_high) == (2.0, 1.0, 3.0)
    assert (row.bound, row.ceiling_share) == (1.5, 0.5)
    assert row.max_difference == pytest.approx(2e-6)
    assert row.peak_memory_ratio == 1.52
    assert row.tokens_per_second == 20
    text = markdown(summary(metrics))
    assert "| sweep (5 of 6) | m | float32 | 3.00 | hf-loop 2.00 (1.00–3.00; 1.50) |" in text
