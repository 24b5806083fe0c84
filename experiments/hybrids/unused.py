"""Which options were given that nothing in this study would read?

An option that changes the run's hash and nothing else looks like a result that does not depend on
it. Each row names options, when they are read, and in words what has to be asked for as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.hybrids.study import Hybrids

_READ: tuple[tuple[tuple[str, ...], Callable[[Hybrids], bool], str], ...] = (
    (
        ("generations", "candidates", "most_parameters", "compute"),
        lambda study: study.search,
        "a search reads it (--search)",
    ),
    (("sweep_share",), lambda study: bool(study.rates), "a sweep of rates reads it (--rates)"),
    (("rate",), lambda study: not study.rates, "every architecture takes its best of --rates"),
    (("betas",), lambda study: study.optimiser != "sgd", "adam and adamw read them"),
    (("momentum",), lambda study: study.optimiser == "sgd", "--optimiser sgd reads it"),
    (
        ("final_share",),
        lambda study: study.schedule != "constant",
        "a cosine reads it (--schedule)",
    ),
    (("cycles",), lambda study: study.schedule == "cyclical", "--schedule cyclical reads it"),
    (
        ("double_residual",),
        lambda study: any(b.has_mamba for text in study.architectures for b in study.blocks(text)),
        "Mamba blocks read it, and no architecture has one",
    ),
)


def refuse_unused(study: Hybrids) -> None:
    """ValueError, in one line, for the first option that is not as by default and not read."""
    usual = {each.name: each.default for each in dataclasses.fields(study)}
    for names, reads, why in _READ:
        for name in names:
            if getattr(study, name) != usual[name] and not reads(study):
                raise ValueError(
                    f"--{name.replace('_', '-')} was given, but would change nothing: {why}"
                )
