"""What do trained models, and baselines on the same prompts, say of held-out functions?

`yardsticks` draws the prompts of a task under one shift, from a stream that nothing is trained or
selected on, and asks every baseline; `evaluated` asks the models of an architecture, seed by seed;
`followed` asks every checkpoint of them whose predictions it follows. All leave tidy rows: errors
by number of examples (`sums.error_rows`), a sum a prompt (`sums.SUMS`), distances and labels.

Beside the shifts of `shift_table` there is `DENSE` for sparse tasks: prompts of dense linear
functions of the same size, where least squares and the lasso part ways.

Where it misleads. A baseline that fits anew for every prefix (`SLOW`) is asked about the first
prompts only, and scores against it are of those prompts. All models of a task see the same prompts,
so differences are sharp and the prompts' own chance is common to all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ablate.placement import load
from experiments.hybrids.architecture.model import Hybrid
from experiments.hybrids.learning.streams import held_out_generator
from experiments.hybrids.measuring.schemes import distances, labelled, scheme_rows
from experiments.hybrids.measuring.sums import ALL, KEYS, SUMS, error_rows, prompt_sums
from experiments.hybrids.regression.baselines import SLOW, baselines_for, predictions
from experiments.hybrids.regression.prompts import Prompts, counted, interleaved, predictions_at
from experiments.hybrids.regression.task_table import Task
from experiments.hybrids.regression.tasks import sample

CPU = torch.device("cpu")
PURPOSE = "evaluation"
"""Of the held-out stream: prompts that neither training, stopping nor selection looks at."""
DENSE = "dense"
VARIANTS = ("lasso-0.1", "lasso-0.01", "tree-4")
"""Baselines that are no scheme of their own beside their siblings."""
COORDINATES = 2**20
"""Of prompts, that a model reads at a time."""


@dataclass(frozen=True, eq=False)
class Yardsticks:
    """Prompts, and what each baseline says of them, or of the first of them."""

    task: Task
    shift: str
    prompts: Prompts
    predictions: Mapping[str, Float[Tensor, "some point y_dim"]]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Rows of one architecture, or of the baselines.

    Attributes:
        errors: KEYS, examples, metric, value, stderr.
        sums: `SUMS`.
    """

    errors: pd.DataFrame
    sums: pd.DataFrame


def yardsticks(
    task: Task,
    shift: str,
    count: int,
    *,
    slow: int = 64,
    names: Sequence[str] | None = None,
    device: torch.device = CPU,
) -> Yardsticks:
    """`count` prompts and the baselines of the task on them, those of `SLOW` on the first `slow`.

    `names` are the baselines to ask; all of the task unless given. ValueError for a shift that the
    task cannot have.
    """
    generator = held_out_generator(task.name, device, PURPOSE)
    if shift == DENSE:
        drawn = sample(_dense(task), count, generator)
    else:
        drawn = sample(task, count, generator, shift=shift)
    names = baselines_for(drawn.task) if names is None else names
    quick = tuple(name for name in names if name not in SLOW)
    found = predictions(drawn, quick)
    if late := tuple(name for name in names if name in SLOW):
        found |= predictions(first(drawn, slow), late)
    return Yardsticks(task, shift, drawn, {name: found[name] for name in names})


def first(prompts: Prompts, count: int) -> Prompts:
    """The first prompts, and what is hidden of them."""
    hidden = {
        name: value[:count] if value.ndim else value for name, value in prompts.hidden.items()
    }
    return dataclasses.replace(prompts, xs=prompts.xs[:count], ys=prompts.ys[:count], hidden=hidden)


@torch.no_grad()
def predicted(model: nn.Module, prompts: Prompts) -> Float[Tensor, "batch point y_dim"]:
    """The model's predictions of every point, in float32, in evaluation mode."""
    was_training = model.training
    model.eval()
    inputs = interleaved(prompts)
    rows = max(1, COORDINATES // inputs[0].numel())
    answers = [predictions_at(model(prompts=some).logits) for some in inputs.split(rows)]
    model.train(was_training)
    return torch.cat(answers).float()


def evaluated(
    architecture: str, models: Mapping[int, Hybrid | Path], measure: Yardsticks
) -> Evaluated:
    """The models of an architecture, by seed: loaded ones or folders."""
    seeds = list(models)
    said = torch.stack([_answers(model, measure.prompts) for model in models.values()])
    ys, inside = measure.prompts.ys, counted(measure.prompts)
    sums = prompt_sums(said, ys, inside)
    keys = {"architecture": architecture, "task": measure.task.name, "shift": measure.shift}
    errors = error_rows(said, ys, seeds, inside).assign(**keys, baseline="")
    rows = [_sum_rows(own, keys, seed, "") for seed, own in zip(seeds, sums, strict=True)]
    return Evaluated(_ordered(errors), pd.concat(rows, ignore_index=True))


def baselines_evaluated(measure: Yardsticks) -> Evaluated:
    """The baselines, zero among them: rows without an architecture, of seed `ALL`."""
    said = {"zero": torch.zeros_like(measure.prompts.ys), **measure.predictions}
    ys, inside = measure.prompts.ys, counted(measure.prompts)
    keys = {"architecture": "", "task": measure.task.name, "shift": measure.shift}
    errors, sums = [], []
    for name, answers in said.items():
        some = len(answers)
        own = error_rows(answers[None], ys[:some], [ALL], inside[:some])
        errors.append(own.assign(**keys, baseline=name))
        totals = prompt_sums(answers[None], ys[:some], inside[:some])[0]
        sums.append(_sum_rows(totals, keys, ALL, name))
    return Evaluated(
        _ordered(pd.concat(errors, ignore_index=True)), pd.concat(sums, ignore_index=True)
    )


def followed(
    architecture: str,
    checkpoints: Mapping[tuple[int, int], Hybrid | Path],
    measure: Yardsticks,
    generator: np.random.Generator,
    *,
    schemes: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Whose predictions each checkpoint follows; `checkpoints` are by (seed, step).

    `schemes` are baselines of `measure`; all but `VARIANTS` unless given. Prompts are those that
    all of them were asked about. Returns distances (KEYS, step, metric, value, stderr) and labels
    (architecture, task, shift, seed, step and the columns of `schemes.labelled`).
    """
    names = [n for n in measure.predictions if n not in VARIANTS] if schemes is None else schemes
    some = min(len(measure.predictions[name]) for name in names)
    prompts = first(measure.prompts, some)
    offered = {name: measure.predictions[name][:some] for name in names}
    inside = counted(prompts)
    keys = {"architecture": architecture, "task": measure.task.name, "shift": measure.shift}
    rows, labels = [], []
    for (seed, step), model in checkpoints.items():
        found = distances(_answers(model, prompts)[None], offered, inside)
        rows.append(scheme_rows(found, [seed]).assign(step=step))
        labels.append(labelled(found, [seed], generator).assign(step=step))
    order = [*KEYS, "step", "metric", "value", "stderr"]
    far = pd.concat(rows, ignore_index=True).assign(**keys).loc[:, order]
    return far, pd.concat(labels, ignore_index=True).assign(**keys)


def checkpoints_of(folder: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    """((seed, step), folder) of every checkpoint a run has kept, in order."""
    for path in sorted(folder.glob("checkpoints/s*/*")):
        yield (int(path.parent.name.removeprefix("s")), int(path.name)), path


def _dense(task: Task) -> Task:
    """Dense linear functions where the task's are sparse. ValueError for another task."""
    if task.name != "sparse":
        raise ValueError(
            f"shift {DENSE} of task {task.name}: it is for sparse functions, take another shift"
        )
    return Task("linear", d=task.d, points=task.points, y_dim=task.y_dim)


def _answers(model: Hybrid | Path, prompts: Prompts) -> Float[Tensor, "batch point y_dim"]:
    if isinstance(model, Path):
        loaded = load(str(model), dtype="float32")[0]  # one at a time in memory
        return predicted(loaded.to(prompts.xs.device), prompts)
    return predicted(model, prompts)


def _sum_rows(
    values: Float[np.ndarray, "prompt"], keys: Mapping[str, str], seed: int, baseline: str
) -> pd.DataFrame:
    rows = pd.DataFrame({"prompt": np.arange(len(values)), "value": values})
    return rows.assign(**keys, seed=seed, baseline=baseline).loc[:, list(SUMS)]


def _ordered(errors: pd.DataFrame) -> pd.DataFrame:
    return errors.loc[:, [*KEYS, "examples", "metric", "value", "stderr"]]
