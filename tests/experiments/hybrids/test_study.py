"""Which cells a study has, and what it refuses in one line before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.config import with_preset
from experiments.hybrids.architecture.grammar import THE_TWELVE
from experiments.hybrids.cells import cells_of
from experiments.hybrids.study import FACTORS, THE_SIX, Hybrids
from experiments.hybrids.unused import refuse_unused
from experiments.run_folder import run_study


def test_the_table_is_twelve_by_six_and_the_factorial_two_by_two_by_two() -> None:
    table = cells_of(with_preset(Hybrids, "table"))
    assert len(table) == 72
    assert {cell.architecture for cell in table} == set(THE_TWELVE)
    assert {cell.task.name for cell in table} == set(THE_SIX)
    factorial = cells_of(with_preset(Hybrids, "factorial"))
    assert len(factorial) == 16
    for task in ("sparse", "tree"):
        mine = [cell for cell in factorial if cell.task.name == task]
        assert {c.config.position_std for c in mine} == {0.02, 1.0}
        assert {c.architecture.split(" ")[0] for c in mine} == set(FACTORS)
    assert with_preset(Hybrids, "factorial").seeds >= 5


def test_models_read_the_whole_prompt_and_keys_differ() -> None:
    cells = cells_of(Hybrids(functions=("linear", "mqar")))
    assert all(cell.config.n_positions == 2 * cell.task.points for cell in cells)
    assert len({cell.key for cell in cells}) == len(cells)
    assert cells[0].key == cells_of(Hybrids(seeds=5))[0].key


def test_without_learned_positions_their_variance_is_no_factor() -> None:
    labels = [
        cell.architecture
        for cell in cells_of(Hybrids(architectures=("gpt2", "llama"), position_std=(0.02, 1.0)))
    ]
    assert labels == ["gpt2 positions 0.02", "gpt2 positions 1", "llama"]
    with pytest.raises(ValueError, match="none of llama, mamba learns positions"):
        cells_of(Hybrids(architectures=("llama", "mamba"), position_std=(1.0,)))


def test_matched_architectures_have_about_as_many_parameters() -> None:
    from experiments.hybrids.architecture.model import Hybrid

    cells = cells_of(Hybrids(architectures=("gpt2", "gpt2-swiglu"), match="gpt2"))
    sizes = [sum(p.numel() for p in Hybrid(cell.config).parameters()) for cell in cells]
    assert abs(sizes[1] / sizes[0] - 1) < 0.02
    assert [cell.parameters for cell in cells] == sizes
    loose = cells_of(Hybrids(architectures=("gpt2", "gpt2-swiglu")))
    assert sum(p.numel() for p in Hybrid(loose[1].config).parameters()) > 1.2 * sizes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architectures": ("gpt3",)}, "no block word 'gpt3'"),
        ({"architectures": ()}, "--architectures"),
        ({"architectures": ("gpt2", "gpt2")}, "each once"),
        ({"functions": ("cubic",)}, "no task 'cubic'"),
        ({"shifts": ("foggy",)}, "no shift 'foggy'"),
        ({"seeds": 0}, "--seeds 0"),
        ({"prompts": 1}, "--prompts 1"),
        ({"rates": (0.0,)}, "--rates"),
        ({"position_std": (-1.0,)}, "--position-std"),
        ({"steps": 0}, "steps 0"),
        ({"seed": 999_999}, "seeds from 1000000 on"),
        ({"sweep_share": 0.0}, "--sweep-share"),
        ({"architectures": ("mamba-mamba_ffn-rms",)}, "two Mambas"),
        ({"architectures": ("gelu-rms*2",)}, "nothing sees an example"),
        ({"architectures": ("attention*100000000",)}, "more than 1000 blocks"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"clip": float("inf")}, "--clip inf"),
        ({"device": "foo"}, "--device foo"),
        ({"d_ff": -1}, "--d-ff -1"),
        ({"thresholds": ()}, "--thresholds without a value"),
        ({"thresholds": (0.5, 0.5)}, "each once"),
        ({"thresholds": (5.0,)}, "below"),
        ({"rates": (1e-3, 1e-3)}, "each once"),
        ({"per_decade": 0.0}, "per_decade 0"),
        ({"candidates": 1}, "--candidates 1"),
        ({"search": True, "architectures": ("mamba",)}, "draws its own orders"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hybrids(**options)


def test_a_model_that_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heads must divide d_model"):
        run_study("hybrid", Hybrids(heads=3, runs=tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_same_model_twice_is_refused_before_any_training() -> None:
    with pytest.raises(ValueError, match="the same model"):
        cells_of(Hybrids(architectures=("gpt2",), position_std=(1.0, 1.0)))
    twice = ("attention-rms*2", "attention-rms,attention-rms")
    with pytest.raises(ValueError, match="the same model"):
        cells_of(Hybrids(architectures=twice))


def test_a_search_of_several_functions_is_refused(tmp_path: Path) -> None:
    asked = Hybrids(search=True, functions=("linear", "sparse"), runs=tmp_path)
    with pytest.raises(ValueError, match="one function class"):
        run_study("hybrid", asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"candidates": 6}, "--candidates was given"),
        ({"compute": 1e12}, "--compute was given"),
        ({"sweep_share": 0.2}, "--sweep-share was given"),
        ({"rate": 1e-2, "rates": (1e-3, 3e-3)}, "--rate was given"),
        ({"momentum": 0.5}, "--momentum was given"),
        ({"optimiser": "sgd", "betas": (0.8, 0.9)}, "--betas was given"),
        ({"cycles": 2, "schedule": "cosine"}, "--cycles was given"),
        ({"final_share": 0.5}, "--final-share was given"),
        ({"architectures": ("gpt2",), "double_residual": True}, "--double-residual was given"),
        ({"search": True, "position_std": (1.0,)}, "--search with --position-std"),
    ],
)
def test_what_nothing_would_read_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        run_study("hybrid", Hybrids(**options, runs=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"search": True, "candidates": 6, "compute": 1e12},
        {"rates": (1e-3, 3e-3), "sweep_share": 0.2},
        {"optimiser": "sgd", "momentum": 0.5},
        {"schedule": "cyclical", "cycles": 2, "final_share": 0.5},
        {"architectures": ("gpt2", "mamba"), "double_residual": True},
    ],
)
def test_what_is_read_is_not_refused(options: dict[str, Any]) -> None:
    refuse_unused(Hybrids(**options))


def test_no_preset_asks_for_what_it_does_not_read() -> None:
    for name in Hybrids.PRESETS:
        refuse_unused(with_preset(Hybrids, name))
