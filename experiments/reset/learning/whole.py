"""What becomes of a model of which more than a few blocks are trained, one student at a time?

The plain way: a copy of the base, `requires_grad` where something is trained, the model's own full
forward, torch's backward and AdamW. It serves the arms in which no prefix is frozen,

    all              the base, perhaps with a reset place, everything trained
    scratch          a model that was never trained, everything trained
    random-context   a model that was never trained, of which only the places are trained

and, with scope `places`, it is the slow oracle and the benchmark's peer of `session`, which it
equals in every loss: same batches, rates, clipping, averages, evaluations and ledger.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.parts import Part
from ablate.placement import require_materialised
from ablate.places import block_at
from ablate.reset import masks_all, weights_at
from experiments import checkpoints
from experiments.objectives import Batch, losses
from experiments.reset.learning.climb import Pass, block_error, divergence
from experiments.reset.learning.cohorts import window
from experiments.reset.learning.session import Session, own_chance
from experiments.reset.learning.treatments import Treatment
from experiments.training import is_decayed


def retrain_whole(
    session: Session,
    treatment: Treatment,
    checkpoint: Path | None = None,
    *,
    model: nn.Module | None = None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> pd.DataFrame:
    """One student, the plain way; the ledger's rows, as `session.retrain` gives them.

    The session's own treatments are not looked at. `model` is what the student begins as, if it is
    not what `prepared` makes of the base; what requires a gradient is trained. Raises ValueError
    for a place or a law that the model does not have, and for an offloaded model.
    """
    with own_chance(session, treatment.seed):
        return _retrain_whole(session, treatment, checkpoint, model, progress)


def _retrain_whole(
    session: Session,
    treatment: Treatment,
    checkpoint: Path | None,
    model: nn.Module | None,
    progress: Callable[[int, int], None],
) -> pd.DataFrame:
    require_materialised(session.model.named_parameters())
    session.model.eval()
    session.model.requires_grad_(False)
    examiner, ledger = session.examiner(), session.ledger()
    model = prepared(session, treatment) if model is None else model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masks = _masks(session.model, treatment)
    kept = {name: trained[name].detach().clone() for name in masks}
    averages = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = _optimiser(session, trained)
    step, tokens, seconds = 0, 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        state = _resume(session, checkpoint, treatment, trained, averages, optimiser)
        step, tokens, seconds = state["at"]
        ledger.load(state["ledger"])
    saved, done = time.monotonic(), False
    while not done:
        for kind in session.kinds(step):
            with _averaged(trained, averages) if kind == "averaged" else nullcontext():
                sums = row_sums(session, model, examiner.held_out)
                swapped = examiner.strangers and examiner.strangers.held_out
                strange = row_sums(session, model, swapped) if swapped else None
            done |= ledger.write(
                treatment,
                sums,
                kind,
                examiner,
                strange=strange,
                step=step,
                tokens=tokens + session.fitted_tokens(treatment),
                seconds=seconds,
                parameters=sum(p.numel() for p in trained.values()),
            )
        if done or step == session.last or not trained:
            break
        started = time.monotonic()
        batch = session.batch(step)
        with session.precision(), learning(model, treatment) if session.dropout else nullcontext():
            loss = plain_loss(session, model, treatment, session.share.of(batch))
        loss.backward()
        if session.share.count > 1:
            for parameter in trained.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            session.share.add_(p.grad for p in trained.values() if p.grad is not None)
        for name, mask in masks.items():
            trained[name].grad.mul_(mask)  # pyright: ignore[reportOptionalMemberAccess]
        norm = nn.utils.clip_grad_norm_(trained.values(), session.clip)
        for group in optimiser.param_groups:
            group["lr"] = treatment.rate * session.rate_share(step) if norm.isfinite() else 0.0
        if not norm.isfinite():
            for parameter in trained.values():
                parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in masks.items():
                trained[name].copy_(torch.where(mask, trained[name], kept[name]))
            step += 1
            for name, parameter in trained.items():
                averages[name].lerp_(parameter, window(step))
        tokens += batch.tokens
        seconds += time.monotonic() - started
        progress(step, session.last)
        late = time.monotonic() - saved > session.save_every
        if checkpoint is not None and late and session.share.leads:
            tensors = _tensors(trained, averages, optimiser)
            state = {
                "name": treatment.name,
                "at": [step, tokens, seconds],
                "ledger": ledger.state(),
            }
            checkpoints.write(checkpoint, tensors, state, session.device)
            saved = time.monotonic()
    return pd.DataFrame(ledger.rows)


def prepared(session: Session, treatment: Treatment) -> nn.Module:
    """The model a student begins as: copied or drawn anew, reset, frozen but for what it trains."""
    if treatment.scope in ("scratch", "random-context"):
        model = untrained(session.model, treatment.seed)
    else:
        model = copy.deepcopy(session.model)
        with torch.no_grad():
            named = dict(model.named_parameters())
            for name, tensor in session.starts([treatment])[0].items():
                named[name].copy_(tensor)
    model.eval()
    everything = treatment.scope in ("all", "scratch")
    model.requires_grad_(everything)
    if not everything:
        for place in treatment.trains:
            for parameter in weights_at(model, place).values():
                parameter.requires_grad_(True)
    return model


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same class and config, drawn by its own initialiser."""
    like = next(model.parameters())
    kind: Any = type(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(copy.deepcopy(model.config))
    return made.to(device=like.device, dtype=like.dtype)


@contextmanager
def learning(model: nn.Module, treatment: Treatment) -> Iterator[None]:
    """What is trained in training mode: all of the model, or blocks of it. Beside another model's
    encoder nothing is: dropout does not draw there."""
    modules = [model] if treatment.scope in ("all", "scratch") else []
    if not treatment.encoder:
        modules += [block_at(model, place).module for place in treatment.trains]
    for module in modules:
        module.train()
    try:
        yield
    finally:
        model.eval()


def plain_loss(
    session: Session, model: nn.Module, treatment: Treatment, batch: Batch
) -> Float[Tensor, ""]:
    """The treatment's loss from full forwards of the student and, where needed, of the base; of a
    share of a batch, what it adds to the loss of the whole."""
    total = torch.zeros((), device=session.device)
    if treatment.target in ("lm", "mix", "logits"):
        logits = model(**batch.inputs, use_cache=False).logits
        found, predicted = losses(logits, batch)
        count = session.share.total(predicted.sum())
        if treatment.target == "logits":
            with torch.no_grad():
                old = session.model(**batch.inputs, use_cache=False).logits
            total = divergence(logits[predicted], old[predicted]).sum() / count
        else:
            total = found.sum() / count
    if treatment.target in ("hidden", "mix"):
        (layer,) = treatment.layers
        passing = Pass.of(session.model, batch, session.stack)
        block = Part.of(model, session.stack, None).blocks[layer]
        x, y = passing.recorded.resid(layer), passing.recorded.resid(layer + 1)
        total = total + block_error(passing.block(layer, x, block), x, y, 1, session.share)[0]
    return total


@torch.no_grad()
def row_sums(session: Session, model: nn.Module, held_out: Sequence[Batch]) -> Float[Tensor, "row"]:
    """Summed loss of every held-out row."""
    found = [torch.zeros(len(batch.targets), dtype=torch.float64) for batch in held_out]
    for i in filter(session.share.deals, range(len(found))):
        here = held_out[i].to(session.device)
        with session.precision():
            logits = model(**here.inputs, use_cache=False).logits
        found[i] = losses(logits, here)[0].sum(1).double().cpu()
    return session.share.total(torch.cat(found))


def _optimiser(session: Session, trained: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {
            "params": [p for n, p in trained.items() if is_decayed(n, p.ndim) is decayed],
            "weight_decay": session.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def _masks(model: nn.Module, treatment: Treatment) -> dict[str, Tensor]:
    """Which entries are trained, of tensors of which not all are."""
    places = treatment.scope == "places" and treatment.trains
    return masks_all(model, places) if places else {}


@contextmanager
def _averaged(trained: Mapping[str, nn.Parameter], averages: dict[str, Tensor]) -> Iterator[None]:
    def swap() -> None:
        for name, parameter in trained.items():
            parameter.data, averages[name] = averages[name], parameter.data

    swap()
    try:
        yield
    finally:
        swap()


def _tensors(
    trained: Mapping[str, nn.Parameter],
    averages: Mapping[str, Tensor],
    optimiser: torch.optim.AdamW,
) -> dict[str, Tensor]:
    tensors = {f"weights/{name}": p.data for name, p in trained.items()}
    tensors |= {f"average/{name}": average for name, average in averages.items()}
    for name, p in trained.items():
        tensors |= {f"{key}/{name}": value for key, value in optimiser.state[p].items()}
    return tensors


def _resume(
    session: Session,
    path: Path,
    treatment: Treatment,
    trained: Mapping[str, nn.Parameter],
    averages: Mapping[str, Tensor],
    optimiser: torch.optim.AdamW,
) -> dict[str, Any]:
    tensors, state = checkpoints.read(path, session.device)
    if state["name"] != treatment.name:
        raise ValueError(f"{path} belongs to another student: remove it, or give another --runs")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"weights/{name}"])
            averages[name].copy_(tensors[f"average/{name}"])
            moments = ("step", "exp_avg", "exp_avg_sq")
            optimiser.state[parameter] = {key: tensors[f"{key}/{name}"] for key in moments}
    return state
