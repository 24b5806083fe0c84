"""Which heads are induction heads, and what is lost without them?

Scores of every head on random tokens that repeat, beside nulls that do not know the repetition; a
criterion with thresholds and a false-discovery correction; the loss on repeated tokens and on text
with those heads masked, beside as many random ones, on rows that had no say in the choice; and,
given a pruning run, what induction scores have to do with importance for tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from experiments.config import INPUT, NOT_HASHED, ModelOptions

if TYPE_CHECKING:
    from experiments.run_folder import Outcome, RunFolder

PAPER_LENGTHS = tuple(range(25, 224, 2))
"""25 + 2·seed for the seeds 0 … 99 of Bansal et al."""


@dataclass(frozen=True)
class Induction(ModelOptions):
    """Score every head for induction, say which heads pass, and mask them.

    $ ablate induction --model ./my-checkpoint --text held_out.txt
    """

    preset: Literal["default", "paper"] = field(default="default", metadata=NOT_HASHED)
    """paper: rows as Bansal et al. drew them; other options replace its own."""
    seeds: int = 8
    """Draws of random tokens from --seed on; as many others for masking."""
    lengths: tuple[int, ...] = ()
    """Tokens of a block; if empty, four from 25 on that fit the context."""
    repeats: int = 4
    """Copies of a block in a row."""
    spacing: Literal["varied", "fixed"] = "varied"
    """Copies at varying distances, or back to back."""
    dealt: bool = False
    """Seed s draws the length number s alone, not every length."""
    vocabulary: Literal["all", "merge-rank", "id-range", "corpus-frequency"] = "all"
    """Order of the tokens drawn from, of which --drop goes at both ends."""
    drop: float = 0.04
    """Share of the vocabulary left out at each end of its order; all has none."""
    bos: Literal["model", "none"] = "model"
    """Whether a row begins with the model's first token."""
    convention: Literal["corrected", "reference"] = "corrected"
    """reference: beside the other scores, those that the paper's code computes."""
    bias: bool = False
    """Add W_O's bias to what every head writes, in the copying score."""
    final_norm: bool = False
    """Take the gains of the last norm into the copying score."""
    matching: float = 0.3
    """Least prefix matching of an induction head."""
    by: Literal["attribution", "copying", "ov"] = "attribution"
    """Copying score that must exceed --copying."""
    copying: float = 0.0
    """What that score must exceed."""
    level: float = 0.05
    """False-discovery rate allowed among the heads that pass."""
    draws: int = 20
    """Random sets of heads masked beside the induction heads."""
    text: Path | None = field(default=None, metadata=INPUT)
    """UTF-8 text for the in-context-learning score; the bundled model has its own."""
    windows: int = 64
    """Windows of text read, evenly spread."""
    prune_run: Path | None = field(default=None, metadata=INPUT)
    """Folder of a finished `ablate prune`, for importance beside induction."""
    batch: int = 8
    """Rows in one forward."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "seeds": 100,
            "lengths": PAPER_LENGTHS,
            "spacing": "fixed",
            "dealt": True,
            "vocabulary": "merge-rank",
            "convention": "reference",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            raise ValueError("--limit asked for: a scan has no tasks; give --seeds or --lengths")
        if self.seed >= 2**62:
            raise ValueError(f"--seed {self.seed} asked for: its rows take later ones; give less")
        for option, least in (
            ("seeds", 1),
            ("repeats", 2),
            ("draws", 2),
            ("windows", 2),
            ("batch", 1),
        ):
            if getattr(self, option) < least:
                raise ValueError(
                    f"--{option} {getattr(self, option)} asked for: give at least {least}"
                )
        if self.lengths and min(self.lengths) < 2:
            raise ValueError(f"--lengths {min(self.lengths)} asked for: give 2 or more")
        if not 0 <= self.drop < 0.5:
            raise ValueError(f"--drop {self.drop:g} asked for: give a share in [0, 0.5)")
        if not 0 <= self.matching <= 1:
            raise ValueError(f"--matching {self.matching:g} asked for: give a share in [0, 1]")
        if not math.isfinite(self.copying):
            raise ValueError(f"--copying {self.copying} asked for: give a finite number")
        if not 0 < self.level < 1:
            raise ValueError(f"--level {self.level:g} asked for: give a share between 0 and 1")
        if self.convention == "reference" and (self.spacing == "varied" or self.bos == "none"):
            raise ValueError(
                "--convention reference: the paper's rows have their copies back to back behind a "
                "first token; give --spacing fixed and leave --bos"
            )

    @property
    def scan_seeds(self) -> range:
        """Of the rows that heads are scored on."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def masking_seeds(self) -> range:
        """Of the rows that heads are masked on: none that chose them."""
        return range(self.seed + self.seeds, self.seed + 2 * self.seeds)

    def run(self, folder: RunFolder) -> Outcome:
        """Scan, judge, mask on other rows, put it together."""
        from experiments.induction.figures import figures
        from experiments.induction.findings import findings_of
        from experiments.induction.measured import measured
        from experiments.induction.page import report

        model = self.load_model()
        found = measured(self, folder, model)
        findings = findings_of(self, found)
        found.scan.to_parquet(folder.path / "scan.parquet", index=False)
        return folder.finish(
            findings.outcome, findings.metrics, figures=figures(findings), report=report(findings)
        )
