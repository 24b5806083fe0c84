"""A score's baseline gains over predicting 0 in every function class; else it means nothing."""

from __future__ import annotations

import pytest
import torch

from experiments.hybrids.learning.streams import held_out
from experiments.hybrids.measuring.denominators import DENOMINATORS, denominator
from experiments.hybrids.regression.task_table import TASKS, small


@pytest.mark.parametrize("name", TASKS)
def test_it_gains_over_predicting_0(name: str) -> None:
    prompts = held_out(small(name), 24, torch.device("cpu"), "test of denominators")
    chosen, errors = denominator(name, prompts)
    assert chosen == DENOMINATORS.get(name, chosen)
    assert errors.shape == prompts.ys.shape[:2]
    assert float(errors.sum()) < float(prompts.ys.square().mean(-1).sum())
