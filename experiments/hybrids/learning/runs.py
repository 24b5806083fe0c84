"""What is trained, for how long, from which seeds, and what does a run leave on disk?

A run is one architecture, one task, one regime and its members: seeds, each with a rate. All that
its results depend on is its `identity`; a folder that holds another one is refused. It leaves

    run.safetensors                 while it runs: everything the next step depends on
    checkpoints/s<seed>/<step>/     the models of every evaluation, if the regime keeps them
    model-s<seed>/                  the last ones
    curve.parquet, errors.parquet, trained.json     last, so that they say it is finished
"""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from experiments.hybrids.architecture.model import Hybrid, HybridConfig
from experiments.hybrids.learning.curriculum import Curriculum
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.learning.streams import held_out
from experiments.hybrids.regression.tasks import Prompts, Task
from experiments.training import Schedule, log_spaced

CPU = torch.device("cpu")
SAVED = ("transformers_version", "architectures", "dtype")
"""What a configuration gets from being saved."""


@dataclass(frozen=True)
class Member:
    """One of the runs that are trained together."""

    seed: int
    rate: float


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run left.

    Attributes:
        curve: a row for every seed (and rate) and evaluation: step, prompts read, seconds, the mean
            training `loss` since the last one, the held-out `error`, and `share`, that error over
            the zero estimator's.
        errors: the held-out error by number of `examples` before the point, likewise.
        arrivals: steps to each threshold, censored ones kept (`arrivals.arrivals`).
        ended: a row for every seed and rate: its last step, and `why`: steps, arrived or diverged.
    """

    folder: Path
    curve: pd.DataFrame
    errors: pd.DataFrame
    arrivals: pd.DataFrame
    ended: pd.DataFrame

    def model(self, seed: int) -> Path:
        """The Hugging Face folder of one seed's last weights."""
        return model_folder(self.folder, seed)

    def checkpoint(self, seed: int, step: int) -> Path:
        """That of its weights at an evaluation, if the regime keeps them."""
        return checkpoint_folder(self.folder, seed, step)


@dataclass(frozen=True, eq=False)
class Run:
    """What is trained: everything but where it stands.

    Attributes:
        purpose: of the held-out prompts; a selection of rates does not see those of the report.
    """

    config: HybridConfig
    task: Task
    regime: Regime
    members: tuple[Member, ...]
    folder: Path
    device: torch.device = CPU
    purpose: Literal["report", "selection"] = "report"

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("no seeds to train: give at least one")
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"seeds {[m.seed for m in self.members]}: give each one once")
        if self.config.vocab_size:
            raise ValueError(
                f"a model with a vocabulary of {self.config.vocab_size} reads tokens, not prompts:"
                " give a configuration with vocab_size 0"
            )
        asked, built = (self.task.d, self.task.y_dim), (self.config.x_dim, self.config.y_dim)
        if asked != built:
            raise ValueError(
                f"task {self.task.name} has x and y of {asked} coordinates, the model of {built}:"
                f" give a configuration with x_dim {asked[0]} and y_dim {asked[1]}"
            )
        if self.regime.curriculum and self.task.scored == "last":
            raise ValueError(
                f"task {self.task.name} is scored at its last point, which a curriculum cuts off:"
                " give curriculum 0"
            )

    @property
    def keeps_models(self) -> bool:
        """Whether every seed is there once, so that its model has a name."""
        return len({member.seed for member in self.members}) == len(self.members)

    @cached_property
    def built(self) -> HybridConfig:
        """The configuration with the regime's dropout."""
        config = copy.deepcopy(self.config)
        if self.regime.dropout is not None:
            config.dropout = self.regime.dropout
        return config

    @cached_property
    def prompts(self) -> Prompts:
        """The held-out ones."""
        return held_out(self.task, self.regime.held_out, self.device, self.purpose)

    @cached_property
    def zero(self) -> float:
        """The zero estimator's error on them, where the task is scored."""
        errors = self.prompts.ys.square().mean(-1)
        return float(errors[:, self.scored].mean())

    @property
    def scored(self) -> slice:
        """The points that count."""
        return slice(-1, None) if self.task.scored == "last" else slice(None)

    @cached_property
    def schedule(self) -> Schedule:
        """Shares of the peak rate by step."""
        regime = self.regime
        return Schedule(
            1.0, regime.steps, regime.warmup, regime.final_share, regime.schedule, regime.cycles
        )

    @cached_property
    def curriculum(self) -> Curriculum:
        """Sizes of prompts by step."""
        until = round(self.regime.curriculum * self.regime.steps)
        return Curriculum(self.task.d, self.task.points, until, max(1, self.task.k))

    @cached_property
    def evaluations(self) -> frozenset[int]:
        """Steps after which all are evaluated; 0 and the last are among them."""
        regime = self.regime
        return frozenset(log_spaced(regime.steps, regime.per_decade, regime.first_evaluation))

    @cached_property
    def template(self) -> Hybrid:
        """A model to put one seed's weights into."""
        return initial_model(self.built, self.members[0].seed)

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of training forwards."""
        if self.regime.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def identity(self) -> dict[str, Any]:
        """All that its results depend on, as JSON has it."""
        config = {k: v for k, v in self.built.to_dict().items() if k not in SAVED}
        regime = dataclasses.asdict(self.regime)
        del regime["save_every"]
        said = {
            "config": config,
            "task": dataclasses.asdict(self.task),
            "regime": regime,
            "members": [[member.seed, member.rate] for member in self.members],
            "purpose": self.purpose,
        }
        return json.loads(json.dumps(said, default=str))


def initial_model(config: HybridConfig, seed: int) -> Hybrid:
    """The model that training of `seed` begins with, on the CPU: the same for every device."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return Hybrid(copy.deepcopy(config))  # it writes to its own


def model_folder(folder: Path, seed: int) -> Path:
    """Where a seed's last model is."""
    return folder / f"model-s{seed}"


def checkpoint_folder(folder: Path, seed: int, step: int) -> Path:
    """Where its model at an evaluation is."""
    return folder / "checkpoints" / f"s{seed}" / f"{step:07d}"
