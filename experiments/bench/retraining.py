"""Layers that are reset and retrained: by a session, or the plain way, one student after another?

A run is one training step of every student on the same batch; its values are the losses before the
step, so the curves of both sides are compared step by step.

    reset-lm          a student of every layer, the model's own loss        plain
    reset-hidden      the same, towards the old block's output              plain, plain-stopping
    reset-all-train   the same as reset-lm                                  every-gradient
    reset-seeds       several seeds of the middle layer, the model's loss   plain

    ours              `session.advance`: the base's blocks once for all, the graph begins at L
    plain             requires_grad off for all but the block, the model's own forward, torch's
                      backward, clipping and AdamW; towards the old block's output, a forward of the
                      model with a hook on block L, then the student's block alone
    plain-stopping    the same, but the forward is left behind block L
    every-gradient    as plain, with requires_grad everywhere: gradients of all weights are made,
                      and the block's are used

What arithmetic allows, in products of matrices; t of a block's weights, a of its attention, H of
the head. A product costs as much again for the gradient of each factor that has one, attention
twice its forward; a block costs t + a, and in the backward t + 2a if frozen, 2t + 2a if trained:

    plain, lm        N (t + a) + 2H + (N − 1 − L)(t + 2a) + 2t + 2a
    ours, lm         (max L) (t + a) + Σ of the same without the L blocks below
    every-gradient   N (t + a) + 3H + N (2t + 2a)
    plain, hidden    N (t + a) + 3t + 3a;  stopping: L + 1 for N;  ours: N once

With H = a = 0 these are the unit costs 2N − L + 1, 3N and N + 3. Where it misleads: norms, AdamW
and what Python does are in the times and not in the bound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.hooks import execution_device
from ablate.places import Place, block_at
from experiments.bench.arithmetic import Weights
from experiments.memory import keep_freed
from experiments.objectives import Batch, NextToken, Objective, losses
from experiments.orders import Order
from experiments.reset.learning.climb import block_error
from experiments.reset.learning.session import Session, advance, trainings_of
from experiments.reset.learning.treatments import Target, Treatment, starts

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.bench.works import Work

Run = Callable[[], Float[np.ndarray, "student"]]
TARGETS: dict[str, Target] = {"reset-hidden": "hidden"}
RATE, CLIP, DECAY = 1e-3, 1.0, 0.1
WARM = 2
"""Steps before anything is timed."""


def ours(model: HookedModel, work: Work) -> Run:
    """A session's steps."""
    keep_freed()  # as `session.retrain` does
    hf_model = _ready(model)
    objective = _OneBatch(NextToken(), Order(()), torch.from_numpy(work.rows))
    session = Session(
        hf_model,
        objective,
        held_out=(),
        treatments=treatments(work),
        keys={},
        steps=10**9,
        evaluations=(),
        warmup=1,
        weight_decay=DECAY,
        clip=CLIP,
        dropout=False,  # or two ways could not give the same losses
    )
    trainings = trainings_of(session)
    members = [member.name for training in trainings for member in training.members]
    order = [members.index(treatment.name) for treatment in session.treatments]

    def run() -> Float[np.ndarray, "student"]:
        found, _ = advance(session, trainings, 0)
        return torch.cat(found)[order].cpu().numpy()

    return _warm(run)


def plain(model: HookedModel, work: Work) -> Run:
    """One student after another, by full forwards."""
    return _one_by_one(model, work, stopping=False, everywhere=False)


def plain_stopping(model: HookedModel, work: Work) -> Run:
    """The same; forwards end behind the student's block."""
    return _one_by_one(model, work, stopping=True, everywhere=False)


def every_gradient(model: HookedModel, work: Work) -> Run:
    """The same with gradients of all weights."""
    return _one_by_one(model, work, stopping=False, everywhere=True)


def treatments(work: Work) -> list[Treatment]:
    """The students, in the order of the work's values."""
    target = TARGETS.get(work.name, "lm")
    return [
        Treatment("A0", (Place(layer),), (Place(layer),), "init", target, seed, RATE)
        for layer, seed in work.students
    ]


def operations(weights: Weights, work: Work) -> dict[str, int]:
    """Contender -> operations of one step of all students; the fewest under `ours`."""
    rows, length = work.rows.shape
    slots, pairs = rows * length, rows * (length * (length + 1) // 2)
    t, a = 2 * slots * weights.token, weights.attention(pairs)
    head, blocks = 2 * slots * weights.unembed, weights.blocks
    layers = [layer for layer, _ in work.students]
    trained, frozen = 2 * t + 2 * a, t + 2 * a
    if TARGETS.get(work.name) == "hidden":
        alone = t + a + trained
        return {
            "ours": (max(layers) + 1) * (t + a) + len(layers) * alone,
            "plain": sum(blocks * (t + a) + alone for _ in layers),
            "plain-stopping": sum((layer + 1) * (t + a) + alone for layer in layers),
        }
    above = [2 * head + (blocks - 1 - layer) * frozen + trained for layer in layers]
    climbed = sum((blocks - layer) * (t + a) for layer in layers)
    return {
        "ours": max(layers) * (t + a) + climbed + sum(above),
        "plain": len(layers) * blocks * (t + a) + sum(above),
        "every-gradient": len(layers) * (blocks * (t + a + trained) + 3 * head),
    }


def head_blocks(weights: Weights, work: Work) -> float:
    """h: operations of the head's forward over those of a block's."""
    rows, length = work.rows.shape
    slots, pairs = rows * length, rows * (length * (length + 1) // 2)
    return 2 * slots * weights.unembed / weights.block(slots, pairs)


@dataclass(frozen=True, eq=False)
class _OneBatch(Objective):
    """Every step reads all rows."""

    def at(self, step: int) -> Batch:
        return self.task(self.rows, np.random.default_rng(0))


def _ready(model: HookedModel) -> nn.Module:
    hf_model: Any = model.model
    hf_model.set_attn_implementation("sdpa")  # as a model is loaded without this toolkit
    return hf_model.eval().requires_grad_(False)


def _warm(run: Run) -> Run:
    for _ in range(WARM):
        run()
    return run


def _one_by_one(model: HookedModel, work: Work, *, stopping: bool, everywhere: bool) -> Run:
    hf_model = _ready(model)
    if everywhere:
        hf_model.requires_grad_(True)
    batch = NextToken()(torch.from_numpy(work.rows), np.random.default_rng(0))
    batch = batch.to(execution_device(hf_model))
    students = [_student(hf_model, treatment) for treatment in treatments(work)]

    def run() -> Float[np.ndarray, "student"]:
        found = []
        for path, block, optimiser in students:
            if work.name == "reset-hidden":
                loss = _hidden_loss(hf_model, path, block, batch, stopping)
            else:
                with _in_place(hf_model, path, block):
                    logits = hf_model(**batch.inputs, use_cache=False).logits
                nats, predicted = losses(logits, batch)
                loss = nats.sum() / predicted.sum()
            loss.backward()
            nn.utils.clip_grad_norm_(block.parameters(), CLIP)
            optimiser.step()
            optimiser.zero_grad()
            if everywhere:
                hf_model.zero_grad()
            found.append(loss.detach())
        return torch.stack(found).cpu().numpy()

    return _warm(run)


def _student(
    hf_model: nn.Module, treatment: Treatment
) -> tuple[str, nn.Module, torch.optim.Optimizer]:
    """Where it stands, a reset copy of the block, and what trains that."""
    given = block_at(hf_model, treatment.trains[0])
    block = copy.deepcopy(given.module)
    named = dict(block.named_parameters())
    with torch.no_grad():
        for name, tensor in starts(hf_model, treatment).items():
            named[name.removeprefix(f"{given.path}.")].copy_(tensor)
    weights = list(block.requires_grad_(True).parameters())
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=treatment.rate, betas=(0.9, 0.95), fused=True)
    return given.path, block, optimiser


@contextmanager
def _in_place(hf_model: nn.Module, path: str, block: nn.Module) -> Iterator[None]:
    """The model with another block at `path`."""
    parent, _, name = path.rpartition(".")
    above, old = hf_model.get_submodule(parent), hf_model.get_submodule(path)
    setattr(above, name, block)
    try:
        yield
    finally:
        setattr(above, name, old)


class _Seen(Exception):  # noqa: N818 (it is no error: raised in a hook, caught around it)
    """The block that was waited for has run."""


def _hidden_loss(
    hf_model: nn.Module, path: str, block: nn.Module, batch: Batch, stopping: bool
) -> Float[Tensor, ""]:
    """How far the block is from the old one's output, for the input that has in the model."""
    call: list[tuple[Any, dict[str, Any], Tensor]] = []

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        call.append((args, kwargs, out[0] if isinstance(out, tuple) else out))
        if stopping:
            raise _Seen

    base: Any = getattr(hf_model, "base_model")  # noqa: B009 (nn.Module's getattr is Tensor)
    handle = hf_model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            base(**batch.inputs, use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
    ((args, kwargs, y),) = call
    out = block(*args, **kwargs)
    x = args[0] if args else kwargs["hidden_states"]
    return block_error(out[0] if isinstance(out, tuple) else out, x, y, 1)[0]
