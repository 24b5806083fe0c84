"""Which lm-eval task object does a name stand for?

    pair_mapping                 a built-in task, offline (probes/builtin_tasks)
    my_tasks/, my_tasks/a.yaml   your own lm-eval YAML files, with local data
    hellaswag                    any task, group or tag of lm-eval; its data is on the hub

lm-eval is imported inside the functions, and silently: it takes seconds and talks.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from probes.task_files import local_data, task_names

BUILTIN = (
    "call_mapping",
    "code_continuation",
    "identifier_recall",
    "minimal_pairs",
    "pair_mapping",
)
BUILTIN_FOLDER = Path(__file__).parent / "builtin_tasks"


def task_objects(name: str) -> dict[str, Any]:
    """Task name → lm-eval's task object: one, or all of a folder or group.

    Raises ValueError for a name nothing has, and for malformed files.
    """
    path = Path(name)
    if name in BUILTIN:
        return _builtin(name)
    if path.is_dir():
        return _from_files(path, tuple(task_names(path)))
    if path.suffix == ".yaml":
        if not path.is_file():
            raise ValueError(f"no task file {name}: give an existing YAML file or a folder of them")
        return _from_files(path.parent, tuple(task_names(path)))
    return _from_lm_eval(name)


@lru_cache
def _builtin(name: str) -> dict[str, Any]:
    return _from_files(BUILTIN_FOLDER, (name,))


def _from_files(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    with quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        tasks: dict[str, Any] = {}
        for name in names:
            entry = manager.task_index[name]
            assert entry.yaml_path is not None
            changes = local_data(Path(entry.yaml_path), entry.cfg or {})
            # A group of one: the way lm-eval overrides keys of a task that it knows by name.
            group: Any = {"group": "own", "task": [{"task": name, **changes}]}
            with explained(name):
                tasks |= manager.load(group)["tasks"]
    return tasks


@lru_cache
def _from_lm_eval(name: str) -> dict[str, Any]:
    with quiet():
        import lm_eval.tasks
        from lm_eval.tasks import TaskManager

        # Its whole index takes half a minute to build; a plain task needs its own folder only.
        root = Path(lm_eval.tasks.__file__).parent
        word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])".encode())
        mentions = [file for file in sorted(root.rglob("*.yaml")) if word.search(file.read_bytes())]
        line = re.compile(rf"^task: *['\"]?{re.escape(name)}['\"]? *$".encode(), re.MULTILINE)
        homes = [file.parent for file in mentions if line.search(file.read_bytes())]
        if not mentions or not re.fullmatch(r"[\w.:+-]+", name):
            raise ValueError(_unknown(name))
        manager = (
            TaskManager(include_path=str(homes[0]), include_defaults=False)
            if len(homes) == 1
            else TaskManager()
        )
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name))
        with explained(name):
            return manager.load(name)["tasks"]


def _unknown(name: str) -> str:
    close = get_close_matches(name, BUILTIN, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"no task {name}{hint}: built-in tasks are {', '.join(BUILTIN)}; lm-eval has none of that "
        "name; for your own give a folder of lm-eval YAML files, such as ./my_tasks"
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
def explained(name: str) -> Iterator[None]:
    """A template that does not fit its documents, said in one line (ValueError)."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        raise ValueError(
            f"task {name}: a doc_to_… template does not fit its documents: {error.message}"
        ) from None
