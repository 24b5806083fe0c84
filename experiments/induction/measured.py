"""What is measured of a model's heads, before anything is concluded?

The scan is kept a batch of seeds at a time, masking as a whole, so that a run that stopped goes on.
Heads are masked on rows whose seeds the scan did not use, and on text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ablate.components import Component, Head, Stack, parse_component
from ablate.masks import Mask
from ablate.placement import ZOO
from probes.attention import induction_keys
from probes.behaviour import copy_losses, text_rows
from probes.circuits import has_direct_path, ov_eigenvalue_scores
from probes.composition import composition_scores
from probes.criterion import Criterion, judged, passing, rows_needed
from probes.induction import EVERY, Score, head_scores, induction_scan, summary
from probes.masking import masking_effects, removed_sets
from probes.patterns import patterns_of
from probes.repeats import drawn
from probes.vocabulary import vocabulary

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.induction.study import Induction
    from experiments.run_folder import RunFolder

REFERENCE: tuple[Score, ...] = ("prefix_matching_reference", "copying_reference")
SHOWN = 8
"""Heads whose attention the page shows, at most: those that pass, then by prefix matching."""
SHOWN_LENGTH, SHOWN_COPIES, SHOWN_TEXT = 12, 3, 96
"""Block and copies of the row they are shown on; tokens of text."""


@dataclass(frozen=True, eq=False)
class Example:
    """One row of tokens, and what some heads attend to on it."""

    of: str
    tokens: Sequence[str]
    patterns: Mapping[Component, Float[Tensor, "query key"]]
    targets: Sequence[Sequence[int]]
    """The keys of every query that prefix matching counts."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything the findings are made of; what was not measured is empty.

    Attributes:
        scan: component, kind, stack, layer, head, seed, length, score, value; scores of the weights
            alone (ov, k_composition, qk_matching) have neither seed nor length.
        heads: `probes.induction.summary` of it: a row a component, a column a score.
        judgement: `probes.criterion.judged` of the attention heads.
        masked: `probes.masking.masking_effects` of the heads that pass.
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
    positions: pd.DataFrame
    importance: pd.DataFrame
    examples: Sequence[Example]
    left_out: Sequence[str]


def measured(study: Induction, folder: RunFolder, model: HookedModel) -> Measured:
    """Check all inputs, create the folder, measure."""
    if not model.heads and not any(site.kind == "mixer" for site in model.sites):
        raise ValueError(f"{model.name} has neither attention heads nor mixers to scan")
    left_out: list[str] = []
    text = _text(study, model, left_out)
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
    rows = _Rows(study, model, ids)
    rows.check()
    importance = _importance(study, model)
    windows = None if text is None else text_rows(model, text, limit=study.windows)
    folder.create()
    scan = _scan(study, folder, rows)
    judgement = _judged(study, model, scan, left_out)
    heads = [c for c in passing(judgement) if isinstance(c, Head)] if len(judgement) else []
    masked, positions = pd.DataFrame(), pd.DataFrame()
    if len(judgement):
        masked, positions = _masked(study, folder, model, rows, heads, windows, left_out)
    return Measured(
        scan=scan,
        heads=summary(scan),
        judgement=judgement,
        masked=masked,
        positions=positions,
        importance=importance,
        examples=_examples(study, model, ids, text, windows, judgement, heads),
        left_out=left_out,
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The random tokens of a study."""

    study: Induction
    model: HookedModel
    ids: Int[Tensor, "vocab"]

    @property
    def options(self) -> dict[str, Any]:
        study = self.study
        return {
            "lengths": study.lengths or None,
            "repeats": study.repeats,
            "batch": study.batch,
            "vocabulary": self.ids,
            "bos": "model" if study.bos == "model" else None,
            "spacing": study.spacing,
            "dealt": study.dealt,
        }

    def check(self) -> None:
        """Raise ValueError for rows that do not fit the model, or are too few to judge it by."""
        study, model = self.study, self.model
        batches = drawn(model, self.options["lengths"], **self._drawn(), seeds=study.scan_seeds)
        reading = [site for site in model.sites if has_direct_path(model, site)]
        if study.convention == "reference" and not any(site.stack == "" for site in reading):
            raise ValueError(
                f"--convention reference: the paper's scores are of heads of decoders, and "
                f"{model.name} has none; leave --convention"
            )
        judging = sum(head.stack != "cross" for head in model.heads) if reading else 0
        rows = sum(len(batch.seeds) for batch in batches)
        if judging and rows < (needed := rows_needed(judging, study.level)):
            raise ValueError(
                f"--seeds {study.seeds}: {rows} rows (seeds × lengths) cannot single out one of "
                f"{judging} heads at level {study.level:g}; give --seeds or --lengths for {needed} "
                "rows or more"
            )

    def others(self) -> Any:
        """Batches of rows that the scan did not see."""
        return drawn(
            self.model,
            self.options["lengths"],
            **self._drawn(),
            seeds=self.study.masking_seeds,
        )

    def _drawn(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name != "lengths"}


def _scan(study: Induction, folder: RunFolder, rows: _Rows) -> pd.DataFrame:
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
    rows: _Rows,
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


def _positions(
    study: Induction, model: HookedModel, rows: _Rows, heads: Sequence[Head]
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


def _text(study: Induction, model: HookedModel, left_out: list[str]) -> Int[Tensor, "token"] | None:
    """Token ids of the text given, or of the bundled model's held-out text."""
    if study.text is not None:
        if model.tokenizer is None:
            raise ValueError(f"--text {study.text}: {model.name} has no tokenizer to read it with")
        try:
            words = study.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {study.text}: not UTF-8 at byte {error.start}") from None
        ids = model.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)
    bundled = ZOO / study.model / "validation.safetensors"
    if bundled.is_file():
        return load_file(bundled)["tokens"].long()
    left_out.append("No `--text` was given: the in-context-learning score on text is not measured.")
    return None


def _importance(study: Induction, model: HookedModel) -> pd.DataFrame:
    """Mean importance over tasks of every head at each shot count: component, shots, value."""
    if study.prune_run is None:
        return pd.DataFrame()
    try:
        options = json.loads((study.prune_run / "config.json").read_text())
        metrics = pd.read_parquet(study.prune_run / "metrics.parquet")
    except FileNotFoundError:
        raise ValueError(
            f"--prune-run {study.prune_run}: no finished run of `ablate prune` there; give the "
            "folder with its metrics.parquet"
        ) from None
    if options["study"] != "prune":
        raise ValueError(f"--prune-run {study.prune_run}: that is a run of {options['study']}")
    pruned = options["options"]["model"]
    if pruned != study.model:
        raise ValueError(
            f"--prune-run {study.prune_run}: that run pruned {pruned}, this one scans {study.model}"
        )
    rows = metrics.loc[(metrics["part"] == "importance") & (metrics["unit"] == "heads")]
    heads = {str(head) for head in model.heads}
    if set(rows["component"]) != heads:
        raise ValueError(
            f"--prune-run {study.prune_run}: it has the importance of "
            f"{rows['component'].nunique()} heads, {model.name} has {len(heads)} of other names"
        )
    return rows[["component", "shots", "value"]].reset_index(drop=True)


def _examples(
    study: Induction,
    model: HookedModel,
    ids: Int[Tensor, "vocab"],
    text: Int[Tensor, "token"] | None,
    windows: Int[Tensor, "example pos"] | None,
    judgement: pd.DataFrame,
    heads: Sequence[Head],
) -> list[Example]:
    """How the heads that pass, or those nearest to it, attend on a short row, and on text."""
    if judgement.empty:
        return []
    nearest = judgement.sort_values("prefix_matching", ascending=False)["component"].tolist()
    chosen = list(dict.fromkeys([*heads, *map(parse_component, nearest)]))
    chosen = [component for component in chosen if component.stack == chosen[0].stack][:SHOWN]
    length = min(SHOWN_LENGTH, len(ids) // SHOWN_COPIES)
    (row,) = drawn(
        model,
        (length,),
        repeats=SHOWN_COPIES,
        seeds=[study.masking_seeds.stop],
        batch=1,
        vocabulary=ids,
        bos="model" if study.bos == "model" else None,
    )
    found = [_example("random tokens that repeat", model, row.repeated, chosen)]
    hf: Any = model.model
    if text is not None and windows is not None and not hf.config.is_encoder_decoder:
        shown = min(SHOWN_TEXT, windows.shape[1])
        tokens = text_rows(model, text, context=shown, limit=2)[-1:]
        found.append(_example("text", model, {"": tokens}, chosen))
    return found


def _example(
    of: str,
    model: HookedModel,
    rows: Mapping[Stack, Int[Tensor, "1 pos"]],
    chosen: Sequence[Component],
) -> Example:
    tokens = rows[chosen[0].stack]
    ids = tokens[0].tolist()
    names = (
        [str(token) for token in ids]
        if model.tokenizer is None
        else [model.tokenizer.decode([token]) for token in ids]
    )
    keys = induction_keys(tokens)[0].tolist()
    targets = [[key for key in own if key >= 0] for own in keys]
    return Example(of, names, patterns_of(model, rows, chosen), targets)
