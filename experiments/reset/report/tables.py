"""The numbers of a study of resets as tables: bases (T1), shares (T2), rates (T3), cost (T4).

Each is a frame for the page, whose columns are words; a table of nothing is empty. `markdown`
writes one for a paper. The answer has one line for each family and target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.report import minus, numbers
from experiments.reset.result import (
    TARGETS,
    base_names,
    families,
    finished,
    main,
    one_weights,
    percent,
    place_name,
    targets,
    unit_of,
)
from experiments.reset.statistics.summaries import ends, medians, numbered
from experiments.reset.statistics.survival import Headline, Unit, amount_text, headline, with_ends

if TYPE_CHECKING:
    from experiments.reset.result import Result

COARSER = 0.1
"""Nat: said beside the answer where that is out of reach."""
SEED = 0
"""Of the resamples behind the answer's interval."""


def answers(result: Result) -> Iterator[tuple[str, Headline]]:
    """The one-line answer of every family and target that has one."""
    if result.crossings.empty:
        return
    own = main(result.crossings)
    for family in families(own):
        rows = result.crossings.loc[result.crossings["family"] == family]
        for target in targets(own.loc[own["family"] == family]):
            found = headline(rows, target, np.random.default_rng(SEED))
            if found.students:
                yield family, found


def answer_line(result: Result) -> str:
    """All answers in one line, for the terminal and the top of the page."""
    found = list(answers(result))
    if not found:
        return _without_an_answer(result.ledger)
    several = len({family for family, _ in found}) > 1
    parts = [
        (f"{family}, " if several else "")
        + f"{TARGETS[each.target]}: {each.text}{_coarser(result, family, each)}"
        for family, each in found
    ]
    return "; ".join(parts)


def _without_an_answer(ledger: pd.DataFrame) -> str:
    """Where whole blocks were not retrained on fresh data (A0): where the other students ended."""
    rows = numbered(ledger)
    trained = rows.loc[rows["tokens"] > 0] if len(rows) else rows
    if trained.empty:
        return "no layer was reset and retrained: nothing to answer"
    last = ends(one_weights(trained))
    cycled = np.where(last["unique"].notna(), " on repeated data", "")
    found = [
        f"{arm} {gap.median():.3f} (students: {len(gap)})"
        for arm, gap in last["gap"].groupby(last["arm"] + cycled, sort=False)
    ]
    return (
        "no student of A0 on fresh data, whose tokens are the answer; median gap at the end of the "
        f"budget, nat: {minus(', '.join(found))}"
    )


def _coarser(result: Result, family: str, asked: Headline) -> str:
    """The next coarser threshold, where the median student did not come within the asked one."""
    if math.isfinite(asked.median):
        return ""
    rows = result.crossings.loc[result.crossings["family"] == family]
    found = headline(rows, asked.target, np.random.default_rng(SEED), threshold=COARSER)
    unit: Unit = "share" if asked.unit == "share" else "tokens"
    amounts = [
        amount_text(value, found.bound, unit) for value in (found.median, found.low, found.high)
    ]
    return f" (within {COARSER:g} nat: {with_ends(amounts)}, {percent(found.censored)} censored)"


def bases(ledger: pd.DataFrame) -> pd.DataFrame:
    """T1: what was reset: sizes, tokens, held-out loss; a row a checkpoint."""
    if ledger.empty:
        return ledger
    keys = ["base", "base_share"]
    names = {
        "base": "base",
        "family": "family",
        "n_layers": "N",
        "d_model": "D",
        "base_seed": "seed",
        "base_share": "share trained",
        "base_tokens": "T0, tokens",
        "unique_tokens": "U0, unique tokens",
        "loss_base": "held-out loss, nat",
    }
    rows = ledger.drop_duplicates(keys).sort_values(["family", "n_layers", "d_model", *keys])
    return _worded(rows, names)


def shares_table(crossings: pd.DataFrame) -> pd.DataFrame:
    """T2: f(τ) of every base, target, place and absolute threshold; range over seeds."""
    own = finished(main(crossings))
    own = own.loc[own["kind"] == "absolute"] if len(own) else own
    if own.empty:
        return own
    unit, text = unit_of(own)
    table = medians(own, ["base", "target", "stack", "layer", "threshold"], unit)
    order = list(TARGETS)
    table = table.assign(rank=[order.index(t) for t in table["target"]]).sort_values(
        ["base", "rank", "stack", "layer", "threshold"],
        ascending=[True, True, True, True, False],
        kind="stable",
    )
    rows = table.to_dict("records")
    ends_ = [
        [text(row[name]) if np.isfinite(row[name]) else "not reached" for row in rows]
        for name in ("smallest", "largest")
    ]
    return pd.DataFrame(
        {
            "base": table["base"].to_numpy(),
            "target": [TARGETS[t] for t in table["target"]],
            "place": [place_name(row["stack"], row["layer"]) for row in rows],
            "within, nat": [f"{row['threshold']:g}" for row in rows],
            "share of T0" if unit == "share" else "tokens": [
                text(row["value"]) if np.isfinite(row["value"]) else f">{text(row['bound'])}"
                for row in rows
            ],
            "smallest": ends_[0],
            "largest": ends_[1],
            "seeds": table["students"].to_numpy(),
            "censored, %": (100 * table["censored"] / table["students"]).to_numpy(),
            "diverged": table["diverged"].to_numpy(),
        }
    )


def rates_table(rates: pd.DataFrame) -> pd.DataFrame:
    """T3: the picked rate of each arm and target, and how much a factor of two costs.

    `gap` is from the rows that picked. Sensitivity: the largest gap at the picked rate's neighbours
    less its own; a pick at the end of the sweep has one neighbour, and says so.
    """
    if rates.empty:
        return rates
    keys = [name for name in ("base", "arm", "target", "layer") if name in rates]
    rows = []
    names: Any
    for names, sweep in rates.groupby(keys, sort=False, dropna=False):
        sweep = sweep.groupby("rate")[["gap", "picked"]].agg({"gap": "mean", "picked": "max"})
        chosen = np.flatnonzero(np.asarray(sweep["picked"], bool))
        if chosen.size == 0:
            continue
        at, gaps = int(chosen[0]), np.asarray(sweep["gap"], float)
        beside = [gaps[i] for i in (at - 1, at + 1) if 0 <= i < gaps.size]
        edge = "only one" if gaps.size == 1 else "at its end" if len(beside) == 1 else "inside"
        found: dict[str, Any] = dict(zip(keys, names, strict=True))
        found |= {"rate": f"{sweep.index[at]:.2g}", "gap, nat": gaps[at]}
        found |= {"neighbours cost, nat": max(beside) - gaps[at] if beside else np.nan}
        rows.append(found | {"rates tried": gaps.size, "in the sweep": edge})
    table = pd.DataFrame(rows)
    return table.assign(target=[TARGETS.get(t, t) for t in table["target"]]) if rows else table


def cost(ledger: pd.DataFrame) -> pd.DataFrame:
    """T4: students, tokens and the longest clock of every base, arm and target.

    Students that read the same batches share a clock, so seconds do not add up over rows.
    """
    if ledger.empty:
        return ledger
    last = ends(numbered(ledger))
    found = last.groupby(["base", "arm", "target"], sort=False).agg(
        students=("student", "nunique"), tokens=("tokens", "sum"), seconds=("seconds", "max")
    )
    found = found.reset_index()
    found["target"] = [TARGETS.get(t, t) for t in found["target"]]
    return _worded(
        found,
        {
            "base": "base",
            "arm": "arm",
            "target": "target",
            "students": "students",
            "tokens": "tokens, all students",
            "seconds": "longest clock, s",
        },
    )


def tables(result: Result) -> dict[str, pd.DataFrame]:
    """All tables with something in them, by caption."""
    names = base_names(result.ledger)
    ledger, crossings, rates = (
        frame.assign(base=frame["base"].replace(names)) if "base" in frame else frame
        for frame in (result.ledger, result.crossings, result.rates)
    )
    made = {
        "Bases: what was reset": bases(ledger),
        "How much it takes: median over seeds, from the smallest to the largest": shares_table(
            crossings
        ),
        "Learning rates picked, on rows that no result is from": rates_table(rates),
        "Cost: students that read the same batches share a clock": cost(ledger),
    }
    return {caption: table for caption, table in made.items() if len(table)}


def markdown(frame: pd.DataFrame) -> str:
    """A table for a paper: numbers aligned right and written as on the page."""
    if frame.empty:
        return ""
    columns, rules = [], []
    for name in frame.columns:
        number = pd.api.types.is_numeric_dtype(frame[name].dtype)
        number = number and not pd.api.types.is_bool_dtype(frame[name].dtype)
        if number:
            columns.append(numbers(frame[name].to_numpy(float, na_value=np.nan).tolist()))
        else:
            columns.append([str(value).replace("|", "\\|") for value in frame[name]])
        rules.append("---:" if number else "---")
    lines = [[str(name) for name in frame.columns], rules, *map(list, zip(*columns, strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _worded(frame: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    return frame.loc[:, list(names)].set_axis(list(names.values()), axis="columns")
