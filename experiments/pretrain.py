"""Can a language model small enough to ship learn in context, and when does it begin?

Trains a model from scratch on text that every Python installation carries, measures it along the
way, and leaves a Hugging Face folder with its training record. With no option it is OPT-shaped: the
bundled model is what two runs of this study wrote, one with no option, and one that went on from it
with longer rows (its training.json has both commands). Other families, sizes and objectives are
bases for other studies, so the model as it was at the start and as it was at shares of the way is
kept beside the last one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.config import INPUT, LATER, NOT_HASHED, RunOptions
from experiments.families import KINDS, TASKS, Family, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from experiments.run_folder import Outcome, RunFolder


@dataclass(frozen=True)
class Pretraining(RunOptions):
    """Train a small language model on the standard library's source, from scratch.

    $ ablate pretrain --layers 2 --d-model 64 --tokens 1000000
    """

    grid: Literal["", "tokens", "tokens-per-parameter"] = field(default="", metadata=LATER)
    """Train the bases of the reset study, all on as many tokens or on as many a parameter; they
    bring their own shapes."""
    family: Family = field(default="opt", metadata=LATER)
    """Architecture: opt, gpt2, llama and hybrid decode, bert and esm encode, t5 and bart do
    both."""
    blocks: str = field(default="", metadata=LATER)
    """Blocks of a hybrid: a preset (gpt2, llama, mamba, mambaformer, ...) of --layers layers, or
    the blocks one by one, as 'mamba-rms, attention-mamba_ffn-rms*3'; --family hybrid alone is
    mambaformer."""
    objective: Literal["auto", "lm", "mlm", "denoising", "translation"] = field(
        default="auto", metadata=LATER
    )
    """What is predicted; auto is lm for a decoder, mlm for an encoder, denoising for both."""

    layers: int = 4
    """Number of blocks; of an encoder-decoder, in each stack."""
    d_model: int = 192
    """Width of the residual stream; the FFN is four times as wide."""
    heads: int = 6
    """Attention heads a block."""
    context: int = 512
    """Longest context, in tokens."""
    vocab: int = 2048
    """Entries of the byte-level BPE vocabulary."""
    corpus: str = field(default="stdlib", metadata=INPUT)
    """'stdlib', or a folder of text files; split into train and validation by file."""
    start_from: str = field(default="", metadata=INPUT)
    """Go on from a model that this study wrote (its folder, on the same corpus); empty: scratch."""
    tokens: int = 24_000_000
    """Tokens to train on, repeated epochs counted."""
    batch: int = 8
    """Windows of `context` tokens a step."""
    rate: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup: int = 200
    """Steps of linear warm-up; the schedule follows."""
    schedule: Literal["cosine", "wsd", "constant"] = field(default="cosine", metadata=LATER)
    """Of the rate: cosine decays to 5 % all the way, wsd linearly over the last fifth, constant
    never."""
    short_rows: int = 256
    """Row length of the first phase; windows are split into such rows."""
    short_share: float = 0.7
    """Share of the steps spent in the first phase."""
    repeated_share: float = 0.25
    """Share of the rows made of one repeated span (half text, half random tokens)."""
    reserved_share: float = field(default=0.0, metadata=LATER)
    """Share of the corpus that is kept from training, for studies that need text never read."""
    curve_tokens: int = field(default=65_536, metadata=LATER)
    """Held-out tokens measured for a row of the curve; the end measures all of them besides."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto is bfloat16 where the device has it."""
    device: str = "auto"
    """Torch device; auto takes CUDA when there is one."""
    save_every: float = field(default=60.0, metadata=NOT_HASHED)
    """Seconds between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "heads", "tokens", "batch", "warmup", "curve_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give ≥ 1")
        super().__post_init__()
        if not 0 < self.rate < math.inf:
            raise ValueError(f"--rate {self.rate:g}: give a learning rate above 0")
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            raise ValueError(f"--device {self.device}: give auto, cpu, cuda, cuda:1, mps or xpu")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model {self.d_model} does not divide into {self.heads} heads: "
                "give a multiple of --heads"
            )
        if not 260 <= self.vocab <= 2**16:
            raise ValueError(f"--vocab {self.vocab}: give a size from 260 to 65536")
        for name in ("short_share", "repeated_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: give a share in [0, 1]"
                )
        if not 32 <= self.short_rows <= self.context:
            raise ValueError(
                f"--short-rows {self.short_rows}: give a length from 32 to --context {self.context}"
            )

        self._check_blocks()
        self._check_objective()

    def _check_blocks(self) -> None:
        from experiments.hybrids.architecture.grammar import blocks_of, tokens_mix

        if not self.blocks:
            return
        if self.family not in ("opt", "hybrid"):
            raise ValueError(
                f"--blocks {self.blocks} of --family {self.family}: only a hybrid is written in"
                " blocks; leave one of the two out"
            )
        object.__setattr__(self, "family", "hybrid")
        try:
            blocks = blocks_of(self.blocks, self.layers)
        except ValueError as error:
            raise ValueError(f"--blocks {self.blocks}: {error}") from None
        if not tokens_mix(blocks):
            raise ValueError(
                f"--blocks {self.blocks}: without attention and Mamba no token sees another; give"
                " one of them to a block"
            )
        if any(b.position == "rope" for b in blocks) and self.d_model // self.heads % 2:
            raise ValueError(
                f"--blocks {self.blocks}: rope turns pairs of dimensions, but a head has"
                f" {self.d_model // self.heads} of them; give another --heads"
            )

    def _check_objective(self) -> None:
        known = TASKS[KINDS[self.family]]
        if self.objective != "auto" and self.objective not in known:
            raise ValueError(
                f"--objective {self.objective}: {self.family} can be trained on "
                f"{' or '.join(known)}; give that, or another --family"
            )
        if not 0 <= self.reserved_share <= 0.9:
            raise ValueError(f"--reserved-share {self.reserved_share}: give a share in [0, 0.9]")
        if self.family in ("llama", "esm") and self.d_model // self.heads % 2:
            raise ValueError(
                f"{self.family} turns pairs of dimensions: {self.d_model} over {self.heads} heads"
                f" leaves {self.d_model // self.heads} each; give another --heads"
            )

    @property
    def task(self) -> TaskName:
        """The objective, auto resolved."""
        return TASKS[KINDS[self.family]][0] if self.objective == "auto" else self.objective

    @property
    def steps(self) -> int:
        """Updates in all."""
        return math.ceil(self.tokens / (self.batch * self.context))

    def row(self, step: int) -> int:
        """Row length at a step: short rows first, then whole windows."""
        return self.short_rows if step < self.short_share * self.steps else self.context

    def run(self, folder: RunFolder) -> Outcome:
        """Train (or take up the checkpoint), measure, write the model and its record."""
        from experiments.pretrain_report import curve_frame, figures, headline, report
        from experiments.run_folder import Outcome

        if self.grid:
            from experiments.base_grid import train_grid

            return train_grid(self, folder)
        folder.create()
        _, _, record = self.train(folder.path)
        frame = curve_frame(record["curve"])
        final, whole = record["curve"][-1], record["held_out"]["validation_loss"]
        outcome = Outcome(
            headline(record),
            {"model": str(folder.path / "model"), **final, "held_out_loss": whole},
        )
        made = folder.finish(outcome, frame, figures=figures(frame), report=report(record))
        (folder.path / "checkpoint.safetensors").unlink(
            missing_ok=True
        )  # the model folder is the result
        return made

    def train(self, path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
        """Everything but the run folder's bookkeeping: works in `path`, resumes what it finds."""
        from tqdm import tqdm

        from experiments.pretrain_curve import as_saved, measured_steps, row, whole
        from experiments.pretrain_record import training_record, write_model
        from experiments.pretrain_setup import prepare
        from experiments.waypoints import keep_first, keep_waypoint

        setup = prepare(self, path)
        trainer, tokenizer = setup.trainer, setup.text.tokenizer
        folder = path / "model"
        if not self.start_from:
            keep_first(trainer.model, folder)
        if trainer.resume():
            tqdm.write(f"resuming at step {trainer.step:,} of {self.steps:,}", file=_stderr())
        measured = measured_steps(self.steps)
        mean_loss = None
        with tqdm(
            total=self.steps * self.batch * self.context,
            initial=trainer.tokens,
            unit="tok",
            unit_scale=True,
            desc="pretrain",
            file=_stderr(),
        ) as bar:
            for loss in trainer.run(save_every=self.save_every):
                mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
                bar.update(self.batch * self.context)
                bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
                if trainer.step in measured and trainer.step < self.steps:
                    trainer.rows.append(row(self, setup))
                if not self.start_from:
                    keep_waypoint(self, setup, folder)
        if not trainer.rows or trainer.rows[-1]["step"] < self.steps:
            trainer.rows.append(row(self, setup))
            trainer.save()
        model = as_saved(trainer.model)
        record = training_record(self, setup, whole(self, setup, model), folder)
        write_model(model, tokenizer, record, folder, setup.text.held_out)
        return model, tokenizer, record


def _stderr() -> Any:
    import sys

    return sys.stderr
