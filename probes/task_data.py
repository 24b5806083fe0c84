"""Which local records stand in for a task's data on the hub?

    DIR/<task>/<split>.jsonl        one JSON object a line; also .json (one list) and .parquet
    DIR/<task>/<split>-….parquet    the parts of a split, as the hub names them

with the splits and fields that the dataset has on the hub (those of the paper's tasks are in
probes/bansal14.py). Splits that are neither reported, chosen by nor shown may be missing. Such a
folder also takes a task to a machine without a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probes.task_files import read_splits

KINDS = ("jsonl", "json", "parquet")
FILE = re.compile(rf"(?P<split>\w+)(-[\w.-]+)?\.(?P<kind>{'|'.join(KINDS)})")


def split_files(folder: str | Path, task: str) -> dict[str, list[Path]]:
    """Split → the files under DIR/<task>; empty where there is no such folder.

    Raises ValueError for a DIR that is no folder, and a split in files of two kinds.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"no data folder {root}: give a folder with <task>/<split>.jsonl")
    found: dict[str, list[Path]] = {}
    for path in sorted((root / task).glob("*")):
        if matched := FILE.fullmatch(path.name):
            found.setdefault(matched["split"], []).append(path)
    for split, paths in found.items():
        if len({path.suffix for path in paths}) > 1:
            named = " and ".join(path.name for path in paths)
            raise ValueError(f"{root / task} has split {split} in {named}: keep one of them")
    return found


def stand_ins(folder: str | Path, task: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What to override in a task's configuration so that DIR/<task> is its data.

    Raises ValueError, in one line, where the folder or a split that is needed is missing, for a
    malformed file, and for a task that is a Python class, which reads its data by itself.
    """
    if "class" in config:
        raise ValueError(
            f"task {task} is a Python class, which reads its own data: leave it out with {folder}"
        )
    files = split_files(folder, task)
    needed = _needed(config)
    missing = [split for split in needed if split not in files]
    if missing:
        have = f"has {', '.join(files)}" if files else "has no data"
        raise ValueError(
            f"{Path(folder) / task} {have}: task {task} needs "
            f"{' and '.join(f'{split}.jsonl' for split in missing)}, with the fields of "
            f"{config.get('dataset_path')} on the hub"
        )
    import datasets

    splits = datasets.DatasetDict()
    for kind in ("json", "parquet"):
        chosen = {s: paths for s, paths in files.items() if kind in paths[0].suffix}
        if chosen:
            splits.update(read_splits(chosen, kind))

    def given(**_: object) -> Any:
        """What lm-eval calls for the dataset, with the task's metadata as keywords."""
        return splits

    left_out = {
        key: None
        for key in ("training_split", "validation_split", "test_split")
        if config.get(key) is not None and config[key] not in splits
    }
    return {"custom_dataset": given, "dataset_kwargs": {}, **left_out}


def _needed(config: Mapping[str, Any]) -> list[str]:
    """The splits that are reported, chosen by or shown, by the rules of probes/tasks.py."""
    training, validation, test = (
        config.get(f"{kind}_split") for kind in ("training", "validation", "test")
    )
    shown = (config.get("fewshot_config") or {}).get("split") or config.get("fewshot_split")
    wanted = [test or validation, training or validation, shown]
    return [str(split) for split in dict.fromkeys(wanted) if split is not None]


@contextmanager
def reached(task: str) -> Iterator[None]:
    """A dataset that is neither in the cache nor within reach, said in one line (ValueError)."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        said = " ".join(str(error).split())
        # datasets ends so on repositories with a loading script, which it no longer runs.
        if isinstance(error, RuntimeError) and "script" not in said:
            raise
        raise ValueError(
            f"task {task}: its data is neither in the cache nor within reach ({said}): load it "
            f"once with a network, or give a data folder with {task}/<split>.jsonl"
        ) from error
