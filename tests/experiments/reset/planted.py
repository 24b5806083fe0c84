"""A study of resets nobody made: gaps fall as powers of the tokens, so crossings are known.

gap(t) = damage · (1 + t/t₁)^−α, so it crosses τ at t = t₁ ((damage/τ)^{1/α} − 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.reset.result import Result
from experiments.reset.statistics.crossing import crossings

T0 = 8_000_000.0
SHARES = (0.0, *np.geomspace(0.0005, 0.08, 23))
BASE_LOSS = 2.0
SLOPE: Mapping[str, float] = {"lm": 0.6, "hidden": 1.0, "logits": 0.9, "mix": 0.8}


def gap_of(tokens: float, layer: int, target: str, seed: int, length: float = T0) -> float:
    """The planted gap; layer 0 is hurt most, local regression is slow at first and falls faster."""
    begin = length * (0.0006 if target == "lm" else 0.0035)
    hurt = 1.6 / (1 + layer) ** 1.6 * (1 + 0.06 * (seed - 1))
    return hurt * (1 + tokens / begin) ** -SLOPE[target]


def student(
    layer: int,
    *,
    gap: Any = None,
    arm: str = "A0",
    target: str = "lm",
    seed: int = 0,
    end: str = "budget",
    stop: float | None = None,
    until: int | None = None,
    **columns: Any,
) -> pd.DataFrame:
    """One student's rows; `stop` is the gap at which it ends early, `until` its evaluations."""
    base = {
        "base": "tiny",
        "family": "decoder",
        "architecture": "opt",
        "n_layers": 4,
        "d_model": 64,
        "base_seed": 0,
        "base_share": 1.0,
        "base_tokens": T0,
        "unique_tokens": T0 / 4,
        "parameters": 50_000,
        "stack": "",
        "part": "block",
        "law": "init",
        "origin": "same",
        "unique": np.nan,
        "rate": 1e-3,
        "weights": "raw",
        "source_use": np.nan,
    } | columns
    length = base["base_tokens"] if np.isfinite(base["base_tokens"]) else T0
    planted = gap or (lambda t: gap_of(t, layer, target, seed, length))
    rows = []
    for step, share in enumerate(SHARES[:until]):
        tokens = float(round(share * length))
        value = float(planted(tokens))
        rows.append(
            base
            | {
                "arm": arm,
                "layer": layer,
                "layers": columns.get("layers", str(layer)),
                "variant": columns.get("variant", ""),
                "target": target,
                "seed": seed,
                "step": step,
                "tokens": tokens,
                "seconds": tokens / 1e4,
                "loss": BASE_LOSS + value,
                "gap": value,
                "stderr": 0.002,
                "loss_base": BASE_LOSS,
                "loss_reset": BASE_LOSS + float(planted(0.0)),
                "loss_skip": BASE_LOSS + 1.01 * float(planted(0.0)),
                "status": "running",
                "budget": SHARES[-1] * length,
            }
        )
        if stop is not None and value < stop:
            end = "recovered"
            break
    rows[-1]["status"] = end
    return pd.DataFrame(rows)


def ledger(
    layers: Iterable[int] = range(4),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    targets: Sequence[str] = ("lm", "hidden"),
    stop: float | None = 0.008,
    **columns: Any,
) -> pd.DataFrame:
    """A0 for every target, A1 and A7: the frame of the default study."""
    several = list(layers)
    made = [
        student(layer, target=target, seed=seed, stop=stop, **columns)
        for target in targets
        for layer in several
        for seed in seeds
    ]
    made += [
        student(
            layer,
            arm="A1",
            law="",
            seed=seed,
            gap=lambda t, n=layer: (0.004 + 0.003 * n) * t / (t + 1e5),
            **columns,
        )
        for layer in several[:2]
        for seed in seeds
    ]
    made.append(student(0, arm="A7", gap=lambda t: 4.5 * (1 + t / 2e4) ** -0.5, **columns))
    return pd.concat(made, ignore_index=True)


def diverged(layer: int = 2, seed: int = 3, **columns: Any) -> pd.DataFrame:
    """A student whose loss rises until it is given up."""
    return student(
        layer,
        seed=seed,
        gap=lambda t: 0.35 * (1 + t / 2e4),
        end="diverged",
        until=12,
        **columns,
    )


def arms(layers: Sequence[int] = (0, 1, 2, 3), seeds: Sequence[int] = (0, 1)) -> pd.DataFrame:
    """Every arm and some variants, for the picture of the arms."""
    made = [ledger(layers, seeds=seeds, targets=("lm", "hidden", "logits"))]
    for layer in layers:
        for seed in seeds:
            own: list[dict[str, Any]] = [
                {"arm": "A3"},
                {"arm": "A4", "gap": lambda t, n=layer: 0.3 / (1 + n) * (1 + t / 1e5) ** -0.05},
                {"arm": "A5", "gap": lambda t, n=layer: 0.3 / (1 + n) * (1 + t / 1e5) ** -0.2},
                {"arm": "A6", "gap": lambda t, n=layer: 1.6 / (1 + n) ** 1.6},
                {"arm": "A9", "part": "attention"},
                {"arm": "A9", "part": "ffn"},
                {"arm": "A10", "law": "rewind"},
                {"arm": "A10", "law": "copy-below"},
            ]
            made += [student(layer, seed=seed, **each) for each in own]
    for seed in seeds:
        made.append(student(0, arm="A2", law="", seed=seed, gap=lambda t: 0.02 * t / (t + 1e5)))
        made.append(student(2, arm="A12", seed=seed))
    return pd.concat(made, ignore_index=True)


def result(rows: pd.DataFrame | None = None, **frames: Any) -> Result:
    """A study of these ledger rows."""
    own = ledger() if rows is None else rows
    return Result("tiny", own, crossings(own), **frames)
