"""What does a pretraining run look like to a reader: loss and induction against tokens?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.plots import curve, panels
from experiments.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "held-out text": (
        "nats per token",
        {
            "validation_loss": "all positions",
            "early_loss": "positions 20–60",
            "late_loss": "positions 400–500",
            "no_source_loss": "with another row's source",
        },
    ),
    "random tokens, repeated": (
        "nats per token",
        {"first_copy_loss": "first copy", "second_copy_loss": "second copy"},
    ),
    "attention": (
        "prefix-matching score",
        {"prefix_matching": "best head", "layer0_prefix_matching": "best head of the first"},
    ),
}
"""Title -> (unit, metric -> label)."""
_COPIES = (
    "Rows that repeat a span were part of the training mix, so the model was helped to "
    "copy; a model of plain text may get there later, or otherwise.",
)


def curve_frame(rows: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """The training curve as tidy rows: step, tokens, metric, value."""
    wide = pd.DataFrame(rows).drop(columns="seconds")
    return wide.melt(id_vars=["step", "tokens"], var_name="metric", value_name="value")


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """One figure: what the model learned, against tokens."""
    measured = set(frame.metric)
    shown = {title: panel for title, panel in PANELS.items() if measured & set(panel[1])}
    figure, axes = panels(1, len(shown), width=4.2)
    for ax, (title, (unit, labels)) in zip(axes[0], shown.items(), strict=True):
        rows = frame[frame.metric.isin(labels)]
        rows = rows.assign(metric=rows.metric.map(labels), millions=rows.tokens / 1e6)
        curve(
            rows,
            x="millions",
            group="metric",
            title=title,
            xlabel="million tokens",
            ylabel=unit,
            ax=ax,
        )
    return {"training": figure}


def headline(record: Mapping[str, Any]) -> str:
    """The run in one sentence."""
    final, whole = record["curve"][-1], record["held_out"]["validation_loss"]
    start = f"held-out loss {whole:.3f} nat after {record['tokens_seen']:,} tokens"
    if record["kind"] == "decoder":
        ratio = final["second_copy_loss"] / final["first_copy_loss"]
        copies = f"the second copy of random tokens costs {ratio:.0%} of the first"
        if "prefix_matching" not in final:
            return f"{start}; {copies}"
        best = final["prefix_matching"]
        return f"{start}; the best head matches prefixes with {best:.2f}, and {copies}"
    if "no_source_loss" in final:
        return f"{start}; {record['held_out']['no_source_loss']:.3f} with another row's source"
    return start


def report(record: Mapping[str, Any]) -> Report:
    """The page of a run, from its training record."""
    first, last = record["curve"][0], record["curve"][-1]
    decoder = record["kind"] == "decoder"
    return Report(
        title="Does this model learn in context, and since when?"
        if decoder
        else f"How well does this model learn its task ({record['objective']}), and since when?",
        question=(
            f"{'A' if decoder else 'An'} {record['kind']} of {record['parameters']:,} parameters "
            f"was trained on "
            f"{record['tokens_seen']:,} tokens ({record['epochs']:.1f} epochs of "
            f"{record['unique_tokens_in_corpus']:,}) of the corpus `{record['corpus']['name']}`. "
            f"The mix: {record['training_mix']}."
        ),
        findings=[
            f"{name.replace('_', ' ')}: {value:.3f} (at the first measurement {first[name]:.3f})."
            for name, value in last.items()
            if name not in ("step", "tokens", "seconds")
        ]
        + [
            f"On all {record['held_out']['tokens']:,} held-out tokens the loss is "
            f"{record['held_out']['validation_loss']:.3f}; the curve is measured on part of them."
        ],
        captions={
            "training": "Held-out loss by position, loss on repeated random tokens, and the best "
            "head's attention to the token that followed the last occurrence, during training."
            if decoder
            else "Held-out loss during training."
        },
        caveats=[
            "One seed: when induction appears differs from seed to seed."
            if decoder
            else "One seed.",
            *(_COPIES if record["options"]["repeated_share"] else ()),
            "Measured on the weights rounded to bf16, as they are saved.",
        ],
    )
