"""What a user types and sees: help at once, one JSON line, one line of complaint, exit codes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from experiments import __main__ as cli
from experiments.config import ModelOptions
from tests.experiments.toy import Counting

HEAVY = {"torch", "transformers", "pandas", "numpy", "scipy", "matplotlib", "datasets", "lm_eval"}


@pytest.fixture(autouse=True)
def toy_studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cli, "STUDIES", {"count": Counting, **cli.STUDIES})
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ablate: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_last_line_is_the_outcome(capsys, tmp_path: Path):
    assert cli.main(["count", "--numbers", "4", "5"]) == 0
    first = capsys.readouterr()
    line = json.loads(first.out.splitlines()[-1])
    assert line["headline"] == "counted to 5"
    assert (Path(line["run"]) / "metrics.parquet").exists()
    assert first.err == f"ablate: report in {line['run']}/report.html\n"
    assert cli.main(["count", "--numbers", "4", "5"]) == 0
    second = capsys.readouterr()
    assert json.loads(second.out) == line
    assert second.err.startswith("ablate: finished before, on 20")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["count", "--seed", "x"], "--seed: invalid literal"),
        (["count", "--sed", "3"], "Unrecognized options: --sed, 3"),
        (["count", "--fail", "maybe"], "invalid choice 'maybe' for argument '--fail'"),
        (["paint"], "Unrecognized options: paint; Available subcommands: count, prune, induction"),
        ([], "one of {count, prune, induction, reset, hybrid, pretrain, bench}; see ablate --help"),
        (["count", "--numbers", "-1"], "--numbers"),
        (["count", "--numbers", "1", "x" * 200], "x" * 200),
        (["count", "--fail", "refuse"], "no model colossus: the bundled one is tiny; give that"),
        (["count", "--fail", "refuse-late"], "L0H1 gives NaN on example 3"),
        (["count", "--runs", "/proc/none"], "cannot write run folders under --runs: "),
        (["prune", "--fractions", "1.5"], "1.5"),
        (["count", "--source", "x" * 300], "File name too long: xxx"),
        (["count", "--runs", "x" * 300], "File name too long: xxx"),
        (["prune", "--model", "x" * 300], "File name too long: xxx"),
        (["prune", "--tasks", "x" * 300], "File name too long: xxx"),
        (["prune", "--tasks", "nowhere.yaml"], "no task file nowhere.yaml"),
        (["pretrain", "--corpus", "x" * 300], "File name too long: xxx"),
        (["pretrain", "--start-from", "x" * 300], "File name too long: xxx"),
        (["pretrain", "--heads", "5"], "d_model 192 does not divide into 5 heads"),
    ],
)
def test_unusable_arguments_get_one_line_and_leave_nothing(words, says, capsys, tmp_path):
    assert cli.main(words) == 2
    assert says in complaint(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fail", "error"), [("bug", RuntimeError), ("key", KeyError), ("disk", OSError)]
)
def test_bugs_and_broken_machines_keep_their_traceback(fail: str, error):
    with pytest.raises(error):
        cli.main(["count", "--fail", fail])


def test_interruption_says_how_to_go_on(capsys, tmp_path: Path):
    assert cli.main(["count", "--fail", "interrupt"]) == 130
    line = complaint(capsys)
    assert "interrupted; the same command resumes runs/count/" in line
    assert Path(line.split()[-1], "partial").is_dir()


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in cli.STUDIES)])
def test_help_imports_nothing_heavy(words: list[str]):
    code = (
        "import sys\nfrom experiments.__main__ import main\n"
        f"code = main({words!r})\nprint(sorted({HEAVY!r} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert "usage: ablate" in done.stdout
    assert done.stderr == ""


def test_help_shows_every_study_and_its_example(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.STUDIES:
        assert f"$ ablate {name}" in text


@pytest.mark.parametrize("study", cli.STUDIES.values())
def test_options_have_help_and_shared_ones_mean_the_same(study: type, capsys):
    shared = get_type_hints(ModelOptions)
    hints = get_type_hints(study)
    name = next(name for name, known in cli.STUDIES.items() if known is study)
    cli.main([name, "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(study):
        positional = field.metadata.get("positional", False)
        shown = "positional arguments" if positional else f"--{field.name.replace('_', '-')}"
        assert shown in text
        if field.name in shared:
            assert hints[field.name] == shared[field.name]
        if field.name != "limit" and field.name in shared:
            assert field.default == ModelOptions.__dataclass_fields__[field.name].default


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_module_is_the_command_in_any_locale(encoding: str):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "paint"],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "ablate: Unrecognized options: paint; Available subcommands: prune, induction, reset, "
        "hybrid, pretrain, bench; see ablate --help\n"
    )
