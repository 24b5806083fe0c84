"""What was measured: squared errors by number of examples, and a sum for every prompt.

With ξ(n, i) the squared error of prompt n after i examples (mean over the coordinates of y), at
points that count only (`prompts.counted`):

    error_rows       mean over n of ξ(n, i), for curves
    prompt_sums      e(n) = Σ_i ξ(n, i): all that a score and its bootstrap need

Sums are kept as tidy rows (`SUMS`), a row a prompt; `gathered` puts those of many cells together
again, and refuses cells that were measured on different prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from experiments.statistics import mean_and_stderr
from probes.regression import squared_error_by_examples

ALL = -1
"""The seed of a row over seeds, and of a baseline's."""
KEYS = ("architecture", "task", "seed", "shift", "baseline")
SUMS = (*KEYS, "prompt", "value")


@dataclass(frozen=True, eq=False)
class Sums:
    """Σ_i ξ(i) of each prompt, of all that was measured on one task under one shift."""

    task: str
    shift: str
    zero: Float[np.ndarray, "prompt"]
    baselines: Mapping[str, Float[np.ndarray, "prompt"]]
    models: Mapping[str, Float[np.ndarray, "seed prompt"]]
    seeds: Mapping[str, tuple[int, ...]]


def error_rows(
    predictions: Float[Tensor, "seed batch point y_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    seeds: Sequence[int],
    counted: Bool[Tensor, "batch point"] | None = None,
) -> pd.DataFrame:
    """Squared error by number of examples: seed, examples, metric, value, stderr over prompts.

    Points that are `counted` in no prompt (of associative recall, all but the last) have no row.
    """
    errors, inside = _errors(predictions, ys, counted)
    rows = []
    for seed, own in zip(seeds, errors, strict=True):
        for point in np.flatnonzero(inside.any(axis=0)):
            values = own[inside[:, point], point]
            estimate = mean_and_stderr(values)
            rows.append((seed, int(point), "squared_error", estimate.mean, estimate.stderr))
    return pd.DataFrame(rows, columns=pd.Index(["seed", "examples", "metric", "value", "stderr"]))


def prompt_sums(
    predictions: Float[Tensor, "seed batch point y_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    counted: Bool[Tensor, "batch point"] | None = None,
) -> Float[np.ndarray, "seed batch"]:
    """Σ_i ξ(i) of every prompt, over the points that are counted; all unless given."""
    errors, inside = _errors(predictions, ys, counted)
    return np.where(inside, errors, 0.0).sum(axis=2)


def gathered(frame: pd.DataFrame) -> list[Sums]:
    """Rows of `SUMS`, of one or many cells, as `Sums` for each task and shift.

    A baseline's rows have no architecture and seed `ALL`; "zero" is among them. Baselines that were
    asked about some of the prompts only have a `Sums` of their own, of those prompts, behind that
    of all. ValueError where rows of one baseline from several cells differ: the cells were measured
    on different prompts.
    """
    found = []
    key: Any
    for key, part in frame.groupby(["task", "shift"], sort=False, observed=True):
        task, shift = map(str, key)
        where = f"task {task}, shift {shift}"
        yardsticks = _yardsticks(part.loc[part["architecture"] == ""], where)
        zero = yardsticks.pop("zero")
        tables = {}
        own = part.loc[part["architecture"] != ""]
        for name, rows in own.groupby("architecture", sort=False, observed=True):
            table = rows.pivot(index="seed", columns="prompt", values="value").sort_index()
            if list(table.columns) != list(zero.index):
                raise ValueError(
                    f"{where}: {name} has {len(table.columns)} prompts, zero {len(zero)}"
                )
            tables[str(name)] = table
        seeds = {name: tuple(int(s) for s in table.index) for name, table in tables.items()}
        for size in sorted({len(zero), *map(len, yardsticks.values())}, reverse=True):
            some: Any = zero.index[:size]
            asked = {name: own for name, own in yardsticks.items() if len(own) == size}
            if any(list(own.index) != list(some) for own in asked.values()):
                raise ValueError(f"{where}: {', '.join(asked)}: not the first {size} prompts")
            found.append(
                Sums(
                    task,
                    shift,
                    zero.loc[some].to_numpy(float),
                    {name: own.to_numpy(float) for name, own in asked.items()},
                    {name: table[some].to_numpy(float) for name, table in tables.items()},
                    seeds,
                )
            )
    return found


def _yardsticks(given: pd.DataFrame, where: str) -> dict[str, pd.Series]:
    """Sums by prompt of every baseline; ValueError where two cells differ, or without zero."""
    span = given.groupby(["baseline", "prompt"], observed=True, sort=False)["value"]
    span = span.agg(["min", "max"])
    if not np.allclose(span["min"], span["max"], rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError(f"{where}: cells were measured on different prompts; draw them alike")
    found: dict[str, pd.Series] = {}
    for name, own in span.groupby(level="baseline", observed=True, sort=False):
        values: Any = own.droplevel("baseline").sort_index()["min"]
        found[str(name)] = values
    if "zero" not in found:
        raise ValueError(f"{where}: no rows of the baseline zero, which every score needs")
    return found


def _errors(
    predictions: Float[Tensor, "seed batch point y_dim"],
    ys: Float[Tensor, "batch point y_dim"],
    counted: Bool[Tensor, "batch point"] | None,
) -> tuple[Float[np.ndarray, "seed batch point"], Bool[np.ndarray, "batch point"]]:
    errors = squared_error_by_examples(predictions, ys.expand_as(predictions)).double()
    if counted is None:
        counted = torch.ones(errors.shape[1:], dtype=torch.bool)
    return errors.cpu().numpy(), counted.cpu().numpy()
