"""Which changes of the distribution of prompts are there, and what does each task allow?

A shift is a name, with a strength where it has one: `noisy`, `noisy:0.2`. It serves in training
(`Task.shift`) or out of distribution (`sample(shift=...)`), there on top of the task's own.

    none
    noisy              y + ε, var ε = s · E y²; s = 1/20, as Garg et al.'s σ = 1 at d = 20
    noisy-x            x + ε is shown, var ε = s = 1/20 a coordinate; y is that of x
    skewed             covariance with eigenvalues ∝ i^(−2s), s = 1, in a random basis a prompt
    half-subspace      x within a random subspace of s · d coordinates, s = 1/2
    orthogonal         each run of d points is orthogonal; lengths as they were
    quadrant           all x but the last have the signs of one random corner
    opposite-quadrant  and the last has all signs the other way
    seen               the last x is one of the others, drawn uniformly
    scaled-x           x times s = 3, y accordingly
    scaled-y           f times s = 3
    outlier            each point becomes x = (1, …, 1), y = 1 with probability s = 0.9
    orthogonal-outlier each point becomes, with probability s = 1/2, one random vector orthogonal to
                       w, of length √d, as x, and its first coordinates as y

All but the last two keep E |x|² (scaled-x apart). Where only the last x is special only it is
scored; outliers are not scored (`prompts.counted`). Sources: Garg et al. 2022 (skewed to scaled-y),
Park et al. 2024 (outliers; there y_i of an orthogonal outlier is the whole vector). Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Shift(NamedTuple):
    """A change of distribution, and how strong."""

    name: str
    strength: float


SHIFTS: Mapping[str, float] = {
    "none": 0.0,
    "noisy": 0.05,
    "noisy-x": 0.05,
    "skewed": 1.0,
    "half-subspace": 0.5,
    "orthogonal": 0.0,
    "quadrant": 0.0,
    "opposite-quadrant": 0.0,
    "seen": 0.0,
    "scaled-x": 3.0,
    "scaled-y": 3.0,
    "outlier": 0.9,
    "orthogonal-outlier": 0.5,
}
"""name -> its strength unless given; 0 where it has none"""

LAST_ONLY = ("quadrant", "opposite-quadrant", "seen")
"""Only the last prediction is out of distribution, and scored."""

_ANY = ("none", "noisy", "noisy-x")
_LINEAR = ("linear", "sparse", "quadratic", "classification")
_GAUSSIAN = (*_LINEAR, "mlp", "mlp-normalised", "tree")
_UNSCALED = ("parity", "parity-batch", "classification")


def parse_shift(text: str) -> Shift:
    """`noisy` or `noisy:0.2`. ValueError for an unknown name or a strength out of range."""
    name, colon, number = text.partition(":")
    if name not in SHIFTS:
        raise ValueError(f"no shift {name!r}: take one of {', '.join(SHIFTS)}")
    if not colon:
        return Shift(name, SHIFTS[name])
    if not SHIFTS[name]:
        raise ValueError(f"shift {text!r}: {name} has no strength, write {name!r}")
    try:
        strength = float(number)
    except ValueError:
        raise ValueError(f"shift {text!r}: {number!r} is no number, write {name}:0.5") from None
    most = 1.0 if name in ("half-subspace", "outlier", "orthogonal-outlier") else float("inf")
    if not 0 < strength <= most:
        raise ValueError(f"shift {text!r}: strength {number} of {name} is not within (0, {most:g}]")
    return Shift(name, strength)


def shifts_for(task: str) -> tuple[str, ...]:
    """The shifts that have a meaning for a task, `none` first."""
    return tuple(name for name in SHIFTS if _allowed(name, task))


def check_shift(text: str, task: str) -> Shift:
    """The shift, if the task allows it; else ValueError."""
    shift = parse_shift(text)
    if not _allowed(shift.name, task):
        raise ValueError(
            f"shift {shift.name} has no meaning for task {task}: "
            f"take one of {', '.join(shifts_for(task))}"
        )
    return shift


def _allowed(shift: str, task: str) -> bool:
    if shift in _ANY:
        return True
    if shift == "scaled-y":
        return task not in _UNSCALED
    if shift == "orthogonal-outlier":
        return task in _LINEAR
    if shift == "seen":
        return task != "mqar"
    return task in _GAUSSIAN
