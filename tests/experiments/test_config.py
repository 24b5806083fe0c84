"""What decides a result decides the hash, and nothing else does."""

import dataclasses
import shlex
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
from tests.experiments.toy import Counting


def test_hash_ignores_where_runs_are_kept_and_how_fast():
    study = Counting()
    for same in (
        dataclasses.replace(study, runs=Path("elsewhere")),
        dataclasses.replace(study, width=99),
    ):
        assert config_of("count", same) == config_of("count", study)
    assert "width" not in options_of(study)


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
