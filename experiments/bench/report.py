"""What does a benchmark look like to a reader: one table, three figures, what was reached?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from experiments.bench.table import GIB, Row, number, rows_of, shown, work_of
from experiments.plots import BLUE, FAINT, INK, ORANGE, RED, panels, style
from experiments.report import Report
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.bench.study import Bench

EQUAL = 1e-4
"""Largest difference in nats at which fp32 results count as the same."""
CURVES = 1e-3
"""Largest difference in nats at which curves of training count as the same."""
SHARE = 0.95
"""Of the bound that retraining aims at."""
TIMES = 10
"""As fast as transformers' Mamba that ours has to be on a CPU."""
SAME = 1e-5
"""Likewise of induction scores, which are shares of attention."""
CAPTIONS = {
    "ratio": "How many times sooner than the peer: dots are medians over rounds, lines their "
    "range, triangles what arithmetic allows. Beyond the triangle, larger batches ran nearer to "
    "the machine's peak.",
    "time": "Seconds of one run, medians.",
    "memory": "Highest memory during a run, the process included (on CUDA: what torch allocated).",
}


def outcome_of(table: pd.DataFrame) -> Outcome:
    """The headline, and `rows` for machines: null where there is no peer."""
    rows = rows_of(table)
    plain = [
        {name: None if value == "" or value != value else value for name, value in row.items()}
        for row in rows
    ]
    return Outcome("; ".join(_headline(rows)), {"rows": plain})


def _headline(rows: Sequence[Row]) -> list[str]:
    parts = []
    compared = [row for row in rows if row["peer"]]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in compared):
        kinds: dict[str, list[float]] = {}
        for row in compared:
            if (row["model"], row["dtype"]) == (model, dtype):
                kinds.setdefault(row["work"].split("-")[0], []).append(row["ratio"])
        times = ", ".join(f"{kind} {_span(ratios)}×" for kind, ratios in kinds.items())
        parts.append(f"{model} in {dtype}: {times} as fast as the peers")
    parts += [
        f"{row['model']} in {row['dtype']}: {row['work']} {row['tokens_per_second']:,.0f} tokens/s"
        for row in rows
        if not row["peer"]
    ]
    nats = (*_in_nats(compared), *_resets(compared))
    for unit, among in (("nat", nats), ("of attention", _scans(compared))):
        exact = [row["max_difference"] for row in among if row["dtype"] == "float32"]
        if exact:
            parts.append(f"largest difference in float32 {max(exact):.0e} {unit}")
    return parts


def findings(rows: Sequence[Row]) -> list[str]:
    """What was aimed at, and whether it was reached, sentence by sentence."""
    found = []
    compared = [row for row in rows if row["peer"]]
    apart = (*_resets(compared), *_hybrids(compared))
    others = [row for row in compared if row not in apart]
    if others:
        missed = [_against(r, "ratio", ".2f", "bound") for r in others if r["ratio"] < r["bound"]]
        reached = len(others) - len(missed)
        found.append(
            f"Ratio at the arithmetic bound or beyond it in {reached} of {len(others)} rows"
            + (f"; below it: {', '.join(missed)}." if missed else ".")
        )
    found += _equality(_in_nats(compared), "Results", EQUAL, f"{EQUAL:g} nat")
    found += _equality(_scans(compared), "Induction scores", SAME, f"{SAME:g}")
    found += _retrained(_resets(compared))
    found += _trained_hybrids(_hybrids(compared))
    found += [
        f"{row['work']} on {row['model']} in {row['dtype']}: "
        f"{number(row['ours_growth_bytes'] / GIB, '.2f')} GiB above the loaded model, "
        f"{row['peer']} {number(row['peer_growth_bytes'] / GIB, '.2f')} GiB, which takes "
        f"{row['ratio']:.2f}× as long."
        for row in _scans(compared)
    ]
    once = {(row["work"], row["model"], row["dtype"]): row for row in rows}
    for (work, model, dtype), row in once.items():
        if dtype == "bfloat16" and (whole := once.get((work, model, "float32"))):
            times = whole["ours_seconds"] / row["ours_seconds"]
            found.append(f"{work} on {model}: bfloat16 is {times:.2f}× as fast as float32.")
        if not work.startswith(("choices", "hybrid")):
            found.append(
                f"{work} on {model} reached {row['ceiling_share']:.0%} of the {dtype} ceiling of "
                f"{row['matmul_rate'] / 1e9:,.0f} · 10⁹ operations a second."
            )
    return found


def _equality(rows: Sequence[Row], what: str, bound: float, said: str) -> list[str]:
    exact = [row for row in rows if row["dtype"] == "float32"]
    off = [_against(r, "max_difference", ".0e") for r in exact if not r["max_difference"] <= bound]
    if not exact:
        return []
    return [
        f"{what} in float32 equal the peer's to {said} in {len(exact) - len(off)} of "
        f"{len(exact)} rows" + (f"; not in {', '.join(off)}." if off else ".")
    ]


def _scans(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["work"].startswith("induction")]


def _in_nats(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row["work"].startswith(("induction", "reset", "hybrid"))]


def _resets(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["work"].startswith("reset")]


def _hybrids(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["work"].startswith("hybrid")]


def _trained_hybrids(rows: Sequence[Row]) -> list[str]:
    """Beside transformers' Mamba and beside a lean GPT-2."""
    found = []
    slow = [row for row in rows if row["peer"] == "hf-mamba"]
    if slow:
        missed = [_against(row, "ratio", ".1f") for row in slow if row["ratio"] < TIMES]
        found.append(
            f"At least {TIMES}× as fast as transformers' Mamba in {len(slow) - len(missed)} of "
            f"{len(slow)} rows" + (f"; not in {', '.join(missed)}." if missed else ".")
        )
    found += [
        f"A step of {row['model']} takes {1 / row['ratio']:.2f} of the time of a lean GPT-2's "
        f"(rounds {1 / row['ratio_high']:.2f}–{1 / row['ratio_low']:.2f})."
        for row in rows
        if row["peer"] == "lean-gpt2"
    ]
    same = [row for row in rows if row["max_difference"] == row["max_difference"]]
    scans = [row for row in same if row["work"].startswith("hybrid-scan")]
    steps = [row for row in same if row not in scans]
    found += _equality(scans, "Scans and their gradients", SAME, f"{SAME:g} of their largest entry")
    return found + _equality(steps, "Losses of a hybrid's steps", CURVES, f"{CURVES:g}")


def _retrained(rows: Sequence[Row]) -> list[str]:
    """Where retraining reached what it aims at, and what its bound is made of."""
    if not rows:
        return []
    missed = [_against(r, "ratio", ".2f", "bound") for r in rows if r["ratio"] < SHARE * r["bound"]]
    found = [
        f"Retraining reaches {SHARE:.0%} of its arithmetic bound in {len(rows) - len(missed)} of "
        f"{len(rows)} rows" + (f"; not in {', '.join(missed)}." if missed else ".")
    ]
    found += _equality(rows, "Losses of every step", CURVES, f"{CURVES:g} nat")
    heads = {row["model"]: row["head_blocks"] for row in rows}
    return found + [
        f"The head of {model} costs {blocks:.2f} blocks (h)." for model, blocks in heads.items()
    ]


def report(study: Bench, table: pd.DataFrame) -> Report:
    """The page of a run; captions belong to `figures`."""
    rows = rows_of(table)
    return Report(
        title="How much sooner is the same answer?",
        question=(
            "Each work is done by this toolkit and by what a user would otherwise run, each in a "
            "process of its own with its own copy of the model, alternately, one at a time, in the "
            f"same dtype, with the same threads and inputs: {study.repeats} timed runs a side "
            "after one that is not timed. The ratio is taken within each round.\n\n"
            "Peers: `hf-loop`, one Hugging Face forward and one hook a component; `bridge`, "
            "TransformerLens' run_with_hooks; `hflm`, lm-eval's model in the same loop, a request "
            "at a time (`hflm-batched`: its fastest batch size); `reference`, importance with "
            "gradients of all weights, an example at a time. Induction scans (`induction-512`: of "
            "512 tokens) read four attention scores of every head, ours under fused attention "
            "from the entries they need; `bridge` is there run_with_cache with a filter on "
            "patterns, `bridge-last` the same without logits but the last, `hf-attentions` the "
            "blocks alone with output_attentions, all under eager attention, as they must be. A "
            "reset work is one training step of a student of every layer (`reset-seeds`: of "
            "several students of the middle one), on the same batch again and again, in float32: "
            "`plain` trains one at a time by the model's own forward with requires_grad off "
            "elsewhere (`reset-hidden`: a full forward for the targets, then the block; "
            "`plain-stopping` leaves that forward behind the block), `every-gradient` with "
            "requires_grad everywhere. A hybrid work is a selective scan, forward and backward "
            "(`hybrid-scan-24`: of 24 tokens), or training steps of a small in-context regressor, "
            "drawing its prompts included, in float32: `hf-mamba` scans, or has its mixers, by "
            "transformers' torch path, `hf-mamba-kept` in a process whose malloc keeps what is "
            "freed, as ours does; `lean-gpt2` is GPT-2 of the same width and depth in plain "
            "PyTorch, which beside a Mamba is another model."
        ),
        findings=findings(rows),
        captions={name: CAPTIONS[name] for name in figures_of(table)},
        tables={"All rows": shown(table)},
        caveats=_caveats(rows),
    )


def _caveats(rows: Sequence[Row]) -> Sequence[str]:
    caveats = [
        "The bound counts matrix products only, and causal attention exactly: a peer's kernel may "
        "do more than is counted for it.",
        "Peak memory is of the whole process: on small models most of it is Python and libraries. "
        "What a run added is counted from when the model was loaded; with it come the code that is "
        "first used then and what the allocator keeps.",
    ]
    if any(" of " in work_of(row) for row in rows):
        caveats.append(
            "Where a work says k of n, a subset of the components stands for all, the same for "
            "both sides; what we do once for all of them then weighs more than in a full sweep, "
            "so the bound of a full sweep is higher. `--budget 0` measures all."
        )
    if any(row["peer"].startswith("hflm") and row["dtype"] != "float32" for row in rows):
        caveats.append(
            "lm-eval normalises in the model's dtype: its nats in bfloat16 carry that rounding, "
            "and ours do not."
        )
    return caveats


def figures_of(table: pd.DataFrame) -> Mapping[str, Figure]:
    """The figures of a run, by file name."""
    rows = rows_of(table)
    compared = [row for row in rows if row["peer"]]
    drawn = {"ratio": _drawn(compared, _ratios, "times as fast as the peer")} if compared else {}
    drawn["time"] = _drawn(rows, _seconds, "seconds")
    drawn["memory"] = _drawn(rows, _memory, "peak memory, GiB")
    return drawn


def _drawn(rows: Sequence[Row], draw: Callable[[Axes, Sequence[Row]], None], label: str) -> Figure:
    figure, axes = panels(1, 1, width=8.2, height=1.0 + 0.22 * len(rows))
    ax = axes[0, 0]
    with style():
        draw(ax, rows)
        names = [
            " · ".join(filter(None, (work_of(r), r["model"], r["dtype"], r["peer"]))) for r in rows
        ]
        ax.set_yticks(range(len(rows)), names, fontsize=8)
        ax.set(ylim=(len(rows) - 0.4, -0.6), xscale="log", xlabel=label)
        ax.xaxis.set_major_formatter("{x:g}")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _ratios(ax: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    low, high, ratio, bound = (
        [row[name] for row in rows] for name in ("ratio_low", "ratio_high", "ratio", "bound")
    )
    ax.hlines(places, low, high, color=BLUE, linewidth=2.2)
    ax.plot(ratio, places, "o", color=BLUE, label="measured")
    ax.plot(bound, places, ">", color=ORANGE, label="arithmetic bound")
    ax.axvline(1.0, color=FAINT, linewidth=1.0)


def _seconds(ax: Axes, rows: Sequence[Row]) -> None:
    _both(ax, rows, "seconds", 1.0)


def _memory(ax: Axes, rows: Sequence[Row]) -> None:
    _both(ax, rows, "peak_bytes", GIB)


def _both(ax: Axes, rows: Sequence[Row], metric: str, unit: float) -> None:
    ours = [row[f"ours_{metric}"] / unit for row in rows]
    theirs = [row[f"peer_{metric}"] / unit for row in rows]
    ax.hlines(range(len(rows)), ours, theirs, color=INK, linewidth=0.8, alpha=0.4)
    ax.plot(ours, range(len(rows)), "o", color=BLUE, label="ours")
    if any(row["peer"] for row in rows):
        ax.plot(theirs, range(len(rows)), "s", color=RED, label="peer")


def _against(row: Row, column: str, form: str, of: str = "") -> str:
    """`sweep on opt-768 in float32 against bridge (1.20 of 1.32)`."""
    measured = f"{row[column]:{form}}" + (f" of {row[of]:{form}}" if of else "")
    return f"{row['work']} on {row['model']} in {row['dtype']} against {row['peer']} ({measured})"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low}–{high}"
