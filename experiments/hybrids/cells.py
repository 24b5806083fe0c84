"""Of which models does a study of hybrids consist?

A cell is one architecture learning one function class, all its seeds together. Where initial
positions of several standard deviations are asked for, each is an architecture of its own ("gpt2
positions 1"); an architecture without learned positions is there once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from experiments.hybrids.architecture.grammar import written
from experiments.hybrids.architecture.model import HybridConfig
from experiments.hybrids.architecture.sizes import Sizes
from experiments.hybrids.regression.task_table import Task

if TYPE_CHECKING:
    from experiments.hybrids.study import Hybrids

VARIANT = " positions "
"""Between an architecture and the standard deviation of its initial positions."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One architecture, one function class.

    Attributes:
        architecture: its label in tables and figures.
    """

    architecture: str
    task: Task
    config: HybridConfig

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return self.config.sizes.parameters(self.config.parsed)

    @property
    def key(self) -> str:
        """Name under which its results are kept."""
        config = {k: v for k, v in self.config.to_dict().items() if k != "transformers_version"}
        what = json.dumps([config, asdict(self.task)], sort_keys=True, default=str)
        digest = hashlib.sha256(what.encode()).hexdigest()[:10]
        return f"{self.task.name}-{self.architecture.replace(' ', '-')[:40]}-{digest}"


def cells_of(study: Hybrids) -> tuple[Cell, ...]:
    """Every cell, function class by function class.

    Raises ValueError for a model that cannot be built.
    """
    if study.position_std and not any(_learns_positions(study, a) for a in study.architectures):
        raise ValueError(
            f"--position-std {' '.join(f'{std:g}' for std in study.position_std)} asked for, but"
            f" none of {', '.join(study.architectures)} learns positions: leave it out"
        )
    cells = tuple(
        Cell(label, study.task(name), config_of(study, text, study.task(name), std))
        for name in study.functions
        for text in study.architectures
        for label, std in _variants(study, text)
    )
    for name in study.functions:
        mine = [cell for cell in cells if cell.task.name == name]
        models = [str(cell.config.to_dict()) for cell in mine]
        labels = [cell.architecture for cell in mine]
        if len(set(models)) < len(mine) or len(set(labels)) < len(mine):
            raise ValueError(
                f"two of {', '.join(labels)} are the same model: give each architecture and each"
                " --position-std once"
            )
    return cells


def sizes_of(study: Hybrids, task: Task) -> Sizes:
    """The sizes of a function class's models, before any is matched to another."""
    return Sizes(
        study.d_model, study.d_ff, n_positions=2 * task.points, x_dim=task.d, y_dim=task.y_dim
    )


def config_of(
    study: Hybrids, architecture: str, task: Task, position_std: float | None = None
) -> HybridConfig:
    """The model of an architecture for a function class, at the study's size."""
    blocks = study.blocks(architecture)
    sizes = sizes_of(study, task)
    if study.match and architecture != study.match:
        sizes = sizes.matched(blocks, sizes.parameters(study.blocks(study.match)))
    return HybridConfig(
        blocks=written(blocks),
        d_model=sizes.d_model,
        heads=study.heads,
        d_ff=sizes.d_ff,
        expand=sizes.expand,
        n_positions=sizes.n_positions,
        x_dim=sizes.x_dim,
        y_dim=sizes.y_dim,
        init=study.init,
        position_std=position_std,
        double_residual=study.double_residual,
    )


def _learns_positions(study: Hybrids, text: str) -> bool:
    return any(block.position == "learned" for block in study.blocks(text))


def _variants(study: Hybrids, text: str) -> list[tuple[str, float | None]]:
    """(label, standard deviation of positions) of an architecture."""
    if not study.position_std or not _learns_positions(study, text):
        return [(text, None)]
    if len(study.position_std) == 1:
        return [(text, study.position_std[0])]
    return [(f"{text}{VARIANT}{std:g}", std) for std in study.position_std]
