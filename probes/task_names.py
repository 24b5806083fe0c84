"""Which lm-eval task object does a name stand for?

    pair_mapping                 a built-in task, offline (probes/builtin_tasks)
    my_tasks/, my_tasks/a.yaml   your own lm-eval YAML files, with local data
    hellaswag                    any task, group or tag of lm-eval; its data is on the hub
    bansal14, bansal16           the tasks of Bansal et al. (probes/bansal14.py)

lm-eval is imported inside the functions, and silently: it takes seconds and talks.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from probes.bansal14 import CORRECTED, CORRECTED_FOLDER, PRESETS
from probes.task_data import reached, split_files, stand_ins
from probes.task_files import data_files, data_folder, local_data, task_names
from probes.task_yaml import read_task_file, require_known_words

BUILTIN = (
    "call_mapping",
    "code_continuation",
    "identifier_recall",
    "minimal_pairs",
    "pair_mapping",
)
REMEDY = (
    "it takes from doc_to_text a text, from doc_to_choice a list of texts that are not empty, from "
    "doc_to_target one of them or its number from 0"
)
BUILTIN_FOLDER = Path(__file__).parent / "builtin_tasks"


def task_objects(name: str, data: str | Path | None = None) -> dict[str, Any]:
    """Task name → lm-eval's task object: one, or all of a folder, group or preset.

    `data` is a folder of records for tasks whose data is on the hub (probes/task_data.py). Raises
    ValueError for a name nothing has, malformed files, and data that cannot be had.
    """
    if name in PRESETS:
        return {k: v for one in PRESETS[name] for k, v in task_objects(one, data).items()}
    if name in BUILTIN:
        return _builtin(name)
    if files := _own_files(name):
        return _from_files(files, data)
    if name in CORRECTED:
        return _corrected(name) if data is None else _from_files(_corrected_file(name), data)
    return _from_lm_eval(name) if data is None else _from_lm_eval_with(name, data)


def task_sources(name: str, data: str | Path | None = None) -> tuple[Path, ...]:
    """The local files that decide what a task is: YAML, data, Python; of a task of lm-eval, its
    records under `data`, if any.

    lm-eval is not imported. Raises ValueError as `task_objects` does.
    """
    if name in PRESETS:
        return tuple(path for one in PRESETS[name] for path in task_sources(one, data))
    if name in BUILTIN:
        return (BUILTIN_FOLDER / "read.py", *sorted(BUILTIN_FOLDER.glob(f"{name}.*")))
    found: dict[Path, None] = {}
    files = _own_files(name)
    if not files and name in CORRECTED:
        files = _corrected_file(name)
    for path in files.values():
        file = read_task_file(path)
        folder = data_folder(file)
        local = [path for paths in data_files(file).values() for path in paths]
        found |= dict.fromkeys([*file.files, *local, *([folder] if folder else [])])
    if data is not None:
        for task in files or [name]:
            found |= dict.fromkeys(p for paths in split_files(data, task).values() for p in paths)
    return tuple(found)


def _own_files(name: str) -> dict[str, Path]:
    """Task → YAML file, where `name` is a folder or a file; empty where it is neither."""
    path = Path(name)
    if path.suffix == ".yaml" and not path.exists():
        raise ValueError(f"no task file {name}: give an existing YAML file or a folder of them")
    if not path.is_dir() and path.suffix != ".yaml":
        return {}
    files = task_names(path)
    for own, file in files.items():
        if own in BUILTIN and file.parent.resolve() != BUILTIN_FOLDER.resolve():
            raise ValueError(f"{file}: task {own} has the name of a built-in task: rename yours")
    return files


@lru_cache
def _builtin(name: str) -> dict[str, Any]:
    return _from_files({name: BUILTIN_FOLDER / f"{name}.yaml"})


@lru_cache
def _corrected(name: str) -> dict[str, Any]:
    return _from_files(_corrected_file(name))


def _corrected_file(name: str) -> dict[str, Path]:
    return {name: CORRECTED_FOLDER / f"{name}.yaml"}


def _from_files(files: Mapping[str, Path], data: str | Path | None = None) -> dict[str, Any]:
    with quiet():
        tasks: dict[str, Any] = {}
        for name, path in files.items():
            file = read_task_file(path)
            require_known_words(file)
            changes = local_data(file)
            if data is not None and not changes and "custom_dataset" not in file.config:
                changes = stand_ins(data, name, file.config)
            tasks |= _made(name, path, changes)
    return tasks


def _made(name: str, path: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The task of one YAML file, with some of its keys changed."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    config = _imported(path)
    with reached(name), explained(f"{path}: task {name}"), _built(path):
        # Not by name from an index of the folder: another file there may have that name.
        return manager.load({**config, **changes, "task": name})["tasks"]


def _imported(path: Path) -> dict[str, Any]:
    """What a YAML file says, as lm-eval reads it, its functions imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path)
    except (ImportError, AttributeError, NameError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: a !function cannot be imported: {_said(error)}") from error


@lru_cache
def _from_lm_eval(name: str) -> dict[str, Any]:
    with quiet():
        from lm_eval.tasks import TaskManager

        # Its whole index takes half a minute to build; a plain task needs its own folder only.
        homes = [file.parent for file in _definitions(name)]
        manager = (
            TaskManager(include_path=str(homes[0]), include_defaults=False)
            if len(homes) == 1
            else TaskManager()
        )
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name))
        try:
            with reached(name), explained(f"task {name}"):
                return manager.load(name)["tasks"]
        except ImportError as error:
            raise ValueError(
                f"task {name}: lm-eval's definition needs a module that is not here: {_said(error)}"
            ) from error


def _from_lm_eval_with(name: str, data: str | Path) -> dict[str, Any]:
    """A task of lm-eval on records from a folder."""
    with quiet():
        files = _definitions(name)
        if len(files) != 1:
            raise ValueError(
                f"{name} is a group of lm-eval: name its tasks one by one to read {data}"
            )
        config = read_task_file(files[0]).config
        return _made(name, files[0], stand_ins(data, name, config))


def _definitions(name: str) -> tuple[Path, ...]:
    """lm-eval's files that say `task: name`; none for a group or tag. ValueError where it knows
    no such name."""
    found = _index().get(name, ())
    if not found and not (re.fullmatch(r"[\w.:+-]+", name) and _mentioned(name)):
        raise ValueError(_unknown(name))
    return found


@lru_cache
def _index() -> Mapping[str, tuple[Path, ...]]:
    """Task → lm-eval's files that define it: 14 000 are read, once."""
    line = re.compile(rb"^task: *['\"]?([\w.:+-]+)['\"]? *$", re.MULTILINE)
    found: dict[str, tuple[Path, ...]] = {}
    for file in _lm_eval_files():
        for name in line.findall(file.read_bytes()):
            found[name.decode()] = (*found.get(name.decode(), ()), file)
    return found


def _mentioned(name: str) -> bool:
    """Whether any of lm-eval's files has the word: groups and tags are not defined by a line."""
    word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])".encode())
    return any(word.search(file.read_bytes()) for file in _lm_eval_files())


def _lm_eval_files() -> list[Path]:
    import lm_eval.tasks

    return sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))


def _unknown(name: str) -> str:
    close = get_close_matches(name, [*BUILTIN, *PRESETS], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"no task {name}{hint}: built-in tasks are {', '.join(BUILTIN)}; presets are "
        f"{', '.join(PRESETS)}; lm-eval has none of that name; for your own give a folder of "
        "lm-eval YAML files, such as ./my_tasks"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets without their log, bars and deprecation warnings."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets

        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            log.setLevel(level)
            if shown:
                datasets.enable_progress_bars()


@contextmanager
def explained(where: str) -> Iterator[None]:
    """A template or function that does not fit its documents, said in one line (ValueError).

    Around calls of lm-eval only: these are the errors that its prompt building ends in.
    """
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{where}: a doc_to_… template does not fit its documents: {error.message}"
        ) from None
    except (TypeError, AttributeError, LookupError, AssertionError, SyntaxError) as error:
        raise ValueError(f"{where}: lm-eval stops at {_said(error)}; {REMEDY}") from error


@contextmanager
def _built(path: Path) -> Iterator[None]:
    """lm-eval's own refusals, and what templates gave that it cannot read, with the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: lm-eval stops at {_said(error)}; {REMEDY}") from error


def _said(error: Exception) -> str:
    """The error in one line, with its type: lm-eval raises some without a word."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(said).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
