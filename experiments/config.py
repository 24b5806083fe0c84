"""What exactly was asked of a study: its options, its local inputs, its command line, its hash.

Two runs share a folder when everything that decides the result is equal: the study's name, its
options, and the content of the files behind them: local files and folders that a field declared
with `metadata=INPUT` names, and what the tasks of a field called `tasks` are made of, built-in ones
too. The root of the run folders decides nothing, and neither does a field declared with
`metadata=NOT_HASHED` (a batch size, say). Where it misleads: what is on the hub goes by its name,
and a Python file that a task's function imports counts only inside a folder named as the task.

The options that several studies have are defined once, here: a study inherits `RunOptions`, or
`ModelOptions` when it loads a model, and adds its own fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from ablate.hooked import HookedModel

NOT_HASHED: Mapping[str, bool] = {"hashed": False}
"""Metadata of a dataclass field that changes the cost of a run and not its result."""

LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a dataclass field younger than runs that are kept: at its default it is left out of
the config, so that their hashes stay what they were."""

INPUT: Mapping[str, bool] = {"input": True}
"""Metadata of a dataclass field that names a local input, by a path or a bundled name."""

POSITIONAL: Mapping[str, bool] = {"positional": True}
"""Metadata of a dataclass field that is given on the command line without its name."""

CONTENT_LIMIT = 256 * 2**20
"""Bytes up to which a local input is identified by content; above, by names, sizes and times."""

ZOO = Path(__file__).parent.parent / "ablate" / "zoo"
"""Where the bundled models are."""


@dataclass(frozen=True)
class RunOptions:
    """The options every study has."""

    seed: int = 0
    """Of everything random in the study."""
    runs: Path = Path("runs")
    """Root of the run folders."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What each value of a field `preset`, where a study has one, sets other fields to."""

    def __post_init__(self) -> None:
        """Subclasses that check their own fields call this too."""
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed {self.seed}: give a number from 0 to {2**64 - 1}")


@dataclass(frozen=True)
class ModelOptions(RunOptions):
    """The options of every study that loads a model."""

    model: str = dataclasses.field(default="stdlib-opt", metadata=INPUT)
    """Bundled name, local folder or Hugging Face id."""
    dtype: Literal["float32", "bfloat16", "float16", "checkpoint"] = "float32"
    """Of the weights; checkpoint keeps what the file has."""
    device_map: str | None = None
    """Accelerate's: auto, cuda:0, disk, ...; without it, the CPU."""
    limit: int | None = None
    """Use at most this many examples of each task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit}: give a count of at least 1, or leave it out")

    def load_model(self) -> HookedModel:
        """The model these options name, placed as they say; ValueError says why it cannot be."""
        from ablate.hooked import HookedModel

        model = HookedModel.from_pretrained(
            self.model,
            dtype=None if self.dtype == "checkpoint" else self.dtype,
            device_map=self.device_map,
        )
        if getattr(model.model.config, "vocab_size", None) == 0:
            raise ValueError(
                f"--model {self.model} reads numbers and has no vocabulary: `ablate hybrid` studies"
                " its heads and mixers, `ablate reset` its layers; give a language model here"
            )
        return model


def options_of(study: Any) -> dict[str, Any]:
    """The fields of a study that decide its result, as JSON values (paths and tuples written out).

    `study` is a dataclass instance. Equal options are written alike, 4 and 4.0 too. Left out:
    `runs`, fields with metadata NOT_HASHED, and those with metadata LATER at their default.
    """
    return {
        field.name: _plain(_as_declared(field, getattr(study, field.name)))
        for field in dataclasses.fields(study)
        if field.name != "runs"
        and field.metadata.get("hashed", True)
        and not (field.metadata.get("later") and getattr(study, field.name) == field.default)
    }


def config_of(name: str, study: Any) -> dict[str, Any]:
    """What is hashed: study name, options, fingerprints of the inputs they name.

    Raises ValueError for a task file that cannot be read.
    """
    inputs = dict(sorted(_inputs(study)))
    return {"study": name, "options": options_of(study), "inputs": inputs}


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the config's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def with_preset(kind: type[Any], preset: str = "") -> Any:
    """A study with its defaults, but for what `preset` sets, if it knows it."""
    known = getattr(kind, "PRESETS", {})
    return kind(preset=preset, **known[preset]) if preset in known else kind()


def command_line(name: str, study: Any) -> str:
    """The command that runs this study: `ablate <name>`, the preset, and the options that are not
    its."""
    words = ["ablate", name]
    usual = with_preset(type(study), preset := getattr(study, "preset", ""))
    if preset in study.PRESETS:
        words += ["--preset", preset]
    for field in dataclasses.fields(study):
        value = getattr(study, field.name)
        if field.name in ("runs", "preset") or value == getattr(usual, field.name):
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            many = isinstance(value, (tuple, list))
            values = [str(v) for v in (value if many else [value])]
            if field.metadata.get("positional"):
                words[2:2] = values  # behind a variadic option they would be taken for its values
            else:
                words += [f"--{option}", *values]
    return shlex.join(words)


def fingerprint(path: Path, *, besides: Path | None = None) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents; hidden files are left out.

    Above CONTENT_LIMIT bytes in all, sizes and modification times stand in for the contents.
    Files under `besides` are not looked at (a runs folder inside the input would never repeat).
    """
    files = sorted(_files(path, besides and besides.resolve()))
    stats = [file.stat() for file in files]
    by_content = sum(stat.st_size for stat in stats) <= CONTENT_LIMIT
    digest = hashlib.sha256()
    for file, stat in zip(files, stats, strict=True):
        name = file.relative_to(path).as_posix() if file != path else ""
        digest.update(f"{name}\0{stat.st_size}\0".encode())
        digest.update(file.read_bytes() if by_content else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def _as_declared(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value equal to the default is written as that is, an int of a float field as a float."""
    if value == field.default:
        return field.default
    if not {"int", "bool"}.isdisjoint(words := set(re.findall(r"\w+", str(field.type)))):
        return value
    if "float" in words and isinstance(value, int):
        return float(value)
    if "float" in words and isinstance(value, (tuple, list)):
        return [float(v) if isinstance(v, int) else v for v in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _inputs(study: Any) -> Iterator[tuple[str, str]]:
    """What the options name, and the fingerprint of its files."""
    for field in dataclasses.fields(study):
        value = getattr(study, field.name)
        if field.name in ("tasks", "unseen"):
            names = tuple(_strings(_plain(value)))
            if not names and field.name == "tasks":
                names = _builtin()
            yield from _task_inputs(names, getattr(study, "data", None), study.runs)
        elif field.metadata.get("input"):
            for name in _strings(_plain(value)):
                if (path := _local(name)) is not None:
                    yield name, fingerprint(path, besides=study.runs)


def _builtin() -> tuple[str, ...]:
    """The tasks that a study asks when none is named."""
    from probes.task_names import BUILTIN

    return BUILTIN


def _task_inputs(
    names: tuple[str, ...], data: Path | None, runs: Path
) -> Iterator[tuple[str, str]]:
    """Every task asked for, if its files are here."""
    from probes.task_names import BUILTIN, task_sources

    for name in names:
        paths = list(task_sources(name, data))
        if name not in BUILTIN and Path(name).is_dir():
            paths.append(Path(name))
        if paths:
            parts = [f"{path.name} {fingerprint(path, besides=runs)}" for path in paths]
            yield f"task {name}", hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v)


def _local(value: str) -> Path | None:
    """The file or folder an input's name stands for, if there is one: bundled ones come first."""
    if not value or "\0" in value:
        return None
    if value in {path.name for path in ZOO.glob("*")}:
        return ZOO / value
    path = Path(value).expanduser()
    return path if path.exists() else None


def _files(path: Path, besides: Path | None) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for child in path.iterdir():
        hidden = child.name.startswith(".") or child.name == "__pycache__"
        if hidden or (besides is not None and child.resolve() == besides):
            continue
        if child.is_dir():
            yield from _files(child, besides)
        elif child.is_file():
            yield child
