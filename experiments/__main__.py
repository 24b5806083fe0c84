"""The command line: `ablate <study> [options]`, one subcommand per study.

Options, defaults and help come from the study's dataclass; torch is imported inside `run`, so help
is instant. Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 done,
2 unusable arguments (one line on stderr), 130 interrupted, 1 anything else, with its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Union

from experiments.bench.study import Bench
from experiments.config import with_preset
from experiments.hybrids.study import Hybrids
from experiments.induction.study import Induction
from experiments.pretrain import Pretraining
from experiments.prune.study import Pruning
from experiments.reset.study import Resetting
from experiments.run_folder import RunFolder, Study, run_study

STUDIES: dict[str, type[Study]] = {
    "prune": Pruning,
    "induction": Induction,
    "reset": Resetting,
    "hybrid": Hybrids,
    "pretrain": Pretraining,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study that the arguments (default: the command line's) ask for; the exit code."""
    try:
        study = parse(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as stop:  # help was printed, or the arguments were refused
        return stop.code if isinstance(stop.code, int) else 0
    name = next(name for name, known in STUDIES.items() if known is type(study))
    try:
        folder = RunFolder.for_study(name, study)
        again = folder.finished
    except (ValueError, LookupError, OSError) as error:
        return _refused(error)
    try:
        folder, outcome = run_study(name, study)
    except KeyboardInterrupt:
        resumes = f"; the same command resumes {folder.path}" if folder.path.exists() else ""
        _say("interrupted" + resumes)
        return 130
    except (ValueError, LookupError, OSError) as error:
        return _refused(error)
    if not folder.leads:
        return 0
    if again:
        _say(f"finished before, on {folder.environment()['started']}; remove its folder to repeat")
    _say(f"report in {folder.path / 'report.html'}")
    print(outcome.line(folder.path))
    return 0


def parse(words: Sequence[str]) -> Study:
    """The study the words describe. SystemExit 0 after help, 2 after one line on stderr."""
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return _cli(words)
    except SystemExit as stop:
        if stop.code != 2:
            sys.stderr.write(boxed.getvalue())
            raise
    # tyro explains itself in a box wrapped to the terminal; unwrapped, it is one line of text.
    boxed, columns = io.StringIO(), os.environ.get("COLUMNS")
    try:
        os.environ["COLUMNS"] = "100000"
        with contextlib.redirect_stderr(boxed):
            return _cli(words)
    except SystemExit:
        _say(_unboxed(boxed.getvalue()))
        raise
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _cli(words: Sequence[str]) -> Study:
    import tyro

    preset = _preset(words)
    studies: Any = [
        Annotated[
            kind,
            tyro.conf.subcommand(name, default=with_preset(kind, preset), prefix_name=False),
        ]
        for name, kind in STUDIES.items()
    ]
    any_of: Any = Union[tuple(studies)]  # noqa: UP007 (made at run time)
    return tyro.cli(
        any_of,
        prog="ablate",
        description="Studies of unmodified Hugging Face models; each runs with no option at all.",
        args=list(words),
    )


def _preset(words: Sequence[str]) -> str:
    """What --preset is given, so that its settings are the defaults of the options beside it."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--preset"):
            return word.partition("=")[2] or after
    return ""


def _unboxed(text: str) -> str:
    """What tyro's box says below its title (Unicode or ASCII, by locale), and where help is."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    rows = [row.strip("│|╭╮╰╯+ ") for row in plain.splitlines()]
    is_rule = [set(row) <= {"─", "-"} for row in rows]  # an empty row is one too
    title = is_rule.index(False)
    parts = [
        " ".join(row for _, row in part).rstrip(".")
        for rule, part in groupby(
            list(zip(is_rule, rows, strict=True))[title + 1 :], lambda r: r[0]
        )
        if not rule
    ]
    message = re.sub(r"^Error parsing [A-Z]\w*: ", "", parts[0])
    available = [part for part in parts[1:] if part.startswith("Available")]
    help_at = re.search(r"ablate[\w ]*--help", plain)
    return "; ".join([message, *available, f"see {help_at[0] if help_at else 'ablate --help'}"])


def _refused(error: ValueError | LookupError | OSError) -> int:
    """The exit code of unusable arguments, said in one line; any other error goes on up."""
    if not _is_about_arguments(error):
        raise error
    _say(_one_line(error))
    return 2


def _is_about_arguments(error: ValueError | LookupError | OSError) -> bool:
    """False for a bare KeyError or IndexError (a bug) and for a disk or network that failed."""
    if isinstance(error, OSError):
        about_paths = (FileNotFoundError, FileExistsError, NotADirectoryError)
        return error.errno in (None, errno.ENAMETOOLONG) or isinstance(
            error, (*about_paths, IsADirectoryError, PermissionError)
        )
    return type(error) not in (KeyError, IndexError)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split()) or type(error).__name__


def _say(message: str) -> None:
    print(f"ablate: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
