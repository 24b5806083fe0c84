"""Whose scores are in this file, and do they fit this model?

A table of scores is CSV or parquet with the columns ``component`` (as in L3H1, L5F) and ``value``,
or ``layer``, ``head`` and ``value``; layers and heads count from 0, the least important has the
lowest value, other columns are ignored. A file fits a model if it scores every component of each
kind and stack that it names, and nothing else: half a model is another model's.

`.pkl` and `.pt` files of the code of Bansal et al. (2023) are read by `ablate.pickled_rankings`:
a tensor [layer, head] of head scores, or a list of layers whose FFNs go first to last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ablate.components import FFN, Component, Head, KVGroup, Mixer, Stack, parse_component, sort_key
from ablate.pickled_rankings import read_pickle
from ablate.pruning import ranked

if TYPE_CHECKING:
    import pandas as pd

    from ablate.hooked import HookedModel

TABLES = (".csv", ".parquet")
PICKLES = (".pkl", ".pickle", ".pt", ".pth")
_NAMES = {Head: "heads", KVGroup: "key/value groups", FFN: "FFNs", Mixer: "mixers"}


def read_scores(path: str | Path, model: HookedModel) -> dict[Component, float]:
    """The scores in `path`, in the model's order.

    Raises ValueError, in one line, for a file that is not there, is no such table, scores a
    component twice or not finitely, or is for another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no ranking file {path}: give a .csv, .parquet or .pkl file")
    if path.suffix in PICKLES:
        scores = _of_pickle(path)
    elif path.suffix in TABLES:
        scores = _of_table(path, _table(path))
    else:
        raise ValueError(
            f"{path.name} is no ranking file: use one of {', '.join((*TABLES, *PICKLES))}"
        )
    _require_fit(path, scores, model)
    return {component: scores[component] for component in sorted(scores, key=sort_key)}


def write_scores(path: str | Path, scores: Mapping[Component, float]) -> None:
    """Write a table that `read_scores` reads back exactly; whole or not at all.

    Raises ValueError for another suffix than .csv and .parquet and for scores not finite.
    """
    import pandas as pd

    path = Path(path)
    if path.suffix not in TABLES:
        raise ValueError(f"scores cannot be written to {path.name}: use .csv or .parquet")
    ranked(scores)  # refuses what is not finite
    table = pd.DataFrame(
        {"component": [str(c) for c in scores], "value": [float(v) for v in scores.values()]}
    )
    half = path.with_name(f".{path.name}.part")
    try:
        if path.suffix == ".csv":
            table.to_csv(half, index=False)
        else:
            table.to_parquet(half, index=False)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd
    from pyarrow import ArrowException

    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str)  # pandas' own floats are not exact
        return pd.read_parquet(path)
    except (ValueError, OSError, ArrowException) as error:  # pandas' parser errors are ValueErrors
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path.name} is no {path.suffix[1:]} table: {reason}") from None


def _of_table(path: Path, table: pd.DataFrame) -> dict[Component, float]:
    columns = set(table.columns)
    if not ({"component", "value"} <= columns or {"layer", "head", "value"} <= columns):
        raise ValueError(
            f"{path.name} has the columns {', '.join(map(str, table.columns))}: a ranking needs "
            "component and value, or layer, head and value"
        )
    named = "component" in columns
    scores: dict[Component, float] = {}
    for number, row in enumerate(table.to_dict("records"), start=1):
        try:
            if named:
                component = parse_component(str(row["component"]))
            else:
                component = Head(_count(row["layer"]), _count(row["head"]))
            value = float(row["value"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {number} of {path.name}: {error}") from None
        if component in scores:
            raise ValueError(
                f"{path.name} has several rows for {component}: keep one a component, of one task "
                "and one convention"
            )
        if not math.isfinite(value):
            raise ValueError(
                f"row {number} of {path.name}: the value of {component} is {value}; "
                "a ranking needs finite ones"
            )
        scores[component] = value
    return scores


def _count(value: object) -> int:
    number = float(str(value))
    if not number.is_integer():
        raise ValueError(f"a layer or head of {value}: they count 0, 1, 2, …")
    return int(number)


def _of_pickle(path: Path) -> dict[Component, float]:
    content = read_pickle(path)
    if isinstance(content, list):
        if len(set(content)) < len(content):
            raise ValueError(f"{path.name} lists a layer twice: a ranking of FFNs has each once")
        return {FFN(layer): float(place) for place, layer in enumerate(content)}
    if content.ndim != 2:
        raise ValueError(
            f"{path.name} holds a tensor of shape {list(content.shape)}: scores of heads are "
            "[layer, head]"
        )
    rows = content.double().tolist()
    scores: dict[Component, float] = {
        Head(layer, head): value for layer, row in enumerate(rows) for head, value in enumerate(row)
    }
    ranked(scores)
    return scores


def _require_fit(path: Path, scores: Iterable[Component], model: HookedModel) -> None:
    """Each kind and stack that the file names is there in full, and the model has no other."""
    own = _by_kind((*model.components, *model.kv_groups))
    found = _by_kind(scores)
    if not found:
        raise ValueError(f"{path.name} scores nothing: it has no rows")
    for (kind, stack), components in found.items():
        expected = own.get((kind, stack), set())
        if components != expected:
            missing, foreign = expected - components, components - expected
            odd = min(foreign or missing, key=sort_key)
            where = f" in the stack {stack!r}" if stack else ""
            raise ValueError(
                f"{path.name} is for another model: it scores {len(components)} {_NAMES[kind]}"
                f"{where} and {model.name} has {len(expected)}; {odd} is in "
                f"{'the file' if foreign else 'the model'} only"
            )


def _by_kind(components: Iterable[Component]) -> dict[tuple[type, Stack], set[Component]]:
    table: dict[tuple[type, Stack], set[Component]] = {}
    for component in components:
        table.setdefault((type(component), component.stack), set()).add(component)
    return table
