"""What do the arms of the protocol do to a base with so many blocks?

    A0   reset a block, train it                     A7   all from scratch
    A1   reset nothing, train a block                A8   all random and frozen, train a block
    A2   reset nothing, train all                    A9   reset and train a part of a block
    A3   reset a block, train all                    A10  A0 by other laws
    A4   reset a block, train its norms              A11  A0 towards other targets
    A5   reset a block, train its neighbours         A12  reset and train several blocks
    A6   reset a block, train nothing                A13  what wiping cross-attention does

Every function gives treatments of one seed; A1, A2 and A7, which are not about the reset, have the
first seed only. Rates are those of the arm where the study has one of its own. What a base cannot
do (a copy of a block below the lowest) is left out, and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablate.components import Stack
from ablate.reset import Part, Place
from experiments.reset.learning.treatments import Start, Target, Treatment

if TYPE_CHECKING:
    from experiments.reset.study import Resetting

NORM_RATE = 5.0
"""Times the usual rate, where norms alone are trained: they have little leverage each."""
LOCAL_RATE = 2.0
"""Times the usual rate, towards the old block's output: what lies above has no say in it."""
TARGETS: tuple[Target, ...] = ("lm", "hidden", "logits", "mix")


@dataclass(frozen=True)
class Site:
    """Where the arms act: blocks of one stack.

    Attributes:
        layers: those to reset, of n_blocks.
        parts, laws: what the base can do.
    """

    stack: Stack
    layers: tuple[int, ...]
    n_blocks: int
    parts: Sequence[Part]
    laws: Sequence[Start]

    def place(self, layer: int, part: Part = "block") -> Place:
        """A place in this stack."""
        return Place(layer, part, self.stack)


def treatments(study: Resetting, site: Site, seed: int, rate: float) -> Iterator[Treatment]:
    """All that the study's arms do in this stack with one seed."""
    arms = set(study.arms)
    for layer in site.layers:
        here = (site.place(layer),)
        for target in study.targets if "A0" in arms else ():
            yield Treatment("A0", here, here, "init", target, seed, _rate(rate, target))
        if "A1" in arms and seed == study.seed:
            yield Treatment("A1", (), here, "init", "lm", seed, rate)
        if "A3" in arms:
            yield Treatment("A3", here, (), "init", "lm", seed, study.rate_all, "all")
        if "A4" in arms:
            norms = (site.place(layer, "norms"),)
            yield Treatment("A4", here, norms, "init", "lm", seed, rate * NORM_RATE)
        if "A5" in arms and site.n_blocks > 1:
            around = [n for n in (layer - 1, layer + 1) if 0 <= n < site.n_blocks]
            yield Treatment("A5", here, tuple(map(site.place, around)), "init", "lm", seed, rate)
        if "A6" in arms:
            yield Treatment("A6", here, (), "init", "lm", seed, rate)
        if "A8" in arms:
            yield Treatment("A8", (), here, "init", "lm", seed, rate, "random-context")
        for part in site.parts if "A9" in arms else ():
            some = (site.place(layer, part),)
            yield Treatment("A9", some, some, "init", "lm", seed, rate)
        for law in site.laws if "A10" in arms else ():
            if _allowed(law, layer, site.n_blocks):
                yield Treatment("A10", here, here, law, "lm", seed, rate)
        for target in TARGETS if "A11" in arms else ():
            if "A0" not in arms or target not in study.targets:
                yield Treatment("A11", here, here, "init", target, seed, _rate(rate, target))
    for several in _several(site) if "A12" in arms else ():
        places = tuple(map(site.place, several))
        yield Treatment("A12", places, places, "init", "lm", seed, rate)


def whole(study: Resetting, seed: int, rate: float) -> Iterator[Treatment]:
    """The arms that are about no stack."""
    if seed != study.seed:
        return
    if "A2" in study.arms:
        yield Treatment("A2", (), (), "init", "lm", seed, study.rate_all, "all")
    if "A7" in study.arms:
        yield Treatment("A7", (), (), "init", "lm", seed, rate, "scratch")


def _rate(rate: float, target: Target) -> float:
    return rate * LOCAL_RATE if target == "hidden" else rate


def _allowed(law: Start, layer: int, n_blocks: int) -> bool:
    """Whether the block has the neighbours that the law copies."""
    below, above = layer > 0, layer < n_blocks - 1
    return {"copy-below": below, "copy-above": above, "copy-mean": below and above}.get(law, True)


def _several(site: Site) -> Sequence[tuple[int, ...]]:
    """Two in the middle, two apart, half of the blocks, all."""
    n = site.n_blocks
    if n < 3:
        return [tuple(range(n))]
    middle = n // 2 - 1
    found = [(middle, middle + 1), (0, n - 1), tuple(range(0, n, 2)), tuple(range(n))]
    return list(dict.fromkeys(found))
