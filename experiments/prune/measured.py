"""What has a pruning run measured, before anything is averaged?

A *unit* is a kind of component that is pruned by itself: heads, groups (key/value groups), ffns or
mixers. A *condition* is one task at one number of shots, with the demonstrations and the selection
examples of one seed. Reporting examples had no say in any ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

    from ablate.components import Component
    from ablate.importance import Importance

WHOLE, ALONE, GRID, EXPORTED = "whole", "alone", "grid", "exported"
"""Values of `answers.unit` that are no unit: nothing removed, one component, components of two
units, what an exported checkpoint does without."""


Units = Mapping[str, tuple["Component", ...]]
"""The components of every unit that is pruned, in the model's order."""


class Key(NamedTuple):
    """One task at one number of shots, by the demonstrations and selection examples of a seed."""

    task: str
    shots: int
    seed: int


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything the findings are made of.

    Attributes:
        units: what was pruned.
        importance: first-order effects on the selection examples of each condition.
        groups: the text that each of those examples comes from.
        effects: exact effects on the same examples; task, shots, seed, component, doc_id, group,
            loss_rise, score_change (without the component − whole).
        rankings: unit, ranking, task, shots, seed, component, place (0 goes first).
        partners: task, shots, seed, unit, which (highest, lowest), partner, value (Spearman).
        answers: reporting examples; task, shots, seed, unit, ranking, removed (components of the
            unit; heads in the grid), ffns (removed in the grid, else 0), component (removed alone,
            else ""), doc_id, group, score (1 right, 0 wrong; nan does not count), loss.
        induction: component, prefix_matching, copying; one row a head. None where not scanned.
        chances: expected score of a blind guess, by task.
        truncated: prompts that lost their beginning.
        exported: model (whole, exported), metric, value, low, high, as
            `ablate.export.sizes_and_speed` has them; None where nothing was exported.
    """

    units: Units
    importance: Mapping[Key, Importance]
    groups: Mapping[Key, tuple[str, ...]]
    effects: pd.DataFrame
    rankings: pd.DataFrame
    partners: pd.DataFrame
    answers: pd.DataFrame
    induction: pd.DataFrame | None
    chances: Mapping[str, float]
    truncated: int
    exported: pd.DataFrame | None = None
