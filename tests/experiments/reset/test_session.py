"""A session against the plain way: the same curves; killed and resumed; students that stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ablate.reset import Place
from experiments.reset.learning import session as session_room
from experiments.reset.learning.cohorts import Training
from experiments.reset.learning.ledger import goes_on
from experiments.reset.learning.session import retrain
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import retrain_whole
from experiments.training import log_spaced
from tests.experiments.reset.sessions import session
from tests.families import tiny

VALUES = ["loss", "gap", "stderr", "loss_base", "loss_reset", "loss_skip"]


def treated(layer: int, target: str = "lm", *, seed: int = 0, rate: float = 1e-2) -> Treatment:
    """A reset block."""
    place = (Place(layer),)
    return Treatment("A0", place, place, "moments", target, seed, rate)  # pyright: ignore


def same(one: pd.DataFrame, other: pd.DataFrame, tolerance: float = 2e-4) -> None:
    """The same rows, in any order, but for the seconds."""
    keys = ["name", "step", "weights"]
    one, other = (f.sort_values(keys).reset_index(drop=True) for f in (one, other))
    others = [c for c in one.columns if c not in (*VALUES, "seconds")]
    pd.testing.assert_frame_equal(one[others], other[others])
    for name in VALUES:
        np.testing.assert_allclose(one[name], other[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert", "esm"])
def test_curves_are_those_of_the_plain_way(family: str) -> None:
    treatments = [
        treated(0),
        treated(1, seed=1, rate=2e-2),
        treated(1, seed=2),
        treated(0, "hidden"),
        treated(1, "mix"),
        Treatment("A1", (), (Place(1),)),
        Treatment("A4", (Place(0),), (Place(0, "norms"),), "moments"),
        Treatment("A9", (Place(1, "ffn"),), (Place(1, "ffn"),), "moments"),
        Treatment("A9", (Place(0, "qk"),), (Place(0, "qk"),), "moments"),
        Treatment("A12", (Place(0), Place(1)), (Place(0), Place(1)), "moments"),
    ]
    asked = session(family, treatments, parts=2)
    together = retrain(asked)
    alone = pd.concat([retrain_whole(asked, t) for t in treatments])
    same(together, alone)
    last = together[together["step"] == asked.last]
    assert set(last["weights"]) == {"annealed"}
    assert set(last["status"]) <= {"budget", "diverged"}
    first = together[together["step"] == 0]
    assert (first["tokens"] == 0).all()
    assert np.allclose(first[first.arm == "A1"]["gap"], 0, atol=1e-6)


def test_frozen_weights_are_bitwise_what_they_were() -> None:
    model = tiny("gpt2")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    asked = session("gpt2", [treated(1), treated(0, "hidden")], model=model)
    retrain(asked)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_of_a_fused_projection_only_the_places_entries_change() -> None:
    asked = session("gpt2")
    qk = Treatment("A9", (Place(0, "qk"),), (Place(0, "qk"),), "moments", rate=1e-1)
    training = Training.of(asked.model, [qk], weight_decay=0.5)
    own = dict(asked.model.named_parameters())
    name = "transformer.h.0.attn.c_attn.weight"
    for stack in training.stacks:
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(0))
    training.update(1.0)
    after = training.weights(asked.model, 0)[name]
    width = after.shape[0]
    assert torch.equal(after[:, 2 * width :], own[name][:, 2 * width :])
    assert not torch.isclose(after[:, : 2 * width], own[name][:, : 2 * width]).any()


def test_a_killed_session_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    treatments = [treated(0), treated(1, "hidden"), treated(1, seed=3)]
    whole = retrain(session("opt", treatments))

    class KilledError(Exception):
        pass

    def die(step: int, _: int) -> None:
        if step == 5:
            raise KilledError

    checkpoint = tmp_path / "session.safetensors"
    with pytest.raises(KilledError):
        retrain(session("opt", treatments, save_every=0), checkpoint, progress=die)
    steps: list[int] = []
    resumed = retrain(
        session("opt", treatments), checkpoint, progress=lambda step, _: steps.append(step)
    )
    assert steps[0] > 1
    drop = ["seconds"]
    pd.testing.assert_frame_equal(resumed.drop(columns=drop), whole.drop(columns=drop))


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "session.safetensors"
    retrain(session("opt", [treated(0)], save_every=0), checkpoint)
    with pytest.raises(ValueError, match="other students"):
        retrain(session("opt", [treated(1)]), checkpoint)


def test_students_that_recovered_stop_and_the_others_go_on_unchanged() -> None:
    treatments = [treated(0, seed=s, rate=r) for s in range(3) for r in (1e-2, 2e-2)]
    free = retrain(session("opt", treatments, steps=12))
    ends = free[(free.weights == "averaged") & (free.step == 12)].sort_values("gap")
    level = float(ends["gap"].iloc[:3].max())
    stopped = retrain(session("opt", treatments, steps=12, enough=level))
    mine = stopped[stopped["status"] == "recovered"]["name"]
    assert not any(goes_on(name) for name in mine)
    keys = ["name", "step", "weights"]
    both = stopped.merge(free, on=keys, suffixes=("", "_free"))
    assert len(both) == len(stopped)
    np.testing.assert_allclose(both["gap"], both["gap_free"], atol=1e-5)


def test_a_student_that_explodes_is_a_class_of_its_own() -> None:
    wild = treated(1, rate=1e18)
    rows = retrain(session("opt", [wild, treated(0)]))
    assert rows[rows.rate == 1e18]["status"].iloc[-1] == "diverged"
    assert np.isfinite(rows[rows.rate != 1e18]["loss"]).all()


def test_a_model_from_scratch_and_a_random_context() -> None:
    asked = session("opt")
    scratch = retrain_whole(asked, Treatment("A7", (), (), scope="scratch"))
    assert (scratch["layer"] == -1).all()
    frozen = Treatment("A8", (), (Place(1),), scope="random-context", seed=4)
    rows = retrain_whole(asked, frozen)
    assert rows["loss_base"].nunique() == 1
    assert rows["parameters"].iloc[0] < scratch["parameters"].iloc[0]
    everything = Treatment("A3", (Place(1),), (), "moments", scope="all")
    trained = retrain_whole(asked, everything)
    assert trained["layer"].iloc[0] == 1
    assert trained["trains"].iloc[0] == "all"


def test_a_whole_model_resumes(tmp_path: Path) -> None:
    treatment = Treatment("A3", (Place(1),), (), "moments", scope="all", rate=1e-2)
    whole = retrain_whole(session("opt"), treatment)
    checkpoint = tmp_path / "whole.safetensors"

    class KilledError(Exception):
        pass

    def die(step: int, _: int) -> None:
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        retrain_whole(session("opt", save_every=0), treatment, checkpoint, progress=die)
    resumed = retrain_whole(session("opt"), treatment, checkpoint)
    drop = ["seconds"]
    pd.testing.assert_frame_equal(resumed.drop(columns=drop), whole.drop(columns=drop))


def test_waves_hold_every_cohort_once(monkeypatch: pytest.MonkeyPatch) -> None:
    treatments = [treated(layer, target) for layer in (0, 1, 2) for target in ("lm", "hidden")]
    whole = retrain(session("opt", treatments))
    monkeypatch.setattr(session_room, "IN_FLIGHT", {"cpu": 1})
    same(retrain(session("opt", treatments)), whole, 1e-5)


@pytest.mark.parametrize(("steps", "first"), [(1, 1), (7, 1), (100, 1), (640, 6)])
def test_evaluations_are_spaced_by_ratio(steps: int, first: int) -> None:
    found = log_spaced(steps, 6, first)
    assert found[0] == 0
    assert found[-1] == steps
    assert found == sorted(set(found))
    ratios = [b / a for a, b in zip(found[1:], found[2:], strict=False) if a >= 10]
    assert all(ratio < 10 ** (1 / 6) + 0.12 for ratio in ratios)
