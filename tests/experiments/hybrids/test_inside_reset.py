"""Resetting blocks of hybrids: language models as any other, regressors on fresh prompts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from ablate.reset import Place
from experiments.bases import base_at
from experiments.hybrids.architecture.config import HybridConfig
from experiments.hybrids.architecture.model import Hybrid
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.learning.streams import held_out, prompts_at
from experiments.hybrids.learning.training import train_seeds
from experiments.hybrids.regression.prompts import interleaved, predictions_at
from experiments.hybrids.regression.task_table import Task
from experiments.prompted_data import CPU, NextVector, PromptOrder, prompted_data
from experiments.reset.learning.session import Session, retrain
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import retrain_whole
from experiments.reset.on_prompts import reads_prompts
from experiments.reset.study import Resetting
from experiments.run_folder import run_study
from tests.experiments.reset.sessions import session
from tests.experiments.reset.test_session import same

TASK = Task("linear", d=1, points=6)
REGIME = Regime(steps=300, batch=32, rate=1e-2, held_out=64, per_decade=2, curriculum=0.04)
BLOCKS = "mamba-rms,learned-attention-gelu-layer"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two seeds."""
    config = HybridConfig(
        blocks=BLOCKS,
        d_model=16,
        heads=2,
        d_state=4,
        expand=2,
        n_positions=12,
        x_dim=1,
        y_dim=1,
    )
    folder = tmp_path_factory.mktemp("run")
    train_seeds(config, TASK, REGIME, [0, 1], folder)
    return folder


def treatments(target="lm"):
    places = [(Place(0),), (Place(1),)]
    return [
        *(Treatment("A0", p, p, "init", target, seed, 1e-2) for p in places for seed in (0, 1)),
        Treatment("A1", (), (Place(1),)),
    ]


def prompt_session(trained, chosen):
    base = base_at(str(trained / "model-s0"))
    data = prompted_data(base)
    return Session(
        Hybrid.from_pretrained(base.weights).eval(),
        data.reading("held-out", seed=0),
        data.objective.held_out(600, split="report"),
        chosen,
        {"base": "b"},
        steps=6,
        evaluations=(0, 2, 6),
        parts=2,
        warmup=2,
        hold=4,
        anneal=0.5,
    )


def test_a_regressor_is_a_base_that_knows_its_training(trained):
    base = base_at(str(trained / "model-s1"))
    assert base.objective == "regression"
    assert base.seed == 1
    assert base.n_layers == 2
    # The curriculum: twelve steps of fewer points, then all six.
    small = [prompts_at(TASK, [1], s, 32, REGIME_SIZES[s], CPU).xs.shape[1] for s in range(12)]
    assert base.tokens == 2 * 32 * (sum(small) + 288 * 6)
    curve = pd.read_parquet(trained / "curve.parquet")
    mine = curve[(curve.seed == 1) & (curve.step > 0)]
    assert [v for _, v in base.curve] == pytest.approx(mine["share"].tolist())
    assert base.curve[-1][0] == base.tokens
    half = sorted((trained / "checkpoints" / "s1").iterdir())[1]
    assert 0 < (base_at(str(half)).tokens or 0) < (base.tokens or 0)


REGIME_SIZES = [(1, 2 + 4 * s // 12) for s in range(12)]


def test_the_loss_is_the_error_over_that_of_predicting_0(trained):
    asked = prompt_session(trained, treatments())
    rows = retrain(asked)
    model = Hybrid.from_pretrained(trained / "model-s0").eval()
    prompts = held_out(TASK, 2048, CPU)
    unit = prompts.ys.square().mean()
    read = torch.cat([b.inputs["prompts"] for b in asked.held_out])
    with torch.no_grad():
        predictions = predictions_at(model(prompts=read).logits)
    error = (predictions - read[:, 1::2, :1]).square().mean() / unit
    assert rows["loss_base"].unique() == pytest.approx([float(error)], rel=1e-5)
    no_op = rows[(rows.arm == "A1") & (rows.step == 0)]
    assert no_op.gap.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("target", ["lm", "hidden", "mix"])
def test_regressors_are_retrained_as_the_plain_way_does(trained, target):
    chosen = treatments(target)
    asked = prompt_session(trained, chosen)
    same(retrain(asked), pd.concat([retrain_whole(asked, t) for t in chosen]))


def test_a_reset_block_learns_its_task_again(trained):
    chosen = [Treatment("A0", (Place(0),), (Place(0),), "init", "lm", 0, 3e-2)]
    asked = prompt_session(trained, chosen)
    asked = dataclasses.replace(asked, steps=80, evaluations=(0, 80), hold=64, parts=1)
    rows = retrain(asked)
    first, last = rows.iloc[0], rows[rows.weights == "annealed"].iloc[0]
    assert first.gap > 0.5
    assert last.gap < 0.1


def test_targets_stand_where_x_stands():
    rows = interleaved(held_out(TASK, 5, CPU))
    batch = NextVector(1, unit=2.0)(rows)
    assert batch.predicted.tolist() == [[True, False] * 6] * 5
    torch.testing.assert_close(batch.targets[:, ::2], rows[:, 1::2, :1])
    assert batch.tokens == 60
    last = NextVector(1, unit=2.0, last=True)(rows)
    assert last.predicted.sum(1).tolist() == [1] * 5
    assert last.predicted[:, 10].all()


def test_fresh_prompts_are_neither_trained_on_nor_held_out():
    order = PromptOrder(TASK, 4, seed=0)
    assert torch.equal(order.at(3), order.at(3))
    others = [
        PromptOrder(TASK, 4, seed=1).at(3),
        order.at(4),
        interleaved(prompts_at(TASK, [0], 3, 4, (1, 6), CPU)),
        interleaved(held_out(TASK, 4, CPU)),
    ]
    assert all(not torch.equal(order.at(3), other) for other in others)
    assert order.steps_for(49) == 2
    assert torch.equal(PromptOrder(TASK, 4, 0, cycle=3).at(4), order.at(1))


def test_the_command_does_it_all(trained, tmp_path):
    study = Resetting(
        model=str(trained / "model-s0"),
        arms=("A0", "A1", "A6", "A7"),
        seeds=1,
        budget=1_000.0,
        step=96,
        evaluate=600,
        per_decade=2,
        precision="float32",
        runs=tmp_path,
    )
    folder, outcome = run_study("reset", study)
    assert "predicting 0" in outcome.headline
    assert "nat" not in outcome.headline.split()
    metrics = pd.read_parquet(folder.path / "metrics.parquet")
    assert set(metrics["objective"]) == {"regression"}
    assert set(metrics["layer"]) == {-1, 0, 1}
    assert set(metrics["origin"]) == {"held-out"}
    page = (folder.path / "report.html").read_text()
    assert " nat" not in page
    assert json.loads((folder.path / "outcome.json").read_text())["extra"]["answers"]


def test_what_a_regressor_cannot_do_is_refused(trained, tmp_path):
    name = str(trained / "model-s0")
    for options, said in (
        ({"targets": ("logits",)}, "no distribution over words"),
        ({"origin": "same"}, "new ones at every step"),
        ({"corpus": "stdlib"}, "no text"),
        ({"shares": (0.5,)}, "folders of their own"),
        ({"base_tokens": 5}, "its record says"),
    ):
        with pytest.raises(ValueError, match=said):
            run_study("reset", Resetting(model=name, runs=tmp_path, **options))
    words = SimpleNamespace(name="a model of words", base=SimpleNamespace(objective="lm"))
    beside = SimpleNamespace(name=name, base=base_at(name))
    with pytest.raises(ValueError, match="a run of its own"):
        reads_prompts(Resetting(model=name), (words, beside))
    assert not reads_prompts(Resetting(model=name), (words,))
    lost = tmp_path / "model-s0"
    shutil.copytree(name, lost)
    with pytest.raises(ValueError, match="without a record of its task"):
        run_study("reset", Resetting(model=str(lost), runs=tmp_path))


def test_language_hybrids_are_retrained_as_any_other():
    places = [(Place(0),), (Place(1),), (Place(2),)]
    chosen = [Treatment("A0", p, p, "init", "lm", 0, 1e-2) for p in places]
    chosen += [Treatment("A0", p, p, "init", "hidden", 0, 1e-2) for p in places[:1]]
    asked = session("ablate_hybrid", chosen)
    rows = retrain(asked)
    same(rows, pd.concat([retrain_whole(asked, t) for t in chosen]))
    assert (rows[rows.step == 0]["gap"].abs() > 1e-3).all()
