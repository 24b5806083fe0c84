"""The whole study and the whole search, tiny: what they leave, and that a killed one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ablate import HookedModel
from experiments.hybrids import measured
from experiments.hybrids.study import Hybrids
from experiments.induction.study import Induction
from experiments.prune.study import Pruning
from experiments.run_folder import RunFolder, run_study


def tiny(runs: Path, **options: Any) -> Hybrids:
    """Two architectures of two blocks, four steps."""
    asked: dict[str, Any] = {
        "architectures": ("gpt2", "mamba-rms,attention-swiglu-rms"),
        "layers": 2,
        "d_model": 16,
        "heads": 2,
        "steps": 4,
        "batch": 4,
        "prompts": 16,
        "held_out": 8,
        "first_evaluation": 2,
        "per_decade": 2,
        "shifts": ("noisy",),
        "jobs": 1,
    }
    return Hybrids(**asked | options, runs=runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_study("hybrid", tiny(tmp_path_factory.mktemp("runs")))[0].path


def test_it_leaves_scores_of_every_seed_and_figures(folder: Path) -> None:
    metrics = pd.read_parquet(folder / "metrics.parquet")
    scores = metrics[metrics.metric == "icl_score"]
    assert set(scores.seed) == {-1, 0, 1}
    assert set(scores["shift"]) == {"none", "noisy"}
    own = scores[(scores.seed >= 0) & (scores["shift"] == "none")]
    assert own.loc[own.baseline == "least-squares", "value"].notna().all()
    assert {"least-squares", "ridge"} <= set(scores.baseline)
    assert {"errors.png", "scores.png", "training.png", "importance.png"} <= {
        path.name for path in (folder / "figures").iterdir()
    }
    page = (folder / "report.html").read_text()
    assert "mamba-rms,attention-swiglu-rms" in page
    assert not list(folder.rglob("checkpoints"))
    ablated = pd.read_parquet(folder / "ablations.parquet")
    assert {"L0M", "L1H0", "L1F"} <= set(ablated.component)


def test_its_models_load_and_predict(folder: Path) -> None:
    (place, *_) = sorted((folder / "models").glob("*/model-s0"))
    model = HookedModel.from_pretrained(str(place))
    prompts = torch.zeros(1, 24, 5)
    assert model.model(prompts=prompts).logits.shape == (1, 24, 1)
    for kind in (Pruning, Induction):  # both ask for tokens
        with pytest.raises(ValueError, match="has no vocabulary"):
            kind(model=str(place)).load_model()


def test_a_killed_study_goes_on_to_the_same_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    ours, done = measured.measured_cell, 0

    def once(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 2:
            raise KilledError
        return ours(*args)

    monkeypatch.setattr(measured, "measured_cell", once)
    with pytest.raises(KilledError):
        run_study("hybrid", tiny(tmp_path))
    monkeypatch.setattr(measured, "measured_cell", ours)
    again = run_study("hybrid", tiny(tmp_path))[0].path
    assert again.name == folder.name
    both = [pd.read_parquet(path / "metrics.parquet") for path in (folder, again)]
    pd.testing.assert_frame_equal(*both)


def test_frames_lost_between_training_and_their_shard_are_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    keep, kept = RunFolder.keep, 0

    def once(*args: Any) -> None:
        nonlocal kept
        kept += 1
        if kept == 3:
            raise KilledError
        keep(*args)

    monkeypatch.setattr(RunFolder, "keep", once)
    with pytest.raises(KilledError):
        run_study("hybrid", tiny(tmp_path))
    monkeypatch.setattr(RunFolder, "keep", keep)
    again = run_study("hybrid", tiny(tmp_path))[0].path
    both = [pd.read_parquet(path / "metrics.parquet") for path in (folder, again)]
    pd.testing.assert_frame_equal(*both)
    assert not list(again.rglob("checkpoints"))


def test_without_checkpoints_no_scheme_is_told_and_all_else_stays(
    folder: Path, tmp_path: Path
) -> None:
    other = run_study("hybrid", tiny(tmp_path, keep=False))[0].path
    both = [pd.read_parquet(path / "metrics.parquet") for path in (folder, other)]
    pd.testing.assert_frame_equal(*both)
    assert not (other / "labels.parquet").exists()
    assert not (other / "figures" / "schemes.png").exists()


def test_an_architecture_that_diverges_at_every_rate_does_not_end_the_study(tmp_path: Path) -> None:
    asked = tiny(tmp_path, optimiser="sgd", rates=(1e30, 1e35), inside=False, keep=False)
    where = run_study("hybrid", asked)[0].path
    metrics = pd.read_parquet(where / "metrics.parquet")
    failed = metrics[metrics.metric == "failure_rate"]
    assert (failed["value"] == 1).all()
    assert len(failed)


def test_a_search_reports_a_front_on_other_seeds(tmp_path: Path) -> None:
    usual = Hybrids().architectures
    asked = tiny(
        tmp_path, search=True, candidates=6, generations=2, inside=False, architectures=usual
    )
    where, outcome = run_study("hybrid", asked)
    rungs = pd.read_parquet(where.path / "rungs.parquet")
    assert rungs.groupby("generation")["blocks"].nunique().tolist() == [6, 3]
    assert set(rungs.seed) == {100_000, 100_001}
    front = pd.read_parquet(where.path / "front.parquet")
    assert {"gpt2", "llama", "mamba", "mambaformer"} <= set(front.architecture)
    assert front.front.any()
    assert outcome.extra["front"] == front.loc[front.front, "architecture"].tolist()
    assert json.loads((where.path / "outcome.json").read_text())["extra"]["flops"] > 0
