"""What does a study of resets hand to its page, and which rows answer the question?

A `Result` holds frames, one row a fact; an empty frame is a fact nobody measured. The ledger has a
row per student and evaluation, the crossings one per student and threshold. A student is one copy
of a layer, reset and trained while all else is frozen.

The question is about its main rows: a whole block, the base's own initialiser, fresh data. `lead`
takes the largest base of a family at the end of its training, for the figures that show one base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

THRESHOLD = 0.05
"""Nat above the base's held-out loss that counts as "about the same"."""
FAMILIES = ("decoder", "encoder", "encoder-decoder")
STACKS: Mapping[str, str] = {"": "", "encoder": "encoder ", "decoder": "decoder "}
TARGETS: Mapping[str, str] = {
    "lm": "LM loss",
    "hidden": "local regression",
    "logits": "KL to the old logits",
    "mix": "mix",
}
ARMS: Mapping[str, str] = {
    "A0": "reset, train it",
    "A1": "no reset, train it",
    "A2": "no reset, train all",
    "A3": "reset, train all",
    "A4": "reset, train its norms",
    "A5": "reset, train around it",
    "A6": "reset, train nothing",
    "A7": "all from scratch",
    "A8": "all random, train it",
    "A9": "a part",
    "A10": "law",
    "A11": "target",
    "A12": "several layers",
    "A13": "cross-attention",
}
"""The protocol's arms, in words."""
WEIGHTS: Mapping[str, str] = {
    "averaged": "averaged over the last tenth of the way",
    "raw": "as trained, at the rate of the trunk",
    "annealed": "after the rate went to 0",
}
"""Weights that are evaluated, those that are read first. Students stop by their averaged weights: a
raw curve would end before it had its chance."""
WHOLE = ("A2", "A7")
"""Arms that are about no layer."""
ORIGINS: Mapping[str, str] = {
    "same": "the base's own training text, in the same order",
    "reshuffled": "the base's own training text, reshuffled",
    "held-out": "text the base never saw, of the same kind",
    "other": "text of another kind",
}


@dataclass(frozen=True, eq=False)
class Result:
    """All that figures, tables and page are made of."""

    model: str
    """What was reset, as a reader would call it."""
    ledger: pd.DataFrame
    crossings: pd.DataFrame
    survival: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Kaplan–Meier steps: threshold, target, tokens or share, survival, low, high."""
    slopes: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Exponents of a fit: term (N, D, T0), target, value, low, high."""
    predictors: pd.DataFrame = field(default_factory=pd.DataFrame)
    """stack, layer, predictor, value (and base, where there are several)."""
    speeds: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Speed-up over the plain way: layer, n_layers, mode, measured, bound."""
    rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Learning rates tried: arm, target, rate, gap, picked."""
    statements: Sequence[str] = ()
    """Sentences of tests made elsewhere, shown behind the findings."""
    left_out: Sequence[str] = ()
    """What was asked for and is not there, and why."""


def main(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the question, of the first kind of weights that there is."""
    return one_weights(asked(rows))


def asked(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the question: whole blocks, the base's initialiser, fresh data of the origin that
    most bases have (of several, the first), each target; every kind of weights."""
    if rows.empty:
        return rows
    keep = (
        rows["arm"].isin(["A0", "A11"])
        & (rows["part"] == "block")
        & (rows["law"] == "init")
        & rows["unique"].isna()
    )
    return usual_origin(rows.loc[keep])


def usual_origin(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the origin of data that most bases have (of several, the first)."""
    bases = {o: rows.loc[rows["origin"] == o, "base"].nunique() for o in ORIGINS}
    most = max(bases, key=lambda origin: bases[origin])
    return rows.loc[rows["origin"] == most] if bases[most] else rows


def one_weights(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first kind of weights that there is."""
    present = [name for name in WEIGHTS if len(rows) and (rows["weights"] == name).any()]
    return rows.loc[rows["weights"] == present[0]] if present else rows


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of bases at the end of their training, or of the longest checkpoint there is."""
    if rows.empty:
        return rows
    return rows.loc[rows["base_share"] == rows.groupby("base")["base_share"].transform("max")]


def lead(
    rows: pd.DataFrame, family: str | None = None, *, finished_only: bool = True
) -> pd.DataFrame:
    """Rows of the largest base of a family (the first one present), all its seeds, at its end."""
    if rows.empty:
        return rows
    name = family or families(rows)[0]
    rows = rows.loc[rows["family"] == name]
    rows = finished(rows) if finished_only else rows
    for size in ("n_layers", "d_model"):
        rows = rows.loc[rows[size] == rows[size].max()]
    return rows


def most_varied(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Rows of the shape (family, N, D) with the most values of a column: what only some bases were
    asked is shown of those. Of several shapes, `lead`'s."""
    if rows.empty:
        return rows
    shape = ["family", "n_layers", "d_model"]
    number = rows.groupby(shape)[column].transform("nunique")
    return lead(rows.loc[number == number.max()], finished_only=False)


def base_names(ledger: pd.DataFrame) -> dict[str, str]:
    """A short name for every base that is called by its folder: `opt 4×64, seed 0`.

    Bases that would share a name keep their folder's.
    """
    if ledger.empty:
        return {}
    rows = ledger.drop_duplicates("base")
    rows = rows.loc[rows["base"].str.contains(r"[/\\]")]
    names = [
        f"{row['architecture']} {row['n_layers']}×{row['d_model']}"
        + (f", seed {row['base_seed']}" if row["base_seed"] >= 0 else "")
        for row in rows.to_dict("records")
    ]
    return {
        base: name for base, name in zip(rows["base"], names, strict=True) if names.count(name) == 1
    }


def families(rows: pd.DataFrame) -> list[str]:
    """The families present, decoders first."""
    return [name for name in FAMILIES if len(rows) and (rows["family"] == name).any()]


def clearest(crossings: pd.DataFrame) -> str:
    """The target of which most students crossed; of several, the first."""
    crossed = crossings.loc[np.isfinite(crossings["tokens"].to_numpy(float))]
    number = {name: int((crossed["target"] == name).sum()) for name in targets(crossings)}
    return max(number, key=lambda name: number[name])


def targets(rows: pd.DataFrame) -> list[str]:
    """The targets present, in one order everywhere."""
    return [name for name in TARGETS if len(rows) and (rows["target"] == name).any()]


def places(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Stack and layer of every place reset, from the bottom up; whole models are at none."""
    rows = rows.loc[~is_whole(rows)]
    found = rows[["stack", "layer"]].drop_duplicates().itertuples(index=False)
    order = list(STACKS)
    return sorted(((str(s), int(n)) for s, n in found), key=lambda p: (order.index(p[0]), p[1]))


def is_whole(rows: pd.DataFrame) -> pd.Series:
    """Rows of arms that are about no layer: the whole model from scratch, or all of it trained."""
    return rows["arm"].isin(WHOLE) | ~(rows["layer"] >= 0)


def place_name(stack: str, layer: int) -> str:
    """`L3`, `encoder L3`."""
    return f"{STACKS[stack]}L{layer}"


def at_place(rows: pd.DataFrame, place: tuple[str, int]) -> pd.DataFrame:
    """Rows of one place."""
    return rows.loc[(rows["stack"] == place[0]) & (rows["layer"] == place[1])]


def knows_length(rows: pd.DataFrame) -> bool:
    """Whether it is known of every row how many tokens its base was trained on."""
    return bool(len(rows)) and bool(np.isfinite(rows["base_tokens"].to_numpy(float)).all())


def near(rows: pd.DataFrame, threshold: float) -> pd.Series:
    """Rows at a threshold, which went through files as a float."""
    return (rows["threshold"] - threshold).abs() < 1e-9


def unit_of(rows: pd.DataFrame) -> tuple[str, Callable[[float], str]]:
    """Column of amounts (share, or tokens where T0 is unknown), and how an amount is written."""
    return ("share", percent) if knows_length(rows) else ("tokens", tokens_text)


def at_threshold(crossings: pd.DataFrame, threshold: float = THRESHOLD) -> pd.DataFrame:
    """The main rows at an absolute threshold."""
    own = main(crossings)
    return own.loc[(own["kind"] == "absolute") & near(own, threshold)] if len(own) else own


def amount_label(unit: str, threshold: float) -> str:
    """Of an axis of amounts."""
    what = "share of T0" if unit == "share" else "tokens"
    return f"{what} to come within {threshold:g} nat"


def percent(share: float) -> str:
    """A share in percent, to two digits: `3.1 %`."""
    return f"{_two_digits(100 * share)} %"


def tokens_text(tokens: float) -> str:
    """Tokens to two digits: `340 k`, `1.2 M`."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if float(f"{tokens:.2g}") >= size:
            return _two_digits(tokens / size) + unit
    return _two_digits(tokens)


def _two_digits(value: float) -> str:
    if value == 0:
        return "0"
    return np.format_float_positional(float(f"{value:.2g}"), trim="-").replace("-", "−")
