"""On what are heads scanned and masked, and is it enough?

Random tokens, checked before any work; text, given or the bundled model's own; the importance of
heads from a pruning run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor

from ablate.placement import ZOO
from probes.circuits import has_direct_path
from probes.criterion import rows_needed
from probes.repeats import drawn

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.induction.study import Induction


@dataclass(frozen=True, eq=False)
class Rows:
    """The random tokens of a study."""

    study: Induction
    model: HookedModel
    ids: Int[Tensor, "vocab"]

    @property
    def options(self) -> dict[str, Any]:
        """As `probes.repeats.drawn` and `induction_scan` take them."""
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


def text_of(
    study: Induction, model: HookedModel, left_out: list[str]
) -> Int[Tensor, "token"] | None:
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


def importance_of(study: Induction, model: HookedModel) -> pd.DataFrame:
    """Mean importance over tasks of every head at each shot count: component, shots, value."""
    if study.prune_run is None:
        return pd.DataFrame()
    try:
        options = json.loads((study.prune_run / "config.json").read_text())
        metrics = pd.read_parquet(study.prune_run / "metrics.parquet")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"--prune-run {study.prune_run}: no finished run of `ablate prune` there; give the "
            "folder with its metrics.parquet"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, pa.ArrowInvalid):
        raise ValueError(
            f"--prune-run {study.prune_run}: its config.json or metrics.parquet cannot be read; "
            "run `ablate prune` again"
        ) from None
    if not isinstance(options, dict) or options.get("study") != "prune":
        raise ValueError(f"--prune-run {study.prune_run}: that is no run of `ablate prune`")
    pruned = options.get("options", {}).get("model")
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
