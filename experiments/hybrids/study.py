"""Do hybrids of GPT-2, Llama and Mamba learn in context, and with which of their parts?

Every architecture is trained on prompts that show a function by examples, several seeds as one
batched model; measured by the error after each number of examples, beside baselines on the same
prompts; and looked into: which heads, FFNs and mixers its score needs, where it looks, whether the
function's weights can be read off its stream. After Campbell, Lojo et al. 2024 (arXiv 2411.03945).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from experiments.config import LATER, NOT_HASHED, RunOptions
from experiments.hybrids.architecture.grammar import THE_TWELVE, Block, blocks_of, tokens_mix
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.regression.shift_table import parse_shift
from experiments.hybrids.regression.task_table import Task, named, small
from experiments.hybrids.unused import refuse_unused

if TYPE_CHECKING:
    from experiments.run_folder import Outcome, RunFolder

FACTORS = ("gpt2", "gpt2-rms", "gpt2-swiglu", "gpt2-rms-swiglu")
"""Norm and FFN crossed, with learned positions: three of them failed in the paper."""
THE_SIX = ("linear", "sparse", "mlp", "tree", "parity", "mqar")
"""The paper's function classes."""


@dataclass(frozen=True)
class Hybrids(Regime, RunOptions):
    """Train hybrids on functions shown by examples, measure what they learn, and look inside.

    $ ablate hybrid --architectures gpt2 mambaformer "rope-attention-mamba_ffn-rms*4" --functions
    linear sparse
    """

    steps: int = 1_500
    """Updates; each reads fresh prompts."""
    rate: float = 1e-3
    """Peak learning rate."""
    curriculum: float = 0.5
    """Share of the steps in which prompts grow to full size, in dimensions and points; 0: never
    small. The paper's is 0.06. Tasks that are scored at their last point have none."""
    preset: Literal["default", "table", "factorial"] = "default"
    """table: the paper's twelve architectures by six function classes; factorial: norm, FFN and the
    variance of initial positions crossed, on sparse linear functions and trees."""
    search: bool = False
    """Look for better orders of blocks instead, by successive halving on the score."""
    architectures: tuple[str, ...] = ("gpt2", "llama", "mambaformer")
    """Presets, or blocks in words ("mamba-rms,attention-mamba_ffn-rms*4")."""
    functions: tuple[str, ...] = ("linear",)
    """Function classes of the prompts."""
    size: Literal["small", "paper"] = "small"
    """Of the prompts: for two cores (linear: 5 dimensions, 12 points), or as in the paper."""
    layers: int = 4
    """Layers of a preset; blocks in words say their own number."""
    d_model: int = 64
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads a block."""
    d_ff: int = 0
    """Width of an FFN; 0: four times the stream's."""
    match: str = ""
    """Architecture whose number of parameters the others take, by their FFN's or Mamba's width."""
    init: Literal["unified", "reference"] = "unified"
    """Initial weights: one law for all, or each preset as the paper's code leaves it."""
    position_std: tuple[float, ...] = ()
    """Standard deviations of initial learned positions, each a model of its own; none: as the law
    says."""
    double_residual: bool | None = None
    """Whether Mamba blocks add their input twice, as in the paper's code; none: as the law says."""
    seeds: int = 2
    """Initial weights and streams of prompts, from --seed on."""
    rates: tuple[float, ...] = ()
    """Learning rates of which every architecture takes its best, on seeds and prompts that nothing
    is reported on; none: --rate for all."""
    sweep_share: float = 0.1
    """Of --steps, for each rate that is tried."""
    prompts: int = 1024
    """Held-out prompts that scores are measured on."""
    shifts: tuple[str, ...] = ("noisy", "skewed", "scaled-x")
    """Out-of-distribution prompts; a function class leaves out those it cannot have."""
    inside: bool = True
    """Ablate every head, FFN and mixer, score attention, fit linear probes."""
    generations: int = field(default=3, metadata=LATER)
    """Of --search: halvings, each trains its half twice as long."""
    candidates: int = field(default=12, metadata=LATER)
    """Of --search: orders of blocks in the first generation."""
    most_parameters: int = field(default=2_000_000, metadata=LATER)
    """Of --search: orders with more are not tried."""
    compute: float = field(default=math.inf, metadata=LATER)
    """Of --search: FLOPs of training; fewer candidates are tried where it does not reach."""
    device: str = "auto"
    """Torch device; auto takes CUDA when there is one."""
    jobs: int = field(default=0, metadata=NOT_HASHED)
    """Processes on this machine, each with its share of the threads; 0: one a core on a CPU, as
    small models gain little from more threads."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "table": {
            "architectures": THE_TWELVE,
            "functions": THE_SIX,
            "seeds": 3,
            "steps": 10_000,
            "rates": (3e-4, 1e-3, 3e-3),
            "d_model": 128,
            "inside": False,
        },
        "factorial": {
            "architectures": FACTORS,
            "functions": ("sparse", "tree"),
            "position_std": (0.02, 1.0),
            "seeds": 5,
            "layers": 3,
            "steps": 5_000,
            "inside": False,
            "shifts": (),
            "thresholds": (0.7, 0.5, 0.3),
        },
    }

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            numbers = value if isinstance(value, tuple) else (value,)
            odd = [v for v in numbers if isinstance(v, float) and not math.isfinite(v)]
            if odd and (each.name != "compute" or math.isnan(odd[0])):
                name = each.name.replace("_", "-")
                raise ValueError(f"--{name} {odd[0]} asked for: give a finite number")
        Regime.__post_init__(self)
        for name in ("seeds", "layers", "d_model", "heads", "generations", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} asked for: give at least 1"
                )
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            raise ValueError(f"--device {self.device}: give auto, cpu, cuda, cuda:1, mps or xpu")
        if self.d_ff < 0:
            raise ValueError(f"--d-ff {self.d_ff} asked for: give a width, or 0")
        if self.per_decade > 100:
            raise ValueError(f"--per-decade {self.per_decade:g} asked for: give at most 100")
        if not self.thresholds:
            raise ValueError("--thresholds without a value: give at least one")
        if self.candidates < 2:
            raise ValueError(f"--candidates {self.candidates} asked for: give at least 2")
        if self.most_parameters < 1 or self.compute <= 0:
            raise ValueError(
                f"--most-parameters {self.most_parameters}, --compute {self.compute:g}: give"
                " budgets above 0"
            )
        if self.jobs < 0:
            raise ValueError(f"--jobs {self.jobs} asked for: give 0 or more")
        if self.prompts < 2:
            raise ValueError(f"--prompts {self.prompts} asked for: an interval needs at least 2")
        if not 0 < self.sweep_share <= 1:
            raise ValueError(
                f"--sweep-share {self.sweep_share:g} asked for: give a share in (0, 1]"
            )
        for name in ("architectures", "functions"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(values)}: give at least one, each once")
        for text in (*self.architectures, *([self.match] if self.match else [])):
            if not tokens_mix(self.blocks(text)):
                raise ValueError(
                    f"--architectures {text}: without attention and Mamba nothing sees an example;"
                    " give one of them to a block"
                )
        if self.search and self.architectures != type(self).architectures:
            raise ValueError(
                f"--architectures {' '.join(self.architectures)} and --search: a search draws its"
                " own orders of blocks; leave one of the two out"
            )
        for name in self.functions:
            named(name)
        for shift in self.shifts:
            parse_shift(shift)
        if any(rate <= 0 for rate in self.rates) or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"--rates {self.rates}: give learning rates above 0, each once")
        if any(not 0 <= std < math.inf for std in self.position_std):
            raise ValueError(f"--position-std {self.position_std}: give standard deviations")
        if self.seed + self.seeds > 1_000_000:
            raise ValueError(f"--seed {self.seed} asked for: seeds from 1000000 on choose rates")

    @property
    def regime(self) -> Regime:
        """How every model is trained."""
        return Regime(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Regime)})

    def task(self, name: str) -> Task:
        """A function class at the study's size."""
        return small(name) if self.size == "small" else named(name)

    def blocks(self, architecture: str) -> tuple[Block, ...]:
        """Of a preset, or of blocks in words."""
        return blocks_of(architecture, self.layers)

    def run(self, folder: RunFolder) -> Outcome:
        """Train every cell, measure it, look inside, put it together."""
        refuse_unused(self)
        if self.search:
            from experiments.hybrids.searching.search import searched

            return searched(self, folder)
        from experiments.hybrids.cells import cells_of
        from experiments.hybrids.findings import finished
        from experiments.hybrids.measured import measured

        cells = cells_of(self)  # refuses what cannot be built, before anything is written
        folder.create()
        return finished(self, folder, measured(self, cells, folder))
