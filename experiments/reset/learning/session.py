"""What becomes of students that read the same batches, from their reset to the end of the budget?

A session is one pass over one order of data with one base: every batch goes through the base once,
all students learn from it (`climb`), and at log-spaced steps all are evaluated on the same held-out
rows. The ledger has a row for every student, evaluation and kind of weights:

    raw         the weights of that step, at the rate of the trunk
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
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.components import Stack
from ablate.hooks import execution_device
from experiments import checkpoints
from experiments.memory import keep_freed
from experiments.objectives import Batch, Objective
from experiments.prompted_data import PromptObjective
from experiments.reset.learning.climb import Cohort, Pass, depth, learn, needed
from experiments.reset.learning.cohorts import Training
from experiments.reset.learning.examiner import Examiner
from experiments.reset.learning.ledger import Ledger
from experiments.reset.learning.linear_start import fitting_batches, linear_starts
from experiments.reset.learning.parallel import ALONE, Share
from experiments.reset.learning.prefix_cache import PrefixCache
from experiments.reset.learning.treatments import Treatment, starts

IN_FLIGHT = {"cpu": 2**25}
"""Bytes of activations that one wave of students may keep for its backward pass, by type of device
(3 GiB on others): on a CPU little, as what its caches and freed memory hold is used again."""


@dataclass(frozen=True, eq=False)
class Session:
    """Students of one base that read the same batches.

    Attributes:
        keys: columns of the ledger that are the same for all its rows.
        held_out: batches that every evaluation reads.
        steps: of the budget.
        evaluations: steps after which all are evaluated; 0 and `steps` are among them.
        hold: steps at the peak rate, after which it falls as 1/√step: a reset block has far to go
            at first, and a rate that got it there keeps it from arriving.
        parts: a batch of the objective makes so many steps, each with its share of the rows.
        anneal: steps behind the budget in which the rate falls to 0, as a share of `steps`.
        enough: gap, in nats, at which a student has recovered; nan never stops one.
        share: which of several processes with the same session this is (`parallel`).
        cache: of the base's residual streams, for batches that are read more than once.
        dropout: what is trained is in training mode.
    """

    model: nn.Module
    objective: Objective | PromptObjective
    held_out: Sequence[Batch]
    treatments: Sequence[Treatment]
    keys: Mapping[str, Any]
    steps: int
    evaluations: Sequence[int]
    stack: Stack | None = None
    parts: int = 1
    warmup: int = 10
    hold: int = 64
    anneal: float = 0.2
    enough: float = math.nan
    initial: Mapping[str, Tensor] | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    autocast: torch.dtype | None = None
    save_every: float = 60.0
    share: Share = ALONE
    cache: PrefixCache | None = None
    dropout: bool = True

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return execution_device(self.model)

    @property
    def last(self) -> int:
        """Steps in all, those in which the rate falls among them."""
        return self.steps + round(self.anneal * self.steps)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of all forwards."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def rate_share(self, step: int) -> float:
        """Share of the peak rate at a step: warm-up, constant, as 1/√step, then down to 0.

        The budget has no say in it before its end, so that a longer run begins as a shorter one.
        """
        trunk = min(1.0, (step + 1) / self.warmup) * min(1.0, math.sqrt(self.hold / (step + 1)))
        if step < self.steps:
            return trunk
        return trunk * (1 - (step - self.steps + 1) / (self.last - self.steps + 1))

    def batch(self, step: int) -> Batch:
        """What step `step` learns from: a pure function of the step."""
        whole, part = divmod(step, self.parts)
        batch = self.objective.at(whole)
        if self.parts > 1:
            batch = batch.take(torch.arange(len(batch.targets)).chunk(self.parts)[part])
        return batch.to(self.device)

    @cached_property
    def fitting(self) -> tuple[Batch, ...]:
        """What students of the law linear are fitted to: the first batches of the order."""
        return tuple(fitting_batches(self.model, self.batch, self.steps))

    def fitted_tokens(self, treatment: Treatment) -> int:
        """Tokens that a student has cost before its first step; it reads them again."""
        return sum(batch.tokens for batch in self.fitting) if treatment.is_fitted else 0

    def starts(self, treatments: Sequence[Treatment]) -> list[dict[str, Tensor]]:
        """The weights that students begin with, by name in the model: those that are reset."""
        fitted = [t for t in treatments if t.is_fitted]
        found = iter(())
        if fitted:
            found = iter(linear_starts(self.model, fitted, self.fitting, self.stack, self.share))
        return [
            next(found) if t.is_fitted else starts(self.model, t, self.initial) for t in treatments
        ]

    def passing(self, batch: Batch, cohorts: Sequence[Cohort]) -> Pass:
        """The batch's way through the base, as far as `cohorts` read it: from the cache where it
        has been this way before and reading is the faster."""
        keep = needed(cohorts, depth(self.model, self.stack))
        if self.cache is not None:
            return self.cache.passing(batch, self.stack, keep, self.share)
        return Pass.of(self.model, batch, self.stack, keep, self.share)

    def ledger(self) -> Ledger:
        """An empty one."""
        return Ledger(self.keys, self.enough, self.steps)

    def examiner(self) -> Examiner:
        """The base on the held-out rows."""
        first = {min(t.layers) for t in self.treatments if t.layers}
        return Examiner(self.model, self.held_out, self.stack, self.autocast, first, self.share)

    def kinds(self, step: int) -> tuple[str, ...]:
        """Which weights are evaluated after `step` steps."""
        if step == self.last and self.last > self.steps:
            return ("annealed",)
        if step > self.steps or step not in self.evaluations:
            return ()
        return ("raw", "averaged") if step else ("raw",)


@dataclass(eq=False)
class _Running:
    """Where a session stands."""

    trainings: list[Training]
    ledger: Ledger
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def retrain(
    session: Session,
    checkpoint: Path | None = None,
    *,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> pd.DataFrame:
    """Run the session to its end, from `checkpoint` if there is one; the ledger's rows.

    Raises ValueError for a treatment the base does not allow.
    """
    with own_chance(session, session.treatments[0].seed):
        return _retrain(session, checkpoint, progress)


@contextlib.contextmanager
def own_chance(session: Session, seed: int) -> Iterator[None]:
    """Random generators that begin with `seed` (and the process), for dropout; outside, all goes
    on as it was."""
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + 1_000_003 * session.share.rank)
        yield


def _retrain(
    session: Session, checkpoint: Path | None, progress: Callable[[int, int], None]
) -> pd.DataFrame:
    keep_freed()
    session.model.eval()
    session.model.requires_grad_(False)
    if session.share.count > 1:
        for step in range(session.parts):  # steps of all sizes: refused before any work
            session.share.of(session.batch(step))
    running = _Running(trainings_of(session), session.ledger())
    examiner = session.examiner()
    if checkpoint is not None and checkpoint.exists():
        _resume(session, running, checkpoint)
    saved = time.monotonic()
    while True:
        _agree(session.share, running)
        for kind in session.kinds(running.step):
            _examine(session, running, examiner, kind)
        if running.step == session.last or not running.trainings:
            break
        started = time.monotonic()
        running.tokens += advance(session, running.trainings, running.step)[1]
        running.seconds += time.monotonic() - started
        running.step += 1
        progress(running.step, session.last)
        late = time.monotonic() - saved > session.save_every
        if checkpoint is not None and late and session.share.leads:
            _save(session, running, checkpoint)
            saved = time.monotonic()
    return pd.DataFrame(running.ledger.rows)


def trainings_of(session: Session) -> list[Training]:
    """Its students as they begin, stacked where they can be."""
    groups: dict[Any, list[Treatment]] = {}
    for treatment in session.treatments:
        groups.setdefault(treatment.together, []).append(treatment)
    fitted = _fitted(session, session.treatments)
    return [_training(session, members, fitted) for members in groups.values()]


def _fitted(session: Session, treatments: Sequence[Treatment]) -> dict[str, dict[str, Tensor]]:
    """Student -> weights that were fitted to data, all in one pass over it."""
    some = [treatment for treatment in treatments if treatment.is_fitted]
    return dict(zip([t.name for t in some], session.starts(some), strict=True))


def _training(
    session: Session, members: Sequence[Treatment], fitted: Mapping[str, dict[str, Tensor]]
) -> Training:
    return Training.of(
        session.model,
        members,
        weights=[fitted[m.name] if m.is_fitted else session.starts([m])[0] for m in members],
        weight_decay=session.weight_decay,
        clip=session.clip,
    )


def advance(
    session: Session, trainings: Sequence[Training], step: int
) -> tuple[list[Float[Tensor, "student"]], int]:
    """Every student learns from the batch of `step`: their losses before, and its tokens."""
    batch = session.batch(step)
    cohorts = [training.cohort for training in trainings]
    losses: dict[int, Tensor] = {}
    with session.precision():
        passing = session.passing(session.share.of(batch), cohorts)
        for wave in _waves(passing, cohorts):
            found = zip(wave, learn(passing, wave, dropout=session.dropout), strict=True)
            losses |= {id(cohort): loss for cohort, loss in found}
    _add_gradients(session.share, trainings)
    for training in trainings:
        training.update(session.rate_share(step))
    return [losses[id(cohort)] for cohort in cohorts], batch.tokens


def _add_gradients(share: Share, trainings: Sequence[Training]) -> None:
    """Those of all processes; a tensor that only another one's rows went through has one too."""
    if share.count > 1:
        stacks = [stack for training in trainings for stack in training.stacks]
        for stack in stacks:
            if stack.grad is None:
                stack.grad = torch.zeros_like(stack)
        share.add_(stack.grad for stack in stacks if stack.grad is not None)


def _agree(share: Share, running: _Running) -> None:
    """Raises ValueError unless all processes have come equally far with the same students."""
    if share.count > 1:
        stacks = [stack for training in running.trainings for stack in training.stacks]
        weights = sum(float(stack.detach().double().sum()) for stack in stacks)
        standing = torch.tensor([running.step, running.tokens, weights], dtype=torch.float64)
        share.require_same(standing, "students")


def _waves(passing: Pass, cohorts: Sequence[Cohort]) -> list[list[Cohort]]:
    """Cohorts that climb together without keeping more than IN_FLIGHT bytes, roughly counted."""
    rows, pos, width = passing.recorded.shape
    device = passing.batch.targets.device.type
    limit = IN_FLIGHT[device] if device in IN_FLIGHT else 3 * 2**30
    waves: list[list[Cohort]] = [[]]
    used = 0
    for cohort in sorted(cohorts, key=lambda c: c.first):
        blocks = 1 if cohort.target == "hidden" else passing.recorded.n_blocks - cohort.first
        size = rows * pos * width * 64 * blocks * cohort.count  # about 16 numbers a coordinate
        if waves[-1] and used + size > limit:
            waves.append([])
            used = 0
        waves[-1].append(cohort)
        used += size
    return waves


def _examine(session: Session, running: _Running, examiner: Examiner, kind: str) -> None:
    """A row for every student; students that are done leave."""
    with contextlib.ExitStack() as stack:
        if kind == "averaged":
            for training in running.trainings:
                stack.enter_context(training.averaged())
        cohorts = [t.cohort for t in running.trainings]
        found = zip(examiner.sums(cohorts), examiner.strange_sums(cohorts), strict=True)
    left = []
    for training, (sums, strange) in zip(running.trainings, found, strict=True):
        done = [
            running.ledger.write(
                member,
                mine,
                kind,
                examiner,
                strange=None if strange is None else strange[k],
                step=running.step,
                tokens=running.tokens + session.fitted_tokens(member),
                seconds=running.seconds,
                parameters=sum(stack[0].numel() for stack in training.stacks),
            )
            for k, (member, mine) in enumerate(zip(training.members, sums, strict=True))
        ]
        leaving = [k for k, is_done in enumerate(done) if is_done]
        kept = training.without(session.model, leaving) if leaving else training
        if kept is not None and kept.stacks:  # what trains nothing was seen once
            left.append(kept)
    running.trainings = left


def _save(session: Session, running: _Running, path: Path) -> None:
    tensors = {
        f"{t}/{name}": tensor
        for t, training in enumerate(running.trainings)
        for name, tensor in training.state().items()
    }
    state = {
        "members": [[member.name for member in t.members] for t in running.trainings],
        "steps": [t.step for t in running.trainings],
        "at": [running.step, running.tokens, running.seconds],
        "ledger": running.ledger.state(),
    }
    checkpoints.write(path, tensors, state, session.device)


def _resume(session: Session, running: _Running, path: Path) -> None:
    tensors, state = checkpoints.read(path, session.device)
    asked = {member.name: member for member in session.treatments}
    if any(name not in asked for names in state["members"] for name in names):
        raise ValueError(f"{path} belongs to other students: remove it, or give another --runs")
    running.trainings = []
    left = [asked[name] for names in state["members"] for name in names]
    fitted = _fitted(session, left)
    for t, (names, step) in enumerate(zip(state["members"], state["steps"], strict=True)):
        training = _training(session, [asked[name] for name in names], fitted)
        start = f"{t}/"
        training.load(
            {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}, step
        )
        running.trainings.append(training)
    running.step, running.tokens, running.seconds = state["at"]
    running.ledger.load(state["ledger"])
