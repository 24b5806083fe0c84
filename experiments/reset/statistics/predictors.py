"""What of a layer, known before it is reset, might tell how long it takes to recover?

One value a layer and predictor, of a base, a few batches and, for the distance, its true initial
weights:

    skip             loss with the block left out, minus the loss (nan under post-norm, where a
                     block without its branches is a norm)
    distance         ‖θ − θ0‖ of the block's weights (only where θ0 is known)
    block_influence  1 − mean cos(resid_in, resid_out) over tokens     (ShortGPT, Men et al. 2024)
    cka, linear_r2   how linear the block is (`experiments.reset.statistics.linearity`)
    gradient_norm    ‖∇ loss‖ of the block right after a reset, mean over seeds
    fisher           mean over rows of ‖∇ loss of the row‖² of the trained block: the trace of the
                     empirical Fisher information, at one row a draw

The loss is the mean over predicted targets, in nats. Where it misleads. `skip` leaves out the
biases of the output projections too, which a mask of all heads and the FFN keeps. Gradients and
distances add up over weights, so they compare layers of one model, not models. A few batches are
few rows: `fisher` is a mean of as many numbers as there are rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from ablate.anatomy import Anatomy
from ablate.components import Stack
from ablate.hooks import require_eval
from ablate.identity import has_identity
from ablate.laws import Initial, fresh
from ablate.parts import decoder_inputs
from ablate.places import Place, places_of, weights_at
from ablate.stack import Recorded, record
from experiments.objectives import Batch, losses
from experiments.reset.statistics.linearity import Moments, linear_cka, linear_r2

COLUMNS = ("stack", "layer", "predictor", "value")


def predictors(
    hf_model: nn.Module,
    batches: Sequence[Batch],
    *,
    initial: Initial | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    anatomy: Anatomy | None = None,
) -> pd.DataFrame:
    """Rows (stack, layer, predictor, value) of every block; the model is left as it is.

    Without `initial` there is no distance. Costs, in passes of the model over the batches, one
    forward and one backward for each layer and seed, and about two of each for all the rest.

    Raises ValueError for a model in training mode, without logits or offloaded, and for fewer than
    four rows: the ridge map is fitted, chosen and tested on different ones.
    """
    require_eval(hf_model, "predictors")
    places = places_of(hf_model, "block", anatomy)
    for place in places:
        weights_at(hf_model, place, anatomy)  # refuses what is offloaded or tied, by name
    if not seeds:
        raise ValueError("no seeds: the gradient after a reset needs at least one")
    if (rows := sum(len(batch.targets) for batch in batches)) < 4:
        raise ValueError(f"{rows} rows for predictors: give at least 4, better some hundred")
    values: dict[Place, dict[str, float]] = {place: {} for place in places}
    _add(values, "skip", _skips(hf_model, batches, places, anatomy))
    if initial is not None:
        _add(values, "distance", _distances(hf_model, places, initial, anatomy))
    for stack in dict.fromkeys(place.stack for place in places):
        of_stack = [place for place in places if place.stack == stack]
        for name, found in _shapes(hf_model, batches, of_stack, anatomy).items():
            _add(values, name, found)
    _add(values, "gradient_norm", _gradients(hf_model, batches, places, seeds, anatomy))
    _add(values, "fisher", _fisher(hf_model, batches, places, anatomy))
    rows_ = [
        (place.stack, place.layer, name, value)
        for place, named in values.items()
        for name, value in named.items()
    ]
    return pd.DataFrame(rows_, columns=pd.Index(COLUMNS))


def _add(values: dict[Place, dict[str, float]], name: str, found: dict[Place, float]) -> None:
    for place, value in found.items():
        values[place][name] = value


def _logits(answer: Any, hf_model: nn.Module) -> Tensor:
    if getattr(answer, "logits", None) is None:
        raise ValueError(
            f"{type(hf_model).__name__} makes no logits, so it has no loss: load the model with "
            "its language-model head"
        )
    return answer.logits


def _summed(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Summed loss over the predicted targets, and how many there are."""
    each, predicted = losses(logits, batch)
    return each.sum(), int(predicted.sum())


def _recorded(
    hf_model: nn.Module, batch: Batch, stack: Stack, count: int, anatomy: Anatomy | None
) -> Recorded:
    return record(hf_model, batch.inputs, keep=range(count + 1), stack=stack, anatomy=anatomy)


def _skips(
    hf_model: nn.Module, batches: Sequence[Batch], places: Sequence[Place], anatomy: Anatomy | None
) -> dict[Place, float]:
    """Loss without each block, the others run on what it was given, minus the loss."""
    able = [place for place in places if has_identity(hf_model, place, anatomy)]
    counts: dict[Stack, int] = {}
    for place in places:
        counts[place.stack] = counts.get(place.stack, 0) + 1
    extra = dict.fromkeys(able, 0.0)
    targets = 0
    with torch.no_grad():
        for batch in batches:
            clean, predicted = _summed(_logits(hf_model(**batch.inputs), hf_model), batch)
            targets += predicted
            for stack, count in counts.items():
                run = _recorded(hf_model, batch, stack, count, anatomy)
                for place in (place for place in able if place.stack == stack):
                    above = run.run_blocks(place.layer + 1, count, run.resid(place.layer))
                    lost, _ = _summed(_read(hf_model, run, batch, above), batch)
                    extra[place] += float(lost.double() - clean.double())
    return {place: extra[place] / targets if place in extra else math.nan for place in places}


def _read(hf_model: nn.Module, run: Recorded, batch: Batch, resid: Tensor) -> Tensor:
    """Logits of a last residual stream; of an encoder's, through the decoder."""
    if run.part.stack != "encoder":
        return run.head(resid)
    return hf_model(**decoder_inputs(batch.inputs, run.part.close(resid))).logits


def _distances(
    hf_model: nn.Module, places: Sequence[Place], initial: Initial, anatomy: Anatomy | None
) -> dict[Place, float]:
    found = {}
    for place in places:
        start = fresh(hf_model, place, "rewind", initial=initial, anatomy=anatomy)
        now = weights_at(hf_model, place, anatomy)
        moved = ((now[name].detach().double() - start[name].double()).square() for name in start)
        found[place] = math.sqrt(sum(float(square.sum()) for square in moved))
    return found


def _shapes(
    hf_model: nn.Module, batches: Sequence[Batch], places: Sequence[Place], anatomy: Anatomy | None
) -> dict[str, dict[Place, float]]:
    """Block influence, CKA and R² of one stack. Half the rows fit, a quarter choose, a quarter
    test."""
    parts: list[Moments | None] = [None, None, None]
    cosine, tokens, row = torch.zeros(len(places), dtype=torch.float64), 0, 0
    stack = places[0].stack
    with torch.no_grad():
        for batch in batches:
            run = _recorded(hf_model, batch, stack, len(places), anatomy)
            streams = torch.stack([run.resid(i).cpu().double() for i in range(len(places) + 1)])
            chosen = _tokens(batch, stack, streams)
            similar = nn.functional.cosine_similarity(streams[:-1], streams[1:], dim=-1)
            cosine += similar[:, chosen].sum(1)
            tokens += int(chosen.sum())
            which = (torch.arange(len(chosen)) + row) % 4
            row += len(chosen)
            for part, of in enumerate(((which < 2), (which == 2), (which == 3))):
                some = Moments.of(streams, chosen & of[:, None])
                before = parts[part]
                parts[part] = some if before is None else before + some
    fit, choose, test = (part for part in parts if part is not None)
    whole = fit + choose + test
    return {
        "block_influence": {p: 1 - float(cosine[p.layer]) / tokens for p in places},
        "cka": {p: linear_cka(whole, p.layer) for p in places},
        "linear_r2": {p: linear_r2(fit, choose, test, p.layer) for p in places},
    }


def _tokens(
    batch: Batch, stack: Stack, streams: Float[Tensor, "stream batch pos d_model"]
) -> Bool[Tensor, "batch pos"]:
    """Which positions of a stack are no padding."""
    name = "decoder_attention_mask" if stack == "decoder" else "attention_mask"
    if name in batch.inputs:
        return batch.inputs[name].cpu().bool()
    return torch.ones(streams.shape[1:3], dtype=torch.bool)


def _gradients(
    hf_model: nn.Module,
    batches: Sequence[Batch],
    places: Sequence[Place],
    seeds: Sequence[int],
    anatomy: Anatomy | None,
) -> dict[Place, float]:
    """‖∇ loss‖ of each block at fresh weights of its initialiser, mean over seeds."""
    found = {}
    for place in places:
        norms = []
        for seed in seeds:
            weights = fresh(hf_model, place, "init", seed, anatomy=anatomy)
            summed: dict[str, Tensor] = {}
            targets = 0
            for batch in batches:
                gradients, predicted = _gradient(hf_model, weights, batch)
                targets += predicted
                for name, gradient in gradients.items():
                    summed[name] = summed.get(name, torch.zeros(())) + gradient
            norms.append(_norm(summed.values()) / targets)
        found[place] = sum(norms) / len(norms)
    return found


def _fisher(
    hf_model: nn.Module, batches: Sequence[Batch], places: Sequence[Place], anatomy: Anatomy | None
) -> dict[Place, float]:
    """Mean over rows of ‖∇ loss of the row‖²: one backward a row gives all blocks' gradients."""
    names = {place: tuple(weights_at(hf_model, place, anatomy)) for place in places}
    weights = {
        name: hf_model.get_parameter(name).detach() for named in names.values() for name in named
    }
    sums, rows = dict.fromkeys(places, 0.0), 0
    for batch in _rows(batches):
        gradients, predicted = _gradient(hf_model, weights, batch)
        if predicted:
            rows += 1
            for place, named in names.items():
                sums[place] += (_norm(gradients[name] for name in named) / predicted) ** 2
    return {place: total / rows for place, total in sums.items()}


def _rows(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for row in range(len(batch.targets)):
            yield batch.take(torch.tensor([row]))


def _gradient(
    hf_model: nn.Module, weights: dict[str, Tensor], batch: Batch
) -> tuple[dict[str, Tensor], int]:
    """∇ of the summed loss with `weights` in the place of the model's, and its targets.

    The model itself keeps its weights, flags and gradients; its other weights take no part.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    others = {name: weight.detach() for name, weight in hf_model.named_parameters()}
    with torch.enable_grad():
        answer = functional_call(hf_model, {**others, **leaves}, kwargs=dict(batch.inputs))
        summed, predicted = _summed(_logits(answer, hf_model), batch)
        found = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return gradients, predicted


def _norm(gradients: Any) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
