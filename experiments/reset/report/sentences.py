"""What does a study of resets say in words? Every sentence has its numbers, and none without them.

Sentences about one base speak of the family's largest one at the end of its training (`lead`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.reset.report.tables import answers
from experiments.reset.result import (
    TARGETS,
    THRESHOLD,
    at_place,
    at_threshold,
    families,
    finished,
    lead,
    main,
    one_weights,
    place_name,
    places,
    targets,
    unit_of,
)
from experiments.reset.statistics.crossing import final_gap, noise_floor, recovered_within
from experiments.reset.statistics.summaries import (
    crossover,
    damage,
    ends,
    lower_median,
    mean_curves,
    medians,
    numbered,
)

if TYPE_CHECKING:
    from experiments.reset.result import Result


def sentences(result: Result) -> list[str]:
    """The findings of the page, most important first."""
    several = len(families(main(result.ledger))) > 1
    said = _answers(result, several)
    for family in families(main(result.ledger)):
        ledger, crossings = (lead(rows, family) for rows in (result.ledger, result.crossings))
        about = [
            *_damage(ledger),
            *_fastest_and_slowest(crossings),
            *_local_against_lm(ledger, crossings),
            *_no_op(ledger),
            *_scratch(ledger),
        ]
        said += [f"{family.capitalize()}: {_lowered(s)}" if several else s for s in about]
    return [*said, *_ended(result.crossings), *_annealed(result.ledger), *result.statements]


def nats(value: float) -> str:
    """A gap with three decimals at most, a true minus."""
    decimals = 3 if abs(value) < 0.0995 else 2
    return f"{value:.{decimals}f}".replace("-", "−")


def counted(number: int, what: str) -> str:
    """`1 student`, `3 students`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _answers(result: Result, several: bool) -> list[str]:
    said = []
    for family, found in answers(result):
        who = (
            f"{family.capitalize()}, {TARGETS[found.target]}" if several else TARGETS[found.target]
        )
        who = who[0].upper() + who[1:]
        of = f"{counted(found.students, 'student')} of {counted(found.runs, 'base')}"
        how = "" if found.over == "nothing" else f"; interval: {found.over} drawn again"
        said.append(f"{who}: {found.text} ({of}{how}).")
    return said


def _damage(ledger: pd.DataFrame) -> list[str]:
    table = damage(main(ledger))
    if table.empty:
        return []
    if len(table) == 1:
        row = table.iloc[0]
        said = f"Resetting {row['name']} raises the held-out loss by {nats(row['value'])} nat"
    else:
        most, least = table.loc[table["value"].idxmax()], table.loc[table["value"].idxmin()]
        middle = float(np.median(table["value"].to_numpy(float)))
        said = (
            f"Resetting a layer raises the held-out loss by {nats(least['value'])} "
            f"({least['name']}) to {nats(most['value'])} nat ({most['name']}), median "
            f"{nats(middle)}"
        )
    known = table.loc[table["skip"].notna()]
    if len(known):
        apart = float((known["value"] - known["skip"]).abs().max())
        said += f"; leaving it out altogether costs as much to within {nats(apart)} nat"
        if apart > 0.1 * float(known["value"].max()):
            said = said.replace("costs as much to within", "differs from that by up to")
    return [f"{said}."]


def _fastest_and_slowest(crossings: pd.DataFrame) -> list[str]:
    own = at_threshold(crossings)
    said = []
    for target in targets(own):
        rows = own.loc[own["target"] == target]
        unit, text = unit_of(rows)
        table = medians(rows, ["stack", "layer"], unit)
        if len(table) < 2:
            continue
        came = table.loc[np.isfinite(table["value"].to_numpy(float))].sort_values("value")
        never = table.loc[np.isinf(table["value"].to_numpy(float))]
        of = " of the training tokens" if unit == "share" else " tokens"
        within = f"within {THRESHOLD:g} nat"
        parts = []
        if len(came):
            least, most = came["value"].min(), came["value"].max()
            fastest = _tied(came.loc[came["value"] == least])
            parts.append(f"fastest {fastest}, {within} after {text(least)}{of}")
            if most > least and never.empty:
                slowest = _tied(came.loc[came["value"] == most])
                parts.append(f"slowest {slowest}, after {text(most)}")
        if len(never):
            bound = text(float(never["bound"].min()))
            parts.append(f"not {within} after {bound}: {_tied(never)}")
        said.append(f"{_raised(TARGETS[target])}: {'; '.join(parts)} (medians over seeds).")
    return said


def _local_against_lm(ledger: pd.DataFrame, crossings: pd.DataFrame) -> list[str]:
    own = at_threshold(crossings)
    if not {"lm", "hidden"} <= set(targets(own)):
        return []
    unit, text = unit_of(own)
    table = medians(own, ["target", "stack", "layer"], unit)
    pair = [
        table.loc[table["target"] == target, ["stack", "layer", "value"]]
        for target in ("lm", "hidden")
    ]
    both = pair[0].merge(pair[1], on=["stack", "layer"], suffixes=("_lm", "_hidden"))
    if both.empty:
        return []
    lm, hidden = (both[name].to_numpy(float) for name in ("value_lm", "value_hidden"))
    told = np.isfinite(np.minimum(lm, hidden))
    fewer, open_ = int((hidden < lm)[told].sum()), int((~told).sum())
    said = []
    if told.any():
        rest = f" ({counted(open_, 'layer')} came within it by neither)" if open_ else ""
        both_came = np.isfinite(np.maximum(lm, hidden)) & (lm > 0)
        ratio = (
            f", in the median {lower_median(hidden[both_came] / lm[both_came]):.2g} times as many"
            if both_came.sum() > 1
            else ""
        )
        said.append(
            f"To come within {THRESHOLD:g} nat, local regression takes fewer tokens than the LM "
            f"loss at {fewer} of {counted(int(told.sum()), 'layer')}{ratio}{rest}."
        )
    rows = main(numbered(ledger))
    met = []
    for place in places(rows):
        here = at_place(rows, place)
        lines = [
            mean_curves(here.loc[here["target"] == target], ["target"])
            for target in ("lm", "hidden")
        ]
        found = crossover(*lines) if all(len(line) for line in lines) else None
        if found is not None:
            met.append(found)
    crossed = [found.tokens for found in met if found.kind == "crosses"]
    parts = []
    if crossed:
        scale = float(rows["base_tokens"].iloc[0]) if unit == "share" else 1.0
        of = " of the training tokens" if unit == "share" else " tokens"
        median = "" if len(crossed) == 1 else "in the median "
        after = text(lower_median(np.array(crossed)) / scale)
        parts.append(f"overtakes the LM loss at {len(crossed)}, {median}after {after}{of}")
    for kind, words in (
        ("ahead", "is ahead all along at"),
        ("behind", "is behind as far as both go at"),
    ):
        number = sum(found.kind == kind for found in met)
        if number:
            parts.append(f"{words} {number}")
    if parts:
        said.append(f"Of {counted(len(met), 'layer')}, local regression {listed(parts)}.")
    return said


def _no_op(ledger: pd.DataFrame) -> list[str]:
    quiet = one_weights(ledger.loc[ledger["arm"] == "A1"]) if len(ledger) else ledger
    if quiet.empty or not (quiet["tokens"] > 0).any():
        return []
    floor = noise_floor(quiet)
    after = quiet.loc[quiet["tokens"] > 0, "gap"]
    return [
        "Trained as long without a reset, a layer's gap stays between "
        f"{nats(float(after.min()))} and {nats(float(after.max()))} nat "
        f"({counted(int(floor['students'].sum()), 'student')}): a gap as small is no damage."
    ]


def _scratch(ledger: pd.DataFrame) -> list[str]:
    own = one_weights(ledger.loc[ledger["arm"] == "A7"]) if len(ledger) else ledger
    last = ends(numbered(own))
    last = last.loc[last["tokens"] > 0]
    if last.empty:
        return []
    unit, text = unit_of(last)
    trained = last["tokens"] / (last["base_tokens"] if unit == "share" else 1.0)
    of = " of the training tokens" if unit == "share" else " tokens"
    return [
        f"A whole model trained from scratch for {text(float(trained.median()))}{of} is still "
        f"{nats(float(last['gap'].median()))} nat above the base."
        if float(last["gap"].median()) > 0
        else f"A whole model trained from scratch for {text(float(trained.median()))}{of} is "
        f"{nats(-float(last['gap'].median()))} nat below the base."
    ]


def _ended(crossings: pd.DataFrame) -> list[str]:
    own = at_threshold(crossings)
    if own.empty:
        return []
    own = finished(own)
    number = {name: int((own["status"] == name).sum()) for name in ("censored", "diverged")}
    said = []
    if number["censored"]:
        are = "is" if number["censored"] == 1 else "are"
        said.append(
            f"{number['censored']} of {counted(len(own), 'student')} {are} censored at "
            f"{THRESHOLD:g} nat: above it when the budget ended, counted as longer than that and "
            "never dropped."
        )
    else:
        said.append(f"No student of {len(own)} is censored at {THRESHOLD:g} nat.")
    if number["diverged"]:
        said.append(
            f"{counted(number['diverged'], 'student')} diverged (0.5 nat above the loss at the "
            f"reset), {_who(own.loc[own['status'] == 'diverged'])}."
        )
    return said


def _annealed(ledger: pd.DataFrame) -> list[str]:
    own = ledger.loc[ledger["arm"].isin(["A0", "A11"])] if len(ledger) else ledger
    if own.empty or not (own["weights"] == "annealed").any():
        return []
    calm = noise_floor(one_weights(ledger.loc[ledger["arm"] == "A1"]))
    judged = recovered_within(final_gap(own), calm)
    judged = judged.loc[judged["unique"].isna() & (judged["part"] == "block")]
    said = []
    for target in targets(judged):
        rows = judged.loc[judged["target"] == target]
        same = int(rows["same"].sum())
        tolerance = nats(float(rows["tolerance"].max()))
        said.append(
            f"After the rate went to 0, {TARGETS[target]} leaves a gap of "
            f"{nats(float(np.median(rows['gap'].to_numpy(float))))} nat (median of "
            f"{counted(len(rows), 'student')}); {same} {'is' if same == 1 else 'are'} "
            f"approximately the same as before (within {tolerance} nat). Students that stopped "
            "because they were back are not among them."
        )
    return said


def _who(rows: pd.DataFrame) -> str:
    names = [
        f"{place_name(row['stack'], row['layer'])} ({TARGETS[row['target']]})"
        for row in rows.drop_duplicates(["stack", "layer", "target"]).to_dict("records")
    ]
    return f"of {listed(names)}"


def _tied(rows: pd.DataFrame) -> str:
    """The places of rows that are level."""
    return listed([_place(row) for row in rows.to_dict("records")])


def _place(row: Mapping[Any, Any] | pd.Series) -> str:
    return place_name(str(row["stack"]), int(row["layer"]))


def _raised(words: str) -> str:
    return words[0].upper() + words[1:]


def _lowered(sentence: str) -> str:
    """A sentence behind a colon: its first letter small, unless it begins a name like LM."""
    return sentence if sentence[:2].isupper() else sentence[0].lower() + sentence[1:]
