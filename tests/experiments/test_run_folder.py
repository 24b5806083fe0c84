"""A folder with metrics is a finished run, whatever happened on the way."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.run_folder import Outcome, RunFolder, load_runs, run_study
from tests.experiments.toy import Counting

METRICS = pd.DataFrame({"seed": [0, 1], "metric": "accuracy", "value": [0.5, 0.25]})
RUN = """
import sys
from pathlib import Path
from experiments.run_folder import run_study
from tests.experiments.toy import Counting
print("ready", flush=True)
folder, outcome = run_study("count", Counting(runs=Path(sys.argv[1]), fail=sys.argv[2],
    numbers=tuple(range(int(sys.argv[3])))))
print(outcome.line(folder.path))
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_of_several_processes_the_first_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    folder, outcome = run_study("count", Counting(runs=tmp_path))
    assert outcome == Outcome("counted to 2", {"counted": 3})
    assert not folder.leads
    assert not everything(tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert run_study("count", Counting(runs=tmp_path))[0].finished


def test_a_finished_run_has_all_its_files_and_nothing_else(tmp_path: Path):
    folder, outcome = run_study("count", Counting(runs=tmp_path))
    assert outcome == Outcome("counted to 2", {"counted": 3})
    assert everything(folder.path) == {
        "config.json",
        "environment.json",
        "outcome.json",
        "report.html",
        "metrics.parquet",
    }
    assert folder.path.parent == tmp_path / "count"
    config = json.loads((folder.path / "config.json").read_text())
    assert config["options"]["numbers"] == [0, 1, 2]
    environment = folder.environment()
    assert environment["command"] == "ablate count"
    assert environment["seed"] == 0
    assert {"python", "platform", "versions", "started", "argv"} <= set(environment)
    pd.testing.assert_series_equal(folder.load()["value"], pd.Series([0.0, 1, 2], name="value"))


def test_the_same_study_answers_from_the_finished_run(tmp_path: Path):
    folder, _ = run_study("count", Counting(runs=tmp_path))
    before = (folder.path / "metrics.parquet").stat()
    again, outcome = run_study("count", Counting(runs=tmp_path, width=3))
    assert outcome.headline == "counted to 2"
    assert (again.path / "metrics.parquet").stat() == before
    assert again.finished


def test_figures_and_their_report(tmp_path: Path):
    def later() -> Figure:
        return Figure(figsize=(1, 1))

    with RunFolder.for_study("count", Counting(runs=tmp_path)) as folder:
        folder.create()
        outcome = Outcome("done", {"share": np.float32(0.5), "heads": np.int64(3)})
        folder.finish(outcome, METRICS, figures={"one": Figure(figsize=(1, 1)), "two": later})
    assert everything(folder.path / "figures") == {"one.png", "two.png"}
    assert (folder.path / "report.html").read_text().count("data:image/png") == 2
    line = json.loads(folder.outcome().line(folder.path))
    assert line == {"run": str(folder.path), "headline": "done", "share": 0.5, "heads": 3}


def test_what_cannot_be_printed_is_not_recorded(tmp_path: Path):
    with RunFolder.for_study("count", Counting(runs=tmp_path)) as folder:
        folder.create()
        with pytest.raises(ValueError, match="JSON compliant"):
            folder.finish(Outcome("done", {"loss": float("nan")}), METRICS)
        with pytest.raises(AssertionError, match="no column metric, value"):
            folder.finish(Outcome("done"), pd.DataFrame({"x": [1]}))
    assert not folder.finished


@pytest.mark.parametrize("key", ["a", "a/b ü?", "x" * 400])
def test_shards_come_back_by_their_key(tmp_path: Path, key: str):
    with RunFolder.for_study("count", Counting(runs=tmp_path)) as folder:
        folder.create()
        assert folder.partial(key) is None
        folder.keep(key, METRICS)
        assert folder.partial(key + "2") is None
    with RunFolder.for_study("count", Counting(runs=tmp_path)) as again:
        pd.testing.assert_frame_equal(again.partial(key), METRICS)


def test_a_damaged_shard_is_named(tmp_path: Path):
    with RunFolder.for_study("count", Counting(runs=tmp_path)) as folder:
        folder.create()
        folder.keep("a", METRICS)
    shard = next((folder.path / "partial").iterdir())
    shard.write_bytes(b"half of it")
    with pytest.raises(ValueError, match="damaged") as caught:
        RunFolder(folder.path, folder.config).partial("a")
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fail", ["refuse", "refuse-late"])
def test_unusable_inputs_leave_nothing_behind(tmp_path: Path, fail):
    with pytest.raises((ValueError, LookupError)):
        run_study("count", Counting(runs=tmp_path / "runs", fail=fail))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fail", ["bug", "key", "disk", "interrupt"])
def test_other_failures_keep_the_work(tmp_path: Path, fail):
    study = Counting(runs=tmp_path, fail=fail)
    with pytest.raises((RuntimeError, KeyError, OSError, KeyboardInterrupt)):
        run_study("count", study)
    folder = RunFolder.for_study("count", study)
    assert folder.partial("count 1") is not None
    assert not folder.finished


class Broken(Counting):
    def run(self, folder: RunFolder) -> Outcome:
        folder.create()
        return json.loads("{")


def test_a_librarys_value_error_keeps_the_work(tmp_path: Path):
    with pytest.raises(json.JSONDecodeError):
        run_study("count", Broken(runs=tmp_path))
    assert RunFolder.for_study("count", Broken(runs=tmp_path)).path.exists()


def test_files_of_the_study_itself_are_never_removed(tmp_path: Path):
    folder = RunFolder.for_study("count", Counting(runs=tmp_path, fail="refuse-late"))
    folder.path.mkdir(parents=True)
    (folder.path / "checkpoint").write_text("hours of work")
    with pytest.raises(LookupError):
        run_study("count", Counting(runs=tmp_path, fail="refuse-late"))
    assert (folder.path / "checkpoint").exists()


def test_a_killed_run_resumes_where_it_was(tmp_path: Path):
    killed = start(str(tmp_path), "kill", "4")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    folder = next((tmp_path / "count").iterdir())
    (folder / "metrics.parquet.tmp").write_text("half-written")
    assert not RunFolder(folder, {}).finished
    resumed = start(str(tmp_path), "kill", "4", SPARE="1")
    output, _ = resumed.communicate(timeout=60)
    line = json.loads(output.splitlines()[-1])
    assert line["counted"] == 2  # the first two were kept
    assert len(load_runs(tmp_path, "count")) == 4
    assert not list(folder.glob("**/*.tmp"))
    assert len(RunFolder(folder, {}).environment()["resumed"]) == 1


@pytest.mark.parametrize(
    ("fail", "number"), [("kill", signal.SIGKILL), ("terminate", signal.SIGTERM)]
)
def test_a_lock_that_an_ended_run_left_is_taken_over(tmp_path: Path, fail: str, number: int):
    ended = start(str(tmp_path), fail, "4")
    ended.communicate(timeout=60)
    assert ended.returncode == -number
    (lock,) = tmp_path.glob("count/*/.lock")
    assert lock.read_text() == str(ended.pid)
    # Whoever has that number by now does not hold the lock: a file left behind says nothing.
    lock.write_text(str(os.getpid()))
    again = start(str(tmp_path), fail, "4", SPARE="1")
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert not lock.exists()
    assert len(load_runs(tmp_path, "count")) == 4


@pytest.mark.faults
def test_killed_at_any_moment_the_run_ends_the_same(tmp_path: Path):
    chance = random.Random(0)
    for _ in range(15):
        process = start(str(tmp_path), "no", "300")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.05, 2.5))
        process.kill()
        process.communicate()
        for metrics in tmp_path.glob("count/*/metrics.parquet"):
            assert len(pd.read_parquet(metrics)) == 300
    start(str(tmp_path), "no", "300").communicate(timeout=120)
    frame = load_runs(tmp_path, "count")
    assert frame["value"].tolist() == [float(number) for number in range(300)]


def test_two_processes_do_not_write_one_folder(tmp_path: Path):
    study = Counting(runs=tmp_path)
    with RunFolder.for_study("count", study) as first:
        first.create()
        with pytest.raises(ValueError, match=f"written by process {os.getpid()}: wait"):
            run_study("count", study)
        assert first.path.exists()
    run_study("count", study)


def test_a_run_that_another_process_finished_meanwhile_is_left_as_it_is(tmp_path: Path):
    study = Counting(runs=tmp_path)
    with RunFolder.for_study("count", study) as late:
        assert not late.finished
        finished, _ = run_study("count", study)
        before = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="finished by another process meanwhile"):
            late.create()
    after = {path: path.read_bytes() for path in finished.path.rglob("*") if path.is_file()}
    assert after == before


def test_unwritable_runs_are_refused_before_any_work(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="cannot write run folders under --runs"):
        run_study("count", Counting(runs=file / "runs", fail="bug"))
    with pytest.raises(OSError, match="cannot write run folders"):
        run_study("count", Counting(runs=Path("/proc/runs"), fail="bug"))
    assert everything(tmp_path) == {"file"}


def test_checking_leaves_nothing_behind(tmp_path: Path):
    RunFolder.for_study("count", Counting(runs=tmp_path / "a" / "b")).check_writable()
    assert not list(tmp_path.iterdir())


def test_create_comes_before_writing(tmp_path: Path):
    with pytest.raises(AssertionError, match="call folder.create"):
        RunFolder.for_study("count", Counting(runs=tmp_path)).keep("x", METRICS)


def test_load_runs_joins_runs_with_their_options(tmp_path: Path):
    study = Counting(runs=tmp_path)
    for seed in (0, 1):
        run_study("count", dataclasses.replace(study, seed=seed))
    with pytest.raises(RuntimeError):
        run_study("count", dataclasses.replace(study, fail="bug"))
    frame = load_runs(tmp_path, "count")
    assert frame.groupby(["config.seed", "config.numbers"])["value"].sum().tolist() == [3.0, 3.0]
    assert list(frame.columns)[:2] == ["run", "config.seed"]
    assert list(frame.columns)[-3:] == ["number", "metric", "value"]
    with pytest.raises(FileNotFoundError, match="no finished run of prune"):
        load_runs(tmp_path, "prune")
