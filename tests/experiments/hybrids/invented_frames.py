"""Frames of a study that nobody ran, of any size, in the columns of a real one."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pandas as pd

from experiments.hybrids.measuring.scores import drawn_all, failure_rows, over_seeds, score_rows
from experiments.hybrids.measuring.sums import ALL, KEYS, gathered
from experiments.hybrids.report.published import beside_published

POINTS, PROMPTS = 12, 60
LABELS = ("zero", "none", "least-squares", "lasso", "bayes")


def frames(
    architectures: Sequence[str],
    tasks: Sequence[str] = ("linear",),
    *,
    seeds: int = 2,
    shifts: Sequence[str] = ("none", "noisy"),
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """errors, sums, curve, labels, ablations, attention, probes."""
    generator = np.random.default_rng(seed)
    errors, sums, curve, labels, parts = [], [], [], [], []
    looking, probes = [], []
    steps = [0, 20, 27, 36, 48, 64, 85, 114, 152, 203, 271, 361, 482, 642, 857, 1143, 1524, 2000]
    for task in tasks:
        zero = 5 * generator.chisquare(2, (PROMPTS, POINTS)) / 2
        fall = np.clip(1 - np.arange(POINTS) / 5, 1e-12, None)
        for shift in shifts:
            for baseline, left in (
                ("zero", 1.0),
                ("least-squares", fall),
                ("ridge", 0.9 * fall + 0.1),
                ("bayes", fall),
            ):
                _add(errors, sums, zero * left, ("", task, ALL, shift, baseline))
            for at, architecture in enumerate(architectures):
                for one in range(seeds):
                    stuck = 0.9 if (at, one) == (1, 1) else 0.0
                    noise = 0.02 * (1 + at) * generator.uniform(0.5, 1.5, (PROMPTS, POINTS))
                    left = np.clip(np.maximum(fall + noise, stuck), None, 1)
                    _add(errors, sums, zero * left, (architecture, task, one, shift, ""))
                    level = np.clip((np.log1p(steps) / np.log1p(2000) + at / 20) * 5, 0, 4).astype(
                        int
                    )
                    level = np.minimum(level, 0 if stuck else 4)
                    labels += [
                        {
                            "architecture": architecture,
                            "task": task,
                            "shift": shift,
                            "seed": one,
                            "step": step,
                            "label": LABELS[k],
                            "support": 1.0 if k % 2 else 0.6,
                        }
                        for step, k in zip(steps, level, strict=True)
                    ]
        for at, architecture in enumerate(architectures):
            for one in range(seeds):
                curve += [
                    {
                        "architecture": architecture,
                        "task": task,
                        "seed": one,
                        "rate": 1e-3,
                        "step": step,
                        "share": float((1 + step / 100) ** -(0.3 + 0.1 * at + 0.05 * one)),
                    }
                    for step in steps
                ]
                names = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
                names += ["L0F", "L1M"]
                for name in names:
                    row = {"architecture": architecture, "task": task, "seed": one, "fill": "zero"}
                    row |= {"component": name, "layer": int(name[1]), "baseline": "bayes"}
                    row |= {"examples": ALL, "metric": "score_drop"}
                    parts.append(row | {"value": float(generator.normal(0.1, 0.2))})
                row = {"architecture": architecture, "task": task, "seed": one}
                for name in (*names[:8], "L1M", "even"):
                    head = int(name[3]) if "H" in name else -1
                    part = {"component": name, "layer": int(name[1]) if name[0] == "L" else -1}
                    part |= {"kind": name[2:3], "head": head, "examples": ALL}
                    looking += [
                        row
                        | part
                        | {"prompts": prompts, "metric": metric, "value": 0.1 * one + share}
                        for prompts, metric, share in (
                            ("as drawn", "label", 0.5),
                            ("last x again", "label", 0.9),
                            ("last x again", "match", 0.25 if name == "L1H2" else 0.1),
                        )
                    ]
                for layer in range(3):
                    for metric, r2 in (("r2", 0.4 * layer), ("r2_shuffled", 0.0)):
                        at_layer = {"layer": layer, "examples": 5, "metric": metric}
                        probes.append(row | at_layer | {"value": r2 + 0.05 * one})
                best = {"layer": ALL, "examples": 5, "metric": "r2_least_squares", "value": 0.95}
                probes.append(row | best)
    return {
        "errors": pd.concat(errors, ignore_index=True),
        "sums": pd.concat(sums, ignore_index=True),
        "curve": pd.DataFrame(curve),
        "labels": pd.DataFrame(labels),
        "ablations": pd.DataFrame(parts),
        "attention": pd.DataFrame(looking),
        "probes": pd.DataFrame(probes),
    }


def findings(made: dict[str, pd.DataFrame]) -> SimpleNamespace:
    """What `figures` reads of findings."""
    found = drawn_all(gathered(made["sums"]), np.random.default_rng(0), resamples=100)
    scores = pd.concat([score_rows(one) for one in found], ignore_index=True)
    named = {str(task): "least-squares" for task in made["curve"]["task"].unique()}
    table = over_seeds(scores, named, "none")
    return SimpleNamespace(
        measured=SimpleNamespace(frames=made),
        denominators=named,
        table=table,
        beside=beside_published(table),
        failures=failure_rows(scores, named),
        score_effects=pd.DataFrame(),
        step_effects=pd.DataFrame(),
    )


def _add(errors: list, sums: list, values: np.ndarray, keys: tuple) -> None:
    """Rows of one model or baseline from its errors [prompt point]."""
    own = pd.DataFrame(
        {
            "examples": np.arange(POINTS),
            "metric": "squared_error",
            "value": values.mean(0),
            "stderr": values.std(0) / np.sqrt(len(values)),
        }
    )
    errors.append(own.assign(**dict(zip(KEYS, keys, strict=True))))
    totals = pd.DataFrame({"prompt": np.arange(len(values)), "value": values.sum(1)})
    sums.append(totals.assign(**dict(zip(KEYS, keys, strict=True))))
