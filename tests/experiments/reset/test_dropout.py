"""Dropout draws where weights are trained, nowhere else, and as the seed says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from ablate.reset import Place
from experiments.reset.learning.climb import Pass, evaluate, learn
from experiments.reset.learning.cohorts import Training
from experiments.reset.learning.session import Session, retrain
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import learning, plain_loss, prepared, retrain_whole
from tests.experiments.reset.sessions import session
from tests.families import tiny

STUDENT = Treatment("A0", (Place(1),), (Place(1),), "moments", "lm", 0, 1e-2)
EVERYTHING = Treatment("A3", (Place(1),), (), "moments", scope="all", rate=1e-2)


def dropping() -> nn.Module:
    """An OPT of which half of every branch is dropped in training mode."""
    model: Any = tiny("opt")
    for block in model.model.decoder.layers:
        block.dropout = 0.5
    return model


def asked(**options: Any) -> Session:
    return session("opt", [STUDENT], model=dropping(), **options)


def test_it_draws_in_the_trained_block_alone() -> None:
    one = asked()
    batch = one.batch(0)
    cohorts = [Training.of(one.model, [STUDENT]).cohort]
    passing = Pass.of(one.model, batch)
    losses = [float(learn(passing, cohorts)[0]) for _ in range(3)]
    assert len(set(losses)) == 3
    assert torch.equal(evaluate(passing, cohorts)[0], evaluate(passing, cohorts)[0])
    assert not any(module.training for module in one.model.modules())
    off = [float(learn(passing, cohorts, dropout=False)[0]) for _ in range(2)]
    assert off[0] == off[1]


def test_the_plain_way_draws_the_same() -> None:
    one = asked()
    batch = one.batch(0)
    alone = prepared(one, STUDENT)
    cohorts = [Training.of(one.model, [STUDENT]).cohort]
    torch.manual_seed(7)
    (found,) = learn(Pass.of(one.model, batch), cohorts)
    torch.manual_seed(7)
    with learning(alone, STUDENT):
        plain = plain_loss(one, alone, STUDENT, batch)
    torch.testing.assert_close(found[0], plain, rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in alone.modules())


@pytest.mark.parametrize("treatment", [STUDENT, EVERYTHING], ids=["block", "everything"])
def test_a_killed_run_draws_on(treatment: Treatment, tmp_path: Path) -> None:
    def run(one: Session, checkpoint: Path | None = None, **more: Any) -> pd.DataFrame:
        if treatment is STUDENT:
            return retrain(one, checkpoint, **more)
        return retrain_whole(one, treatment, checkpoint, **more)

    class KilledError(Exception):
        pass

    def die(step: int, _: int) -> None:
        if step == 5:
            raise KilledError

    before = torch.get_rng_state()
    whole = run(asked())
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(KilledError):
        run(asked(save_every=0), checkpoint, progress=die)
    resumed = run(asked(), checkpoint)
    drop = ["seconds"]
    pd.testing.assert_frame_equal(resumed.drop(columns=drop), whole.drop(columns=drop))
    assert torch.equal(torch.get_rng_state(), before)
    without = session("opt", [STUDENT])
    still = retrain(without) if treatment is STUDENT else retrain_whole(without, treatment)
    assert not still["loss"].equals(whole["loss"])
