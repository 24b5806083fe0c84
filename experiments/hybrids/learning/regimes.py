"""How is a hybrid trained: how long, by which optimiser, at which rate, on prompts of what size?

The paper trains everything with Adam at one constant rate, without warm-up, clipping or decay, and
leaves open whether the models that failed did so by their architecture or by this regime (Campbell
et al. 2024, arXiv 2411.03945, its limitations). `Regime` holds every choice, `PAPER` the paper's.

Where it misleads. A rate that suits one architecture starves another: compare architectures at the
rate that a sweep picked for each (`rates`), not at one rate for all. Thresholds are shares of the
error of predicting zero, on the same prompts: 0.1 is hard on one task and easy on another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.config import NOT_HASHED

Optimiser = Literal["adam", "adamw", "sgd"]
Shape = Literal["constant", "cosine", "cyclical"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Regime:
    """One way to train."""

    steps: int = 10_000
    """Updates; each reads fresh prompts."""
    batch: int = 64
    """Prompts a step, for every seed."""
    optimiser: Optimiser = "adamw"
    """adam adds the weight decay to the gradient, adamw to the step; sgd has momentum."""
    rate: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of adam's two averages."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """On matrices only; biases, gains and the decay rates of an SSM have none."""
    warmup: int = 0
    """Steps in which the rate rises to its peak."""
    schedule: Shape = "constant"
    """How the rate goes on: constant, down one cosine, or down several, one after another."""
    final_share: float = 0.0
    """What share of the peak a cosine ends at."""
    cycles: int = 4
    """Cosines of the cyclical schedule."""
    clip: float = 0.0
    """Largest norm of one seed's gradient; 0: as it comes."""
    dropout: float | None = None
    """In the model, while it learns; nothing: as its configuration says."""
    precision: Precision = "float32"
    """Of matrix products in training; weights, the optimiser and evaluations are float32."""
    compile: bool = False
    """Compile the model's step with torch.compile: worth it on a GPU, or for a long run."""
    curriculum: float = 0.0
    """Share of the steps in which prompts grow to full size, in dimensions and points; 0: never
    small. The paper's is 0.06."""
    held_out: int = 256
    """Prompts that every evaluation reads; no training stream ever draws them."""
    per_decade: float = 8.0
    """Evaluations a decade of steps."""
    first_evaluation: int = 20
    """Step of the first evaluation after the one at step 0."""
    thresholds: tuple[float, ...] = (0.5, 0.3)
    """Shares of the zero estimator's error whose first crossing is recorded for every seed; the
    best predictor of a small task is at 0 to 0.27."""
    stop_at: float = 0.0
    """A seed whose error falls below this share stops; 0: none does."""
    keep: bool = True
    """Keep a model folder for every seed at every evaluation, to see what scheme it followed."""
    save_every: float = field(default=60.0, metadata=NOT_HASHED)
    """Seconds between checkpoints of the whole run."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "cycles", "held_out", "first_evaluation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give a whole number from 1 on")
        for name in ("rate", "per_decade"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name):g}: give a number above 0")
        for name in ("weight_decay", "warmup", "clip", "stop_at", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name):g} is below 0: give 0 or more")
        for name in ("momentum", "final_share", "curriculum", "dropout"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name} {share:g}: give a share from 0 to below 1")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: give shares from 0 to below 1")
        if self.warmup > self.steps:
            raise ValueError(
                f"a warm-up of {self.warmup} steps does not end in {self.steps}: give fewer"
            )
        shares = self.thresholds
        if any(not 0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
            raise ValueError(
                f"thresholds {shares}: give shares of the zero estimator's error, above 0 and below"
                " 1, each once"
            )

    def over(self, steps: int) -> Regime:
        """The same over another number of steps: its curriculum scales, its warm-up as well."""
        return replace(self, steps=steps, warmup=round(self.warmup * steps / self.steps))


PAPER = Regime(
    steps=500_001, optimiser="adam", rate=1e-4, curriculum=30_000 / 500_001, per_decade=8.0
)
"""As the paper trains on linear, sparse linear, two-layer MLP and tree prompts."""
PAPER_RATES = {"parity": (4e-4, 200_001), "mqar": (2e-4, 500_001)}
"""Start of a task's name -> rate and steps of the paper, where others; without a curriculum."""


def paper_regime(task: str, steps: int | None = None) -> Regime:
    """The paper's regime for a task by its name, scaled to `steps`."""
    found = PAPER
    for part, (rate, length) in PAPER_RATES.items():
        if part in task:
            found = replace(PAPER, rate=rate, steps=length, curriculum=0.0)
    return found if steps is None else found.over(steps)
