"""What is on the page of a study of resets: question, captions, tables, and what to doubt?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.report import Report
from experiments.reset.report.grid_figures import EQUIVALENCE
from experiments.reset.report.sentences import counted, listed, sentences
from experiments.reset.report.tables import tables
from experiments.reset.result import (
    ORIGINS,
    STACKS,
    TARGETS,
    THRESHOLD,
    WEIGHTS,
    families,
    finished,
    knows_length,
    lead,
    main,
    most_varied,
    percent,
    places,
    targets,
    tokens_text,
)

if TYPE_CHECKING:
    from experiments.reset.result import Result

MEANS = {
    "lm": "the loss the base was trained on",
    "hidden": "the squared distance to the old block's output for the same input",
    "logits": "the Kullback–Leibler divergence from the old model's logits",
    "mix": "the base's loss and local regression together",
}
CAPTIONS: Mapping[str, str] = {
    "recovery": "How the gap to the old held-out loss closes, layer by layer. Lines are means over "
    "seeds, bands go from the smallest to the largest seed; thin dotted lines are single students, "
    "trained on when others had stopped, or diverged (×). Dotted levels are thresholds.",
    "shares": "{amount} it takes to come within a threshold, median over seeds. Hatched: the "
    "median student never came within it, and `>` says for how long it was seen above; a student "
    "that stopped early because it was close enough is censored there for thresholds beyond. "
    "0: the reset itself did less harm than that.",
    "arms": "{amount} each arm takes to come within {threshold} nat: the median over students "
    "and, as a bar, the 95 % interval of the median over places (from the smallest to the largest "
    "place where there are fewer than six). Small marks are students, coloured by layer; open "
    "triangles never came within it and point on. `never` counts them.",
    "arms_gap": " Right: gaps at the end of the budget, of arms that were not reset, are not meant "
    "to come back, or never did; bars from the smallest to the largest place.",
    "targets": "The same gap by what the students were trained on, a panel a layer. A dashed line "
    "marks where local regression overtakes the LM loss for good. T0: the tokens the base was "
    "trained on.",
    "families": "A panel a family: students trained on the base's own loss, each layer of the "
    "largest base.",
    "aside": " The cross-attention aside: gap, and, where it was measured, source-use (1: the "
    "decoder gains from its source as much as before; 0: nothing).",
    "depth": "{amount} to come within {threshold} nat against relative depth, towards the target "
    "by which most students came back, median over base and reset seeds; bars from the smallest to "
    "the largest, open triangles are censored. What the reset harmed by less takes 0: off the "
    "axis.",
    "exponents": "Exponents of the tokens to recover in the number of layers N, the width D and "
    "the base's tokens T0, with 95 % intervals. An interval within "
    f"±{EQUIVALENCE:g} (green) counts as no effect.",
    "base_length": "Tokens to come within {threshold} nat against the tokens the base had been "
    "trained on, median over seeds. Dashed: the same tokens (β = 0) and the same share (β = 1); "
    "open triangles are censored.",
    "unique": "Gap by tokens processed and by how much data they were cycled from, averaged over "
    "seeds, a row a layer. Rings: the smallest gap at that much data. Left of the dashed line "
    "nothing was read twice.",
    "survival": "Kaplan–Meier: the share of students not yet within a threshold, with 95 % "
    "intervals that take students as independent. Lines end where the last student left.",
    "predictors": "What was known of a layer before it was retrained, and what it then took to "
    "come within {threshold} nat; open triangles never did.",
    "speed": "How many times as fast as the plain way a training step is, by layer: measured "
    "(points) and by counting operations (dashed).",
}
NOT_ITS_TEXT = "the corpus given is not, token for token, the one its record names"
"""Said of a corpus that only stands for the base's own."""


def report(result: Result) -> Report:
    """The page of a study; captions belong to the figures of `figures`."""
    return Report(
        title=f"How much data does one reset layer of {result.model} need?",
        question=_question(result),
        findings=sentences(result),
        captions=_captions(result),
        tables=tables(result),
        caveats=_caveats(result),
    )


def _captions(result: Result) -> dict[str, str]:
    ledger = result.ledger
    share = knows_length(lead(result.crossings)) if len(result.crossings) else True
    amount = "Share of the base's training tokens" if share else "Tokens"
    captions = dict(CAPTIONS)
    present = set(ledger["arm"]) if len(ledger) else set()
    extra = ""
    if "A1" in present:
        extra += " Grey: students that were trained without a reset."
    if "A7" in present:
        extra += " Dashed: the whole model from scratch."
    captions["recovery"] += extra
    captions["arms"] += captions.pop("arms_gap")
    aside = captions.pop("aside")
    captions["families"] += extra + (aside if "A13" in present else "")
    shown = {name: lead(ledger) for name in ("recovery", "shares", "targets")}
    shown["arms"] = most_varied(ledger, "arm")
    shown["base_length"] = most_varied(ledger, "base_tokens")
    shown["unique"] = lead(ledger.loc[ledger["unique"].notna()]) if len(ledger) else ledger
    for name, rows in shown.items():
        captions[name] += _which(rows) if _shapes(ledger) > 1 else ""
    return {
        name: text.replace("{amount}", amount).replace("{threshold}", f"{THRESHOLD:g}")
        for name, text in captions.items()
    }


def _which(rows: pd.DataFrame) -> str:
    """Which base these rows are of."""
    if rows.empty:
        return ""
    first = rows.iloc[0]
    seeds = len(set(rows["base_seed"]))
    return (
        f" Shown: the {first['family']} with N = {first['n_layers']}, D = {first['d_model']}, "
        f"{counted(seeds, 'base seed')}."
    )


def _shapes(ledger: pd.DataFrame) -> int:
    if ledger.empty:
        return 0
    return len(ledger[["family", "n_layers", "d_model"]].drop_duplicates())


def _question(result: Result) -> str:
    own = main(result.ledger)
    asked = (
        "A layer of a trained model gets fresh weights, everything else is frozen, and the layer "
        "is trained again: how much of the original training data does it take until the held-out "
        "loss is about the old one? The gap is the held-out loss less that of the whole base, on "
        "the same rows; “about” is a curve of thresholds, and the answer in one line is at "
        f"{THRESHOLD:g} nat, held for two evaluations. A student that is not there when its budget "
        "ends is censored: it counts as longer than its budget."
    )
    if own.empty:
        return asked
    trained = [f"{TARGETS[name]}: {MEANS[name]}" for name in targets(own)]
    seeds, where = len(set(own["seed"])), len(places(own))
    budget = float(own["budget"].max())
    length = tokens_text(budget) + " tokens"
    if knows_length(own):
        share = (own["budget"] / own["base_tokens"]).max()
        length += f", {percent(float(share))} of the original training"
    stacks = [name for name in STACKS if name and (own["stack"] == name).any()]
    of = f" ({listed(stacks)})" if stacks else ""
    bases = len(set(own["base"]))
    products = sorted(set(own["precision"].dropna())) if "precision" in own else []
    once = {"A1", "A2", "A7"} & set(result.ledger["arm"])
    alone = f" ({listed(sorted(once))}: one seed)" if once and seeds > 1 else ""
    return (
        f"{asked}\n\nReset: {counted(where, 'layer')}{of}, whole blocks with the base's own "
        f"initialiser, {counted(seeds, 'seed')} of reset and data{alone}, "
        f"{counted(bases, 'base')}. Trained on {'; '.join(trained)}. Budget: {length}. Data: "
        f"{_origin(own)}. Weights read: {WEIGHTS[str(own['weights'].iloc[0])]}."
        + (f" Matrix products in {listed(products)}." if products else "")
    )


def _origin(own: pd.DataFrame) -> str:
    found = [words for name, words in ORIGINS.items() if (own["origin"] == name).any()]
    words = listed(found) or listed(sorted(set(map(str, own["origin"]))))
    return words if _is_own_text(own) else f"{words} ({NOT_ITS_TEXT})"


def _is_own_text(own: pd.DataFrame) -> bool:
    """Whether text that is called the base's own is so, token for token."""
    claimed = own.loc[own["origin"].isin(["same", "reshuffled"])]
    return "exact_text" not in claimed or bool(claimed["exact_text"].astype(bool).all())


def _caveats(result: Result) -> Sequence[str]:
    said: list[str] = []
    own = main(result.ledger)
    if len(own):
        said += _base_caveats(own, result)
        said += _training_caveats(own, result)
    said += result.left_out
    return said


def _base_caveats(own: pd.DataFrame, result: Result) -> list[str]:
    said = []
    for family in families(own):
        rows = own.loc[own["family"] == family]
        fewest = int(rows.groupby(["n_layers", "d_model"])["base"].nunique().min())
        seeds = int(rows.groupby(["n_layers", "d_model"])["base_seed"].nunique().min())
        if min(fewest, seeds) == 1:
            said.append(
                f"One base seed ({family}): the spread over reset seeds says nothing of another "
                "base, however small it is."
            )
    if not knows_length(own):
        unknown = own.loc[own["base_tokens"].isna(), "base"].unique()
        said.append(
            f"How many tokens {listed(sorted(map(str, unknown)))} "
            f"{'was' if len(unknown) == 1 else 'were'} trained on is not known: amounts are "
            "tokens, not shares."
        )
    elif (
        own.groupby(["family", "n_layers", "d_model", "base_seed"])["base_share"].nunique().max()
        == 1
    ):
        said.append(
            "A share of the training tokens depends on how long the base was trained: were the "
            "tokens to recover the same for a base trained twice as long, the share would be half. "
            "One length was tried."
        )
    if finished(own)["base_share"].max() < 1:
        said.append("No base is at the end of its training.")
    sizes = own[["n_layers", "d_model"]].drop_duplicates()
    if len(sizes) == 1:
        said.append(
            f"One size (N = {sizes.iloc[0, 0]}, D = {sizes.iloc[0, 1]}): nothing here says how it "
            "changes with depth or width."
        )
    return said


def _training_caveats(own: pd.DataFrame, result: Result) -> list[str]:
    said = []
    rates = own.groupby(["base", "target"])["rate"].nunique()
    if (rates == 1).all() and result.rates.empty:
        picked = sorted({f"{rate:.2g}" for rate in own["rate"]})
        said.append(
            f"The learning {'rate was' if len(picked) == 1 else 'rates were'} fixed beforehand "
            f"({', '.join(picked)}), not picked for each arm: a better one may take fewer tokens."
        )
    kind = str(own["weights"].iloc[0])
    if kind == "raw":
        said.append(
            "A constant rate has a floor: a gap that stays may be the rate's, not the frozen "
            "neighbours'."
        )
    share = own["budget"] / own["base_tokens"]
    most = float(share.max())
    longest = (
        percent(most) + " of T0" if np.isfinite(most) else tokens_text(float(own["budget"].max()))
    )
    said.append(
        f"Nothing is extrapolated: what takes more than {longest} is only known to take more."
    )
    first = str(own["origin"].iloc[0])
    if first in ("same", "reshuffled"):
        said.append(
            f"The data is {ORIGINS[first]}: unseen text may teach a layer more slowly or faster."
            if _is_own_text(own)
            else f"The data is not the base's own training text ({NOT_ITS_TEXT}), whatever its "
            "origin is called: amounts are still shares of what the base was trained on."
        )
    elif first in ORIGINS:
        said.append(f"The data is {ORIGINS[first]}: text the base has seen may do otherwise.")
    return said
