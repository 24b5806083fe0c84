"""Where does a run stand, and how does it go on from there after a kill?

`run.safetensors` is written beside the old one and renamed; it holds the stacked weights and
moments of the seeds that are still training, the sums of their losses, the rows of the curve, the
step and the random generators (dropout draws from them). Prompts are functions of seed and step
(`streams`), so nothing else is needed to go on bit by bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ablate.students import Students
from experiments import checkpoints
from experiments.hybrids.learning.alone import Alone
from experiments.hybrids.learning.arrivals import arrivals
from experiments.hybrids.learning.optimisers import SeedOptimiser
from experiments.hybrids.learning.runs import Member, Run, Trained, initial_model

CHECKPOINT = "run.safetensors"
CURVE, ERRORS, DONE = "curve.parquet", "errors.parquet", "trained.json"


@dataclass(eq=False)
class Running:
    """Where a run stands.

    Attributes:
        members: those still training, in the order of the students.
        losses: their training losses, summed over the steps `since` the last evaluation.
        rows: of the curve, with the errors by examples in each.
        forward: the students, compiled or not.
    """

    members: list[Member]
    students: Students | Alone
    optimiser: SeedOptimiser
    losses: Float[Tensor, "student"]
    forward: Any
    since: int = 0
    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: list[dict[str, Any]] = field(default_factory=list)


def begun(run: Run) -> Running:
    """All members with their initial weights."""
    models = {seed: initial_model(run.built, seed) for seed in {m.seed for m in run.members}}
    weights = [dict(models[member.seed].named_parameters()) for member in run.members]
    return _stacked(run, list(run.members), weights)


def without(run: Run, running: Running, stay: Sequence[int]) -> Running:
    """The same with some of the seeds only."""
    members = [running.members[k] for k in stay]
    left = _stacked(run, members, [running.students.weights(k) for k in stay])
    chosen = torch.tensor(stay, device=run.device)
    state = running.optimiser.state()
    left.optimiser.load({n: t if n == "step" else t[chosen] for n, t in state.items()})
    return dataclasses.replace(
        running,
        members=members,
        students=left.students,
        optimiser=left.optimiser,
        losses=running.losses[chosen],
        forward=left.forward,
    )


def _stacked(run: Run, members: list[Member], weights: Sequence[Mapping[str, Tensor]]) -> Running:
    """Students of these weights, with an optimiser that has seen nothing."""
    template: Any = copy.deepcopy(run.template)
    block = template.to(run.device)
    students = (
        Students(block, weights, list(weights[0])) if len(weights) > 1 else Alone(block, weights[0])
    )
    optimiser = SeedOptimiser(students.trained(), [m.rate for m in members], run.regime)
    losses = torch.zeros(len(members), device=run.device)
    forward: Any = torch.compile(students, dynamic=False) if run.regime.compile else students
    return Running(members, students, optimiser, losses, forward)


def save(run: Run, running: Running) -> None:
    """Write the checkpoint, by rename."""
    tensors = {f"weights/{n}": s.data for n, s in running.students.trained().items()}
    tensors |= {f"moments/{n}": t for n, t in running.optimiser.state().items()}
    state = {
        "identity": run.identity(),
        "members": [[member.seed, member.rate] for member in running.members],
        "at": [running.since, running.step, running.seconds],
        "rows": running.rows,
        "ended": running.ended,
    }
    tensors["losses"] = running.losses
    checkpoints.write(run.folder / CHECKPOINT, tensors, state, run.device)


def resumed(run: Run) -> Running | None:
    """Where the run in the folder stands; None if it has no checkpoint.

    Raises ValueError when the folder holds another run.
    """
    path = run.folder / CHECKPOINT
    if not path.exists():
        return None
    tensors, state = checkpoints.read(path, run.device)
    _require_same(path, state["identity"], run)
    members = [Member(seed, rate) for seed, rate in state["members"]]
    stacks = _under("weights/", tensors)
    weights = [{n: s[k] for n, s in stacks.items()} for k in range(len(members))]
    running = _stacked(run, members, weights)
    running.optimiser.load(_under("moments/", tensors))
    running.losses = tensors["losses"]
    running.since, running.step, running.seconds = state["at"]
    running.rows, running.ended = state["rows"], state["ended"]
    return running


def write_model(run: Run, weights: Mapping[str, Tensor], target: Path) -> None:
    """One seed's weights as a Hugging Face folder, by rename."""
    model: Any = run.template
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    half = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(half, ignore_errors=True)
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(half)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    shutil.rmtree(target, ignore_errors=True)
    half.rename(target)


def finished(run: Run) -> Trained | None:
    """What a finished run left in the folder; None if it is not finished."""
    path = run.folder / DONE
    if not path.exists():
        return None
    state = json.loads(path.read_text())
    _require_same(path, state["identity"], run)
    curve = pd.read_parquet(run.folder / CURVE)
    errors = pd.read_parquet(run.folder / ERRORS)
    return _trained(run, curve, errors, pd.DataFrame(state["ended"]))


def finish(run: Run, running: Running) -> Trained:
    """Leave the tables, and last the note that says so."""
    keys = ("seed", "rate", "step")
    flat = [{n: v for n, v in row.items() if n != "by_examples"} for row in running.rows]
    errors = [
        {**{key: row[key] for key in keys}, "examples": i, "error": error}
        for row in running.rows
        for i, error in enumerate(row["by_examples"])
    ]
    frames = {CURVE: pd.DataFrame(flat), ERRORS: pd.DataFrame(errors)}
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.to_parquet(run.folder / name, index=False)
    note = run.folder / f"{DONE}.unfinished"
    note.write_text(json.dumps({"identity": run.identity(), "ended": running.ended}, indent=1))
    note.replace(run.folder / DONE)
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return _trained(run, frames[CURVE], frames[ERRORS], pd.DataFrame(running.ended))


def _trained(run: Run, curve: pd.DataFrame, errors: pd.DataFrame, ended: pd.DataFrame) -> Trained:
    found = arrivals(curve, run.regime.thresholds)
    return Trained(run.folder, curve, errors, found, ended)


def _under(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _require_same(path: Path, known: dict[str, Any], run: Run) -> None:
    asked = run.identity()
    if known != asked:
        other = ", ".join(key for key in asked if known.get(key) != asked[key])
        raise ValueError(
            f"{path} belongs to another run (its {other} differ): give another folder, or remove it"
        )
