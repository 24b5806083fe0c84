"""The README is a promise: its blocks run, its commands parse, its numbers are the record's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from experiments.__main__ import parse
from experiments.config import ZOO
from experiments.readme import replaced

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(capsys):
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)  # the README's own text, from this tree
    printed = capsys.readouterr().out
    assert "torch.Size" in printed
    assert "component" in printed


@pytest.mark.parametrize(
    "command", [c for b in blocks("console") for c in b.splitlines() if c.startswith("$ ablate")]
)
def test_ablate_commands_parse(command: str):
    assert parse(shlex.split(command, comments=True)[2:])


def test_make_targets_exist():
    asked = re.findall(r"^\$ make (\w+)", README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(asked)
    for target in asked:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_bundled_models_numbers_are_its_records():
    record = json.loads((ZOO / "stdlib-opt" / "training.json").read_text())
    last = record["curve"][-1] | record["held_out"]
    table = README.split("<!-- zoo -->")[1].split("<!-- /zoo -->")[0]
    for name in ("validation_loss", "late_loss", "early_loss", "prefix_matching"):
        assert f"{last[name]:.2f}" in table, name


def test_every_path_of_the_map_exists():
    tree = README.split("## Rooms")[1].split("```")[1]
    rooms: list[str] = []  # the one a line is in, from the outermost
    for line in tree.splitlines():
        deep = (len(line) - len(line.lstrip())) // 2
        if deep > 2:
            deep = len(rooms)  # the caption goes on
        names = re.findall(r"[\w_]+\.py|\w+/", line)
        if match := re.match(r"^ *(\w+)/ ", line):
            rooms = [*rooms[:deep], match[1]]
            assert ROOT.joinpath(*rooms).is_dir(), rooms
            names = names[1:]
        elif deep < len(rooms):
            rooms = rooms[:deep]
        for name in names:
            assert ROOT.joinpath(*rooms, name).exists(), f"{rooms} {name}: {line.strip()}"


def test_figures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists(), path


def test_marks_are_replaced_once():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert replaced(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="0 places"):
        replaced(text, "y", "new")
