"""Where does the answer of a study live, and can it be trusted, resumed and found again?

One run, one folder, `runs/<study>/<config hash>/`:

    config.json       what was asked; written first
    environment.json  under what circumstances
    partial/          shards of an unfinished run, gone when it is finished
    figures/*.png     what a reader looks at
    report.html       one page that carries everything
    outcome.json      the headline
    metrics.parquet   tidy rows; written last, by rename: a folder that has it is a finished run

A study is a frozen dataclass with `run(folder) -> Outcome`. It loads and checks all its inputs,
calls `folder.create()` (nothing is on disk before), measures, keeping shards on the way, and ends
with `return folder.finish(...)`. The same study run again finds the same folder.

Of several processes of one study (torchrun, accelerate launch) only the first writes. The others
are given the same and keep it in memory; `create` and `finish` wait for all of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import quote

from experiments.config import command_line, config_hash, config_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from experiments.report import Report

PROJECT = Path(__file__).parent.parent
ROOMS = ("ablate", "probes", "experiments")
MANAGED = frozenset(
    {"config.json", "environment.json", "partial", "figures", ".lock", "model", "precision.txt"}
)
"""What a folder may hold and still be removed when its study turns out to be unusable."""


@dataclass(frozen=True)
class Outcome:
    """What a study found: one sentence, and whatever else belongs on the last line of stdout."""

    headline: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """JSON values, numpy scalars included."""

    def line(self, path: Path) -> str:
        """The one JSON object that ends stdout: run, headline, then `extra`."""
        record = {"run": str(path), "headline": self.headline, **self.extra}
        return json.dumps(record, default=_scalar, allow_nan=False, ensure_ascii=False)


class Study(Protocol):
    """A frozen dataclass: its fields are the options, `run` is the methods section."""

    @property
    def runs(self) -> Path:
        """Root of the run folders."""
        ...

    def run(self, folder: RunFolder) -> Outcome:
        """Check the inputs, `folder.create()`, measure, `return folder.finish(...)`."""
        ...


def run_study(name: str, study: Study) -> tuple[RunFolder, Outcome]:
    """Answer from the finished run of this study, or run it, taking up what a try before left."""
    with RunFolder.for_study(name, study) as folder:
        if folder.finished:
            return folder, folder.outcome()
        folder.check_writable()
        import experiments.hybrids.architecture.model  # noqa: F401  # hybrids load by their folder from here on

        return folder, study.run(folder)


class RunFolder:
    """One run's folder. Nothing is written before `create`; use it as a context to let go of it.

    Leaving the context on a refusal (a ValueError or LookupError of the study's own code, not of a
    library: the inputs are unusable) removes a folder made for nothing: created by this process,
    and holding no file that the study itself put there. Any other failure leaves it, to be taken
    up again.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], command: str = "") -> None:
        self.path = path
        self.config = dict(config)
        self.command = command
        self.leads = os.environ.get("RANK", "0") == "0"
        """Whether this process writes, of those that a launcher started."""
        self._lock: int | None = None
        self._fresh = self._created = False
        self._held: dict[str, pd.DataFrame] = {}

    @classmethod
    def for_study(cls, name: str, study: Study) -> Self:
        """The folder of this study under its `runs`; touches nothing on disk."""
        config = config_of(name, study)
        return cls(study.runs / name / config_hash(config), config, command_line(name, study))

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and _is_refusal(error):
            self._discard()
        self._release()

    # what is there

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.path / "metrics.parquet").exists()

    def load(self) -> pd.DataFrame:
        """The metrics of a finished run, as tidy rows. FileNotFoundError if it is not finished."""
        import pandas as pd

        return pd.read_parquet(self.path / "metrics.parquet")

    def outcome(self) -> Outcome:
        """The outcome a finished run ended with. FileNotFoundError if it is not finished."""
        record = json.loads((self.path / "outcome.json").read_text())
        return Outcome(record["headline"], record["extra"])

    def environment(self) -> dict[str, Any]:
        """The circumstances recorded when the run was created."""
        return json.loads((self.path / "environment.json").read_text())

    # making it

    def check_writable(self) -> None:
        """Raise PermissionError or NotADirectoryError if `create` could not write here.

        Tries it where the first new folder would go, so nothing is left behind.
        """
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        try:
            Path(tempfile.mkdtemp(dir=parent, prefix=".ablate-")).rmdir()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"cannot write run folders under --runs: {error.strerror}; "
                "give a folder you may write to",
                str(parent),
            ) from None

    def create(self) -> Self:
        """Make the folder, take its lock, write config.json first; call it once inputs are checked.

        Takes up an unfinished folder of the same config: its shards stay, half-written files go.
        ValueError if another process is writing it, or has finished it since. Calling it
        twice does nothing more.
        """
        if self._created:
            return self
        self._created = True
        if self.leads:
            self._create()
        _wait_for_all()
        return self

    def _create(self) -> None:
        from experiments.environment import environment

        self._fresh = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path / ".lock")
        if self.finished:
            raise ValueError(
                f"{self.path} was finished by another process meanwhile: the same command again"
                " reads it"
            )
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink()
        _write_json(self.path / "config.json", self.config)
        here = environment() | {"command": self.command, "seed": self.config["options"].get("seed")}
        if (self.path / "environment.json").exists():
            earlier = self.environment()
            here = earlier | {"resumed": [*earlier.get("resumed", []), here]}
        _write_json(self.path / "environment.json", here)

    def partial(self, key: str) -> pd.DataFrame | None:
        """The shard kept under `key` by this run or the try before it, or None.

        Raises ValueError, naming it, for one that something else has damaged.
        """
        import pandas as pd
        from pyarrow import ArrowInvalid

        if key in self._held:
            return self._held[key]
        shard = self._shard(key)
        try:
            return pd.read_parquet(shard) if shard.exists() else None
        except (ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{shard} is damaged ({str(error).splitlines()[0]}): delete it, and the same"
                " command measures it again"
            ) from None

    def keep(self, key: str, frame: pd.DataFrame) -> None:
        """Keep a piece of the result under `key`, whole or not at all; a resumed run finds it."""
        self._require_created()
        if not self.leads:
            self._held[key] = frame
            return
        shard = self._shard(key)
        shard.parent.mkdir(exist_ok=True)
        _replace(shard, lambda tmp: frame.to_parquet(tmp, index=False))

    def finish(
        self,
        outcome: Outcome,
        metrics: pd.DataFrame,
        *,
        figures: Mapping[str, Figure | Callable[[], Figure]] | None = None,
        report: Report | None = None,
    ) -> Outcome:
        """Write figures, report, outcome and, last, metrics; drop the shards; return `outcome`.

        `metrics` are tidy rows: key columns, then `metric`, `value` (and `stderr`). `figures` are
        by file name without the suffix, and land in the report in this order.
        """
        from experiments.report import Report, page

        self._require_created()
        missing = {"metric", "value"} - set(metrics.columns)
        assert not missing, f"metrics are not tidy: no column {', '.join(sorted(missing))}"
        outcome.line(self.path)  # what cannot be printed must not be recorded
        _wait_for_all()
        if not self.leads:
            return outcome
        (self.path / "figures").mkdir(exist_ok=True)
        images = {}
        for name, made in (figures or {}).items():
            figure = made() if callable(made) else made
            file = self.path / "figures" / f"{name}.png"
            _replace(file, lambda tmp, figure=figure: figure.savefig(tmp, format="png"))
            images[name] = file.read_bytes()
        html = page(
            report or Report(title=self.config["study"]),
            outcome.headline,
            images,
            self.config,
            self.environment(),
        )
        _replace(self.path / "report.html", lambda tmp: tmp.write_text(html, encoding="utf-8"))
        record = {"headline": outcome.headline, "extra": dict(outcome.extra)}
        _write_json(self.path / "outcome.json", record)
        _replace(self.path / "metrics.parquet", lambda tmp: metrics.to_parquet(tmp, index=False))
        shutil.rmtree(self.path / "partial", ignore_errors=True)
        self._release()
        return outcome

    def _shard(self, key: str) -> Path:
        name = quote(key, safe="")
        if len(name) > 150:
            name = f"{name[:100]}-{sha256(key.encode()).hexdigest()[:16]}"
        return self.path / "partial" / f"{name}.parquet"

    def _require_created(self) -> None:
        assert self._created, "call folder.create() once the inputs are checked"

    def _release(self) -> None:
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _discard(self) -> None:
        if self._lock is None or not self._fresh or self.finished:
            return
        if {child.name for child in self.path.iterdir()} <= MANAGED:
            shutil.rmtree(self.path)
            for parent in (self.path.parent, self.path.parent.parent):
                if not any(parent.iterdir()):
                    parent.rmdir()


def load_runs(root: Path | str, study: str) -> pd.DataFrame:
    """Metrics of all finished runs of a study in one tidy frame.

    Columns: `run` (the folder's name), one `config.<option>` an option (sequences as tuples, so
    that they group), then the metrics' own. FileNotFoundError if there is no finished run.
    """
    import pandas as pd

    frames = []
    for metrics in sorted(Path(root, study).glob("*/metrics.parquet")):
        options = json.loads((metrics.parent / "config.json").read_text())["options"]
        frame = pd.read_parquet(metrics)
        for name, value in reversed(options.items()):
            column = [tuple(value) if isinstance(value, list) else value] * len(frame)
            frame.insert(0, f"config.{name}", pd.Series(column, index=frame.index))
        frame.insert(0, "run", metrics.parent.name)
        frames.append(frame)
    if not frames:
        raise FileNotFoundError(
            f"no finished run of {study} under {root}: run `ablate {study} --runs {root}`"
        )
    return pd.concat(frames, ignore_index=True)


def _wait_for_all() -> None:
    """Until every process that a launcher started is here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _is_refusal(error: BaseException) -> bool:
    """Whether the code of a study raised it: a library's ValueError is no word on the inputs."""
    frames = traceback.extract_tb(error.__traceback__)
    refuses = isinstance(error, (ValueError, LookupError))
    if not refuses or type(error) in (KeyError, IndexError) or not frames:
        return False
    raised = Path(frames[-1].filename)
    installed = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    return any(raised.is_relative_to(PROJECT / room) for room in ROOMS) or not any(
        raised.is_relative_to(place) for place in installed
    )


def _locked(path: Path) -> int:
    """Take the lock file, held until closed or the process ends, however it ends."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
    except BlockingIOError:
        free = False
    if not free:  # held, or removed by a run that ended between the two calls above
        holder = os.read(lock, 20).decode() or "unknown"
        os.close(lock)
        raise ValueError(
            f"{path.parent} is being written by process {holder}: "
            "wait for it to end, or ask for something else (another --seed, another --runs)"
        )
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename: `path` is whole or untouched."""
    tmp = path.with_name(path.name + ".tmp")
    write(tmp)
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    tmp.replace(path)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, default=_scalar, allow_nan=False, ensure_ascii=False)
    _replace(path, lambda tmp: tmp.write_text(text + "\n", encoding="utf-8"))


def _scalar(value: Any) -> Any:
    """A numpy or torch scalar as the Python number it is."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is not a JSON value")
