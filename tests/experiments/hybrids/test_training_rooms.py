"""Sizes, rates, streams, crossings and steps of seeds: each against what can be said by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.hybrids.learning.arrivals import arrivals, crossing
from experiments.hybrids.learning.curriculum import Curriculum
from experiments.hybrids.learning.optimisers import SeedOptimiser, seed_norms
from experiments.hybrids.learning.rates import pick_rate, picked
from experiments.hybrids.learning.regimes import PAPER, Regime, paper_regime
from experiments.hybrids.learning.streams import (
    generator_at,
    held_out,
    held_out_generator,
    prompts_at,
)
from experiments.hybrids.regression.tasks import Task
from experiments.training import Schedule
from tests.experiments.hybrids.test_training import QUICK, TASK, config

CPU = torch.device("cpu")


def test_regimes_need_no_torch():
    code = "import sys; from experiments.hybrids.learning import curriculum, regimes;"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("points", "first", "more"), [(41, 11, 2), (101, 26, 5)])
def test_the_curriculum_is_the_papers(points: int, first: int, more: int):
    whole = Curriculum(20, points, round(PAPER.curriculum * PAPER.steps))
    for step in (0, 1999, 2000, 17_500, 29_999, 30_000, 500_000):
        stage = min(step // 2000, 15)
        assert whole.at(step) == (5 + stage, first + more * stage)


def test_the_curriculum_scales_and_keeps_what_a_function_needs():
    assert Curriculum(5, 12, 0).at(0) == (5, 12)
    sizes = [Curriculum(5, 12, 40).at(step) for step in (0, 10, 20, 30, 40)]
    assert sizes == [(1, 3), (2, 5), (3, 7), (4, 9), (5, 12)]
    assert Curriculum(8, 17, 40, least=3).at(0) == (3, 5)
    assert [Curriculum(1, 9, 8).at(step) for step in (0, 4, 8)] == [(1, 3), (1, 6), (1, 9)]


def test_regimes_of_the_paper():
    assert (paper_regime("linear").rate, paper_regime("linear").steps) == (1e-4, 500_001)
    parity = paper_regime("parity", 1000)
    assert (parity.rate, parity.steps, parity.curriculum) == (4e-4, 1000, 0.0)
    assert paper_regime("mqar").rate == 2e-4
    assert Regime(steps=100, warmup=10).over(1000).warmup == 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps 0"),
        ({"rate": -1.0}, "above 0"),
        ({"clip": -1.0}, "clip -1"),
        ({"dropout": 1.0}, "dropout 1"),
        ({"warmup": 20, "steps": 10}, "does not end in 10"),
        ({"thresholds": (0.0,)}, "above 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_a_regime_without_sense_is_refused(given: dict, said: str):
    with pytest.raises(ValueError, match=said):
        replace(Regime(), **given)


def test_a_cyclical_schedule_is_cosines_one_after_another():
    cosine = Schedule(1.0, steps=35, warmup=10, final_share=0.1)
    cyclical = Schedule(1.0, steps=85, warmup=10, final_share=0.1, kind="cyclical", cycles=3)
    for step in range(10):
        assert cyclical.rate(step) == cosine.rate(step)
    for step in range(10, 35):
        for cycle in range(3):
            assert cyclical.rate(step + 25 * cycle) == pytest.approx(cosine.rate(step))


def test_streams_differ_by_seed_and_step_and_never_meet_held_out_ones():
    def first(generator: torch.Generator) -> float:
        return float(torch.randn(1, generator=generator, device=CPU))

    drawn = [first(generator_at(seed, step, CPU)) for seed in range(5) for step in range(20)]
    drawn += [first(held_out_generator("linear", CPU, p)) for p in ("report", "selection")]
    drawn.append(first(held_out_generator("sparse", CPU)))
    assert len(set(drawn)) == len(drawn)
    assert first(generator_at(3, 7, CPU)) == first(generator_at(3, 7, CPU))
    assert all(generator_at(seed, 0, CPU).initial_seed() < 2**31 for seed in range(50))
    assert held_out_generator("linear", CPU).initial_seed() >= 2**31
    assert torch.equal(held_out(TASK, 4, CPU).xs, held_out(TASK, 4, CPU).xs)


def test_prompts_of_seeds_are_each_ones_and_points_are_a_cut():
    both = prompts_at(TASK, (1, 2), 9, 4, (2, 3), CPU)
    alone = prompts_at(TASK, (2,), 9, 4, (2, 5), CPU)
    assert torch.equal(both.xs[4:], alone.xs[:, :3])
    assert torch.equal(both.ys[4:], alone.ys[:, :3])
    assert not both.xs[..., 2:].any()
    twice = prompts_at(TASK, (2, 2), 9, 4, (2, 5), CPU)
    assert torch.equal(twice.xs[:4], twice.xs[4:])


def test_a_power_law_is_crossed_where_it_crosses():
    steps = [0, 10, 100, 1000]
    shares = [(1 + step) ** -0.5 for step in steps]
    assert crossing(steps, shares, 0.2) == pytest.approx(24)
    assert crossing(steps, shares, 0.01) is None
    assert crossing([0, 5], [0.5, 0.1], 0.7) == 0.0
    assert crossing([0, 5, 9], [1.0, math.nan, math.nan], 0.5) is None
    assert crossing([0, 5], [1.0, 0.0], 0.5) == 5.0


def test_seeds_that_never_arrive_are_kept():
    curve = pd.DataFrame(
        {
            "seed": [1, 1, 2, 2],
            "rate": 0.1,
            "step": [0, 10, 0, 10],
            "share": [1.0, 0.1, 1.0, 0.9],
        }
    )
    found = arrivals(curve, (0.5,)).set_index("seed")
    assert found["arrived"].to_dict() == {1: True, 2: False}
    assert 0 < found["step"][1] < 10 == found["step"][2]


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.01)])
def test_stacked_steps_are_separate_ones(optimiser: str, rates: tuple[float, float]):
    regime = replace(Regime(), optimiser=optimiser, weight_decay=0.1, clip=1.0)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "vector": (4,), "mixer.A_log": (3, 2)}
    stacks = {n: torch.nn.Parameter(torch.randn(2, *s, generator=draw)) for n, s in shapes.items()}
    alone = [
        {n: torch.nn.Parameter(s.detach()[k].clone()) for n, s in stacks.items()} for k in (0, 1)
    ]
    extra = {"momentum": 0.9} if optimiser == "sgd" else {}
    separate = [
        kinds[optimiser](
            [
                {"params": [mine["matrix"]], "weight_decay": 0.1},
                {"params": [mine["vector"], mine["mixer.A_log"]], "weight_decay": 0.0},
            ],
            lr=0.5 * rate,
            **extra,
        )
        for mine, rate in zip(alone, rates, strict=True)
    ]
    together = SeedOptimiser(stacks, rates, regime)
    for turn in range(5):
        if turn == 3:  # what it knows can be moved to another
            state = {n: t.clone() for n, t in together.state().items()}
            together = SeedOptimiser(stacks, rates, regime)
            together.load(state)
        scale = torch.tensor([0.01, 10.0])  # one seed is clipped, one is not
        for n, stack in stacks.items():
            noise = torch.randn(stack.shape, generator=draw)
            stack.grad = noise * scale.reshape(2, *[1] * (stack.ndim - 1))
            for k in (0, 1):
                alone[k][n].grad = stack.grad[k].clone()
        for k in (0, 1):
            torch.nn.utils.clip_grad_norm_(alone[k].values(), 1.0)
            separate[k].step()
        together.step(0.5)
    for n, stack in stacks.items():
        assert stack.grad is None
        for k in (0, 1):
            torch.testing.assert_close(stack.detach()[k], alone[k][n].detach())


def test_norms_are_each_seeds():
    gradients = [torch.tensor([[3.0], [0.0]]), torch.tensor([[[4.0]], [[2.0]]])]
    assert seed_norms(gradients).tolist() == [5.0, 2.0]


def test_the_rate_that_learns_fastest_is_picked(tmp_path: Path):
    task = Task("parity", d=1, points=4, k=1)
    regime = replace(QUICK, steps=12, optimiser="sgd", schedule="constant")
    built = config(x_dim=1)
    found = pick_rate(built, task, regime, tmp_path, rates=(1e-6, 1e-2, 1e30), seeds=(8, 9))
    assert found.rate == 1e-2
    assert not found.at_edge
    assert len(found.ends) == 6
    assert found.ends["error"].to_list()[-2:] == [math.inf, math.inf]


def test_a_grid_that_ends_at_its_best_says_so():
    curve = pd.DataFrame({"seed": 0, "rate": [1.0, 2.0], "step": 1, "error": [2.0, 1.0]})
    curve["share"] = curve["error"]
    ended = pd.DataFrame({"seed": 0, "rate": [1.0, 2.0], "step": 1, "why": "steps"})
    assert picked(curve, ended).at_edge
    assert picked(curve, ended.assign(why="diverged")).rate == 1.0  # the lowest
