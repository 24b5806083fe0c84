"""Which heads and FFNs does in-context learning need? (after Bansal et al. 2023, arXiv 2212.09095)

Every component's importance for every task and shot count, on examples to choose by; rankings from
that, from exact removal, from other tasks, from weights, from chance; then what is left of the
accuracy as components go, on examples that had no say in any ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from experiments.config import INPUT, NOT_HASHED, ModelOptions

if TYPE_CHECKING:
    from experiments.run_folder import Outcome, RunFolder
    from probes.tasks import Split

Unit = Literal["heads", "groups", "ffns", "mixers"]
RankingName = Literal[
    "importance",
    "aggregate",
    "aggregate-rank",
    "aggregate-z",
    "others",
    "partners",
    "exact",
    "re-scored",
    "greedy",
    "weights",
    "activations",
    "prefix-matching",
    "copying",
    "random",
]
TENTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EXACT_LIMIT = 256
"""Components up to which each is removed alone without being asked for."""


@dataclass(frozen=True)
class Pruning(ModelOptions):
    """Prune heads and FFNs, least important first, and chart what in-context learning loses.

    $ ablate prune --model stdlib-opt --tasks pair_mapping --shots 0 5
    """

    preset: Literal["default", "full", "paper"] = field(default="default", metadata=NOT_HASHED)
    """full: every ranking and the grid; paper: as Bansal et al.; other options replace its own."""
    tasks: tuple[str, ...] = ()
    """Built-in or lm-eval tasks, bansal14, folders of lm-eval YAML files; all built-in if empty."""
    unseen: tuple[str, ...] = ()
    """Tasks that are reported as well, but whose importance enters no aggregate."""
    data: Path | None = field(default=None, metadata=INPUT)
    """Folder with <task>/<split>.jsonl for tasks whose data is on the hub; nothing is fetched."""
    shots: tuple[int, ...] = (0, 5)
    """Numbers of demonstrations in the prompt."""
    seeds: int = 3
    """Repetitions from --seed on, with other demonstrations, selection texts and random orders."""
    units: tuple[Unit, ...] = ()
    """What is pruned, each by itself; groups share keys and values; if empty, all but groups."""
    rankings: tuple[RankingName, ...] = ("importance", "aggregate", "weights", "random")
    """Orders; partners: of the tasks that agree most and least; others: mean of the other tasks."""
    ranking_files: tuple[str, ...] = field(default=(), metadata=INPUT)
    """Scores from files (.csv, .parquet, or the paper's .pkl), each one more ranking."""
    fractions: tuple[float, ...] = TENTHS
    """Shares of a unit's components removed."""
    quota: Literal["global", "layer"] = "global"
    """Remove a share of all components, or the same share of each layer's."""
    grid: bool = False
    """Remove heads and FFNs together, at every pair of shares."""
    convention: Literal["gate", "token", "reference"] = "gate"
    """|Σ_t ∂L/∂ξ_t| (gate), Σ_t |∂L/∂ξ_t| (token), or as the paper's code (reference)."""
    integrated: int = 0
    """Gradients along the way from whole to removed, for each layer; 0: one, at the whole model."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    exact: Literal["auto", "yes", "no"] = "auto"
    """Remove every component alone, on the examples to choose by; auto: where there are ≤ 256."""
    fill: Literal["zero", "mean", "resample"] = "zero"
    """What stands in for a removed component's output."""
    tolerance: float = 0.02
    """Fall of the average accuracy that the headline allows."""
    limit: int | None = 40
    """Choose by this many examples of each task."""
    report_limit: int | None = 100
    """Report on this many others."""
    fewer: bool = False
    """Take all there are of a task that has fewer examples than asked for."""
    overlong: Literal["refuse", "cut"] = "refuse"
    """Prompts longer than the context: refuse, or cut their beginning."""
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    """Whether a BOS opens every prompt."""
    leading_space: bool = True
    """Score choices with the blank before them."""
    export: Path | None = None
    """Folder for a smaller checkpoint without what can go, chosen on the examples to choose by."""
    export_mask: str = ""
    """Components to leave out of it instead, as in L0H1,L3F."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "full": {
            "shots": (0, 1, 5),
            "rankings": get_args(RankingName),
            "grid": True,
            "limit": 60,
            "report_limit": 200,
        },
        "paper": {
            "tasks": ("bansal14",),
            "unseen": ("mathqa", "lambada_openai"),
            "shots": (0, 1, 5),
            "rankings": ("importance", "aggregate", "partners", "exact", "random"),
            "grid": True,
            "convention": "token",
            "overlong": "cut",
            "limit": 2500,
            "report_limit": None,
            "fewer": True,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for fraction in self.fractions:
            if not 0 <= fraction <= 1:
                raise ValueError(f"--fractions {fraction:g} asked for: give shares in [0, 1]")
        if not any(self.fractions):
            raise ValueError("no share to remove asked for: give --fractions above 0")
        if not self.shots or min(self.shots) < 0:
            raise ValueError(f"--shots {self.shots} asked for: give numbers from 0 up")
        for option in ("shots", "units", "rankings"):
            values = getattr(self, option)
            if len(set(values)) < len(values):
                said = " ".join(map(str, values))
                raise ValueError(f"--{option} {said} asked for: name each once")
        if not self.rankings and not self.ranking_files:
            raise ValueError("no ranking asked for: give --rankings or --ranking-files")
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds} asked for: give at least 1 (3 for intervals)")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"--limit {self.limit} asked for: give at least 2 examples a task")
        if self.report_limit is not None and self.report_limit < 2:
            raise ValueError(
                f"--report-limit {self.report_limit} asked for: give at least 2 examples a task"
            )
        if self.integrated < 0:
            raise ValueError(f"--integrated {self.integrated} asked for: give 0 steps or more")
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"--tolerance {self.tolerance:g} asked for: give one in [0, 1]")
        if self.integrated and self.convention == "reference":
            raise ValueError(
                "--integrated with --convention reference: the paper's code takes the gradient at "
                "the whole model; leave one of them out"
            )
        if self.exact == "no" and "exact" in self.rankings:
            raise ValueError(
                "--exact no with the ranking exact: it orders by removing every component alone; "
                "leave one of them out"
            )
        if self.fill == "resample" and {"re-scored", "greedy"} & set(self.rankings):
            raise ValueError(
                "--fill resample with the rankings re-scored or greedy: they look again at every "
                "step, where a draw of donors is no one loss; leave them out of --rankings"
            )
        if self.export is not None and self.fill != "zero":
            raise ValueError(
                f"--export with --fill {self.fill}: a smaller checkpoint writes nothing where a "
                "component was, which is --fill zero"
            )
        if self.export_mask and self.export is None:
            raise ValueError("--export-mask without --export: name the folder to write to")

    def limit_of(self, split: Split) -> int | None:
        """Examples of each task on one side."""
        return self.report_limit if split == "test" else self.limit

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """--seed and those after it."""
        return tuple(range(self.seed, self.seed + self.seeds))

    def run(self, folder: RunFolder) -> Outcome:
        """Choose on selection examples, measure on reporting examples, put it together."""
        from tqdm import tqdm

        from experiments.prune.conditions import conditions_of, units_of
        from experiments.prune.figures import figures
        from experiments.prune.findings import findings_of
        from experiments.prune.grading import fills_of
        from experiments.prune.measured import Measured
        from experiments.prune.orders import file_scores, orders_of, require_orders
        from experiments.prune.page import report
        from experiments.prune.reporting import reported, steps
        from experiments.prune.selection import selected
        from experiments.prune.smaller import mask_to_export, require_exportable, written
        from probes.induction import summary

        model = self.load_model()
        units = units_of(self, model)
        files = file_scores(self, model, units)
        require_exportable(self, folder, model, units)
        conditions = conditions_of(self, model)
        require_orders(self, model, units, conditions)
        folder.create()
        fills = fills_of(self, model, conditions)
        with tqdm(total=steps(self, units, conditions), unit="batch", desc="prune") as bar:
            chosen = selected(self, folder, model, units, conditions, fills, bar)
            orders = orders_of(self, folder, model, units, conditions, chosen, files, fills, bar)
            gone = mask_to_export(self, folder, model, units, conditions, chosen, fills, bar)
            answers = reported(
                self, folder, model, units, conditions, chosen.effects, orders, gone, fills, bar
            )
        measured = Measured(
            units=units,
            importance=chosen.importance,
            groups=chosen.groups,
            effects=chosen.effects,
            rankings=orders.frame,
            partners=orders.partners,
            answers=answers,
            induction=None if orders.induction is None else summary(orders.induction),
            chances={c.key.task: c.chance for c in conditions},
            truncated=sum(c.truncated for c in conditions),
            exported=written(self, folder, model, gone, conditions),
        )
        findings = findings_of(self, measured)
        answers.to_parquet(folder.path / "examples.parquet", index=False)
        orders.frame.to_parquet(folder.path / "rankings.parquet", index=False)
        return folder.finish(
            findings.outcome, findings.metrics, figures=figures(findings), report=report(findings)
        )
