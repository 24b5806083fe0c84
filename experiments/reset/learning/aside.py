"""Why did wiping the cross-attention behave like a full reset?

An encoder of another width was put into an encoder-decoder, the cross-attention began anew, and the
model seemed to have forgotten everything. Three things had happened at once. Arm A13 takes them
apart; the variants are students of the decoder of a base, all else frozen:

    one block wiped         fresh cross-attention in one block, the base's own encoder
    all wiped               the same in every block
    all wiped, silent       the same, its output projections zero: it begins by adding nothing
    ... other encoder       all wiped, and the encoder of another base of the same width
    ... other width         all wiped, and the encoder of a base of another width
    ... decoder trained     all wiped, other encoder, and the whole decoder is trained
    bridge                  nothing wiped: other encoder, and a linear map from it to the decoder
    bridge, other width     the same for the other width

Beside them: the cross-attention trained without a reset (A1), a whole model from scratch (A7).

Wiping means the projections of the cross-attention (query, key, value, output) with their biases.
Its norm is no part of it: it keeps the gain and bias it was trained with and stays frozen, unless
the whole decoder is trained. What a student gains from its source is its source-use
(`examiner`): without it, a decoder that ignores its encoder would look almost recovered.

The preset trains its bases itself, on the synthetic translation task (`experiments.translation`):
two of one shape, each lending its encoder to the other, and one of another width that lends only.

What it costs, counted from single steps in CPU time of one thread: 5 minutes a base and 7 for the
one of another width, 1.4 minutes for the five students with the base's own encoder of one base and
seed, 0.4 for every other student: 38 minutes, about 20 in two processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate.reset import Place
from experiments.base_grid import HEAD_WIDTH, MATCHED_TOKENS, SHARED, model_folder
from experiments.bases import Base, base_at
from experiments.pretrain import Pretraining
from experiments.processes import processes
from experiments.reset.learning.treatments import Treatment

if TYPE_CHECKING:
    from experiments.reset.opened import Opened
    from experiments.reset.study import Resetting

NO_OP = "cross-attention"
"""Variant of A1: all cross-attention trained without a reset."""
WIPED = "all wiped"
WIPED_OTHER = f"{WIPED}, other encoder"
DECODER_TOO = f"{WIPED_OTHER}, decoder trained"
SILENT = f"{WIPED}, silent"
BRIDGE = "bridge"
WIDTH, OTHER_WIDTH = 64, 96
"""Of the bases, and of the one that only lends its encoder."""
SHAPE: dict[str, Any] = SHARED | {
    "family": "bart",
    "objective": "translation",
    "layers": 2,
    "tokens": MATCHED_TOKENS,
    "rate": 2e-3,
    "vocab": 512,
    "context": 32,
    "short_rows": 32,
    "batch": 64,
}
"""Of the preset's bases. A base learns nothing from its source until it has found out which
position each word comes from. With rows of 64 tokens and 1024 words one seed had done so after 1.9M
tokens, another not after 3.5M; with these, the latter had after 1.5M."""


@dataclass(frozen=True)
class Lenders:
    """Folders of models whose encoders a base may borrow; empty where there is none.

    Attributes:
        same: of the base's width.
        other: of another width.
    """

    same: str = ""
    other: str = ""


def treatments(
    layers: Sequence[int],
    n_blocks: int,
    lenders: Lenders,
    seed: int,
    rate: float,
    *,
    first: bool = True,
) -> Iterator[Treatment]:
    """All variants of one seed; `layers` are those wiped alone, the no-op is the first seed's."""
    cross = tuple(Place(layer, "cross", "decoder") for layer in range(n_blocks))
    usual = Treatment("A13", cross, cross, seed=seed, rate=rate, variant=WIPED)
    if first:
        yield dataclasses.replace(usual, arm="A1", resets=(), variant=NO_OP)
    for layer in layers:
        one = (cross[layer],)
        yield dataclasses.replace(usual, resets=one, trains=one, variant="one block wiped")
    yield usual
    yield dataclasses.replace(usual, law="identity", variant=SILENT)
    kept = dataclasses.replace(usual, resets=(), trains=(), scope="bridge")
    if lenders.same:
        other = dataclasses.replace(usual, encoder=lenders.same, variant=WIPED_OTHER)
        yield other
        yield dataclasses.replace(other, trains=(), scope="decoder", variant=DECODER_TOO)
        yield dataclasses.replace(kept, encoder=lenders.same, variant=BRIDGE)
    if lenders.other:
        yield dataclasses.replace(usual, encoder=lenders.other, variant=f"{WIPED}, other width")
        yield dataclasses.replace(kept, encoder=lenders.other, variant=f"{BRIDGE}, other width")


def lenders_of(opened: Opened, others: Sequence[Base], left_out: list[str]) -> Lenders:
    """Whose encoders this base borrows: of each kind the first that reads the same ids.

    What is missing is added to `left_out`.
    """
    base = opened.base
    found: dict[bool, str] = {}
    for other in others:
        fits = other.kind == "encoder-decoder" and other.weights != base.weights
        if fits and (same := other.d_model == base.d_model) not in found and _reads(opened, other):
            found[same] = other.weights
    for same, width in ((True, f"width {base.d_model}"), (False, "another width")):
        if same not in found:
            left_out.append(
                f"A13 of {opened.name} with another encoder of {width}: no other base has one; "
                "name one with --encoders"
            )
    return Lenders(found.get(True, ""), found.get(False, ""))


def candidates(study: Resetting, bases: Sequence[Opened], index: int) -> list[Base]:
    """Bases that may lend an encoder to the base at `index`: those behind it first, round about."""
    own = [opened.base for opened in (*bases[index + 1 :], *bases[:index])]
    share = bases[index].base.share
    return [
        *(base for base in own if base.share == share),
        *(base_at(name) for name in study.encoders),
    ]


def _reads(opened: Opened, other: Base) -> bool:
    """Whether the other model's ids are the base's."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(other.folder or other.weights)
    own: Any = opened.data  # of tokens: prompts have no encoder to lend, and were refused
    return theirs.get_vocab() == own.tokenizer.get_vocab()


def bases(study: Resetting) -> tuple[Pretraining, ...]:
    """The bases of the preset, as many as --bases, and one of another width."""
    widths = (*(WIDTH for _ in range(study.bases)), OTHER_WIDTH)
    return tuple(
        Pretraining(
            **SHAPE,
            d_model=width,
            heads=width // HEAD_WIDTH,
            seed=seed,
            runs=study.runs,
            corpus=study.corpus or "stdlib",
            precision=study.precision,
            save_every=study.save_every,
        )
        for seed, width in enumerate(widths)
    )


def with_bases(study: Resetting, wanted: Sequence[Pretraining] | None = None) -> Resetting:
    """The study on bases of its own, which are trained where they are not there yet.

    Each is a run of `ablate pretrain` under the same --runs, as resumable as that.
    """
    wanted = bases(study) if wanted is None else wanted
    if study.jobs == 1:
        for base in wanted:
            _train(base)
    else:
        with processes(study.jobs) as pool:
            list(pool.map(_train, reversed(wanted)))  # the widest first
    first, *more, lender = (str(model_folder(base)) for base in wanted)
    return dataclasses.replace(study, model=first, also=tuple(more), encoders=(lender,))


def _train(base: Pretraining) -> None:
    from experiments.run_folder import run_study

    run_study("pretrain", base)
