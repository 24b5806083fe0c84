"""Which orders of blocks are there to try, and what does trying one cost?

A candidate is as many blocks as the study has layers, each drawn uniformly from all blocks that the
grammar can write with a branch; where a model asks for learned positions anywhere, it has them. The
presets with as many layers stand among the candidates, so that a search that finds nothing better
than a known architecture says so. What has more parameters than allowed, or neither attention nor a
Mamba, is drawn again.

Successive halving (Jamieson & Talwalkar 2016): generation g trains the best n / 2^g of n candidates
for steps · 2^(g + 1 − G), so that every generation costs about as much and the last one trains
whole. Training costs 6 · parameters · tokens FLOPs, about: a selective scan costs more than its
parameters say.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import get_args

from experiments.hybrids.architecture.grammar import (
    Block,
    FFNKind,
    MixerKind,
    NormKind,
    PositionKind,
    preset,
    tokens_mix,
    written,
)
from experiments.hybrids.architecture.sizes import Sizes

KNOWN = ("gpt2", "llama", "mamba", "mambaformer")
"""Presets that are always candidates."""
DRAWS = 10_000
"""Draws after which no small enough candidate is taken to exist."""


def all_blocks() -> tuple[Block, ...]:
    """Every block that can be written, in a fixed order."""
    found = []
    slots = itertools.product(
        get_args(MixerKind), get_args(FFNKind), get_args(NormKind), get_args(PositionKind)
    )
    for mixer, ffn, norm, position in slots:
        try:
            block = Block(mixer, ffn, norm, position)
        except ValueError:
            continue  # the grammar's own rules, said once, there
        if position != "learned" or mixer == "attention":
            found.append(block)
    return tuple(found)


def drawn(
    count: int, layers: int, sizes: Sizes, most: int, seed: int
) -> tuple[tuple[Block, ...], ...]:
    """`count` different candidates of at most `most` parameters, the known ones first.

    Raises ValueError where there are not so many.
    """
    generator, choices = random.Random(seed), all_blocks()
    known = (preset(name, layers) for name in KNOWN)
    found = dict.fromkeys(blocks for blocks in known if sizes.parameters(blocks) <= most)
    for _ in range(DRAWS):
        if len(found) >= count:
            break
        blocks = tuple(generator.choice(choices) for _ in range(layers))
        if tokens_mix(blocks) and sizes.parameters(blocks) <= most:
            found[blocks] = None
    if len(found) < count:
        raise ValueError(
            f"{count} candidates of at most {most:,} parameters asked for: {len(found)} were found"
            f" in {DRAWS:,} draws; give fewer --candidates, a smaller --d-model, or more"
            " --most-parameters"
        )
    return tuple(found)[:count]


def generations(count: int, rounds: int, steps: int) -> tuple[tuple[int, int], ...]:
    """(candidates, steps) of every generation; the last trains `steps`.

    >>> generations(12, 3, 4000)
    ((12, 1000), (6, 2000), (3, 4000))
    """
    return tuple((max(1, count >> g), max(1, steps >> (rounds - 1 - g))) for g in range(rounds))


def flops(
    candidates: Sequence[Sequence[Block]], sizes: Sizes, steps: int, tokens: int, seeds: int
) -> float:
    """Of training the candidates for so many steps of so many tokens."""
    return sum(6.0 * sizes.parameters(blocks) * steps * tokens * seeds for blocks in candidates)


def affordable(
    candidates: Sequence[tuple[Block, ...]],
    sizes: Sizes,
    plan: tuple[int, int],
    tokens: int,
    seeds: int,
    budget: float,
) -> tuple[tuple[Block, ...], ...]:
    """The first candidates whose whole search costs at most `budget`, taken at their mean size.

    `plan` is (generations, steps of the last). Raises ValueError if not even two can be afforded.
    """
    rounds, steps = plan
    for count in range(len(candidates), 1, -1):
        kept = candidates[:count]
        each = flops(kept, sizes, 1, tokens, seeds) / count
        total = each * sum(n * s for n, s in generations(count, rounds, steps))
        if total <= budget:
            return tuple(kept)
    raise ValueError(
        f"--compute {budget:g} FLOPs asked for: not even two orders of blocks can be tried with"
        f" --steps {steps} and {rounds} generations; give more, or fewer steps"
    )


def named(blocks: Sequence[Block]) -> str:
    """A preset's name where the blocks are one, else the blocks in words."""
    for name in KNOWN:
        layers = len(blocks) - len(preset(name, 1)) + 1
        if layers > 0 and preset(name, layers) == tuple(blocks):
            return name
    return written(blocks)
