"""At which learning rate does an architecture learn fastest?

Every rate trains a few seeds over a short run, all of them as one batched model: same initial
weights and same prompts for all rates of a seed. The rate is picked by

    argmin over rates of mean over seeds of log(held-out error at the end)

a diverged seed counting as error ∞; where every rate loses a seed, the lowest is taken, and what
diverges at full length counts as failed like any other. Seeds and held-out prompts are others than
those reported, so that the pick is not rewarded for its luck.

Where it misleads. What is fastest in a short run need not be best in a long one: short runs favour
high rates. `at_edge` says that the grid ended where it was best; more rates on that side may be
better still.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from experiments.hybrids.architecture.model import HybridConfig
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.learning.runs import CPU, Member, Run
from experiments.hybrids.learning.training import quiet, train
from experiments.hybrids.regression.tasks import Task

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (1_000_001, 1_000_002)
"""Seeds of the sweep; no report uses them."""


@dataclass(frozen=True, eq=False)
class Picked:
    """The rate, and what every one gave.

    Attributes:
        ends: a row for every rate and seed: its held-out `error` and `share` at the end (infinite
            for a diverged one).
    """

    rate: float
    at_edge: bool
    ends: pd.DataFrame


def pick_rate(
    config: HybridConfig,
    task: Task,
    regime: Regime,
    folder: Path,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    device: torch.device = CPU,
    progress: Callable[[int, int], None] = quiet,
) -> Picked:
    """Train `seeds` at `rates` under `regime`, a short one, and pick."""
    members = tuple(Member(seed, rate) for rate in sorted(set(rates)) for seed in seeds)
    quick = dataclasses.replace(regime, keep=False, stop_at=0.0)
    ran = train(Run(config, task, quick, members, folder, device, "selection"), progress)
    return picked(ran.curve, ran.ended)


def picked(curve: pd.DataFrame, ended: pd.DataFrame) -> Picked:
    """The pick from a curve whose members have several rates."""
    last = curve.loc[curve.groupby(["rate", "seed"])["step"].idxmax()]
    ends = last[["rate", "seed", "error", "share"]].merge(ended[["rate", "seed", "why"]])
    ends.loc[ends["why"] == "diverged", ["error", "share"]] = math.inf
    ends = ends.sort_values(["rate", "seed"], ignore_index=True).drop(columns="why")
    logs = ends["share"].map(lambda share: math.log(share) if share > 0 else -math.inf)
    means = logs.groupby(ends["rate"]).mean()  # ascending: of equals, idxmin takes the lowest
    rate = float(means.idxmin())  # pyright: ignore[reportArgumentType]
    at_edge = len(means) > 1 and rate in (means.index.min(), means.index.max())
    return Picked(rate, at_edge, ends)
