"""Which orders of blocks learn best in context, for how many parameters?

Successive halving (`candidates`): in every generation all that are left train for twice as many
steps, several seeds each, and the better half goes on, by

    mean over seeds of S      against the task's baseline, on prompts kept for selection

Those of the last generation are trained anew, whole, from other seeds, and scored on prompts that
chose nothing: what is reported. The front is what no other reported model beats in both score and
parameters; the known architectures among the candidates are reported whether they got that far or
not.

Where it misleads. What learns fast in few steps is kept, so late bloomers go; candidates are drawn
at random, a few of very many orders, so what is not on the front was mostly not tried.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ablate.placement import load
from experiments.hybrids.architecture.grammar import Block, preset, written
from experiments.hybrids.architecture.sizes import Sizes
from experiments.hybrids.cells import Cell, cells_of, config_of, sizes_of
from experiments.hybrids.learning.streams import held_out
from experiments.hybrids.learning.training import train_seeds
from experiments.hybrids.measured import Measured, measured, regime_of
from experiments.hybrids.measuring.denominators import denominator
from experiments.hybrids.measuring.evaluation import predicted
from experiments.hybrids.measuring.sums import prompt_sums
from experiments.hybrids.regression.prompts import Prompts, counted
from experiments.hybrids.regression.task_table import Task
from experiments.hybrids.searching.candidates import (
    KNOWN,
    affordable,
    drawn,
    flops,
    generations,
    named,
)
from experiments.pretrain_setup import device_of
from probes.regression import squared_error_by_examples

if TYPE_CHECKING:
    from experiments.hybrids.study import Hybrids
    from experiments.run_folder import Outcome, RunFolder

PURPOSE = "search"
"""Of the prompts that candidates are selected on."""
SELECTED_ON = 512
"""So many of them."""
SEEDS_APART = 100_000
"""Seeds of selection begin so far above those of the report."""


@dataclass(frozen=True, eq=False)
class Searched:
    """Every score that chose, and the report's cells.

    Attributes:
        rungs: generation, steps, blocks, parameters, seed, score; `kept`: went on.
    """

    rungs: pd.DataFrame
    reported: Measured
    parameters: dict[str, int]
    flops: float


def searched(study: Hybrids, folder: RunFolder) -> Outcome:
    """Search, report, finish the folder.

    Raises ValueError for several function classes, and for a budget in which nothing can be tried.
    """
    from experiments.hybrids.searching.search_report import finished

    if len(study.functions) > 1:
        raise ValueError(
            f"--search with --functions {' '.join(study.functions)}: a search has one score; give"
            " one function class"
        )
    if study.match or study.rates:
        raise ValueError(
            "--search with --match or --rates: candidates are of the widths they have and train at"
            " one --rate; leave them out"
        )
    if study.position_std:
        raise ValueError(
            f"--search with --position-std {' '.join(f'{std:g}' for std in study.position_std)}:"
            " candidates begin as --init says; leave it out"
        )
    first = candidates_of(study)
    folder.create()
    last, rungs, spent = _halved(study, first, folder)
    chosen = dict.fromkeys((*last, *_known(study)))
    final = dataclasses.replace(
        study,
        search=False,
        inside=False,
        shifts=(),
        architectures=tuple(written(blocks) for blocks in chosen),
    )
    cells = tuple(
        dataclasses.replace(cell, architecture=named(blocks))
        for cell, blocks in zip(cells_of(final), chosen, strict=True)
    )
    sizes = {named(blocks): _sizes(study).parameters(blocks) for blocks in chosen}
    return finished(study, folder, Searched(rungs, measured(final, cells, folder), sizes, spent))


def candidates_of(study: Hybrids) -> tuple[tuple[Block, ...], ...]:
    """The first generation, within both budgets."""
    sizes = _sizes(study)
    found = drawn(study.candidates, study.layers, sizes, study.most_parameters, study.seed)
    plan = (study.generations, study.steps)
    tokens = 2 * study.task(study.functions[0]).points * study.batch
    return affordable(found, sizes, plan, tokens, study.seeds, study.compute)


def selection_seeds(study: Hybrids) -> range:
    """Seeds that choose; none of them is reported."""
    return range(SEEDS_APART + study.seed, SEEDS_APART + study.seed + study.seeds)


def _sizes(study: Hybrids) -> Sizes:
    return sizes_of(study, study.task(study.functions[0]))


def _known(study: Hybrids) -> tuple[tuple[Block, ...], ...]:
    """The known architectures that are small enough."""
    found = (preset(name, study.layers) for name in KNOWN)
    return tuple(b for b in found if _sizes(study).parameters(b) <= study.most_parameters)


def _halved(
    study: Hybrids, candidates: Sequence[tuple[Block, ...]], folder: RunFolder
) -> tuple[tuple[tuple[Block, ...], ...], pd.DataFrame, float]:
    from tqdm import tqdm

    sizes, spent, tables = _sizes(study), 0.0, []
    tokens = 2 * study.task(study.functions[0]).points * study.batch
    left = tuple(candidates)
    plan = generations(len(candidates), study.generations, study.steps)
    for generation, (count, steps) in enumerate(plan):
        rows = []
        with tqdm(left, desc=f"generation {generation + 1} of {len(plan)}", file=sys.stderr) as bar:
            for blocks in bar:
                key = f"search-{generation}-{written(blocks)}"
                if (kept := folder.partial(key)) is None:
                    scores = _scores(study, blocks, steps, folder.path / "search")
                    kept = pd.DataFrame(
                        {
                            "generation": generation,
                            "steps": steps,
                            "blocks": written(blocks),
                            "architecture": named(blocks),
                            "parameters": sizes.parameters(blocks),
                            "seed": selection_seeds(study),
                            "score": scores,
                        }
                    )
                    folder.keep(key, kept)
                rows.append(kept)
        spent += flops(left, sizes, steps, tokens, study.seeds)
        table = pd.concat(rows, ignore_index=True)
        # A seed without a score counts as the worst there is: it must not help its candidate.
        known = table.assign(score=table["score"].fillna(-math.inf))
        means: pd.Series = known.groupby("blocks")["score"].mean()  # pyright: ignore[reportAssignmentType]
        following = plan[generation + 1][0] if generation + 1 < len(plan) else count
        names: list[Any] = means.sort_values(ascending=False).index.tolist()
        best = list(map(str, names[:following]))
        tables.append(table.assign(kept=table["blocks"].isin(best)))
        left = tuple(blocks for blocks in left if written(blocks) in best)
    return left, pd.concat(tables, ignore_index=True), spent


def _scores(study: Hybrids, blocks: Sequence[Block], steps: int, place: Path) -> list[float]:
    """S of every seed on the prompts of selection; nan where it is not finite."""
    task = study.task(study.functions[0])
    device = device_of(study.device)
    config = config_of(study, written(blocks), task)
    regime = dataclasses.replace(regime_of(study, task).over(steps), keep=False)
    seeds = selection_seeds(study)
    cell = Cell(named(blocks), task, config)
    trained = train_seeds(config, task, regime, seeds, place / f"{steps}-{cell.key}", device=device)
    prompts, zero, base = _selection(task, device)
    found = []
    for seed in seeds:
        model = load(str(trained.model(seed)), dtype="float32")[0]
        answers = predicted(model.to(device), prompts)
        error = prompt_sums(answers[None], prompts.ys, counted(prompts))[0].mean()
        score = (zero - error) / (zero - base)
        found.append(float(score) if np.isfinite(score) else math.nan)
    return found


@lru_cache(maxsize=2)
def _selection(task: Task, device: torch.device) -> tuple[Prompts, float, float]:
    """The prompts that select, and the mean sums of errors on them of zero and of the baseline:
    the same for every candidate."""
    prompts = held_out(task, SELECTED_ON, device, PURPOSE)
    _, errors = denominator(task.name, prompts)
    inside = counted(prompts)
    zero = squared_error_by_examples(torch.zeros_like(prompts.ys), prompts.ys)
    sums = [float((each * inside).double().sum(1).mean()) for each in (zero, errors)]
    return prompts, sums[0], sums[1]


def front(table: pd.DataFrame) -> pd.Series:
    """Which rows no other row beats: at least its `value` for at most its `parameters`, and one
    of the two truly better. nan is beaten by everything."""
    values = table["value"].fillna(-math.inf).to_numpy(float)
    sizes = table["parameters"].to_numpy(float)
    beaten = [
        bool(np.any((values >= value) & (sizes <= size) & ((values > value) | (sizes < size))))
        or value == -math.inf
        for value, size in zip(values, sizes, strict=True)
    ]
    return pd.Series(~np.array(beaten, dtype=bool), index=table.index)
