"""What does one lm-eval YAML file say, and which of its words would lm-eval stumble over?

lm-eval passes over a file that it cannot read, looks for a metric that it does not know on the
network, and ends on a misspelt key with a traceback. So a file is read here first, with what it
includes, and its words are compared with those lm-eval knows. Where it misleads: a template is
wrong or right for a document, not for a file, so that shows only when documents are put into it
(`probes.task_names.explained`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import yaml

Config = Mapping[str, Any]
"""What a YAML task file says, with what it includes; a `!function` is a `Function`."""
STRUCTURE = ("tag", "task_list")
"""Keys that lm-eval takes out of a task's configuration before it is one."""
TEXTS = (
    *("dataset_path", "dataset_name", "output_type", "description", "gen_prefix"),
    *("target_delimiter", "fewshot_delimiter"),
    *("training_split", "validation_split", "test_split", "fewshot_split"),
)
"""Keys whose value is a text (or a function)."""


@dataclass(frozen=True)
class Function:
    """A `!function module.name` of a YAML file in `folder`, not imported."""

    folder: Path
    reference: str

    @property
    def module(self) -> Path:
        """The file beside the YAML file that it is in, if it is in one."""
        return self.folder / f"{self.reference.rpartition('.')[0].replace('.', '/')}.py"


@dataclass(frozen=True)
class TaskFile:
    """A YAML file and the files it is made of.

    Attributes:
        path: the file.
        config: what it says.
        files: itself, what it includes, and the local Python files of its functions.
    """

    path: Path
    config: Config
    files: tuple[Path, ...]


def scalar_of(file: Path, key: str) -> str | None:
    """The scalar under `key` of one file, from the syntax tree: tags are not resolved.

    Raises ValueError, with the line, for a file that is no YAML or no mapping.
    """
    with _readable(file):
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file}: no task file: give `key: value` lines, `task: name` among them")
    for name, value in node.value:
        if name.value == key and isinstance(value, yaml.ScalarNode):
            return str(value.value)
    return None


def read_task_file(path: Path) -> TaskFile:
    """A YAML file with its includes beneath it (its own keys win); no function is imported.

    Raises ValueError, with the file, for what cannot be read and an include that does not exist.
    """
    config, files = _merged(path, ())
    modules = {function.module: None for function in _functions(config.values())}
    return TaskFile(path, config, (*files, *(file for file in modules if file.is_file())))


def require_known_words(file: TaskFile) -> None:
    """Compare keys, metrics and aggregations with lm-eval's. ValueError names the nearest one."""
    from lm_eval.api.instance import OutputType
    from lm_eval.config.task import FewshotConfig, TaskConfig

    config, kinds = file.config, get_args(OutputType)
    if "group" in config:
        raise ValueError(f"{file.path}: a task with `group:`, which lists tasks: call it `tag:`")
    if "class" not in config:  # a Python task has keys of its own
        _require_keys(file, config, [*(f.name for f in fields(TaskConfig)), *STRUCTURE])
        if not config.get("dataset_path") and not config.get("custom_dataset"):
            raise ValueError(f"{file.path}: no data: give dataset_path, such as json")
        if not config.get("test_split") and not config.get("validation_split"):
            raise ValueError(f"{file.path}: no split to report on: give test_split")
        needed = ["doc_to_text", "doc_to_target"]
        needed += ["doc_to_choice"] * (config.get("output_type") == "multiple_choice")
        for key in needed if "use_prompt" not in config else []:
            if config.get(key) is None:
                raise ValueError(f"{file.path}: no {key}: give a field's name or a template")
    kind = config.get("output_type", kinds[0])
    if kind not in kinds:
        raise ValueError(
            f"{file.path}: lm-eval has no output_type {kind}: give one of {', '.join(kinds)}"
        )
    for key in ("dataset_kwargs", "fewshot_config"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ValueError(f"{file.path}: {key} is {config[key]!r}: give `key: value` lines")
    for key in TEXTS:
        if not isinstance(config.get(key), str | Function | None):
            raise ValueError(f"{file.path}: {key} is {config[key]!r}: give a text, in quotes")
    shown = config.get("fewshot_config") or {}
    _require_keys(file, shown, [f.name for f in fields(FewshotConfig)], of=" of fewshot_config")
    _require_metrics(file, config.get("metric_list"), config.get("process_results") is not None)


def _require_keys(file: TaskFile, given: Config, known: Sequence[str], of: str = "") -> None:
    for key in given:
        if key not in known:
            raise ValueError(
                f"{file.path}: lm-eval has no key {key}{of}{_nearest(key, known)}: correct it"
            )


def _require_metrics(file: TaskFile, metrics: Any, own_rules: bool) -> None:
    import_module("lm_eval.api.metrics")  # which fills the registries
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    for entry in metrics if isinstance(metrics, list) else [metrics] if metrics else []:
        if not isinstance(entry, Mapping) or "metric" not in entry:
            raise ValueError(
                f"{file.path}: metric_list has {entry!r}: give a list of `- metric: acc`"
            )
        name, aggregation = entry["metric"], entry.get("aggregation")
        # A task that grades by rules of its own may call its metrics what it likes.
        free = own_rules and aggregation is not None
        if not (free or isinstance(name, Function)) and name not in METRIC_REGISTRY:
            near = _nearest(name, list(METRIC_REGISTRY.keys()))
            raise ValueError(
                f"{file.path}: lm-eval has no metric {name}{near}: correct metric_list"
            )
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            near = _nearest(aggregation, list(AGGREGATION_REGISTRY.keys()))
            raise ValueError(
                f"{file.path}: lm-eval has no aggregation {aggregation}{near}: correct metric_list"
            )


def _nearest(word: object, known: Sequence[str]) -> str:
    close = get_close_matches(str(word), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _merged(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """One file's keys over those of its includes, and the files read."""
    own = _document(path)
    includes = own.pop("include", [])
    config: dict[str, Any] = {}
    files = [path]
    for name in includes if isinstance(includes, list) else [includes]:
        base = path.parent / str(name)
        if not base.is_file():
            raise ValueError(f"{path} includes {name}, and there is no file {base}: correct it")
        if base.resolve() in {file.resolve() for file in (path, *above)}:
            raise ValueError(f"{path} includes {name}, which includes {path}: remove one `include`")
        below, read = _merged(base, (*above, path))
        below.pop("task_list", None)
        config |= below
        files += read
    return config | own, tuple(files)


def _document(path: Path) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        """A loader that knows the folder of this file."""

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Function:
        return Function(path.parent, str(loader.construct_scalar(node)))

    Loader.add_constructor("!function", function)
    with _readable(path):
        # A SafeLoader: it builds plain values only.
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: no task file: give `key: value` lines")
    return config


def _functions(values: Iterable[Any]) -> Iterator[Function]:
    for value in values:
        if isinstance(value, Function):
            yield value
        elif isinstance(value, Mapping):
            yield from _functions(value.values())
        elif isinstance(value, list):
            yield from _functions(value)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{file}, line {line}: no YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: no YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text: {error.reason}") from None
