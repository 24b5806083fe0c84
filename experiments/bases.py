"""What was this model trained on, for how long, and how good was it on the way?

A base is a trained model as a study of its training sees it: its objective, the tokens T0 it was
trained on, the unique ones U0 among them, its curve of held-out loss, and the weights it began
from. Models that `ablate pretrain` wrote know all this (training.json), the bundled model too, and
regressors of `ablate hybrid` (prompted_data.py). Any other Hugging Face model is a base of unknown
T0, unless one is given.

Where it misleads: a curve is the run's own. Where the rate decays, a loss on the way is that of a
model that was not done, and a shorter run of its own would have been better at the same token:
`annealed` has such runs where there are any. A curve is measured on part of the held-out text, so
it compares with itself and not with a loss on other rows. Records older than that rule have a last
row on all of it; their other rows are scaled to it by the ratio of the last two rows, which were
taken a few steps apart (of the bundled model's two runs: 1.238 and 1.028).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.families import Kind, TaskName

STEMS: Mapping[Kind, TaskName] = {
    "decoder": "lm",
    "encoder": "mlm",
    "encoder-decoder": "denoising",
}
"""What a model without a record is taken to be trained on."""


@dataclass(frozen=True, eq=False)
class Base:
    """A trained model and what is known of its training.

    Attributes:
        name: as it was asked for: bundled name, folder or hub id.
        weights: what `from_pretrained` takes: the folder of the checkpoint, or the hub id.
        family: Hugging Face's model_type.
        n_layers: blocks of each stack.
        share: of its training; below 1 it is a checkpoint.
        tokens: T0 up to here, epochs counted; None if unknown.
        unique_tokens: U0, no more than its corpus holds; None if unknown.
        curve: (tokens, held-out loss in nats, or as a share of predicting 0 in a regressor) along
            the way; empty if unknown.
        annealed: the same of runs that ended there, as far as there are checkpoints of such.
        initial: the weights before the first step, if they were kept.
        seed: of weights and data order.
        record: training.json, or None.
        folder: of the whole model, where its record and tokenizer are; None for a hub id.
    """

    name: str
    weights: str
    kind: Kind
    family: str
    objective: TaskName | Literal["regression"]
    n_layers: int
    d_model: int
    share: float
    tokens: int | None
    unique_tokens: int | None
    curve: tuple[tuple[int, float], ...]
    annealed: tuple[tuple[int, float], ...]
    initial: Path | None
    seed: int | None
    record: Mapping[str, Any] | None
    folder: Path | None

    def reached(self, gap: float, *, annealed: bool = False) -> float:
        """Equivalent progress q: the share of T0 at which this model's own curve first came down
        to `gap` nats above its end.

        A gap and not a loss, as the curve may be measured on other rows. Interpolated on log
        tokens. 0 before the first measurement, 1 at no gap and below; nan without a curve.
        """
        curve = self.annealed if annealed else self.curve
        if not curve:
            return math.nan
        tokens = np.log([t for t, _ in curve])
        best = np.minimum.accumulate([value - curve[-1][1] for _, value in curve])
        if gap > best[0]:
            return 0.0
        gap = max(gap, float(best[-1]))
        after = int(np.argmax(best <= gap))
        at = tokens[after]
        if after > 0:
            down = (best[after - 1] - gap) / (best[after - 1] - best[after])
            at = tokens[after - 1] + down * (tokens[after] - tokens[after - 1])
        return float(np.exp(at - tokens[-1]))


def base_at(
    name: str | Path,
    *,
    share: float = 1.0,
    tokens: int | None = None,
    objective: TaskName | None = None,
) -> Base:
    """The base called `name`: a bundled model, a model folder or a hub id.

    Args:
        share: a checkpoint that was kept on the way, instead of the end.
        tokens: T0, for a model without a record.
        objective: of a model without a record; by its architecture if not given.

    Raises ValueError for a checkpoint that was not kept, and for a T0 against the record's.
    """
    from transformers import AutoConfig

    import experiments.hybrids.architecture.model  # noqa: F401  transformers knows hybrids from then on
    from ablate.placement import resolve

    weights, local = resolve(name)
    config = AutoConfig.from_pretrained(weights)
    if getattr(config, "is_regression", False):
        from experiments.prompted_data import prompted_base

        return prompted_base(str(name), weights, config, share=share, tokens=tokens)
    kind = _kind(config)
    folder = Path(weights) if local else None
    record = _record(folder)
    shape = {
        "name": str(name),
        "family": config.model_type,
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "folder": folder,
    }
    if record is None:
        if share != 1:
            raise ValueError(
                f"share {share:g} of the training of {name} asked for: nothing is known of it; "
                "give a model that `ablate pretrain` wrote"
            )
        return Base(
            **shape,
            weights=weights,
            kind=kind,
            objective=objective or STEMS[kind],
            share=1.0,
            tokens=tokens,
            unique_tokens=None,
            curve=(),
            annealed=(),
            initial=None,
            seed=None,
            record=None,
        )
    if tokens not in (None, record["tokens_seen"]):
        raise ValueError(
            f"{tokens:,} training tokens given for {name}: its record says "
            f"{record['tokens_seen']:,}; leave the number out"
        )
    assert folder is not None
    seen, curve = record["tokens_seen"], _curve(record)
    annealed = _annealed(record)
    if share != 1:
        note = _checkpoint(name, record, share)
        seen = note["tokens"]
        weights = str(folder / "checkpoints" / f"{share:g}")
        before = tuple(row for row in curve if row[0] < seen)
        curve = (*before, (seen, note["validation_loss"]))
        annealed = tuple(row for row in annealed if row[0] <= seen)
    initial = folder / "initial.safetensors"
    return Base(
        **shape,
        weights=weights,
        kind=kind,
        objective=record.get("objective", "lm"),  # records from before there was a choice
        share=share,
        tokens=seen,
        unique_tokens=min(seen, record["unique_tokens_in_corpus"]),
        curve=curve,
        annealed=annealed,
        initial=initial if initial.exists() else None,
        seed=record["seed"],
        record=record,
    )


def _kind(config: Any) -> Kind:
    if config.is_encoder_decoder:
        return "encoder-decoder"
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    return "encoder" if masked else "decoder"


def _record(folder: Path | None) -> Mapping[str, Any] | None:
    if folder is None or not (folder / "training.json").is_file():
        return None
    return json.loads((folder / "training.json").read_text())


def _curve(record: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    rows = [(row["tokens"], row["validation_loss"]) for row in record["curve"]]
    if "options" in record:
        return tuple(rows)
    earlier = _curve(record["earlier"]) if record["earlier"] else ()
    rows = rows[len(record["earlier"]["curve"]) if record["earlier"] else 0 :]
    # The last row is on all held-out text, the rows before it on a part.
    scale = rows[-1][1] / rows[-2][1]
    return (*earlier, *((tokens, scale * loss) for tokens, loss in rows[:-1]), rows[-1])


def _annealed(record: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    notes = [note for note in record.get("checkpoints", ()) if note["annealed"]]
    ended = [(note["tokens"], note["validation_loss"]) for note in notes]
    last = record["curve"][-1]
    return (*ended, (last["tokens"], last["validation_loss"])) if ended else ()


def _checkpoint(name: str | Path, record: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    kept = {note["share"]: note for note in record.get("checkpoints", ())}
    if share not in kept:
        known = ", ".join(f"{other:g}" for other in (*kept, 1.0))
        raise ValueError(
            f"share {share:g} of the training of {name} asked for: kept are {known}; give one of "
            "them"
        )
    return kept[share]
