"""Which components can a smaller checkpoint do without, and how much smaller and faster is it?

Unit after unit (heads or groups, then FFNs), in the order of the importance averaged over all
conditions whose task is not unseen: as many as can go on the *selection* examples before the
average score falls by more than the tolerance, what the units before lost included. The reporting
examples then say what that mask costs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ablate.export import export, sizes_and_speed
from ablate.masks import Mask
from ablate.pruned import require_removable
from ablate.pruning import nested_masks, ranked, removable
from ablate.rankings import combined
from experiments.prune.grading import scored
from experiments.prune.orders import quota_of
from probes.readings import inputs_of

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.prune.conditions import Condition
    from experiments.prune.grading import Fills
    from experiments.prune.measured import Units
    from experiments.prune.selection import Selection
    from experiments.prune.study import Pruning
    from experiments.run_folder import RunFolder

EXPORTABLE: tuple[str, ...] = ("heads", "groups", "ffns")
SIZES, BEGUN = "export-sizes", "export-begun"
"""Shards of a checkpoint that is written and measured, and of one that is about to be."""


def require_exportable(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    units: Units,
) -> None:
    """Refuse, before any work, an export that would fail after it."""
    if study.export is None:
        return
    if study.export.exists() and folder.partial(BEGUN) is None:
        raise ValueError(f"--export {study.export}: it exists; name a new folder")
    if study.export_mask:
        mask = Mask.parse(study.export_mask)
        if not mask:
            raise ValueError("--export-mask names no component: leave it out, or name one")
        require_removable(model.model, model.expand(mask))
        return
    named = [c for unit in EXPORTABLE for c in units.get(unit, ())]
    if not named:
        raise ValueError(
            f"--export of {model.name} without heads or FFNs to leave out: its units here are "
            f"{', '.join(units)}"
        )
    require_removable(model.model, model.expand(Mask(named)))


def mask_to_export(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    units: Units,
    conditions: Sequence[Condition],
    chosen: Selection,
    fills: Fills,
    bar: Any,
) -> Mask:
    """The mask asked for, or the largest that selection examples allow; empty without --export."""
    if study.export is None:
        return Mask()
    if study.export_mask:
        return Mask.parse(study.export_mask)
    seen = [c for c in conditions if not c.unseen] or list(conditions)
    gone, start = Mask(), float("nan")
    for unit in [unit for unit in EXPORTABLE if unit in units]:
        tables = {
            condition.name: {
                c: s
                for c, s in chosen.importance[condition.key].scores(study.convention).items()
                if c in set(units[unit])
            }
            for condition in seen
        }
        order = ranked(combined(tables))
        steps = nested_masks(order, sorted(study.fractions), quota=quota_of(study, order))
        masks = list(dict.fromkeys([gone, *(gone | step for step in steps)]))
        means = []
        for condition in seen:
            bar.set_postfix_str(f"{condition.name} export", refresh=False)
            name = f"{condition.name}-export-{unit}"
            selection = condition.selection
            graded = scored(folder, name, model, selection, masks, fills(condition), bar)
            means.append(np.nanmean(graded.score, axis=1)[[graded.place[m] for m in masks]])
        average = np.mean(means, axis=0).tolist()
        start = average[0] if np.isnan(start) else start
        left = max(0.0, study.tolerance - (start - average[0]))
        counts = [len(mask) - len(gone) for mask in masks]
        gone = masks[counts.index(removable(counts, average, tolerance=left))]
    return gone


def written(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    mask: Mask,
    conditions: Sequence[Condition],
) -> pd.DataFrame | None:
    """Write the checkpoint and measure it, once; rows (model, metric, value), or None where there
    is nothing to write."""
    if study.export is None or not mask:
        return None
    sizes = folder.partial(SIZES)
    if sizes is None:
        if study.export.exists():  # this run's own, before it was stopped: nothing was there
            shutil.rmtree(study.export)
        folder.keep(BEGUN, pd.DataFrame({"folder": [str(study.export)]}))
        export(model, mask, study.export)
        answers = conditions[-1].answers
        inputs = inputs_of(model, answers.batches[0], answers.layout)
        sizes = sizes_and_speed(model, mask, study.export, inputs)
        folder.keep(SIZES, sizes)
    return sizes
