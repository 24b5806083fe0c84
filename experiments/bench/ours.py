"""How does this toolkit do each work? As a user would write it: a call each.

Every function loads nothing and returns what to run and time: `run()` → values, as `works.py` lays
them out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float

from ablate import Head, HookedModel, Mask, Reading, leave_one_out
from ablate.hooks import execution_device
from ablate.importance import answer_importance
from experiments.bench import retraining
from experiments.bench.scans import scan
from experiments.bench.works import Work
from probes.scoring import log_likelihoods, prepare

Run = Callable[[], Float[np.ndarray, "..."]]


def ours(model: HookedModel, work: Work) -> Run:
    """This toolkit's way to do `work` on `model`."""
    runs = {
        "sweep": _sweep,
        "choices": _choices,
        "importance": _importance,
        "induction": scan,
        "reset": retraining.ours,
        "forward": _forward,
    }
    return runs[work.kind](model, work)


def _sweep(model: HookedModel, work: Work) -> Run:
    def run() -> Float[np.ndarray, "one_and_component row"]:
        found = leave_one_out(model, [_reading(model, work)], components=work.components)
        return torch.cat([found.whole[:, None], found.without], dim=1).T.numpy()

    return run


def _choices(model: HookedModel, work: Work) -> Run:
    masks = [Mask(), *(Mask([component]) for component in work.components)]

    def run() -> Float[np.ndarray, "one_and_component choice"]:
        return log_likelihoods(model, prepare(model, work.examples), masks)[0]

    return run


def _importance(model: HookedModel, work: Work) -> Run:
    heads = [i for i, c in enumerate(model.components) if isinstance(c, Head)]

    def run() -> Float[np.ndarray, "row head"]:
        return answer_importance(model, [_reading(model, work)]).token[:, heads].numpy()

    return run


def _forward(model: HookedModel, work: Work) -> Run:
    ids = _on_device(model, work)

    @torch.no_grad()
    def run() -> Float[np.ndarray, "1 row"]:
        logits = model.model(input_ids=ids, use_cache=False).logits
        return -logits[:, -2].float().log_softmax(-1).gather(1, ids[:, -1:]).T.cpu().numpy()

    return run


def _reading(model: HookedModel, work: Work) -> Reading:
    """Every row's last `scored` tokens, each read one position before it stands."""
    ids = _on_device(model, work)
    rows, length = ids.shape
    at = torch.cartesian_prod(
        torch.arange(rows), torch.arange(length - work.scored - 1, length - 1)
    )
    return Reading({"input_ids": ids}, at, ids[:, -work.scored :].flatten().cpu())


def _on_device(model: HookedModel, work: Work) -> torch.Tensor:
    return torch.from_numpy(work.rows).to(execution_device(model.model))
