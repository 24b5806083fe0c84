"""Which bases does the reset study need, and what do they cost?

Decoders of N ∈ {4, 8, 12} blocks and width D ∈ {64, 128, 256}, three seeds each, in two slices:
`tokens` trains all on as many tokens, `tokens-per-parameter` on as many tokens for each weight of
the blocks (12·N·D²); the two meet near N = 8, D = 128. The first slice has encoders and
encoder-decoders of a few sizes beside them. All read rows of 128 tokens, keep a tenth of the corpus
unread, and train under a wsd schedule, so that their checkpoints compare with their end.

One seed is trained whole before the next begins, cheapest model first.

What it costs, measured on one core in bf16 autocast: 36 thousand tokens a second for N = 4, D = 64,
9.6 for N = 8, D = 128 and, on a busy core, 1.2 for N = 12, D = 256, so 2 minutes, 7 minutes and an
hour of training for the slice `tokens`; the curve adds a tenth to a fifth. The other slice asks the
largest model for 24M tokens, 5 to 6 hours at that speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.pretrain import Pretraining

if TYPE_CHECKING:
    import pandas as pd

    from experiments.run_folder import Outcome, RunFolder

Slice = Literal["tokens", "tokens-per-parameter"]

LAYERS = (4, 8, 12)
WIDTHS = (64, 128, 256)
SEEDS = 3
MATCHED_TOKENS = 4_000_000
PER_PARAMETER = 2.5
"""Tokens for each weight of the blocks, in the other slice."""
HEAD_WIDTH = 32
OTHERS: tuple[dict[str, Any], ...] = (
    {"family": "esm", "layers": 4, "d_model": 64, "rate": 2e-3},
    {"family": "bert", "layers": 4, "d_model": 128, "rate": 2e-3, "tokens": 4 * MATCHED_TOKENS},
    {"family": "t5", "layers": 4, "d_model": 64, "rate": 2e-3},
    {"family": "bart", "layers": 4, "d_model": 64, "rate": 2e-3},
    {
        "family": "bart",
        "objective": "translation",
        "layers": 2,
        "d_model": 64,
        "rate": 2e-3,
        "context": 64,
        "short_rows": 64,
        "batch": 32,
    },
)
"""Encoders and encoder-decoders. An encoder predicts 15 % of what it reads. esm learns from it at
once; bert, with learned positions and norms behind its branches, reads more and may not."""
SHARED = {
    "vocab": 1024,
    "context": 128,
    "short_rows": 128,
    "batch": 16,
    "warmup": 100,
    "repeated_share": 0.0,
    "reserved_share": 0.1,
    "schedule": "wsd",
    "curve_tokens": 32_768,
}
"""Of every base of the grid."""
GIVEN = ("grid", "seed", "runs", "corpus", "precision", "device", "save_every")
"""What a command with --grid may say besides."""


def grid(
    slice: Slice, usual: Pretraining | None = None, *, seeds: int = SEEDS
) -> tuple[Pretraining, ...]:
    """The bases of a slice, in the order they are trained.

    Args:
        usual: corpus, device, precision, runs and the first seed are taken from it.
    """
    given = usual or Pretraining()
    kept = {name: getattr(given, name) for name in GIVEN if name not in ("grid", "seed")}
    return tuple(
        Pretraining(**shape, **kept, seed=given.seed + seed)
        for seed in range(seeds)
        for shape in sorted(_shapes(slice), key=_cost)
    )


def model_folder(study: Pretraining) -> Path:
    """Where the model of a base is, or will be."""
    from experiments.run_folder import RunFolder

    return RunFolder.for_study("pretrain", study).path / "model"


def train_grid(study: Pretraining, folder: RunFolder) -> Outcome:
    """Train every base of `study.grid` that is not trained yet, each in a run folder of its own.

    Raises ValueError for an option that the grid decides.
    """
    import pandas as pd
    from tqdm import tqdm

    from experiments.report import Report
    from experiments.run_folder import Outcome, run_study

    changed = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(study)
        if field.name not in GIVEN and getattr(study, field.name) != field.default
    ]
    if changed:
        raise ValueError(
            f"--grid {study.grid} brings its own shapes: leave out {', '.join(changed)}"
        )
    assert study.grid
    bases = grid(study.grid, study)
    folder.create()
    frames = []
    for i, base in enumerate(bases):
        tqdm.write(f"base {i + 1} of {len(bases)}: {title(base)}")
        made, outcome = run_study("pretrain", base)
        frames.append(_rows(base, made.path, outcome.extra))
    frame = pd.concat(frames, ignore_index=True)
    losses = frame[frame.metric == "held_out_loss"].value
    outcome = Outcome(
        f"{len(bases)} bases trained, held-out losses {losses.min():.2f} to {losses.max():.2f} nat",
        {"models": [str(model_folder(base)) for base in bases]},
    )
    page = Report(
        title=f"Bases of the reset study, matched {study.grid}",
        question="Which models are there to reset a layer of, and how good are they?",
        findings=[
            f"{title(base)}: {loss:.3f} nat on all held-out tokens."
            for base, loss in zip(bases, losses, strict=True)
        ],
        captions={"losses": "Held-out loss of the decoders, the mean over seeds."},
        caveats=["Losses of different objectives do not compare."],
    )
    return folder.finish(outcome, frame, figures={"losses": _figure(frame)}, report=page)


def title(study: Pretraining) -> str:
    """A base in a few words."""
    return (
        f"{study.family} ({study.task}), N={study.layers}, D={study.d_model}, "
        f"{study.tokens / 1e6:.1f}M tokens, seed {study.seed}"
    )


def flops(study: Pretraining) -> float:
    """Of training its blocks, about: 6 a weight and token, 12·N·D² weights."""
    return 6.0 * 12 * study.layers * study.d_model**2 * study.tokens


def _shapes(slice: Slice) -> Iterator[dict[str, Any]]:
    for layers in LAYERS:
        for width in WIDTHS:
            tokens = MATCHED_TOKENS
            if slice == "tokens-per-parameter":
                tokens = round(PER_PARAMETER * 12 * layers * width**2)
            yield SHARED | {
                "layers": layers,
                "d_model": width,
                "heads": width // HEAD_WIDTH,
                "tokens": tokens,
            }
    if slice == "tokens":
        for shape in OTHERS:
            heads = shape["d_model"] // HEAD_WIDTH
            yield SHARED | {"tokens": MATCHED_TOKENS, "heads": heads} | shape


def _cost(shape: dict[str, Any]) -> int:
    return shape["tokens"] * shape["layers"] * shape["d_model"] ** 2


def _rows(study: Pretraining, path: Path, measured: Any) -> pd.DataFrame:
    import json

    import pandas as pd

    record = json.loads((path / "model" / "training.json").read_text())
    values = {
        "tokens": record["tokens_seen"],
        "unique_tokens": record["unique_tokens"],
        "parameters": record["parameters"],
        "seconds": record["seconds"],
        "held_out_loss": measured["held_out_loss"],
    }
    return pd.DataFrame(
        {
            "run": path.name,
            "family": study.family,
            "objective": study.task,
            "n_layers": study.layers,
            "d_model": study.d_model,
            "base_seed": study.seed,
            "metric": list(values),
            "value": [float(value) for value in values.values()],
        }
    )


def _figure(frame: pd.DataFrame) -> Any:
    from experiments.plots import curve, panels

    figure, axes = panels(width=4.2)
    rows = frame[(frame.metric == "held_out_loss") & (frame.objective == "lm")]
    means = rows.groupby(["n_layers", "d_model"], as_index=False).value.mean()
    means["blocks"] = "N = " + means.n_layers.astype(str)
    curve(
        means,
        x="d_model",
        group="blocks",
        log_x=True,
        xlabel="D",
        ylabel="held-out loss, nats per token",
        ax=axes[0][0],
    )
    return figure
