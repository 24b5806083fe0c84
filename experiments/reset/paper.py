"""Of which studies does the paper consist, and how do they become one?

    rates      the reference base: five learning rates, factor 2
    arms       the reference base: controls, parts, laws, targets, several layers
    length     the reference base's checkpoints: does the cost grow with T0?
    unique     the reference base: unique tokens and steps as two axes
    origins    the reference base: its own order, text it never read
    grid       every base, every layer, both losses: position, N, D, family

Each is a run of its own, with its own folder, that can be run, killed and read alone; the bases
are runs of `ablate pretrain`. What is missing is done, what is finished is taken as it is; in the
end all rows are put together. The reference is the decoder in the middle of the grid, three seeds
of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.base_grid import grid, model_folder, title
from experiments.pretrain import Pretraining
from experiments.reset.study import Resetting

if TYPE_CHECKING:
    from experiments.reset.findings import Findings
    from experiments.run_folder import Outcome, RunFolder

REFERENCE = (8, 128)
"""N and D of the base that all arms are run on."""
GIVEN = ("seeds", "seed", "runs", "jobs", "save_every", "precision", "budget", "evaluate", "bases")
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
    folder.create()
    models = _models(study)
    found: list[tuple[str, Path]] = []
    for name, part in parts(study, models):
        _say(f"{name}: {len(part.models)} bases")
        found.append((name, run_study("reset", part)[0].path))
    bases = [opened for _, part in parts(study, models) for opened in opened_bases(part)]
    return finished(folder, together(found, bases))


def parts(
    study: Resetting, models: Sequence[tuple[Pretraining, str]]
) -> Iterator[tuple[str, Resetting]]:
    """The studies by name, cheapest first."""
    reference = [folder for base, folder in models if _is_reference(base)]
    usual = {name: getattr(study, name) for name in GIVEN if name != "bases"}

    def asked(bases: Sequence[str], **options: object) -> Resetting:
        return dataclasses.replace(
            Resetting(**usual),
            model=bases[0],
            also=tuple(bases[1:]),
            **options,  # pyright: ignore[reportArgumentType]
        )

    yield "rates", asked(reference[:1], arms=("A0",), rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3))
    yield (
        "arms",
        asked(
            reference,
            arms=("A0", "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A12"),
            laws=(
                *("rewind", "torch", "identity", "linear", "copy-below", "copy-mean", "moments"),
                "permuted",
            ),
            predictors=True,
        ),
    )
    yield "length", asked(reference, arms=("A0",), shares=(0.125, 0.25, 0.5, 1.0))
    unique = tuple(share * study.budget for share in (1 / 64, 1 / 16, 1 / 4))
    yield "unique", asked(reference[:1], arms=("A0",), unique=(*unique, 0))
    for origin in ("same", "held-out"):
        yield f"origin {origin}", asked(reference[:1], arms=("A0",), origin=origin)
    yield "grid", asked([folder for _, folder in models], arms=("A0", "A1", "A7"))


def finished(folder: RunFolder, findings: Findings) -> Outcome:
    """Write what was found into the folder."""
    from experiments.reset.figures import figures
    from experiments.reset.page import report

    findings.write(folder.path)
    return folder.finish(
        findings.outcome,
        findings.metrics,
        figures=figures(findings.result, paper=True),
        report=report(findings.result),
    )


def _models(study: Resetting) -> list[tuple[Pretraining, str]]:
    """Every base asked for with its model folder, trained if it is not there."""
    from experiments.run_folder import run_study

    usual = Pretraining(runs=study.runs, precision=study.precision, save_every=study.save_every)
    found = []
    wanted = [base for base in grid("tokens", usual, seeds=study.bases) if _is_wanted(base)]
    for i, base in enumerate(wanted):
        if not (model_folder(base) / "training.json").exists():
            _say(f"base {i + 1} of {len(wanted)}: {title(base)}")
            run_study("pretrain", base)
        found.append((base, str(model_folder(base))))
    return found


def _is_wanted(base: Pretraining) -> bool:
    """Translation bases belong to --preset cross-attention."""
    return base.objective != "translation"


def _is_reference(base: Pretraining) -> bool:
    return (base.layers, base.d_model) == REFERENCE and base.family == "opt"


def _say(message: str) -> None:
    import sys

    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)
