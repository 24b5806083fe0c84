"""What did the clock say, in one row a (work, model, dtype, peer)?

    ratio               median over rounds of peer's seconds / our seconds, with its range
    bound               peer's operations / fewest operations
    ceiling_share       fewest operations / our seconds / rate of a large matrix product
    max_difference      largest |ours − peer's| over all values and runs: nats, and for induction
                        shares of attention
    peak_memory_ratio   peer's peak / our peak
    …_growth_bytes      peak above what the process held when its model was loaded
    tokens_per_second   tokens of the inputs, once for the whole model and for each component
    head_blocks         of resets: the head's forward in blocks' forwards (h)

Where there is no peer, what compares is nan (null in JSON) and `peer` is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

KEYS = ["work", "model", "dtype", "peer"]
GIB = 2**30
Row = dict[str, Any]


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows, in the order measured, from the tidy metrics of `Session.frame`."""
    rows: list[Row] = []
    for _, frame in metrics.groupby(KEYS, sort=False):
        keys: Row = frame[KEYS].iloc[0].to_dict()
        rows.append(keys | _ours(frame) | _against(frame, keys["peer"]))
    return pd.DataFrame(rows)


def rows_of(table: pd.DataFrame) -> list[Row]:
    """The table row by row."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: numbers as text, with their units in the heads."""
    cells = [
        {
            "work": work_of(row),
            "model": row["model"],
            "dtype": row["dtype"],
            "peer": row["peer"] or "–",
            "ours, s": _seconds(row["ours_seconds"]),
            "peer, s": _seconds(row["peer_seconds"]),
            "ratio (range)": _ratio(row),
            "bound": number(row["bound"], ".2f"),
            "max. difference": number(row["max_difference"], ".0e"),
            "peak, GiB": number(row["ours_peak_bytes"] / GIB, ".2f"),
            "peer's": number(row["peer_peak_bytes"] / GIB, ".2f"),
            "added, GiB": number(row["ours_growth_bytes"] / GIB, ".2f"),
            "peer's added": number(row["peer_growth_bytes"] / GIB, ".2f"),
            "ceiling": f"{row['ceiling_share']:.0%}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}".replace(",", "\u202f"),
        }
        for row in rows_of(table)
    ]
    return pd.DataFrame(cells)


def printed(table: pd.DataFrame) -> str:
    """The shown table for a terminal."""
    return shown(table).to_string(index=False)


def markdown(table: pd.DataFrame) -> str:
    """The table for a README, a row a work: its peers side by side in one cell."""
    lines = []
    for _, group in table.groupby(KEYS[:3], sort=False):
        rows = rows_of(group)
        first = rows[0]
        found = [row["max_difference"] for row in rows if row["peer"]]
        differences = [value for value in found if value == value]
        peaks = [row["peak_memory_ratio"] for row in rows if row["peer"]]
        cells = {
            "work": work_of(first),
            "model": first["model"],
            "dtype": first["dtype"],
            "ours, s": _seconds(first["ours_seconds"]),
            "times as fast as (range; bound)": ", ".join(
                f"{row['peer']} {_ratio(row)[:-1]}; {row['bound']:.2f})"
                for row in rows
                if row["peer"]
            )
            or "–",
            "max. difference": number(max(differences), ".0e") if differences else "–",
            "peak memory, peers / ours": " ".join(f"{peak:.2f}" for peak in peaks) or "–",
            "GiB above the model, ours; peers": _added(rows),
            "share of ceiling": f"{first['ceiling_share']:.0%}",
        }
        if not lines:
            lines = [f"| {' | '.join(cells)} |", f"|{'---|' * len(cells)}"]
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines)


def work_of(row: Row) -> str:
    """`sweep-answers (14 of 156)`; nothing in brackets where all components are measured."""
    part = row["components"] < row["of_components"]
    if not part or not row["work"].startswith(("sweep", "choices", "reset")):
        return row["work"]
    return f"{row['work']} ({row['components']} of {row['of_components']})"


def _added(rows: Sequence[Row]) -> str:
    """`0.10; 0.55 1.20`."""
    peers = [row["peer_growth_bytes"] for row in rows if row["peer"]]
    ours, *theirs = (number(x / GIB, ".2f") for x in (rows[0]["ours_growth_bytes"], *peers))
    return f"{ours}; {' '.join(theirs)}" if theirs else ours


def number(value: float, form: str) -> str:
    """`value` with a true minus; – for nan."""
    return "–" if value != value else f"{value:{form}}".replace("-", "−")


def _ours(frame: pd.DataFrame) -> Row:
    seconds = _values(frame, "ours", "seconds").median()
    rate, operations = _once(frame, "ours", "matmul_rate"), _once(frame, "ours", "operations")
    components, tokens = _once(frame, "ours", "components"), _once(frame, "ours", "tokens")
    swept = 1 + components if _is_swept(frame) else 1
    return {
        "ours_seconds": seconds,
        "tokens_per_second": tokens * swept / seconds,
        "ceiling_share": operations / seconds / rate,
        "matmul_rate": rate,
        "ours_peak_bytes": _values(frame, "ours", "peak_bytes").max(),
        "ours_growth_bytes": _values(frame, "ours", "growth_bytes").max(),
        "components": int(components),
        "of_components": int(_once(frame, "ours", "of_components")),
        "tokens": int(tokens),
        "head_blocks": frame.loc[frame["metric"] == "head_blocks", "value"].max(),
    }


def _against(frame: pd.DataFrame, peer: str) -> Row:
    if not peer:
        columns = ("ratio", "ratio_low", "ratio_high", "bound", "max_difference", "peer_seconds")
        memory = ("peak_memory_ratio", "peer_peak_bytes", "peer_growth_bytes")
        return dict.fromkeys((*columns, *memory), float("nan"))
    seconds = _values(frame, peer, "seconds")
    ratios = seconds / _values(frame, "ours", "seconds")
    peak = _values(frame, peer, "peak_bytes").max()
    return {
        "ratio": ratios.median(),
        "ratio_low": ratios.min(),
        "ratio_high": ratios.max(),
        "bound": _once(frame, peer, "operations") / _once(frame, "ours", "operations"),
        "max_difference": _values(frame, peer, "max_difference").max(skipna=False),
        "peer_seconds": seconds.median(),
        "peak_memory_ratio": peak / _values(frame, "ours", "peak_bytes").max(),
        "peer_peak_bytes": peak,
        "peer_growth_bytes": _values(frame, peer, "growth_bytes").max(),
    }


def _values(frame: pd.DataFrame, side: str, metric: str) -> pd.Series:
    """The values of one side, by run."""
    rows = frame.loc[(frame["side"] == side) & (frame["metric"] == metric)]
    return rows.set_index("run")["value"]


def _once(frame: pd.DataFrame, side: str, metric: str) -> float:
    return float(_values(frame, side, metric).iloc[0])


def _is_swept(frame: pd.DataFrame) -> bool:
    return str(frame["work"].iloc[0]).startswith(("sweep", "choices"))


def _ratio(row: Row) -> str:
    if row["ratio"] != row["ratio"]:
        return "–"
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"


def _seconds(value: float) -> str:
    return number(value, ".2f" if value >= 0.1 else ".3f")
