"""Tiny random regressors for tests, with weights large enough that every part matters."""

from __future__ import annotations

import torch

from ablate import HookedModel
from experiments.hybrids.model import Hybrid, HybridConfig
from experiments.hybrids.prompts import Prompts
from experiments.hybrids.streams import generator_at
from experiments.hybrids.task_table import small
from experiments.hybrids.tasks import sample

CPU = torch.device("cpu")


def regressor(blocks: str, task: str = "linear", seed: int = 0, scale: float = 0.3) -> HookedModel:
    """A random regressor for the small size of a task."""
    shape = small(task)
    torch.manual_seed(seed)
    config = HybridConfig(
        blocks=blocks,
        d_model=16,
        heads=2,
        d_state=4,
        expand=2,
        n_positions=2 * shape.points,
        x_dim=shape.d,
        y_dim=shape.y_dim,
    )
    model = Hybrid(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith(("A_log", "conv1d.weight")):
                parameter.normal_(std=scale)
    return HookedModel(model)


def drawn(task: str = "linear", count: int = 6, seed: int = 1) -> Prompts:
    """Prompts of the small size of a task."""
    return sample(small(task), count, generator_at(seed, 0, CPU))
