"""What decides a result decides the hash, and nothing else does."""

import dataclasses
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import (
    ModelOptions,
    RunOptions,
    command_line,
    config_hash,
    config_of,
    fingerprint,
    options_of,
)
from probes import task_names
from probes.task_names import BUILTIN
from tests.experiments.toy import Counting


def test_hash_ignores_where_runs_are_kept_and_how_fast():
    study = Counting()
    for same in (
        dataclasses.replace(study, runs=Path("elsewhere")),
        dataclasses.replace(study, width=99),
    ):
        assert config_of("count", same) == config_of("count", study)
    assert "width" not in options_of(study)


@dataclass(frozen=True)
class Rates(RunOptions):
    most: float | None = 7
    rates: tuple[float, ...] = (1,)
    steps: int | float = 2


def test_equal_numbers_are_hashed_alike():
    for one, other in (
        (Rates(most=7), Rates(most=7.0)),
        (Rates(most=8), Rates(most=8.0)),
        (Rates(rates=(1, 2)), Rates(rates=(1.0, 2.0))),
        (Rates(rates=(1,)), Rates(rates=(1.0,))),
    ):
        assert config_hash(config_of("r", one)) == config_hash(config_of("r", other))
    assert repr(options_of(Rates())["most"]) == "7", "defaults are written as they always were"
    assert repr(options_of(Rates(steps=3))["steps"]) == "3"


@pytest.mark.parametrize("change", [{"seed": 1}, {"numbers": (0, 1)}, {"source": "here"}])
def test_hash_follows_every_other_option(change):
    changed = dataclasses.replace(Counting(), **change)
    assert config_hash(config_of("count", changed)) != config_hash(config_of("count", Counting()))
    assert config_hash(config_of("count", Counting())) != config_hash(config_of("c", Counting()))


def test_hash_follows_the_content_of_a_local_input(tmp_path: Path):
    source = tmp_path / "checkpoint"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_text("one")
    study = Counting(source=str(source), runs=source / "runs")
    before = config_of("count", study)
    assert list(before["inputs"]) == [str(source)]
    (source / "runs").mkdir()
    (source / "runs" / "result").write_text("a run inside its own input")
    (source / ".hidden").write_text("a lock, say")
    assert config_of("count", study) == before
    (source / "sub" / "weights").write_text("two")
    assert config_of("count", study)["inputs"] != before["inputs"]


@dataclass(frozen=True)
class Asking(ModelOptions):
    """A study that asks tasks."""

    tasks: tuple[str, ...] = ()
    fill: str = "zero"


def inputs_of(**options) -> dict[str, str]:
    return config_of("ask", Asking(**options))["inputs"]


def test_only_fields_that_name_inputs_are_looked_for(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = config_of("ask", Asking())
    for name in ("zero", "float32", "runs"):
        (tmp_path / name).write_text("a file that nobody named")
    assert config_of("ask", Asking()) == before
    assert set(before["inputs"]) == {"stdlib-opt", *(f"task {name}" for name in BUILTIN)}
    (tmp_path / "mine").write_text("a checkpoint")
    assert set(inputs_of(model="mine", tasks=("pair_mapping",))) == {"mine", "task pair_mapping"}


def test_hash_follows_the_content_of_the_built_in_tasks_asked(tmp_path: Path, monkeypatch):
    folder = tmp_path / "builtin"
    shutil.copytree(task_names.BUILTIN_FOLDER, folder)
    monkeypatch.setattr(task_names, "BUILTIN_FOLDER", folder)
    every, one = inputs_of(), inputs_of(tasks=("pair_mapping",))
    with (folder / "call_mapping.test.jsonl").open("a") as file:
        file.write("\n")
    assert inputs_of(tasks=("pair_mapping",)) == one
    changed = {name for name, mark in inputs_of().items() if every[name] != mark}
    assert changed == {"task call_mapping"}
    (folder / "read.py").write_text("# read otherwise")
    assert inputs_of(tasks=("pair_mapping",)) != one


def test_hash_follows_everything_that_a_task_file_names(tmp_path: Path):
    data = tmp_path / "elsewhere"
    (data / "deep").mkdir(parents=True)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    path = tasks / "mine.yaml"
    path.write_text(
        "task: mine\ninclude: ../elsewhere/base\ndoc_to_text: !function code.f\n"
        "dataset_path: json\ndataset_kwargs: {data_files: {test: ../elsewhere/deep/data.jsonl}}\n"
    )
    for name in ("elsewhere/base", "elsewhere/deep/data.jsonl", "tasks/code.py"):
        (tmp_path / name).write_text("tag: x")
    seen = [inputs_of(tasks=(str(path),)), inputs_of(tasks=(str(tasks),))]
    assert list(seen[0]) == ["stdlib-opt", f"task {path}"]
    for name in ("elsewhere/base", "elsewhere/deep/data.jsonl", "tasks/code.py"):
        (tmp_path / name).write_text(f"tag: {name}")
        now = [inputs_of(tasks=(str(path),)), inputs_of(tasks=(str(tasks),))]
        assert all(a != b for a, b in zip(now, seen, strict=True)), name
        seen = now
    (tasks / "helper.py").write_text("# imported by code.py, perhaps")
    assert inputs_of(tasks=(str(tasks),)) != seen[1]


def test_what_is_on_the_hub_goes_by_its_name():
    assert inputs_of(model="gpt2", tasks=("hellaswag",)) == {}


def test_fingerprint_follows_names_and_works_above_the_content_limit(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    small = fingerprint(tmp_path)
    monkeypatch.setattr("experiments.config.CONTENT_LIMIT", 0)
    large = fingerprint(tmp_path)
    assert small != large == fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(tmp_path) != large


def test_command_line_says_what_is_not_a_default():
    assert command_line("count", Counting(runs=Path("r"))) == "ablate count"
    study = Counting(numbers=(3, 4), source="my model", seed=2)
    assert command_line("count", study) == "ablate count --seed 2 --numbers 3 4 --source 'my model'"


@given(
    st.builds(
        Counting,
        seed=st.integers(0, 99),
        numbers=st.lists(st.integers(0, 9), min_size=1).map(tuple),
        source=st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1).filter(
            lambda text: not text.startswith("-")
        ),
    )
)
def test_command_line_parses_back_to_the_study(study: Counting):
    import tyro

    words = shlex.split(command_line("count", study))[2:]
    assert tyro.cli(Counting, args=words) == study


def test_shared_options_are_checked_where_they_are_defined():
    with pytest.raises(ValueError, match="--limit 0: give a count of at least 1"):
        ModelOptions(limit=0)
    assert set(RunOptions.__dataclass_fields__) < set(ModelOptions.__dataclass_fields__)
