"""What does every example score, and what does its right answer cost, under each of many masks?

One sweep a batch, kept as soon as it is done. `score` is the task's own measure, 1 right and 0
wrong: MultiRC's is `acc_all`, a whole question (nan at its other answers), all others' is `acc`.
`loss` is −log p of the right answer in nats a token, as importance has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from ablate.fills import mean_fill
from experiments.prune.kept_sweeps import kept_log_likelihoods
from probes.donors import donor_fill
from probes.readings import inputs_of
from probes.scoring import grade

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ablate import Fill, HookedModel, Mask
    from experiments.prune.conditions import Condition
    from experiments.prune.study import Pruning
    from experiments.run_folder import RunFolder
    from probes.packing import Batch
    from probes.scoring import Prepared

Fills = Callable[["Condition"], Callable[["Batch"], "Literal['zero'] | Fill"]]
"""For a condition: what stands in for removed components in the forward of a batch."""


def fills_of(study: Pruning, model: HookedModel, conditions: Sequence[Condition]) -> Fills:
    """Zero; the mean over the selection examples of all conditions; or donors of the condition's
    own selection examples, drawn by its seed."""
    match study.fill:
        case "zero":
            return lambda condition: lambda batch: "zero"
        case "mean":
            answers = [condition.answers for condition in conditions]
            mean = mean_fill(
                model, (inputs_of(model, batch, a.layout) for a in answers for batch in a.batches)
            )
            return lambda condition: lambda batch: mean
        case "resample":
            return lambda condition: (
                lambda batch: donor_fill(
                    model,
                    batch,
                    condition.selection.layout,
                    condition.selection,
                    torch.Generator().manual_seed(condition.key.seed),
                )
            )


def scored(
    folder: RunFolder,
    name: str,
    model: HookedModel,
    prepared: Prepared,
    masks: Sequence[Mask],
    fill: Callable[[Batch], Literal["zero"] | Fill],
    bar: Any,
) -> dict[Mask, pd.DataFrame]:
    """For every mask a frame with a row an example: doc_id, group, score, loss.

    A mask that is asked for twice is scored once.
    """
    unique = list(dict.fromkeys(masks))
    values, greedy = kept_log_likelihoods(
        folder, name, model, prepared, unique, fill=fill, tick=bar.update
    )
    lengths = _lengths(prepared)
    golds = np.array([e.gold for e in prepared.examples]) + np.array(prepared.offsets[:-1])
    frames = {}
    for i, mask in enumerate(unique):
        graded = grade(prepared, values[i], greedy[i], mask=mask)
        whole_questions = graded.acc_all.notna().any()
        frames[mask] = pd.DataFrame(
            {
                "doc_id": graded.doc_id,
                "group": graded.group,
                "score": graded.acc_all if whole_questions else graded.acc,
                "loss": -values[i, golds] / lengths[golds],
            }
        )
    return frames


def _lengths(prepared: Prepared) -> NDArray[np.int64]:
    """Tokens of every choice."""
    counts = np.zeros(prepared.offsets[-1], dtype=np.int64)
    for batch in prepared.batches:
        np.add.at(counts, batch.entry_owner.numpy(), 1)
    return counts
