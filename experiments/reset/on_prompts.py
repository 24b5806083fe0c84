"""What does a study of resets say of regressors, which learn from prompts?

The protocol, the ledger and the crossings are those of language models; the loss is another. It is
the squared error over that of predicting 0 (`prompted_data`), so the gap g and the thresholds are
shares of it: 0.05 means an error that is higher than the old one by 5 % of what ignoring the prompt
costs. Tokens are those of the prompts, two a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.plots import style
from experiments.report import Report
from experiments.reset.report.recovery_figures import recovery
from experiments.reset.result import (
    STACKS,
    THRESHOLD,
    at_threshold,
    knows_length,
    main,
    percent,
    targets,
    tokens_text,
)
from experiments.reset.statistics.summaries import medians
from experiments.reset.statistics.survival import Headline, Unit, amount_text, headline, with_ends
from experiments.run_folder import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.reset.findings import Findings
    from experiments.reset.opened import Opened
    from experiments.reset.study import Resetting
    from experiments.run_folder import RunFolder

WORDS: Mapping[str, str] = {
    "lm": "the task's error",
    "hidden": "local regression",
    "mix": "both together",
}
SEED = 0
"""Of the resamples behind the answer's interval."""


def reads_prompts(study: Resetting, bases: Sequence[Opened]) -> bool:
    """Whether the bases are regressors.

    Raises ValueError for regressors beside language models, whose losses have no common unit, and
    for what has no meaning without a vocabulary.
    """
    some = [opened.name for opened in bases if opened.base.objective == "regression"]
    if not some:
        return False
    if len(some) < len(bases):
        raise ValueError(
            f"{some[0]}, a regressor, beside language models: their losses have no common unit; "
            "give each kind in a run of its own"
        )
    asked = {
        "--targets logits": "logits" in study.targets,
        "--predictors": study.predictors,
        "--arms A13": "A13" in study.arms,
    }
    if wrong := [option for option, given in asked.items() if given]:
        raise ValueError(
            f"{wrong[0]} asked for {some[0]}, a regressor, which has no distribution over words: "
            "leave it out"
        )
    return True


def finish(findings: Findings, folder: RunFolder) -> Outcome:
    """Leave the run with these words, where language models have theirs."""
    found = findings.result
    return folder.finish(
        outcome(found.crossings),
        findings.metrics,
        figures=figures(found.ledger),
        report=report(found.model, found.ledger, found.crossings, found.left_out),
    )


def outcome(crossings: pd.DataFrame) -> Outcome:
    """The answer of every target in one line."""
    found = _answers(crossings)
    if not found:
        return Outcome("no layer was reset and retrained: nothing to answer", {"answers": []})
    unit = "share of the original training" if found[0].unit == "share" else "tokens"
    parts = [f"{WORDS[each.target]} {_text(each, crossings)}" for each in found]
    said = (
        f"median {unit} until a reset layer's error is within {THRESHOLD:g} of predicting 0's: "
        f"{'; '.join(parts)}"
    )
    records = [each.record() for each in found]
    return Outcome(said, {"answers": records, "loss": "squared error over predicting 0's"})


def figures(ledger: pd.DataFrame) -> Mapping[str, Callable[[], Figure]]:
    """The gap against the data, a line a layer, a panel a target."""
    return {"recovery": partial(_recovery, ledger)} if len(main(ledger)) else {}


def report(
    model: str, ledger: pd.DataFrame, crossings: pd.DataFrame, left_out: Sequence[str]
) -> Report:
    """The page of the run."""
    return Report(
        title=f"How much data does one reset layer of {model} need?",
        question=(
            "A layer of a trained regressor gets fresh weights, everything else is frozen, and the "
            "layer is trained on new prompts of the same task: how much does it take until the "
            "held-out error is about the old one? Errors are divided by that of predicting 0, on "
            "the same prompts; the gap is the error less that of the whole base. A student that is "
            "not there when its budget ends is censored: it counts as longer than its budget."
        ),
        findings=[_damage(ledger), *_per_target(crossings)],
        captions={
            "recovery": "Gap to the old error, as a share of predicting 0's, against the data. A "
            "line a layer, mean over seeds; grey: trained without a reset; dashed: the whole model "
            "from scratch."
        },
        tables={"Data to come within a threshold, median over seeds": _table(crossings)},
        caveats=[
            "One base is one training run; other seeds of it may need other amounts.",
            "Each learning rate stands for its arm and target; another may be faster.",
            *(f"Left out: {what}." for what in left_out),
        ],
    )


def _answers(crossings: pd.DataFrame) -> list[Headline]:
    own = main(crossings) if len(crossings) else crossings
    found = [
        headline(crossings, target, np.random.default_rng(SEED))
        for target in (targets(own) if len(own) else ())
    ]
    return [each for each in found if each.students]


def _text(each: Headline, crossings: pd.DataFrame) -> str:
    unit: Unit = "share" if each.unit == "share" else "tokens"
    shown = [amount_text(v, each.bound, unit) for v in (each.median, each.low, each.high)]
    rows = at_threshold(crossings)
    rows = rows.loc[(rows["target"] == each.target) & (rows["tokens"] == 0)]
    near = f", {len(rows)} of {each.students} there without training" if len(rows) else ""
    return f"{with_ends(shown)}, {percent(each.censored)} censored{near}"


def _damage(ledger: pd.DataFrame) -> str:
    """What a reset does before anything is trained."""
    own = main(ledger)
    start = own.loc[own["tokens"] == own["tokens"].min()] if len(own) else own
    if start.empty:
        start = ledger.loc[(ledger["step"] == 0) & (ledger["part"] == "block")]
    by_layer = start.groupby("layer")["loss_reset"].median()
    old = float(ledger["loss_base"].median())
    if by_layer.empty:
        return f"The base's error is {old:.3g} of predicting 0's."
    least, most = by_layer.idxmin(), by_layer.idxmax()
    return (
        f"The base's error is {old:.3g} of predicting 0's; right after a reset it is "
        f"{by_layer[least]:.3g} (L{least}) to {by_layer[most]:.3g} (L{most})."
    )


def _per_target(crossings: pd.DataFrame) -> list[str]:
    return [
        f"Trained on {WORDS[each.target]}, the median layer comes within {THRESHOLD:g} after "
        f"{_text(each, crossings)}; {each.students} students."
        for each in _answers(crossings)
    ]


def _table(crossings: pd.DataFrame) -> pd.DataFrame:
    own = main(crossings) if len(crossings) else crossings
    own = own.loc[own["kind"] == "absolute"] if len(own) else own
    if own.empty:
        return own
    unit = "share" if knows_length(at_threshold(crossings)) else "tokens"
    text = percent if unit == "share" else tokens_text
    rows = medians(own, ["base", "target", "stack", "layer", "threshold"], unit).to_dict("records")
    amount = "share of T0" if unit == "share" else "tokens"
    return pd.DataFrame(
        {
            "base": [row["base"] for row in rows],
            "trained on": [WORDS[row["target"]] for row in rows],
            "layer": [f"{STACKS[row['stack']]}L{row['layer']}" for row in rows],
            "within": [f"{row['threshold']:g}" for row in rows],
            amount: [
                text(row["value"]) if math.isfinite(row["value"]) else f"> {text(row['bound'])}"
                for row in rows
            ],
            "students": [row["students"] for row in rows],
            "censored": [row["censored"] for row in rows],
        }
    )


def _recovery(ledger: pd.DataFrame) -> Figure:
    figure = recovery(ledger)
    names = targets(main(ledger))
    with style():
        for ax, target in zip(figure.axes, names, strict=False):
            ax.set_title(WORDS[target])
        figure.axes[0].set_ylabel("gap to the old error, share of predicting 0's")
    return figure
