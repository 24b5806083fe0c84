"""How do K seeds of one hybrid learn a task in context, trained as one batched model?

All weights are stacked on a leading axis (`ablate.students`), the prompts of seed k are rows
k · batch … of one batch, and the loss is the sum over seeds of

    mean over prompts and scored points of |f(x₁, y₁, …, xᵢ) − yᵢ|² / y_dim

so each seed's gradient is that of its own run: initial weights from its own seed, prompts from its
own stream (`streams`), its own clipping and its own rate (`optimisers`). At log-spaced steps all
are evaluated on the same held-out prompts, by number of examples; a seed whose error is below
`stop_at` or not finite leaves, the others go on. A run that was killed goes on to the same curve,
bit by bit (`running`).

Where it misleads. Batched seeds equal separate runs up to rounding (1e-6 a step, which training
amplifies), and up to dropout, whose mask is drawn for all rows at once. Seconds are those of all
seeds together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ablate.students import Students
from experiments.hybrids.architecture.model import HybridConfig
from experiments.hybrids.learning.alone import Alone
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.learning.running import (
    Running,
    begun,
    finish,
    finished,
    resumed,
    save,
    without,
    write_model,
)
from experiments.hybrids.learning.runs import (
    CPU,
    Member,
    Run,
    Trained,
    checkpoint_folder,
    model_folder,
)
from experiments.hybrids.learning.streams import prompts_at
from experiments.hybrids.regression.tasks import Task, interleaved, predictions_at
from experiments.memory import keep_freed

CHUNK = 2**17
"""Coordinates of prompts, over students, that an evaluation reads at a time."""


def quiet(step: int, steps: int) -> None:
    """No progress is shown."""


def train_seeds(
    config: HybridConfig,
    task: Task,
    regime: Regime,
    seeds: Sequence[int],
    folder: Path,
    *,
    device: torch.device = CPU,
    progress: Callable[[int, int], None] = quiet,
) -> Trained:
    """Train `seeds` of one architecture together, from where `folder` stands; at once if done.

    Raises ValueError for a folder with another run, and for a task or a regime that do not fit.
    """
    members = tuple(Member(seed, regime.rate) for seed in seeds)
    return train(Run(config, task, regime, members, folder, device), progress)


def train(run: Run, progress: Callable[[int, int], None] = quiet) -> Trained:
    """The same for members of any rates; models are left where every seed is there once."""
    if (done := finished(run)) is not None:
        return done
    keep_freed()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(run.members[0].seed)  # of dropout
        return _trained(run, progress)


def _trained(run: Run, progress: Callable[[int, int], None]) -> Trained:
    running = resumed(run) or begun(run)
    saved = time.monotonic()
    while True:
        if running.step in run.evaluations:
            running = examined(run, running)
        if running.step == run.regime.steps or not running.members:
            break
        started = time.monotonic()
        advance(run, running)
        running.seconds += time.monotonic() - started
        progress(running.step, run.regime.steps)
        if time.monotonic() - saved > run.regime.save_every:
            save(run, running)
            saved = time.monotonic()
    return finish(run, running)


def advance(run: Run, running: Running) -> None:
    """One step of every seed. Nothing here waits for the device."""
    dims, points = run.curriculum.at(running.step)
    # A compiled step has one shape: later points, which no earlier one sees, are left out of the
    # loss instead.
    shown = run.task.points if run.regime.compile else points
    seeds = [member.seed for member in running.members]
    prompts = prompts_at(run.task, seeds, running.step, run.regime.batch, (dims, shown), run.device)
    if not running.students.training:
        running.students.train()
    with run.precision():
        logits = running.forward(prompts=interleaved(prompts)).logits
    errors = (predictions_at(logits).float() - prompts.ys).square().mean(-1)
    losses = _by_seed(errors[:, :points][:, run.scored], len(seeds)).mean((1, 2))
    losses.sum().backward()
    running.optimiser.step(run.schedule.rate(running.step))
    running.losses += losses.detach()
    running.since += 1
    running.step += 1


@torch.no_grad()
def errors_by_examples(run: Run, students: Students | Alone) -> Float[Tensor, "student point"]:
    """Mean squared error on the held-out prompts after 0, 1, … examples, in float32."""
    students.eval()
    inputs, ys = interleaved(run.prompts), run.prompts.ys
    size = max(1, CHUNK // (inputs[0].numel() * students.count))
    sums = ys.new_zeros(students.count, ys.shape[1])
    for rows, mine in zip(inputs.split(size), ys.split(size), strict=True):
        logits = students(prompts=rows.repeat(students.count, 1, 1)).logits
        predictions = _by_seed(predictions_at(logits), students.count)
        sums += (predictions - mine).square().mean(-1).sum(1)
    return sums / len(ys)


def examined(run: Run, running: Running) -> Running:
    """A row and a checkpoint for every seed; those that are done leave."""
    errors = errors_by_examples(run, running.students)
    losses = running.losses / max(1, running.since)
    stay = []
    for k, member in enumerate(running.members):
        error = float(errors[k, run.scored].mean())
        key = {"seed": member.seed, "rate": member.rate, "step": running.step}
        running.rows.append(
            {
                **key,
                "prompts": running.step * run.regime.batch,
                "seconds": running.seconds,
                "loss": float(losses[k]) if running.since else math.nan,
                "error": error,
                "share": error / run.zero,
                "by_examples": errors[k].tolist(),
            }
        )
        finite = bool(torch.isfinite(errors[k]).all())
        weights = running.students.weights(k)
        if run.keeps_models and run.regime.keep and finite:
            write_model(run, weights, checkpoint_folder(run.folder, member.seed, running.step))
        why = "steps"
        if not finite:
            why = "diverged"
        elif error / run.zero < run.regime.stop_at:
            why = "arrived"
        if why == "steps" and running.step < run.regime.steps:
            stay.append(k)
            continue
        running.ended.append({**key, "why": why})
        if run.keeps_models:
            write_model(run, weights, model_folder(run.folder, member.seed))
    running.losses, running.since = torch.zeros_like(running.losses), 0
    if not stay:
        return replace(running, members=[])
    return running if len(stay) == len(running.members) else without(run, running, stay)


def _by_seed(rows: Float[Tensor, "rows ..."], count: int) -> Float[Tensor, "student batch ..."]:
    return rows.unflatten(0, (count, -1))
