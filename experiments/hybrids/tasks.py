"""Draw a batch of prompts: functions, points and what they say of them, on the generator's device.

    sample(TASKS["sparse"], 64, torch.Generator().manual_seed(0))

One call, no loop over the batch, and nothing but the generator decides: the same state gives the
same prompts. With a curriculum, `dims` keeps the first coordinates of x and zeroes the others
(supports are drawn among those kept) and `points` cuts the prompt. Beside what `functions` lists,
every `hidden` has `clean` [batch point y_dim], y without noise, `noise` [], the standard deviation
of what was added, and `dims` []: all that a Bayes-optimal predictor has to know.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from experiments.hybrids.functions import FUNCTIONS
from experiments.hybrids.prompts import Prompts, interleaved, predictions_at
from experiments.hybrids.task_table import TASKS, Task, TaskName, named, small, zero_error

__all__ = [
    "TASKS",
    "Prompts",
    "Task",
    "TaskName",
    "evaluate",
    "interleaved",
    "named",
    "predictions_at",
    "sample",
    "small",
    "zero_error",
]


def sample(
    task: Task,
    batch: int,
    generator: Generator,
    *,
    dims: int | None = None,
    points: int | None = None,
    shift: str = "none",
) -> Prompts:
    """A batch of prompts of the task.

    Args:
        dims: coordinates of x that are not 0; all of them unless given.
        points: points of a prompt; the task's own number unless given.
        shift: a change of distribution on top of the task's own (`shifts.SHIFTS`).
    """
    dims = task.d if dims is None else dims
    points = task.points if points is None else points
    _check(task, batch, points, dims)
    functions = FUNCTIONS[task.name]
    drawn = functions.hidden(task, 1 if functions.shared else batch, points, dims, generator)
    hidden = {name: value.expand(batch, *value.shape[1:]) for name, value in drawn.items()}
    xs = functions.xs(task, batch, points, dims, generator)
    if task.name == "mqar":
        asked = hidden["index"][:, None, None].expand(-1, 1, task.d)
        xs = torch.cat([xs[:, :-1], xs.gather(1, asked)], dim=1)
    ys = evaluate(task, hidden, xs)
    hidden |= {
        "clean": ys,
        "noise": torch.zeros((), device=generator.device),
        "dims": torch.full((), dims, device=generator.device),
    }
    return Prompts(xs, ys, task.name, hidden, task.scored)


def evaluate(
    task: Task, hidden: dict[str, Tensor], xs: Float[Tensor, "batch point x_dim"]
) -> Float[Tensor, "batch point y_dim"]:
    """f(x) without noise, of the functions in `hidden`, at any points."""
    return FUNCTIONS[task.name].ys(task, hidden, xs)


def _check(task: Task, batch: int, points: int, dims: int) -> None:
    if not 1 <= dims <= task.d:
        raise ValueError(f"{dims} of {task.d} coordinates in task {task.name}: give 1 … {task.d}")
    least = 2 if task.name == "mqar" else 1
    if batch < 1 or points < least:
        raise ValueError(
            f"{batch} prompts of {points} points of task {task.name}: "
            f"give at least 1 prompt and {least} points"
        )
