"""What does the cross-attention aside say in words?

    gap      of a student at its end: annealed, or averaged where it stopped because it was close
    u        its source-use there
    [a, b]   from the smallest to the largest student

Students of one base and seed read the same batches: what an encoder of another seed, or a bridge to
it, leaves more than the own encoder does is a difference of two such students, pair by pair.

Where it misleads: students of one base are no independent bases, and the brackets say no more than
how far these few lie apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from experiments.reset.learning.aside import BRIDGE, DECODER_TOO, NO_OP, WIPED, WIPED_OTHER
from experiments.reset.report.sentences import counted, nats
from experiments.reset.result import THRESHOLD, finished, near, one_weights, unit_of
from experiments.reset.statistics.summaries import medians, numbered

SCRATCH = "from scratch"
"""What the whole model that was never trained (A7) is called among the variants."""


def aside_rows(ledger: pd.DataFrame) -> pd.DataFrame:
    """A13 with its no-op and the scratch model of the same bases, `variant` saying which is which.

    Rows of bases at the end of their training; none where there is no A13.
    """
    if ledger.empty or not (ledger["arm"] == "A13").any():
        return ledger.iloc[:0]
    own = ledger.loc[ledger["base"].isin(ledger.loc[ledger["arm"] == "A13", "base"])]
    scratch = (own["arm"] == "A7") & own["unique"].isna()
    no_op = (own["arm"] == "A1") & (own["variant"] == NO_OP)
    rows = finished(own.loc[(own["arm"] == "A13") | no_op | scratch])
    return rows.assign(variant=np.where(rows["arm"] == "A7", SCRATCH, rows["variant"]))


def last_rows(ledger: pd.DataFrame) -> pd.DataFrame:
    """The end of every student of the aside, with `damage`: what its reset cost."""
    rows = numbered(aside_rows(ledger))
    rows = rows.loc[rows["weights"] != "raw"]
    rows = rows.loc[rows.groupby("student")["tokens"].idxmax()] if len(rows) else rows
    return rows.assign(damage=rows["loss_reset"] - rows["loss_base"])


def aside_sentences(ledger: pd.DataFrame, crossings: pd.DataFrame) -> tuple[str, ...]:
    """All of them, the answer last; none where A13 was not run."""
    last = last_rows(ledger)
    if last.empty or WIPED not in set(last["variant"]):
        return ()
    times = _times(crossings)
    said = [_of(name, last, times) for name in last["variant"].drop_duplicates() if name != NO_OP]
    return (*said, *_bridges(last), *_answer(last))


def aside_answer(ledger: pd.DataFrame) -> str:
    """The answer in one line; empty where A13 was not run with another encoder."""
    last = last_rows(ledger)
    return " ".join(_answer(last)).rstrip(".") if len(last) else ""


def _of(name: str, last: pd.DataFrame, times: pd.DataFrame) -> str:
    """One variant: what it cost, what it took, what is left."""
    own = last.loc[last["variant"] == name]
    what = f"Cross-attention {name}" if name.startswith((WIPED, "one")) else name.capitalize()
    said = (
        f"{what} ({counted(len(own), 'student')} of {counted(own['base'].nunique(), 'base')}): "
        f"{_spread(own['damage'])} nat above the base at first, {_spread(own['gap'])} at the end"
    )
    if own["source_use"].notna().any():
        said += f", source-use {_spread(own['source_use'])}"
    found = times.loc[times["variant"] == name]
    if len(found):
        row = found.iloc[0]
        unit, text = unit_of(last)
        of = " of T0" if unit == "share" else " tokens"
        came = int(row["students"] - row["censored"] - row["diverged"])
        amount = (
            f" after {text(row['value'])}{of} in the median"
            if np.isfinite(row["value"])
            else f", the median student not after {text(row['bound'])}{of}"
        )
        said += f"; within {THRESHOLD:g} nat {came} of {int(row['students'])}{amount}"
    return f"{said}."


def _times(crossings: pd.DataFrame) -> pd.DataFrame:
    """Median tokens to the threshold, of every variant."""
    rows = one_weights(aside_rows(crossings))
    rows = rows.loc[(rows["kind"] == "absolute") & near(rows, THRESHOLD)] if len(rows) else rows
    return medians(rows, ["variant"], unit_of(rows)[0] if len(rows) else "tokens")


def _bridges(last: pd.DataFrame) -> Iterator[str]:
    """What a linear map makes up for."""
    bridge = last.loc[last["variant"] == BRIDGE]
    if len(bridge):
        won = 1 - bridge["gap"] / bridge["damage"]
        yield (
            "An encoder of another seed in place of the own, nothing wiped, costs "
            f"{_spread(bridge['damage'])} nat; a linear bridge wins back "
            f"{_spread(100 * won, '{:.0f}')} % of it."
        )
    for end, who in (("", "another seed"), (", other width", "another width")):
        foreign = WIPED_OTHER if not end else f"{WIPED}{end}"
        both = _paired(last, {"own": WIPED, "foreign": foreign, "bridge": f"{BRIDGE}{end}"})
        if both.empty:
            continue
        wiped, bridged = both["foreign"] - both["own"], both["bridge"] - both["own"]
        yield (
            f"Beside wiped cross-attention with the own encoder, one of {who} leaves "
            f"{_spread(wiped)} nat more, pair by pair; a linear bridge to it, nothing wiped, "
            f"{_spread(bridged)} more."
        )


def _answer(last: pd.DataFrame) -> Iterator[str]:
    """Was it the wiping, or the encoder? A difference is one that every pair of students shows."""
    both: Any = _paired(last, {"own": WIPED, "foreign": WIPED_OTHER})
    if both.empty:
        return
    others = {DECODER_TOO: "the same with the decoder trained", SCRATCH: "a model from scratch"}
    ends: dict[Any, Any] = {name: rows["gap"] for name, rows in last.groupby("variant", sort=False)}
    beside = [f"{said} {_spread(ends[name])}" for name, said in others.items() if name in ends]
    added = both["foreign"] - both["own"]
    numbers = "; ".join(
        (
            f"after {_trained(last)}, wiped cross-attention alone leaves {_spread(both['own'])} "
            f"nat, with an encoder of another seed as well {_spread(both['foreign'])} "
            f"({_spread(added)} more, pair by pair)",
            *beside,
        )
    )
    if added.min() > 0:
        mostly = both["own"].mean() < both["foreign"].mean() / 2
        yield f"{'The encoder more than the wiping' if mostly else 'Both'}: {numbers}."
    elif added.max() < 0:
        yield f"The wiping, not the encoder: {numbers}."
    else:
        yield f"The encoder makes no difference that every pair shows: {numbers}."


def _trained(last: pd.DataFrame) -> str:
    unit, text = unit_of(last)
    longest = last["tokens"] / (last["base_tokens"] if unit == "share" else 1.0)
    return text(float(longest.max())) + (
        " of the training tokens" if unit == "share" else " tokens"
    )


def _paired(last: pd.DataFrame, variants: dict[str, str]) -> pd.DataFrame:
    """Gaps of several variants beside each other, for every base and seed that has all."""
    keys = ["base", "base_share", "seed", "unique"]
    columns: list[Any] = [
        last.loc[last["variant"] == variant].groupby(keys, dropna=False)["gap"].mean().rename(name)
        for name, variant in variants.items()
    ]
    return pd.concat(columns, axis=1).dropna()


def _spread(values: pd.Series, form: str = "") -> str:
    """Mean and, of several, the smallest and the largest."""

    def written(value: float) -> str:
        return form.format(value).replace("-", "−") if form else nats(value)

    mean = written(float(values.mean()))
    if len(values) < 2:
        return mean
    return f"{mean} [{written(float(values.min()))}, {written(float(values.max()))}]"
