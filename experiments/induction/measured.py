"""What is measured of a model's heads, before anything is concluded?

The scan is kept a batch of seeds at a time, masking as a whole, so that a run that stopped goes on.
Heads are masked on rows whose seeds the scan did not use, and on text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Int
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ablate.components import Component, Head
from ablate.masks import Mask
from experiments.induction.examples import Example, examples_of
from experiments.induction.inputs import Rows, importance_of, text_of
from probes.behaviour import copy_losses, text_rows
from probes.circuits import has_direct_path, ov_eigenvalue_scores
from probes.composition import composition_scores
from probes.criterion import Criterion, judged, passing
from probes.induction import EVERY, Score, head_scores, induction_scan, summary
from probes.masking import masking_effects, removed_sets
from probes.vocabulary import vocabulary

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.induction.study import Induction
    from experiments.run_folder import RunFolder

REFERENCE: tuple[Score, ...] = ("prefix_matching_reference", "copying_reference")


MOST, PREVIOUS = 8, 3
"""Heads masked alone: of those that pass, and of those that attend to the previous token."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything the findings are made of; what was not measured is empty.

    Attributes:
        scan: component, kind, stack, layer, head, seed, length, score, value; scores of the weights
            alone (ov, k_composition, qk_matching) have neither seed nor length.
        heads: `probes.induction.summary` of it: a row a component, a column a score.
        judgement: `probes.criterion.judged` of the attention heads.
        masked: `probes.masking.masking_effects` of the heads that pass.
        alone: component, value, low, high: rise of the loss on second copies without one head; of
            the heads that pass and of those that attend most to the previous token.
        positions: set (whole, induction, random), copy, place, value, low, high: loss by position
            of rows that repeat.
        importance: component, shots, value: of the pruning run.
        examples: the attention of some heads on single rows.
        left_out: what was not measured, and why.
    """

    scan: pd.DataFrame
    heads: pd.DataFrame
    judgement: pd.DataFrame
    masked: pd.DataFrame
    alone: pd.DataFrame
    positions: pd.DataFrame
    importance: pd.DataFrame
    examples: Sequence[Example]
    left_out: Sequence[str]


def measured(study: Induction, folder: RunFolder, model: HookedModel) -> Measured:
    """Check all inputs, create the folder, measure."""
    if not model.heads and not any(site.kind == "mixer" for site in model.sites):
        raise ValueError(f"{model.name} has neither attention heads nor mixers to scan")
    for name, parameter in model.model.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{model.name}: weights of {name} are not finite; check the checkpoint"
            )
    left_out: list[str] = []
    text = text_of(study, model, left_out)
    if text is None and study.vocabulary == "corpus-frequency":
        raise ValueError(
            "--vocabulary corpus-frequency: there is no text to count tokens in; give --text"
        )
    ids = vocabulary(
        model,
        study.vocabulary,
        drop=study.drop,
        corpus=text if study.vocabulary == "corpus-frequency" else None,
    )
    rows = Rows(study, model, ids)
    rows.check()
    importance = importance_of(study, model)
    windows = None if text is None else text_rows(model, text, limit=study.windows)
    folder.create()
    scan = _scan(study, folder, rows)
    judgement = _judged(study, model, scan, left_out)
    heads = [c for c in passing(judgement) if isinstance(c, Head)] if len(judgement) else []
    masked, alone, positions = pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    if len(judgement):
        masked, positions = _masked(study, folder, model, rows, heads, windows, left_out)
        alone = _alone(folder, model, rows, scan, heads)
    return Measured(
        scan=scan,
        heads=summary(scan),
        judgement=judgement,
        masked=masked,
        alone=alone,
        positions=positions,
        importance=importance,
        examples=examples_of(study, model, ids, text, windows, judgement, heads),
        left_out=left_out,
    )


def _scan(study: Induction, folder: RunFolder, rows: Rows) -> pd.DataFrame:
    """Every score of every head, kept a batch of seeds at a time; then those of the weights."""
    model = rows.model
    scores = (*EVERY, *(REFERENCE if study.convention == "reference" else ()))
    found = []
    batches = range(study.scan_seeds.start, study.scan_seeds.stop, study.batch)
    for start in tqdm(batches, desc="induction", unit="batch"):
        kept = folder.partial(f"scan {start}")
        if kept is None:
            seeds = range(start, min(start + study.batch, study.scan_seeds.stop))
            kept = induction_scan(
                model,
                seeds=seeds,
                scores=scores,
                mixers=True,
                bias=study.bias,
                final_norm=study.final_norm,
                **rows.options,
            )
            folder.keep(f"scan {start}", kept)
        found.append(kept)
    scan = pd.concat(found, ignore_index=True)
    return pd.concat([scan, _of_weights(model, scan)], ignore_index=True)


def _of_weights(model: HookedModel, scan: pd.DataFrame) -> pd.DataFrame:
    """OV and QK scores, which look at no token."""
    places = scan.drop_duplicates("component").set_index("component")
    tables: dict[str, Mapping[Component, float]] = {}
    if any(has_direct_path(model, site) for site in model.sites):
        tables["ov"] = ov_eigenvalue_scores(model)
    if any(head.stack != "cross" for head in model.heads):
        previous = head_scores(scan, "previous_token")
        tables |= composition_scores(model, previous)
    if not tables:
        return scan.iloc[:0]
    rows = [
        {
            "component": str(component),
            **places.loc[str(component), ["kind", "stack", "layer", "head"]].to_dict(),
            "seed": pd.NA,
            "length": pd.NA,
            "score": score,
            "value": value,
        }
        for score, values in tables.items()
        for component, value in values.items()
    ]
    return pd.DataFrame(rows, columns=scan.columns).astype({"seed": "Int64", "length": "Int64"})


def _judged(
    study: Induction, model: HookedModel, scan: pd.DataFrame, left_out: list[str]
) -> pd.DataFrame:
    """The heads of self attention, judged together; empty where there are none."""
    rows = scan.loc[(scan["kind"] == "Head") & (scan["stack"] != "cross")]
    if rows.empty:
        left_out.append("Mixers have no attention heads: nothing is judged, nothing is masked.")
        return pd.DataFrame()
    if study.by not in set(rows["score"]):
        left_out.append(
            f"No head of {model.name} has a direct path to logits: there is no {study.by} score, "
            "so no head is judged."
        )
        return pd.DataFrame()
    criterion = Criterion(
        matching=study.matching, copying=study.copying, by=study.by, level=study.level
    )
    return judged(rows, criterion, seed=study.seed)


def _masked(
    study: Induction,
    folder: RunFolder,
    model: HookedModel,
    rows: Rows,
    heads: Sequence[Head],
    windows: Int[Tensor, "example pos"] | None,
    left_out: list[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is left without the heads that pass."""
    heads = [head for head in heads if head.stack != "encoder"]
    if not heads:
        left_out.append("No head passes, so none is masked.")
        return pd.DataFrame(), pd.DataFrame()
    others = [h for h in model.heads if h.stack == heads[0].stack and h not in heads]
    heads = heads[: len(others)]
    if not heads:
        left_out.append("Every head passes: there are no other heads to mask beside them.")
        return pd.DataFrame(), pd.DataFrame()
    kept = folder.partial("masked")
    if kept is None:
        kept = masking_effects(
            model, heads, rows.others(), windows, draws=study.draws, seed=study.seed
        )
        folder.keep("masked", kept)
    return kept, _positions(study, model, rows, heads)


def _alone(
    folder: RunFolder,
    model: HookedModel,
    rows: Rows,
    scan: pd.DataFrame,
    passed: Sequence[Head],
) -> pd.DataFrame:
    """What one head alone is worth, whether it passes or is only built on."""
    heads = [head for head in passed if head.stack != "encoder"][:MOST]
    previous = head_scores(scan, "previous_token")
    of_stack = [h for h in previous if isinstance(h, Head) and heads and h.stack == heads[0].stack]
    heads += [h for h in sorted(of_stack, key=lambda h: -previous[h])[:PREVIOUS] if h not in heads]
    if not heads:
        return pd.DataFrame()
    kept = folder.partial("alone")
    if kept is None:
        kept = copy_losses(model, rows.others(), [Mask(), *(Mask([head]) for head in heads)])
        folder.keep("alone", kept)
    second = kept.loc[kept["copy"] == 1].groupby(["mask", "seed", "length"])["loss"].mean()
    by_row = second.unstack("mask")
    rise = by_row.drop(columns=0).sub(by_row[0], axis="index")
    half = rise.sem() * stats.t.ppf(0.975, max(1, len(rise) - 1))
    table = pd.DataFrame({"value": rise.mean(), "low": rise.mean() - half})
    table["high"] = table["value"] + half
    return table.assign(component=[str(head) for head in heads]).reset_index(drop=True)


def _positions(
    study: Induction, model: HookedModel, rows: Rows, heads: Sequence[Head]
) -> pd.DataFrame:
    """Loss of every place of every copy, with the interval over rows: set, copy, place, value."""
    sets = removed_sets(model, heads, ks=[len(heads)], draws=study.draws, seed=study.seed)
    shown = [one for one in sets if one.set != "layer_matched"]
    losses = copy_losses(model, rows.others(), [Mask(one.heads) for one in shown])
    losses["set"] = [shown[i].set for i in losses["mask"]]
    # Blocks of several lengths have only the first places in common.
    losses = losses.loc[losses["place"] < losses["length"].min() - 1]
    by_row = losses.groupby(["set", "copy", "place", "seed", "length"], sort=False)["loss"].mean()
    found = by_row.groupby(["set", "copy", "place"], sort=False).agg(["mean", "sem", "size"])
    half = found["sem"] * stats.t.ppf(0.975, (found["size"] - 1).clip(lower=1))
    table = pd.DataFrame(
        {"value": found["mean"], "low": found["mean"] - half, "high": found["mean"] + half}
    )
    return table.reset_index()
