"""Orders of blocks to search: within both budgets, and halved as they should be."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from experiments.hybrids.architecture.grammar import parse, preset, tokens_mix, written
from experiments.hybrids.architecture.sizes import Sizes
from experiments.hybrids.searching import candidates
from experiments.hybrids.searching.candidates import (
    affordable,
    all_blocks,
    drawn,
    generations,
)
from experiments.hybrids.searching.search import front

SIZES = Sizes(d_model=16, n_positions=24, x_dim=5)


def test_every_block_can_be_written_and_read() -> None:
    blocks = all_blocks()
    assert len(set(blocks)) == len(blocks) > 20
    assert all(parse(written([block])) == (block,) for block in blocks)


def test_candidates_are_small_enough_and_begin_with_known_ones() -> None:
    most = SIZES.parameters(preset("llama", 2))
    found = drawn(20, 2, SIZES, most, seed=0)
    assert len(set(found)) == 20
    assert all(SIZES.parameters(blocks) <= most for blocks in found)
    assert all(tokens_mix(blocks) for blocks in found)
    assert any(not tokens_mix([block]) for block in all_blocks())
    assert found[0] == preset("gpt2", 2)
    assert drawn(20, 2, SIZES, most, seed=0) == found
    assert drawn(20, 2, SIZES, most, seed=1) != found


def test_too_few_small_enough_are_refused() -> None:
    with pytest.raises(ValueError, match="were found"):
        drawn(5, 2, SIZES, 10, seed=0)


def test_generations_cost_about_the_same_and_the_last_trains_whole() -> None:
    plan = generations(16, 3, 4000)
    assert plan == ((16, 1000), (8, 2000), (4, 4000))
    assert {n * steps for n, steps in plan} == {16_000}


def test_a_budget_keeps_what_it_pays_for() -> None:
    found = drawn(12, 2, SIZES, 10**9, seed=0)
    everything = affordable(found, SIZES, (3, 1000), 1536, 2, math.inf)
    assert everything == found
    each = candidates.flops(found[:6], SIZES, 1, 1536, 2) / 6
    budget = each * sum(n * s for n, s in generations(6, 3, 1000))
    kept = affordable(found, SIZES, (3, 1000), 1536, 2, budget * 1.0001)
    assert 2 <= len(kept) <= 12
    spent = candidates.flops(kept, SIZES, 1, 1536, 2) / len(kept)
    assert spent * sum(n * s for n, s in generations(len(kept), 3, 1000)) <= budget * 1.0001
    with pytest.raises(ValueError, match="not even two"):
        affordable(found, SIZES, (3, 1000), 1536, 2, 1.0)


def test_a_known_order_goes_by_its_name() -> None:
    assert candidates.named(preset("mambaformer", 3)) == "mambaformer"
    assert candidates.named(parse("rope-attention-rms, gelu-rms")) == "rope-attention-rms,gelu-rms"


def test_the_front_is_what_nothing_beats_in_both() -> None:
    table = pd.DataFrame(
        {
            "value": [0.9, 0.8, 0.9, 0.5, math.nan, 0.8],
            "parameters": [100, 50, 120, 60, 10, 50],
        }
    )
    assert front(table).tolist() == [True, True, False, False, False, True]
