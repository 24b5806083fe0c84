"""How does a study sweep over masks and lose nothing when it is killed?

One shard a batch of prompts, with every mask's log-likelihood of every choice in it. A run that is
taken up again sweeps only the batches that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from ablate import Fill, HookedModel, Mask
    from experiments.run_folder import RunFolder
    from probes.packing import Batch
    from probes.scoring import Prepared


def kept_log_likelihoods(
    folder: RunFolder,
    key: str,
    model: HookedModel,
    prepared: Prepared,
    masks: Sequence[Mask],
    *,
    fill: Callable[[Batch], Literal["zero"] | Fill] = lambda batch: "zero",
    tick: Callable[[], object] = lambda: None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What `probes.scoring.log_likelihoods` gives, [mask, choice], with shards under `key`.

    `fill` says of each batch what stands in; `tick` is called after each.
    """
    shape = len(masks), prepared.offsets[-1]
    values, greedy = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    for number, batch in enumerate(prepared.batches):
        shard = folder.partial(f"{key}-{number}")
        if shard is None:
            choices = batch.entry_owner.unique().numpy()
            shard = _swept(model, prepared, masks, fill(batch), number, choices)
            folder.keep(f"{key}-{number}", shard)
        values[shard["mask"], shard["choice"]] = shard["nats"]
        greedy[shard["mask"], shard["choice"]] = shard["greedy"]
        tick()
    return values, greedy


def _swept(
    model: HookedModel,
    prepared: Prepared,
    masks: Sequence[Mask],
    fill: Literal["zero"] | Fill,
    number: int,
    choices: NDArray[np.int64],
) -> pd.DataFrame:
    import pandas as pd

    from probes.scoring import log_likelihoods

    values, greedy = log_likelihoods(model, prepared, masks, fill=fill, batches=[number])
    mask, choice = np.meshgrid(np.arange(len(masks)), choices, indexing="ij")
    return pd.DataFrame(
        {
            "mask": mask.ravel(),
            "choice": choice.ravel(),
            "nats": values[:, choices].ravel(),
            "greedy": greedy[:, choices].ravel(),
        }
    )
