"""How much of its training data does a model need again when one of its layers is reset?

A block gets fresh weights, everything else is frozen, the block is trained: on the base's own loss,
or towards the old block's outputs. Held-out loss against tokens is the answer, with what it has to
be held against: training a block that was not reset, training a whole model from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from experiments.config import INPUT, LATER, NOT_HASHED, RunOptions
from experiments.reset.names import Start, Target

if TYPE_CHECKING:
    from experiments.run_folder import Outcome, RunFolder

Arm = Literal[
    "A0", "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A12", "A13"
]
Part = Literal["block", "attention", "ffn", "norms", "qk", "vo", "cross", "mixer"]
PICK_SHARE = 0.2
"""Of the budget, for every learning rate that is tried."""


@dataclass(frozen=True)
class Resetting(RunOptions):
    """Reset a layer, retrain it with the rest frozen, and count the data until the loss is back.

    $ ablate reset --model ./my-checkpoint --corpus ./my-text --layers 0 5 11 --budget 2000000
    """

    preset: Literal["default", "paper", "cross-attention"] = "default"
    """paper: the grid of bases, all arms and axes; cross-attention: what wiping it does."""
    model: str = field(default="stdlib-opt", metadata=INPUT)
    """Bundled name, local folder or Hugging Face id."""
    also: tuple[str, ...] = field(default=(), metadata=INPUT)
    """More bases, studied together with it."""
    encoders: tuple[str, ...] = field(default=(), metadata=INPUT)
    """Models that lend their encoders to A13, beside the other bases."""
    corpus: str = field(default="", metadata=INPUT)
    """Where the base's text is now, or the text for a base without a record ('stdlib' or a folder);
    empty: as its record says."""
    base_tokens: int | None = None
    """T0 of a base without a record; without it amounts are in tokens."""
    shares: tuple[float, ...] = (1.0,)
    """Of a base's training: checkpoints that `ablate pretrain` kept."""
    stacks: tuple[Literal["encoder", "decoder"], ...] = ()
    """Of an encoder-decoder; both if none is named."""
    layers: tuple[int, ...] = ()
    """Blocks to reset; all if none is named."""
    arms: tuple[Arm, ...] = ("A0", "A1", "A7")
    """Of the protocol: A0 reset and train; A1 train without a reset; A2 train all without one; A3
    reset, train all; A4 reset, train the norms; A5 reset, train the neighbours; A6 reset, train
    nothing; A7 all from scratch; A8 all random, train one; A9 parts; A10 laws; A11 targets; A12
    several layers; A13 cross-attention."""
    targets: tuple[Target, ...] = ("lm", "hidden")
    """What A0 trains towards: the base's loss, the old block's output, the old logits, or the first
    two together."""
    parts: tuple[Part, ...] = ("attention", "ffn", "norms", "qk", "vo")
    """Reset and trained alone by A9."""
    laws: tuple[Start, ...] = (
        "torch",
        "identity",
        "copy-below",
        "copy-mean",
        "moments",
        "permuted",
    )
    """By which A10 resets, beside init (linear: the block begins as the best linear map of what it
    did, its fit counted in tokens); what a base has no way to do is left out and named."""
    rates: tuple[float, ...] = (2e-3,)
    """Peak learning rates, twice that for local regression; of several, each arm, target and layer
    takes its best on rows that no result is measured on."""
    rate_all: float = 5e-4
    """Of arms that train a trained model whole (A2, A3)."""
    seeds: int = 3
    """Resets, each with its own order of the data, from --seed on; what is not about the reset (A1,
    A2, A7) is trained with the first alone."""
    budget: float = 700_000
    """Tokens to train on; below 1, a share of T0."""
    step: int = 1024
    """Tokens a step, about: the base's batches are cut into so many whole rows."""
    origin: Literal["auto", "same", "reshuffled", "held-out", "other"] = "auto"
    """Of the data: the base's rows in its order, in another, rows it never read, another corpus.
    auto: reshuffled, or whatever the base has."""
    other: str = field(default="", metadata=INPUT)
    """The other corpus: 'stdlib' or a folder."""
    unique: tuple[float, ...] = (0,)
    """Tokens after which the data begins again (below 1, a share of T0); 0 never."""
    evaluate: int = 16_384
    """Held-out tokens of an evaluation, or all there are."""
    per_decade: float = 8
    """Evaluations a decade of tokens, from a fiftieth of the budget on."""
    anneal: float = 0.1
    """Share of the budget trained on behind it, while the rate falls to 0."""
    dropout: bool = field(default=True, metadata=LATER)
    """Let the base's dropout draw in what is trained; what is frozen never drops."""
    predictors: bool = False
    """Measure what may foretell how long a layer takes."""
    bases: int = 3
    """Seeds of each base of the grid, in the presets that train bases."""
    largest: float = field(default=math.inf, metadata=LATER)
    """FLOPs of training (72·N·D²·T0) above which --preset paper leaves a base out."""
    row: int | None = None
    """Tokens of a row, in training and in evaluation; the length the base read most."""
    context: int | None = None
    """Row length, for a base without a record."""
    dtype: Literal["float32", "bfloat16", "float16", "checkpoint"] = "float32"
    """Of the frozen weights; checkpoint keeps what the file has. What is trained is float32."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 where the device has it."""
    device_map: str | None = None
    """Accelerate's: auto, cuda:0, ...; without it, the CPU."""
    cache: float = field(default=4.0, metadata=NOT_HASHED)
    """GiB of disk for the frozen model's streams, where data is read again; 0: compute them."""
    jobs: int = field(default=1, metadata=NOT_HASHED)
    """Processes on this machine; each takes its share of the threads."""
    save_every: float = field(default=60.0, metadata=NOT_HASHED)
    """Seconds between checkpoints."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cross-attention": {
            "model": "",  # its bases are trained first
            "stacks": ("decoder",),
            "arms": ("A7", "A13"),
            "budget": 0.15,
            "bases": 2,
            "jobs": 2,
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "step", "evaluate", "jobs", "bases"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} asked for: give at least 1")
        for name in ("arms", "targets", "rates", "shares", "unique"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"--{name} without a value: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))}: give each once")
        for name in ("layers", "laws", "parts", "stacks", "also"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))}: give each once")
        for name in ("rates", "rate_all"):
            values = getattr(self, name)
            if not all(0 < v < math.inf for v in (values if name == "rates" else (values,))):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {values}: give learning rates above 0")
        if not 0 < self.budget < math.inf:
            raise ValueError(f"--budget {self.budget:g} asked for: give tokens, or a share below 1")
        if not 0 <= self.save_every < math.inf:
            raise ValueError(f"--save-every {self.save_every:g} asked for: give seconds")
        if math.isnan(self.largest) or self.largest <= 0:
            raise ValueError(f"--largest {self.largest:g} asked for: give FLOPs above 0")
        if (
            any(map(math.isnan, self.unique))
            or min(self.unique) < 0
            or not math.isfinite(max(self.unique))
        ):
            raise ValueError(f"--unique {self.unique} asked for: give tokens, 0 for all")
        if min(self.shares) <= 0 or max(self.shares) > 1:
            raise ValueError(f"--shares {self.shares}: give shares of the training in (0, 1]")
        if not 0 <= self.cache < math.inf:
            raise ValueError(f"--cache {self.cache:g} asked for: give GiB, 0 for none")
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"--anneal {self.anneal:g} asked for: give a share in [0, 1]")
        if not 1 <= self.per_decade <= 100:
            raise ValueError(f"--per-decade {self.per_decade:g} asked for: give 1 to 100")
        if self.layers and min(self.layers) < 0:
            raise ValueError(f"--layers {min(self.layers)} asked for: layers count from 0")
        if self.seed + self.seeds >= 2**31:
            raise ValueError(f"--seed {self.seed} asked for: give less than {2**31 - self.seeds}")
        if (self.origin == "other") != bool(self.other):
            raise ValueError("--origin other and --other CORPUS go together: give both or neither")

    @property
    def models(self) -> tuple[str, ...]:
        """All bases."""
        return tuple(dict.fromkeys((self.model, *self.also)))

    def run(self, folder: RunFolder) -> Outcome:
        """Plan all jobs, pick learning rates, retrain, find the crossings, put it together."""
        from experiments.reset.learning.parallel import joined

        processes = joined(cpu=self.device_map is None).count
        if processes > 1 and (self.jobs > 1 or self.preset != "default"):
            raise ValueError(
                f"--preset {self.preset} --jobs {self.jobs} in {processes} processes of a launcher,"
                " which do every job together: start one process for presets and --jobs"
            )
        if self.preset == "paper":
            from experiments.reset.paper import paper

            return paper(self, folder)
        from experiments.reset import on_prompts
        from experiments.reset.findings import findings_of
        from experiments.reset.opened import opened
        from experiments.reset.plan import planned
        from experiments.reset.report.figures import figures
        from experiments.reset.report.page import report
        from experiments.reset.work import foretold, ledger_of, picked

        if self.preset == "cross-attention" and not self.model:
            from experiments.reset.learning.aside import with_bases

            self = with_bases(self)
        bases = opened(self)
        prompted = on_prompts.reads_prompts(self, bases)
        plan = planned(self, bases)  # refuses what no base can do, before anything is written
        folder.create()
        rates, tried = picked(self, bases, plan, folder)
        ledger = ledger_of(self, bases, plan.at_rates(rates, bases), folder)
        findings = findings_of(self, bases, plan, ledger, tried, foretold(self, bases, folder))
        if folder.leads:
            findings.write(folder.path)
        if prompted:
            return on_prompts.finish(findings, folder)
        return folder.finish(
            findings.outcome,
            findings.metrics,
            figures=figures(findings.result, paper=self.preset != "default"),
            report=report(findings.result),
        )
