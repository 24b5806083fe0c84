"""What does a folder of the user's own task files say, and where does a mistake stand?

lm-eval skips a YAML file it cannot parse and `datasets` reports a malformed line without its
number, or after copying half of it to a cache. So local files are read here: YAML syntax is checked
first, JSON lines and parquet are read into memory (nothing is written), and every complaint names
the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]
"""What a YAML task file says, with what it includes, as lm-eval's index holds it."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_WORDS = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list"}


def task_names(path: Path) -> dict[str, Path]:
    """Task → its YAML file, for a folder (and those below it) or one file.

    Files without a `task:` of their own (bases that others include, groups) are passed over.
    Raises ValueError for a file that is no YAML, two files with one task, and no task at all.
    """
    files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
    names: dict[str, Path] = {}
    for file in files:
        name = _task_of(file)
        if name in names:
            raise ValueError(f"{file} and {names[name]} both define task {name}: rename one")
        if name:
            names[name] = file
    if not names:
        raise ValueError(
            f"no task in {path}: give a folder with lm-eval YAML files (…/name.yaml with a "
            "`task: name` line)"
        )
    return names


def _task_of(file: Path) -> str | None:
    """The scalar under `task:`, from the syntax tree: `!function` tags are not resolved."""
    import yaml

    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{file}, line {line}: no YAML: {error.problem}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text: {error.reason}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file}: no task file: give `key: value` lines, `task: name` among them")
    for key, value in node.value:
        if key.value == "task" and isinstance(value, yaml.ScalarNode):
            return str(value.value)
    return None


def local_data(file: Path, config: Config) -> dict[str, Any]:
    """What to override in `config` so that its data files are read as this module reads them.

    Paths count from the folder of the YAML file, else from the working directory. Configs whose
    data is no local json or parquet are left as they are, but for a dataset folder beside the YAML
    file. Raises ValueError for a file that does not exist and a split that no file is given for.
    """
    kwargs = config.get("dataset_kwargs") or {}
    source, files = config.get("dataset_path"), kwargs.get("data_files")
    if source not in ("json", "parquet") or files is None:
        folder = file.parent / str(source)
        return {"dataset_path": str(folder)} if source and folder.is_dir() else {}
    if not isinstance(files, Mapping):
        files = {"train": files}
    paths = {split: _paths(file, given) for split, given in files.items()}
    for key in SPLITS:
        split = config.get(key)
        if split is not None and split not in paths:
            raise ValueError(
                f"{file}: {key} {split} has no data: data_files give {', '.join(paths)}"
            )
    return {"custom_dataset": _reader(paths, str(source)), "dataset_kwargs": {}}


def _paths(file: Path, given: str | Sequence[str]) -> list[Path]:
    found = []
    for name in [given] if isinstance(given, str) else given:
        places = [path for path in (file.parent / name, Path(name)) if path.is_file()]
        if not places:
            raise ValueError(
                f"{file} names data file {name}, which is neither in {file.parent} nor in "
                f"{Path.cwd()}: correct data_files"
            )
        found.append(places[0])
    return found


def _reader(paths: Mapping[str, Sequence[Path]], kind: str) -> Callable[..., Any]:
    """What lm-eval calls for the dataset, with the task's metadata as keywords."""

    def read(**_: object) -> Any:
        import datasets
        import pyarrow.parquet as pq

        splits: Any = {}
        for split, files in paths.items():
            if kind == "parquet":
                tables = [datasets.Dataset(pq.read_table(path)) for path in files]
                splits[split] = datasets.concatenate_datasets(tables)
            else:
                rows = [row for path in files for row in json_rows(path)]
                splits[split] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)

    return read


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, or of a .json file that holds one list.

    Raises ValueError with the line's number for a line that is no JSON object, or whose field is
    of another type than before.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: no UTF-8 text: {error.reason}") from None
    if text.lstrip().startswith("["):
        return _checked(path, _whole(path, text))
    return _checked(path, _lines(path, text))


def _whole(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no JSON: {error.msg}") from None
    yield from ((f"entry {i}", row) for i, row in enumerate(rows, 1))


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): a JSON string may hold a bare U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{path}, line {number}"
                raise ValueError(f"{where}: no JSON: {error.msg}: {_short(line)}") from None


def _checked(path: Path, rows: Iterator[tuple[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[str, tuple[str, str]] = {}
    found = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {place}: no JSON object: {_short(json.dumps(row))}; give one {{…}} a line"
            )
        for field, value in row.items():
            if value is None:
                continue
            kind = _WORDS.get(type(value), "an object")
            before, where = kinds.setdefault(field, (kind, place))
            if kind != before:
                raise ValueError(
                    f"{path}, {place}: field {field} is {kind} here and {before} in {where}: "
                    "give it one type"
                )
        found.append(row)
    if not found:
        raise ValueError(f"{path} is empty: give one JSON object a line")
    return found


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
