"""What becomes of students that read the same batches, from their reset to the end of the budget?

A session is one pass over one order of data with one base: every batch goes through the base once,
all students learn from it (`climb`), and at log-spaced steps all are evaluated on the same held-out
rows. The ledger has a row for every student, evaluation and kind of weights:

    raw         the weights of that step, at the constant rate behind the warm-up
    averaged    the average of the last tenth of the way (`cohorts`)
    annealed    once, at the end: the rate went to 0 over `anneal` of the budget more

A student whose averaged gap stays below `enough` for three evaluations has recovered and stops; one
in ten, chosen by the hash of what it is, goes on to the end, so that the rule can be checked. One
whose loss is not finite has diverged and stops; one that ends 0.5 nat above the loss at its reset
has diverged too, but nobody is stopped for that on the way: towards the old block's output the loss
may well rise before it falls.

The checkpoint is one file, written beside the old one and renamed: a session killed at any moment
goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.components import Stack
from experiments.objectives import Batch, Objective
from experiments.reset.climb import Cohort, Pass, evaluate, evaluate_base, learn
from experiments.reset.cohorts import Training, Treatment
from experiments.objectives import IGNORED

DIVERGED = 0.5
"""Nats above the loss at the reset."""
HELD = 3
"""Evaluations in a row below `enough` that make a student stop."""
IN_FLIGHT = 3 * 2**30
"""Bytes of activations that one wave of students may keep for its backward pass."""
KEPT = 2**30
"""Bytes of held-out residual streams kept from one evaluation to the next."""


@dataclass(frozen=True, eq=False)
class Session:
    """Students of one base that read the same batches.

    Attributes:
        keys: columns of the ledger that are the same for all its rows.
        held_out: batches that every evaluation reads.
        steps: of the constant-rate part.
        evaluations: steps after which all are evaluated; 0 and `steps` are among them.
        enough: gap, in nats, at which a student has recovered; nan never stops one.
    """

    model: nn.Module
    objective: Objective
    held_out: Sequence[Batch]
    treatments: Sequence[Treatment]
    keys: Mapping[str, Any]
    steps: int
    evaluations: Sequence[int]
    stack: Stack | None = None
    warmup: int = 10
    anneal: float = 0.2
    enough: float = math.nan
    initial: Mapping[str, Tensor] | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    autocast: torch.dtype | None = None
    save_every: float = 60.0

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return next(self.model.parameters()).device

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of all forwards."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def rate_share(self, step: int) -> float:
        """Share of the peak rate at a step: warm-up, constant, then down to 0."""
        if step < self.steps:
            return min(1.0, (step + 1) / self.warmup)
        return max(0.0, 1 - (step - self.steps + 1) / (self.anneal_steps + 1))

    @property
    def anneal_steps(self) -> int:
        """Steps behind the budget in which the rate falls."""
        return round(self.anneal * self.steps)


@dataclass(eq=False)
class _Running:
    """Where a session stands."""

    trainings: list[Training]
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    reset_losses: dict[str, float] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


def retrain(
    session: Session,
    checkpoint: Path | None = None,
    *,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> pd.DataFrame:
    """Run the session to its end, from `checkpoint` if there is one; the ledger's rows.

    Raises ValueError for a treatment the base does not allow.
    """
    session.model.eval()
    session.model.requires_grad_(False)
    running = _Running(_trainings(session))
    examiner = _Examiner(session)
    if checkpoint is not None and checkpoint.exists():
        _resume(session, running, checkpoint)
    saved = time.monotonic()
    last = session.steps + session.anneal_steps
    evaluations = set(session.evaluations)
    while running.trainings:
        started = time.monotonic()
        if running.step in evaluations and running.step <= session.steps:
            _examine(session, running, examiner, ("raw", "averaged") if running.step else ("raw",))
            running.trainings = [t for t in running.trainings if t.stacks]
        if running.step == last and last > session.steps:
            _examine(session, running, examiner, ("annealed",))
        if running.step == last:
            break
        running.tokens += _step(session, running)
        running.seconds += time.monotonic() - started
        running.step += 1
        progress(running.step, last)
        if checkpoint is not None and time.monotonic() - saved > session.save_every:
            _save(session, running, checkpoint)
            saved = time.monotonic()
    return pd.DataFrame(running.rows)


def name_of(treatment: Treatment) -> str:
    """What a student is, in one string: equal for equal treatments only."""
    resets, trains = (",".join(map(str, p)) for p in (treatment.resets, treatment.trains))
    t = treatment
    return f"{t.arm} {resets} {trains} {t.law} {t.target} {t.seed} {t.rate:g}"


def log_spaced(steps: int, per_decade: float, first: int = 1) -> list[int]:
    """0, about `per_decade` whole steps a decade from `first` on, and `steps`."""
    decades = math.log10(steps / first) if steps > first else 0.0
    points = np.logspace(
        math.log10(first), math.log10(max(steps, first)), 1 + math.ceil(per_decade * decades)
    )
    return sorted({0, steps, *(int(round(p)) for p in points if p <= steps)})


def _trainings(session: Session) -> list[Training]:
    groups: dict[Any, list[Treatment]] = {}
    for treatment in session.treatments:
        groups.setdefault(treatment.together, []).append(treatment)
    return [
        Training.of(
            session.model,
            members,
            initial=session.initial,
            weight_decay=session.weight_decay,
            clip=session.clip,
        )
        for members in groups.values()
    ]


def _step(session: Session, running: _Running) -> int:
    """Every student learns from one batch; its tokens."""
    batch = session.objective.at(running.step).to(session.device)
    with session.precision():
        passing = Pass.of(session.model, batch, session.stack)
        for wave in _waves(passing, [t.cohort for t in running.trainings]):
            learn(passing, wave)
    for training in running.trainings:
        training.update(session.rate_share(running.step))
    return batch.tokens


def _waves(passing: Pass, cohorts: Sequence[Cohort]) -> list[list[Cohort]]:
    """Cohorts that climb together without keeping more than IN_FLIGHT bytes, roughly counted."""
    rows, pos, width = passing.recorded.shape
    waves: list[list[Cohort]] = [[]]
    used = 0
    for cohort in sorted(cohorts, key=lambda c: c.first):
        blocks = 1 if cohort.target == "hidden" else passing.recorded.n_blocks - cohort.first
        size = rows * pos * width * 64 * blocks * cohort.count  # about 16 numbers a coordinate
        if waves[-1] and used + size > IN_FLIGHT:
            waves.append([])
            used = 0
        waves[-1].append(cohort)
        used += size
    return waves


# evaluation


class _Examiner:
    """The held-out rows, with what the base makes of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.counts = torch.cat([(b.targets != IGNORED).sum(1) for b in session.held_out]).double()
        self.kept: dict[int, Pass] = {}
        self.room = KEPT
        found = [self._passing(i) for i in range(len(session.held_out))]
        with session.precision():
            self.base = torch.cat([evaluate_base(p).double().cpu() for p in found])
        self.loss = float(self.base.sum() / self.counts.sum())

    def _passing(self, i: int) -> Pass:
        if i in self.kept:
            return self.kept[i]
        session = self.session
        with session.precision():
            passing = Pass.of(session.model, session.held_out[i].to(session.device), session.stack)
        size = sum(t.numel() * t.element_size() for t in passing.recorded.kept.values())
        if size <= self.room:
            self.kept[i] = passing
            self.room -= size
        return passing

    def sums(self, cohorts: Sequence[Cohort]) -> list[Float[Tensor, "student row"]]:
        """Summed loss of every held-out row, for every student."""
        found: list[list[Tensor]] = [[] for _ in cohorts]
        for i in range(len(self.session.held_out)):
            passing = self._passing(i)
            with self.session.precision():
                for c, sums in enumerate(evaluate(passing, cohorts)):
                    found[c].append(sums.double().cpu())
        return [torch.cat(sums, dim=1) for sums in found]

    def gap(self, sums: Float[Tensor, "row"]) -> tuple[float, float]:
        """Loss minus the base's on the same rows, and its standard error over rows."""
        difference = sums - self.base
        gap = float(difference.sum() / self.counts.sum())
        if len(sums) < 2:
            return gap, math.nan
        residual = (difference - gap * self.counts) / self.counts.mean()
        return gap, float(residual.std() / math.sqrt(len(sums)))

    def skipped(self, layer: int) -> float:
        """Loss with the block replaced by the identity."""
        cohort = Cohort({layer: _Skipped()})  # pyright: ignore[reportArgumentType]
        return float(self.sums([cohort])[0].sum() / self.counts.sum())


class _Skipped(nn.Module):
    """A block that gives back its residual stream."""

    count = 1

    def forward(self, resid: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return resid


def _examine(
    session: Session, running: _Running, examiner: _Examiner, kinds: Sequence[str]
) -> None:
    """A row for every student and kind of weights; students that are done leave."""
    cohorts = [t.cohort for t in running.trainings]
    before = len(running.rows)
    for kind in kinds:
        with contextlib.ExitStack() as stack:
            for training in running.trainings:
                if kind == "averaged":
                    stack.enter_context(training.averaged())
            found = examiner.sums(cohorts)
        for training, sums in zip(running.trainings, found, strict=True):
            for member, mine in zip(training.members, sums, strict=True):
                running.rows.append(_row(session, running, examiner, training, member, mine, kind))
    _let_go(session, running, running.rows[before:])


def _row(
    session: Session,
    running: _Running,
    examiner: _Examiner,
    training: Training,
    member: Treatment,
    sums: Float[Tensor, "row"],
    kind: str,
) -> dict[str, Any]:
    name = name_of(member)
    gap, stderr = examiner.gap(sums)
    loss = examiner.loss + gap
    if running.step == 0:
        running.reset_losses[name] = loss
        running.held[name] = 0
    place = (member.resets or member.trains)[0]
    one_layer = len(member.layers) == 1
    if running.step == 0 and one_layer:
        key = f"skip {place.layer}"
        if key not in running.reset_losses:
            running.reset_losses[key] = examiner.skipped(place.layer)
    trained = sum(stack[0].numel() for stack in training.stacks)
    return {
        **session.keys,
        "parameters": trained,
        "arm": member.arm,
        "stack": place.stack,
        "layer": place.layer,
        "layers": " ".join(map(str, member.layers)),
        "part": place.part,
        "law": member.law if member.resets else "",
        "target": member.target,
        "seed": member.seed,
        "rate": member.rate,
        "step": running.step,
        "tokens": running.tokens,
        "seconds": running.seconds,
        "weights": kind,
        "loss": loss,
        "gap": gap,
        "stderr": stderr,
        "loss_base": examiner.loss,
        "loss_reset": running.reset_losses[name],
        "loss_skip": running.reset_losses.get(f"skip {place.layer}", math.nan)
        if one_layer
        else math.nan,
        "status": "running",
        "name": name,
    }


def _let_go(session: Session, running: _Running, rows: Sequence[dict[str, Any]]) -> None:
    """Students that recovered or diverged stop; at the end everybody's status is said."""
    gone: set[str] = set()
    for row in rows:
        name = row["name"]
        if not math.isfinite(row["loss"]):
            row["status"] = "diverged"
            gone.add(name)
        elif row["weights"] == "averaged":
            running.held[name] = running.held[name] + 1 if row["gap"] <= session.enough else 0
            if running.held[name] >= HELD and not _goes_on(name):
                row["status"] = "recovered"
                gone.add(name)
        if row["status"] == "running" and running.step >= session.steps:
            above = row["loss"] > row["loss_reset"] + DIVERGED
            row["status"] = "diverged" if above else "budget"
    if not gone:
        return
    left = []
    for training in running.trainings:
        leaving = [k for k, m in enumerate(training.members) if name_of(m) in gone]
        kept = training.without(session.model, leaving) if leaving else training
        if kept is not None:
            left.append(kept)
    running.trainings = left


def _goes_on(name: str) -> bool:
    """One student in ten, whatever becomes of it."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


# on disk


def _save(session: Session, running: _Running, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"rng/cpu": torch.get_rng_state()}
    if session.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(session.device)
    for t, training in enumerate(running.trainings):
        tensors |= {f"{t}/{name}": tensor for name, tensor in training.state().items()}
    state = {
        "members": [[name_of(m) for m in t.members] for t in running.trainings],
        "steps": [t.step for t in running.trainings],
        "rows": running.rows,
        "step": running.step,
        "tokens": running.tokens,
        "seconds": running.seconds,
        "reset_losses": running.reset_losses,
        "held": running.held,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {n: t.detach().contiguous() for n, t in tensors.items()},
        unfinished,
        metadata={"state": json.dumps(state)},
    )
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _resume(session: Session, running: _Running, path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    asked = {name_of(m): m for m in session.treatments}
    if any(name not in asked for names in state["members"] for name in names):
        raise ValueError(f"{path} belongs to other students: remove it, or give another --runs")
    resumed = []
    for t, (names, step) in enumerate(zip(state["members"], state["steps"], strict=True)):
        members = [asked[name] for name in names]
        training = Training.of(
            session.model,
            members,
            initial=session.initial,
            weight_decay=session.weight_decay,
            clip=session.clip,
        )
        prefix = f"{t}/"
        mine = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        training.load(mine, step)
        resumed.append(training)
    running.trainings = resumed
    for name in ("rows", "step", "tokens", "seconds", "reset_losses", "held"):
        setattr(running, name, state[name])
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"], session.device)
