"""What do the reporting examples say, table by table?

They had no say in any ranking, nor in which components are removed alone here. Every table gives
tasks and shot counts the same weight; texts are the independent units within a task.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from einops import rearrange

from experiments.prune.cells import FEWEST, Cells, Values, spread
from experiments.prune.curves import (
    contrast,
    contrasts,
    curve_of,
    curves,
    holm_of,
    rankings_of,
)
from experiments.prune.curves import grid as grid_of
from experiments.prune.measured import ALONE, EXPORTED, WHOLE, Measured
from experiments.prune.scores import clustered, located
from experiments.statistics import mean_and_stderr, sign_flip_tests

OWN = "importance"
TRANSFERRED = (
    "aggregate",
    "aggregate (rank)",
    "aggregate (z)",
    "others",
    "highest partner",
    "lowest partner",
)
"""Rankings made from other tasks too."""
MIDDLE = (0.25, 0.75)
"""Shares removed over which rankings of other tasks are compared with a task's own."""
EXAMPLE = ["task", "shots", "seed", "doc_id"]


def totals(measured: Measured) -> dict[str, int]:
    """How many components each unit has."""
    return {unit: len(components) for unit, components in measured.units.items()}


def average_table(cells: Cells, totals: Mapping[str, int]) -> pd.DataFrame:
    """All curves: averaged over tasks and shots, over tasks at each shot count, and one by one.

    Columns: those of `Curve.frame`, and task and shots ("" and nan where averaged over).
    """
    keys = cells.keys[["task", "shots"]].drop_duplicates()
    pairs = [(str(task), int(shots)) for task, shots in keys.itertuples(index=False)]
    tables = [curve.frame().assign(task="", shots=np.nan) for curve in curves(cells, totals)]
    for shots in sorted({s for _, s in pairs}):
        at = [pair for pair in pairs if pair[1] == shots]
        tables += [c.frame().assign(task="", shots=shots) for c in curves(cells, totals, at)]
        for task, _ in at:
            one = curves(cells, totals, [(task, shots)])
            tables += [c.frame().assign(task=task, shots=shots) for c in one]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def removable_table(cells: Cells, totals: Mapping[str, int], tolerance: float) -> pd.DataFrame:
    """How many components can go by each ranking before the average falls more than `tolerance`.

    Columns: unit, ranking, shots (nan: averaged over them), components, value, low, high, share,
    share_low, share_high.
    """
    shots = sorted({int(s) for s in cells.keys["shots"]})
    tasks = list(dict.fromkeys(cells.keys["task"]))
    rows = []
    for at in [None, *(shots if len(shots) > 1 else [])]:
        within = None if at is None else [(task, at) for task in tasks]
        for curve in curves(cells, totals, within):
            count = curve.removable(tolerance)
            rows.append(
                (curve.unit, curve.ranking, np.nan if at is None else at, curve.total, *count)
            )
    names = ["unit", "ranking", "shots", "components", "value", "low", "high"]
    frame = pd.DataFrame(rows, columns=pd.Index(names))
    return frame.assign(
        share=frame["value"] / frame["components"],
        share_low=frame["low"] / frame["components"],
        share_high=frame["high"] / frame["components"],
    )


def contrast_table(cells: Cells, totals: Mapping[str, int]) -> pd.DataFrame:
    """`curves.contrasts` of every unit with its random orders."""
    tables = [contrasts(cells, unit, total) for unit, total in totals.items()]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def transfer_table(cells: Cells, totals: Mapping[str, int]) -> pd.DataFrame:
    """Is a task pruned worse by what other tasks find important than by its own importance?

    The difference of the score, averaged over the steps in `MIDDLE`. Columns: unit, task (`all`
    where averaged), ranking, value, stderr, low, high, p, p_holm (over all tasks and rankings of a
    unit; the averages are not among them).
    """
    tables = []
    for unit, total in totals.items():
        names = rankings_of(cells, unit)
        others = [name for name in TRANSFERRED if name in names]
        if OWN not in names or not others:
            continue
        rows = []
        for ranking in others:
            whole = curve_of(cells, unit, ranking, total)
            conditions = () if whole is None else whole.average.conditions
            tasks = list(dict.fromkeys(task for task, _ in conditions))
            for task in [*tasks, *(["all"] if len(tasks) > 1 else [])]:
                within = [pair for pair in conditions if task in ("all", pair[0])]
                one, own = (curve_of(cells, unit, name, total, within) for name in (ranking, OWN))
                if one is not None and own is not None:
                    rows.append((unit, task, ranking, *contrast(one, own, MIDDLE)))
        columns = ["unit", "task", "ranking", "value", "stderr", "low", "high", "p"]
        frame = pd.DataFrame(rows, columns=pd.Index(columns))
        tested = frame["p"].where(frame["task"] != "all").to_numpy(np.float64)
        tables.append(frame.assign(p_holm=holm_of(tested)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def baseline_table(measured: Measured) -> pd.DataFrame:
    """Score of the whole model: task, shots, value, stderr, chance, examples, texts, seeds.

    The mean over examples and seeds; the standard error over texts.
    """
    whole = measured.answers.loc[measured.answers["unit"] == WHOLE].dropna(subset=["score"])
    rows = []
    for (task, shots), own in whole.groupby(["task", "shots"], sort=False, observed=True):
        mean, stderr = mean_and_stderr(own["score"], clusters=own["group"].astype(str))
        rows.append(
            (task, shots, mean, stderr, measured.chances.get(str(task), np.nan))
            + tuple(own[name].nunique() for name in ("doc_id", "group", "seed"))
        )
    names = ["task", "shots", "value", "stderr", "chance", "examples", "texts", "seeds"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def alone_table(measured: Measured, generator: np.random.Generator) -> pd.DataFrame:
    """What removing one component costs, for the components chosen on selection examples.

    Columns: unit, component, value (change of the score), stderr (over texts, tasks given), p (sign
    flips of whole texts), p_holm (over the components of the table), loss_rise, stack, layer, head.
    """
    answers = measured.answers
    whole = answers.loc[answers["unit"] == WHOLE].set_index(EXAMPLE)[["score", "loss"]]
    kinds = {str(c): (unit, c) for unit, cs in measured.units.items() for c in cs}
    rows, found = [], []
    alone = answers.loc[answers["unit"] == ALONE]
    for name, without in alone.groupby("component", sort=False, observed=True):
        joined = without.join(whole, on=EXAMPLE, rsuffix="_whole")
        change = joined.assign(
            score=joined["score"] - joined["score_whole"],
            loss=joined["loss"] - joined["loss_whole"],
        )
        counted = change.dropna(subset=["score"])
        if str(name) not in kinds or counted.empty:
            continue
        unit, component = kinds[str(name)]
        value, stderr = _over_tasks(counted)
        p = sign_flip_tests(rearrange(_sums_of_texts(counted), "text -> text 1"), generator)[0]
        rise = change.groupby(["task", "shots"], observed=True)["loss"].mean().mean()
        rows.append((unit, value, stderr, float(p), float(rise)))
        found.append(component)
    names = ["unit", "value", "stderr", "p", "loss_rise"]
    frame = pd.concat([located(found), pd.DataFrame(rows, columns=pd.Index(names))], axis=1)
    return frame.assign(p_holm=holm_of(frame["p"].to_numpy(np.float64)))


def grid_table(cells: Cells, totals: Mapping[str, int]) -> pd.DataFrame:
    """`curves.grid` averaged over tasks and shots (shots nan) and at each shot count."""
    if not rankings_of(cells, "grid") or not {"heads", "ffns"} <= set(totals):
        return pd.DataFrame()
    shots = sorted({int(s) for s in cells.keys["shots"]})
    tasks = list(dict.fromkeys(cells.keys["task"]))
    tables = []
    for at in [None, *shots]:
        within = None if at is None else [(task, at) for task in tasks]
        table = grid_of(cells, totals["heads"], totals["ffns"], within)
        tables.append(table.assign(shots=np.nan if at is None else at))
    return pd.concat(tables, ignore_index=True)


def exported_table(cells: Cells, measured: Measured) -> pd.DataFrame:
    """The exported checkpoint beside the whole model: size, speed, and score on the same examples.

    low and high of a speed are those of single forwards, not an interval of a mean.

    Columns: model, metric, value, stderr, low, high. Empty where nothing was exported.
    """
    if measured.exported is None:
        return pd.DataFrame()
    rows = [
        (row["model"], row["metric"], float(row["value"]), np.nan, row["low"], row["high"])
        for row in measured.exported.to_dict("records")
    ]
    curve = curve_of(cells, EXPORTED, EXPORTED, 1)
    if curve is not None:
        start, end = curve.average.value[0], curve.average.value[-1]
        around = curve.average.spreads
        change = curve.average.resampled[:, -1] - curve.average.resampled[:, 0]
        rows += [
            ("whole", "accuracy", start, *around[0]),
            ("exported", "accuracy", end, *around[-1]),
            ("exported", "accuracy_change", end - start, *spread(change)),
        ]
    names = ["model", "metric", "value", "stderr", "low", "high"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def _over_tasks(change: pd.DataFrame) -> tuple[float, float]:
    """Mean over tasks and shots alike, and its standard error: texts are drawn, tasks given.

    The standard error is nan with fewer than `FEWEST` texts in a task.
    """
    means, errors = [], []
    for _, rows in change.groupby("task", observed=True):
        # Every shot count weighs the same within its task, however many examples count there.
        sizes = rows.groupby("shots")["score"].transform("size").to_numpy(np.float64)
        weights = len(rows) / rows["shots"].nunique() / sizes
        column = rearrange(rows["score"].to_numpy(np.float64) * weights, "example -> example 1")
        mean, stderr = clustered(column, rows["group"].astype(str).tolist())
        means.append(mean[0])
        errors.append(stderr[0] if rows["group"].nunique() >= FEWEST else np.nan)
    return float(np.mean(means)), float(np.sqrt(np.sum(np.square(errors))) / len(errors))


def _sums_of_texts(change: pd.DataFrame) -> Values:
    """Each text's part in the mean over tasks and shots."""
    sizes = change.groupby(["task", "shots"], observed=True)["score"].transform("size")
    parts = (change["score"] / sizes).groupby([change["task"], change["group"]], observed=True)
    return parts.sum().to_numpy(np.float64)
