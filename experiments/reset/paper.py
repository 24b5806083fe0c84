"""Of which studies does the paper consist, and how do they become one?

    rates      the reference base: five learning rates, factor 2
    grid       every base, every layer, both losses: position, N, D, family; the reference
               bases also controls, parts, laws, targets, several layers
    length     the reference base's checkpoints: does the cost grow with T0?
    unique     the reference base: unique tokens and steps as two axes
    origins    the reference base: its own order, text it never read

Each is a run of its own for every base, with its own folder, that can be run, killed and read
alone; the bases are runs of `ablate pretrain`. What is missing is done, what is finished is taken
as it is, so a larger paper goes on from a smaller one; in the end all rows are put together. The
reference is a decoder of the grid, three seeds of it, however many seeds the others have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.base_grid import flops, grid, model_folder, title
from experiments.pretrain import Pretraining
from experiments.reset.names import Start
from experiments.reset.study import Arm, Resetting

if TYPE_CHECKING:
    from experiments.reset.findings import Findings
    from experiments.run_folder import Outcome, RunFolder

REFERENCE = (4, 128)
"""N and D of the base that all arms are run on."""
REFERENCE_SEEDS = 3
"""At least, so that no arm hangs on one base."""
ARMS: tuple[Arm, ...] = (
    *("A0", "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A12"),
)
"""Of the reference; A13 is --preset cross-attention."""
LAWS: tuple[Start, ...] = (
    *("rewind", "torch", "identity", "linear", "copy-below", "copy-mean", "moments", "permuted"),
)
GIVEN = (
    *("seeds", "seed", "runs", "jobs", "save_every", "precision", "budget", "evaluate"),
    *("bases", "largest"),
)
"""What a command with --preset paper may say besides."""


def paper(study: Resetting, folder: RunFolder) -> Outcome:
    """Train the bases, run the studies, put them together.

    Raises ValueError for an option that the paper decides.
    """
    from experiments.reset.findings import together
    from experiments.reset.opened import opened as opened_bases
    from experiments.run_folder import run_study

    changed = [
        f"--{each.name.replace('_', '-')}"
        for each in dataclasses.fields(study)
        if each.name not in (*GIVEN, "preset") and getattr(study, each.name) != each.default
    ]
    if changed:
        raise ValueError(f"--preset paper brings its own: leave out {', '.join(changed)}")
    wanted = _wanted(study)
    folder.create()
    models = _models(wanted)
    found: list[tuple[str, Path]] = []
    for name, part in parts(study, models):
        _say(name)
        found.append((name, run_study("reset", part)[0].path))
    bases = [opened for _, part in parts(study, models) for opened in opened_bases(part)]
    return finished(folder, together(found, bases))


def parts(
    study: Resetting, models: Sequence[tuple[Pretraining, str]]
) -> Iterator[tuple[str, Resetting]]:
    """The studies by name, one a base."""
    reference = [(base, folder) for base, folder in models if _is_reference(base)]
    usual = {name: getattr(study, name) for name in GIVEN if name not in ("bases", "largest")}

    def asked(folder: str, **options: object) -> Resetting:
        return dataclasses.replace(
            Resetting(**usual),
            model=folder,
            **options,  # pyright: ignore[reportArgumentType]
        )

    _, first = reference[0]
    yield "rates", asked(first, arms=("A0",), rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3))
    for base, folder in models:
        if _is_reference(base):
            yield f"all arms of {title(base)}", asked(folder, arms=ARMS, laws=LAWS, predictors=True)
        else:
            yield title(base), asked(folder, arms=("A0", "A1", "A7"))
    yield "length", asked(first, arms=("A0",), shares=(0.125, 0.25, 0.5))
    unique = tuple(share * study.budget for share in (1 / 64, 1 / 16, 1 / 4))
    yield "unique", asked(first, arms=("A0",), unique=unique)
    for origin in ("same", "held-out"):
        yield f"origin {origin}", asked(first, arms=("A0",), origin=origin)


def finished(folder: RunFolder, findings: Findings) -> Outcome:
    """Write what was found into the folder."""
    from experiments.reset.report.figures import figures
    from experiments.reset.report.page import report

    findings.write(folder.path)
    return folder.finish(
        findings.outcome,
        findings.metrics,
        figures=figures(findings.result, paper=True),
        report=report(findings.result),
    )


def _wanted(study: Resetting) -> list[Pretraining]:
    """The bases, in the order they are trained. ValueError if the reference is not among them."""
    usual = Pretraining(
        runs=study.runs, precision=study.precision, save_every=study.save_every, seed=study.seed
    )
    seeds = max(study.bases, REFERENCE_SEEDS)
    wanted = [base for base in grid("tokens", usual, seeds=seeds) if _is_wanted(base, study)]
    if not any(map(_is_reference, wanted)):
        raise ValueError(
            f"--largest {study.largest:g} leaves out the reference base of {REFERENCE[0]} blocks of"
            f" width {REFERENCE[1]}: give more"
        )
    return wanted


def _models(wanted: Sequence[Pretraining]) -> list[tuple[Pretraining, str]]:
    """Every base with its model folder, trained if it is not there."""
    from experiments.run_folder import run_study

    found = []
    for i, base in enumerate(wanted):
        if not (model_folder(base) / "training.json").exists():
            _say(f"base {i + 1} of {len(wanted)}: {title(base)}")
            run_study("pretrain", base)
        found.append((base, str(model_folder(base))))
    return found


def _is_wanted(base: Pretraining, study: Resetting) -> bool:
    """Translation bases belong to --preset cross-attention."""
    asked = base.seed < study.seed + study.bases or _is_reference(base)
    return asked and base.objective != "translation" and flops(base) <= study.largest


def _is_reference(base: Pretraining) -> bool:
    return (base.layers, base.d_model) == REFERENCE and base.family == "opt"


def _say(message: str) -> None:
    import sys

    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)
