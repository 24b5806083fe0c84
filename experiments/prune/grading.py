"""What does every example score, and what does its right answer cost, under each of many masks?

One sweep a batch, kept as soon as it is done. `score` is the task's own measure, 1 right and 0
wrong: MultiRC's is `acc_all`, a whole question (nan at its other answers), all others' is `acc`.
`loss` is −log p of the right answer in nats a token, as importance has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from ablate.fills import mean_fill
from experiments.prune.kept_sweeps import kept_log_likelihoods
from probes.donors import donor_fill
from probes.readings import inputs_of
from probes.scoring import task_scores

if TYPE_CHECKING:
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


@dataclass(frozen=True, eq=False)
class Graded:
    """Every example under each of many masks.

    Attributes:
        doc_id, group: of each example.
        score, loss: of each example under each mask.
        place: which row of those a mask is.
    """

    doc_id: NDArray[np.int64]
    group: NDArray[np.int64]
    score: Float[np.ndarray, "mask example"]
    loss: Float[np.ndarray, "mask example"]
    place: Mapping[Mask, int]


def scored(
    folder: RunFolder,
    name: str,
    model: HookedModel,
    prepared: Prepared,
    masks: Sequence[Mask],
    fill: Callable[[Batch], Literal["zero"] | Fill],
    bar: Any,
) -> Graded:
    """The examples under `masks`, kept under `name`; a mask asked for twice is scored once."""
    unique = list(dict.fromkeys(masks))
    values, greedy = kept_log_likelihoods(
        folder, name, model, prepared, unique, fill=fill, tick=bar.update
    )
    return graded(prepared, unique, values, greedy)


def graded(
    prepared: Prepared,
    masks: Sequence[Mask],
    values: Float[np.ndarray, "mask choice"],
    greedy: Bool[np.ndarray, "mask choice"],
) -> Graded:
    """Scores and losses from the log-likelihoods of all choices."""
    lengths = np.zeros(prepared.offsets[-1])
    for batch in prepared.batches:
        np.add.at(lengths, batch.entry_owner.numpy(), 1)
    golds = np.array([e.gold for e in prepared.examples]) + np.array(prepared.offsets[:-1])
    scores = [
        task_scores(prepared, *of_mask, mask=mask)
        for *of_mask, mask in zip(values, greedy, masks, strict=True)
    ]
    return Graded(
        np.array([e.doc_id for e in prepared.examples]),
        np.array([e.group for e in prepared.examples]),
        np.stack(scores),
        -values[:, golds] / lengths[golds],
        {mask: i for i, mask in enumerate(masks)},
    )
