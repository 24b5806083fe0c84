"""Which data do the user's own task files name, and where does a mistake in it stand?

`datasets` reports a malformed line without its number, or after copying half of it to a cache. So
local data is read here: JSON lines and parquet come into memory (nothing is written), and every
complaint names the file and the line. `probes/task_yaml.py` reads the YAML files themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.task_yaml import TaskFile, scalar_of

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_WORDS = {str: "text", bool: "true/false", int: "a number", float: "a number"}


def task_names(path: Path) -> dict[str, Path]:
    """Task → its YAML file, for a folder (and those below it) or one file.

    Files without a `task:` of their own (bases that others include, groups) are passed over.
    Raises ValueError for a file that is no YAML, two files with one task, and no task at all.
    """
    files = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
    names: dict[str, Path] = {}
    for file in files:
        name = scalar_of(file, "task")
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


def data_files(file: TaskFile) -> dict[str, list[Path]]:
    """Split → the local json or parquet files a task's data is in; empty where it is elsewhere.

    Paths count from the folder of the YAML file, else from the working directory. Raises ValueError
    for a file that does not exist and a split that no file is given for.
    """
    files = (file.config.get("dataset_kwargs") or {}).get("data_files")
    if file.config.get("dataset_path") not in ("json", "parquet") or files is None:
        return {}
    if not isinstance(files, Mapping):
        files = {"train": files}
    found = {split: _paths(file.path, given) for split, given in files.items()}
    for key in SPLITS:
        split = file.config.get(key)
        if split is not None and split not in found:
            raise ValueError(
                f"{file.path}: {key} {split} has no data: data_files give {', '.join(found)}"
            )
    return found


def data_folder(file: TaskFile) -> Path | None:
    """The local folder that `dataset_path` names, beside the YAML file."""
    source = file.config.get("dataset_path")
    folder = file.path.parent / str(source)
    return folder if source and folder.is_dir() else None


def local_data(file: TaskFile) -> dict[str, Any]:
    """What to override in a task's configuration so that its data files are read by this module.

    Raises ValueError for missing and malformed data files.
    """
    paths = data_files(file)
    if not paths:
        folder = data_folder(file)
        return {"dataset_path": str(folder)} if folder else {}
    splits = read_splits(paths, file.config["dataset_path"])

    def given(**_: object) -> Any:
        """What lm-eval calls for the dataset, with the task's metadata as keywords."""
        return splits

    return {"custom_dataset": given, "dataset_kwargs": {}}


def _paths(file: Path, given: Any) -> list[Path]:
    found = []
    for name in given if isinstance(given, list) else [given]:
        places = [path for path in (file.parent / str(name), Path(str(name))) if path.is_file()]
        if not places:
            raise ValueError(
                f"{file} names data file {name}, which is neither in {file.parent} nor in "
                f"{Path.cwd()}: correct data_files"
            )
        found.append(places[0])
    return found


def read_splits(paths: Mapping[str, Sequence[Path]], kind: str) -> Any:
    """Split → its documents, from json or parquet files, in memory.

    Raises ValueError for malformed files, with the line.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    splits: Any = {}
    for split, files in paths.items():
        named = ", ".join(map(str, files))
        try:
            if kind == "parquet":
                tables = [datasets.Dataset(pq.read_table(path)) for path in files]
                splits[split] = datasets.concatenate_datasets(tables)
            else:
                rows = [row for path in files for row in json_rows(path)]
                splits[split] = datasets.Dataset.from_list(rows)
        except (pa.ArrowException, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{named}: no {kind} with one type a field: {reason}") from None
    return datasets.DatasetDict(splits)


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
                raise ValueError(f"{where}: no JSON: {error.msg}: {shortened(line)}") from None


def _checked(path: Path, rows: Iterator[tuple[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[str, tuple[str, str]] = {}
    found = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {place}: no JSON object: {shortened(json.dumps(row))}; "
                "give one {…} a line"
            )
        for field, value in row.items():
            kind = _kind(path, place, field, value)
            if kind is None:
                continue
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


def _kind(path: Path, place: str, field: str, value: Any) -> str | None:
    """The type of a field's value in words; None where there is nothing to tell it by."""
    if value is None:
        return None
    if not isinstance(value, list):
        return _WORDS.get(type(value), "an object")
    kinds = {kind for one in value if (kind := _kind(path, place, field, one)) is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"{path}, {place}: field {field} is a list of {' and '.join(sorted(kinds))}: "
            "give it one type"
        )
    return f"a list of {kinds.pop()}" if kinds else None


def shortened(text: str) -> str:
    """The text, or its beginning."""
    return text if len(text) <= 60 else f"{text[:57]}..."
