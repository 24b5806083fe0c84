"""The paper's studies: what they ask for, and how their rows become one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.pretrain import Pretraining
from experiments.reset import paper
from experiments.reset.findings import together
from experiments.reset.statistics.crossing import KEYS
from experiments.reset.study import Resetting

MODELS = [
    (Pretraining(family="opt", layers=n, d_model=d, heads=2, seed=seed), f"{n}x{d}-{seed}")
    for n, d in ((4, 64), (4, 128))
    for seed in (0, 1)
]


def test_all_arms_are_about_the_reference_and_the_grid_about_all(tmp_path: Path) -> None:
    asked = dict(paper.parts(Resetting(preset="paper", runs=tmp_path, budget=1000), MODELS))
    grid = {part.model: part for part in asked.values() if "A7" in part.arms}
    assert set(grid) == {folder for _, folder in MODELS}
    assert {folder for folder, part in grid.items() if "A12" in part.arms} == {"4x128-0", "4x128-1"}
    assert all({"A0", "A1", "A7"} <= set(part.arms) for part in grid.values())
    assert len(asked["rates"].rates) == 5
    assert asked["length"].shares == (0.125, 0.25, 0.5)
    assert max(asked["unique"].unique) == 250
    arms = {arm for part in asked.values() for arm in part.arms}
    assert arms == {f"A{n}" for n in range(13)}
    assert all(part.preset == "default" for part in asked.values())
    assert all(part.budget == 1000 for part in asked.values())


def test_a_student_of_two_studies_counts_once(tmp_path: Path) -> None:
    from tests.experiments.reset import planted

    rows = planted.ledger(layers=(0, 1), seeds=(0, 1))
    from experiments.reset.statistics.crossing import crossings

    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        rows.assign(metric="gap", value=rows["gap"]).to_parquet(folder / "metrics.parquet")
        crossings(rows).to_parquet(folder / "crossings.parquet")
    found = together([("one", tmp_path / "one"), ("two", tmp_path / "two")], [])
    assert len(found.result.ledger) == len(rows)
    assert not found.result.crossings.duplicated([*KEYS, "weights", "kind", "threshold"]).any()
    alone = together([("one", tmp_path / "one")], [])
    pd.testing.assert_frame_equal(alone.result.crossings, found.result.crossings)
    tried = together([("rates", tmp_path / "one"), ("two", tmp_path / "two")], [])
    assert len(tried.result.ledger) == len(rows)


def test_a_cap_on_compute_keeps_three_seeds_of_the_reference(tmp_path: Path) -> None:
    asked = Resetting(preset="paper", runs=tmp_path, bases=1, largest=4e13)
    wanted = [b for b in paper.grid("tokens") if paper._is_wanted(b, asked)]  # noqa: SLF001
    shapes = [(b.family, b.layers, b.d_model, b.seed) for b in wanted]
    assert shapes.count(("opt", 4, 128, 0)) == 1
    assert {seed for *shape, seed in shapes if shape == ["opt", 4, 128]} == {0, 1, 2}
    assert {seed for *shape, seed in shapes if shape != ["opt", 4, 128]} == {0}
    assert ("opt", 8, 128, 0) in shapes
    assert ("opt", 12, 256, 0) not in shapes


def test_a_cap_below_the_reference_is_refused(tmp_path: Path) -> None:
    from experiments.run_folder import run_study

    with pytest.raises(ValueError, match="leaves out the reference base"):
        run_study("reset", Resetting(preset="paper", largest=1e9, runs=tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_the_paper_decides_is_refused(tmp_path: Path) -> None:
    from experiments.run_folder import run_study

    with pytest.raises(ValueError, match="--preset paper brings its own"):
        run_study("reset", Resetting(preset="paper", layers=(1,), runs=tmp_path))
    assert not list(tmp_path.iterdir())
