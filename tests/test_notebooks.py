"""What notebooks import is there: running them takes minutes and is left to `make notebooks`."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
OURS = ("ablate", "probes", "experiments")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_that_a_notebook_imports_is_there(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = "\n".join(code).splitlines()
    tree = ast.parse("\n".join(line for line in lines if not line.startswith("%")))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [
        (node.module, name.name)
        for node in froms
        if node.module and node.module.partition(".")[0] in OURS
        for name in node.names
    ]
    assert names
    missing = [
        f"{module}.{name}"
        for module, name in names
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing
