"""What is done with every cell: train it, measure it, look inside?

A cell's frames are shards of the run folder, its training has a checkpoint of its own, its models
stay in `models/`: a study killed and run again does what is missing. With several processes every
one takes the costliest cell that nobody has begun; only the study's own process writes shards.

    curve, arrivals, ended     of training (`runs.Trained`)
    rates                      what every learning rate gave, where several were tried
    errors, sums               on held-out prompts, in and out of distribution (`evaluation`)
    distances, labels          whose predictions every checkpoint follows (`schemes`)
    ablations, attention, probes    inside the last models
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.hybrids.cells import Cell
from experiments.hybrids.inside.inspection import inside
from experiments.hybrids.learning.rates import pick_rate
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.learning.runs import Trained
from experiments.hybrids.learning.training import train_seeds
from experiments.hybrids.measuring.evaluation import (
    DENSE,
    Yardsticks,
    baselines_evaluated,
    checkpoints_of,
    evaluated,
    first,
    followed,
    yardsticks,
)
from experiments.hybrids.regression.shift_table import parse_shift, shifts_for
from experiments.hybrids.regression.task_table import Task
from experiments.pretrain_setup import device_of
from experiments.processes import processes

if TYPE_CHECKING:
    from experiments.hybrids.study import Hybrids
    from experiments.run_folder import RunFolder

FRAMES = (
    *("curve", "arrivals", "ended", "rates", "errors", "sums", "distances", "labels"),
    *("ablations", "attention", "probes"),
)
FOLLOWED = 128
"""Prompts on which a checkpoint is compared with the baselines."""
SEED_OF_LABELS = 0
"""Of the redrawn prompts behind a label's support."""

Frames = dict[str, pd.DataFrame]


@dataclass(frozen=True, eq=False)
class Measured:
    """The frames of all cells, and of the baselines of their function classes.

    Attributes:
        left_out: shifts that a function class cannot have.
    """

    cells: tuple[Cell, ...]
    frames: Mapping[str, pd.DataFrame]
    left_out: tuple[str, ...]


def measured(study: Hybrids, cells: Sequence[Cell], folder: RunFolder) -> Measured:
    """All cells, and the baselines beside them."""
    from tqdm import tqdm

    found = {cell.key: kept for cell in cells if (kept := _kept(folder, cell.key)) is not None}
    left = sorted((c for c in cells if c.key not in found), key=lambda cell: -_cost(cell))
    total = study.steps * len(cells)
    with tqdm(
        total=total,
        initial=study.steps * len(found),
        desc="hybrids",
        unit="step",
        file=sys.stderr,
        disable=not folder.leads,
    ) as bar:
        for cell, frames in _each(study, left, folder.path / "models", bar.update):
            for name in FRAMES:
                folder.keep(f"{cell.key}-{name}", frames[name])
            # Not before: frames that were not kept are made again from what training left.
            for left_over in ("checkpoints", "rates"):
                shutil.rmtree(folder.path / "models" / cell.key / left_over, ignore_errors=True)
            found[cell.key] = frames
            bar.set_postfix_str(f"{len(found)} of {len(cells)} cells")
    joined = {
        name: pd.concat([found[cell.key][name] for cell in cells], ignore_index=True)
        for name in FRAMES
    }
    tasks = {cell.task.name: cell.task for cell in cells}
    left_out = []
    for task in tasks.values():
        left_out += [
            f"shift {s} of {task.name}" for s in study.shifts if s not in _shifts(study, task)
        ]
        for name, frame in _baselines(study, task, folder).items():
            joined[name] = pd.concat([joined[name], frame], ignore_index=True)
    return Measured(tuple(cells), joined, tuple(left_out))


def measured_cell(
    study: Hybrids, cell: Cell, models: Path, progress: Callable[[int], object]
) -> Frames:
    """One cell from its training to the inside of its models."""
    device = device_of(study.device)
    place = models / cell.key
    regime, frames = regime_of(study, cell.task), {name: pd.DataFrame() for name in FRAMES}
    if study.rates:
        short = regime.over(max(1, round(study.sweep_share * study.steps)))
        picked = pick_rate(
            cell.config, cell.task, short, place / "rates", rates=study.rates, device=device
        )
        regime = replace(regime, rate=picked.rate)
        frames["rates"] = picked.ends.assign(
            picked=picked.ends["rate"] == picked.rate, at_edge=picked.at_edge
        )
    seeds = range(study.seed, study.seed + study.seeds)
    done = 0

    def advance(step: int, _: int) -> None:
        nonlocal done
        progress(step - done)
        done = step

    trained = train_seeds(
        cell.config, cell.task, regime, seeds, place, device=device, progress=advance
    )
    progress(study.steps - done)
    frames |= {"curve": trained.curve, "arrivals": trained.arrivals, "ended": trained.ended}
    frames |= _judged(study, cell, trained)
    if study.inside:
        # Of a seed that diverged there is nothing to look into; scores count it as broken.
        whole = trained.ended.loc[trained.ended["why"] != "diverged", "seed"]
        for seed in map(int, whole):
            for name, rows in inside(trained.model(seed), cell.task, seed, study.prompts).items():
                frames[name] = pd.concat([frames[name], rows], ignore_index=True)
    keys = {"architecture": cell.architecture, "task": cell.task.name}
    return {name: frame.assign(**keys) if len(frame) else frame for name, frame in frames.items()}


def regime_of(study: Hybrids, task: Task) -> Regime:
    """How a task is trained: without a curriculum where only the last point counts, which it would
    cut off."""
    regime = study.regime
    return replace(regime, curriculum=0.0) if task.scored == "last" else regime


def _cores(study: Hybrids) -> int:
    """Processes unless told: one a core on a CPU, one on anything else."""
    return (os.cpu_count() or 1) if device_of(study.device).type == "cpu" else 1


def _judged(study: Hybrids, cell: Cell, trained: Trained) -> Frames:
    """Errors and schemes, in and out of distribution."""
    models = {int(seed): trained.model(int(seed)) for seed in trained.ended["seed"]}
    errors, sums, distances, labels = [], [], [], []
    for shift in _shifts(study, cell.task):
        measure = yardsticks_of(cell.task, shift, study.prompts, study.device)
        rows = evaluated(cell.architecture, models, measure)
        errors.append(rows.errors)
        sums.append(rows.sums)
        kept = dict(checkpoints_of(trained.folder)) if study.keep else {}
        if kept and shift in _telling(study, cell.task):
            generator = np.random.default_rng(SEED_OF_LABELS)
            far, said = followed(cell.architecture, kept, _some(measure), generator)
            distances.append(far)
            labels.append(said)
    frames = {"errors": errors, "sums": sums, "distances": distances, "labels": labels}
    return {n: pd.concat(f, ignore_index=True) if f else pd.DataFrame() for n, f in frames.items()}


@lru_cache(maxsize=8)
def yardsticks_of(task: Task, shift: str, prompts: int, device: str) -> Yardsticks:
    """Prompts with the baselines' answers; those of the last tasks and shifts are kept."""
    return yardsticks(task, shift, prompts, device=device_of(device))


def _some(measure: Yardsticks) -> Yardsticks:
    """The first prompts, for comparisons of many checkpoints."""
    answers = {name: said[:FOLLOWED] for name, said in measure.predictions.items()}
    return replace(measure, prompts=first(measure.prompts, FOLLOWED), predictions=answers)


def _baselines(study: Hybrids, task: Task, folder: RunFolder) -> Frames:
    frames: dict[str, list[pd.DataFrame]] = {"errors": [], "sums": []}
    for shift in _shifts(study, task):
        key = f"{task.name}-{shift}-baselines"
        kept = {name: folder.partial(f"{key}-{name}") for name in frames}
        if any(frame is None for frame in kept.values()):
            rows = baselines_evaluated(yardsticks_of(task, shift, study.prompts, study.device))
            kept = {"errors": rows.errors, "sums": rows.sums}
            for name, frame in kept.items():
                folder.keep(f"{key}-{name}", frame)
        for name, frame in kept.items():
            assert frame is not None
            frames[name].append(frame)
    return {name: pd.concat(found, ignore_index=True) for name, found in frames.items()}


def _shifts(study: Hybrids, task: Task) -> tuple[str, ...]:
    """In distribution, and the shifts asked for that the task can have; dense ones of sparse."""
    allowed = shifts_for(task.name)
    asked = tuple(s for s in study.shifts if parse_shift(s).name in allowed)
    dense = (DENSE,) if task.name == "sparse" else ()
    return ("none", *dict.fromkeys((*dense, *(s for s in asked if s != "none"))))


def _telling(study: Hybrids, task: Task) -> tuple[str, ...]:
    """Shifts under which schemes are told apart: none, and the first other one."""
    return _shifts(study, task)[:2]


def _kept(folder: RunFolder, key: str) -> Frames | None:
    frames = {name: folder.partial(f"{key}-{name}") for name in FRAMES}
    if any(frame is None for frame in frames.values()):
        return None
    return {name: frame for name, frame in frames.items() if frame is not None}


def _cost(cell: Cell) -> float:
    return cell.task.points * len(cell.config.blocks) * cell.config.d_model**2


def _each(
    study: Hybrids, cells: Sequence[Cell], models: Path, advance: Callable[[int], object]
) -> Iterator[tuple[Cell, Frames]]:
    jobs = min(study.jobs or _cores(study), len(cells))
    if jobs < 2:
        for cell in cells:
            yield cell, measured_cell(study, cell, models, advance)
        return
    with processes(jobs) as pool:
        waiting = {pool.submit(measured_cell, study, c, models, _nothing): c for c in cells}
        for future in as_completed(waiting):
            advance(study.steps)
            yield waiting[future], future.result()


def _nothing(steps: int) -> None:
    """No progress from another process."""
