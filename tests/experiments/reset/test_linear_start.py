"""Blocks that begin as linear maps: the map, the FFN that holds it, students of it, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ablate.places import block_at
from ablate.reset import Place, fresh, restored
from ablate.stack import record
from experiments.objectives import Batch
from experiments.pretrain import Pretraining
from experiments.reset.learning import linear_start
from experiments.reset.learning.linear_start import Sums, linear_starts, refusal
from experiments.reset.learning.parallel import Share
from experiments.reset.learning.session import retrain
from experiments.reset.learning.treatments import Treatment, starts
from experiments.reset.learning.whole import retrain_whole
from experiments.reset.opened import opened
from experiments.reset.plan import planned
from experiments.reset.statistics.crossing import KEYS, crossings
from experiments.reset.study import Resetting
from experiments.run_folder import run_study
from tests.experiments.reset.sessions import objective, session
from tests.experiments.reset.test_session import same
from tests.experiments.small_corpora import sayings
from tests.families import tiny

WIDE = {
    "opt": ({"ffn_dim": 80}, "fc1", "fc2"),
    "gpt2": ({"n_inner": 80}, "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ({"intermediate_size": 80}, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi": ({"intermediate_size": 80}, "mlp.fc1", "mlp.fc2"),
    "bloom": ({}, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "falcon": ({"ffn_hidden_size": 80}, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "falcon-rw": ({"ffn_hidden_size": 80}, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "t5": ({"d_ff": 80}, "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
}
"""Families with plain FFNs, made wide enough; where the two products are."""
D = 32


def treated(layer: int = 1, seed: int = 0, target: str = "lm", rate: float = 1e-2) -> Treatment:
    """A block that begins as a linear map."""
    place = (Place(layer),)
    return Treatment("A10", place, place, "linear", target, seed, rate)  # pyright: ignore


def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            named[name].copy_(tensor)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"])
def test_two_hidden_units_hold_a_coordinate(name: str) -> None:
    z = torch.linspace(-9, 9, 400, dtype=torch.float64)
    torch.testing.assert_close(ACT2FN[name](z) - ACT2FN[name](-z), z)


def test_the_map_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(300, 7, generator=generator, dtype=torch.float64) + 3
    u[:, -1] = -u[:, :-1].sum(1)  # as a norm leaves it
    r = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    parts = [Sums.of(a, b) for a, b in zip(u.split(70), r.split(70), strict=True)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    for intercept in (True, False):
        A, b = whole.map(intercept=intercept)
        x = u - u.mean(0) if intercept else u
        y = r - r.mean(0) if intercept else r
        penalty = linear_start.PENALTY * float(x.square().sum()) / 7
        rows = np.concatenate([x.numpy(), np.sqrt(penalty) * np.eye(7)])
        wanted = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((7, 5))]))[0]
        np.testing.assert_allclose(A.numpy(), wanted.T, atol=1e-9)
        offset = r.mean(0) - A @ u.mean(0) if intercept else torch.zeros(5).double()
        torch.testing.assert_close(b, offset)


def blocks_of(model: nn.Module, place: Place, batch: Batch, path: str) -> tuple[Tensor, Tensor]:
    """What the block makes of the base's stream, and what the module at `path` in it reads."""
    heard = []
    module = block_at(model, place).module.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    with torch.no_grad():
        recorded = record(model, batch.inputs, keep=[place.layer + 1], stack=place.stack or None)
    handle.remove()
    out = recorded.resid(place.layer + 1)
    return out.flatten(0, 1), heard[0].flatten(0, -2)


@pytest.mark.parametrize("family", WIDE)
def test_a_linear_effect_is_found_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_start, "PENALTY", 1e-10)
    changes, inner, outer = WIDE[family]
    model = tiny(family, **changes)
    place = Place(1, stack="decoder" if family == "t5" else "")
    treatment = Treatment("A10", (place,), (place,), "linear", seed=3)
    asked = objective(family, batch=60)
    path = block_at(model, place).path

    # The block is what the law init gives, but for an FFN of which all but the rows that the
    # activation makes linear is silent.
    planted = fresh(model, place, "init", 3)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(D, D, generator=generator) / 8
    b = torch.randn(D, generator=generator) / 8
    eye = torch.eye(D)
    for name, value in ((inner, torch.cat([eye, -eye])), (outer, torch.cat([A, -A], 1))):
        weight = planted[f"{path}.{name}.weight"]
        weight = weight.T if family == "gpt2" else weight
        if name == outer:
            weight.zero_()
        weight[: len(value), : value.shape[1]] = value
    bias = f"{path}.{outer}.bias"
    put(model, planted | ({bias: b} if bias in planted else {}))
    out, u = blocks_of(model, place, asked.at(5), inner)
    silent = {n: torch.zeros_like(t) for n, t in planted.items() if f".{outer}." in n}
    with restored(model):
        put(model, silent)
        effect = out - blocks_of(model, place, asked.at(5), inner)[0]
    torch.testing.assert_close(effect, u @ A.T + b * (bias in planted), atol=1e-5, rtol=1e-4)

    made = linear_starts(model, [treatment], [asked.at(0), asked.at(1)], place.stack or None)[0]
    assert made.keys() == planted.keys()
    with restored(model):
        put(model, made)
        again = blocks_of(model, place, asked.at(5), inner)[0]
    torch.testing.assert_close(again, out, atol=1e-4, rtol=1e-4)


def test_students_of_a_session_are_those_of_the_plain_way() -> None:
    model = tiny("opt", ffn_dim=80)
    treatments = [
        treated(0),
        treated(1, rate=2e-2),
        treated(1),
        treated(1, target="hidden"),
        Treatment("A10", (Place(1),), (Place(1),), "moments"),
        Treatment("A4", (Place(0),), (Place(0, "norms"),), "linear"),
        Treatment("A9", (Place(1, "ffn"),), (Place(1, "ffn"),), "linear"),
        Treatment("A12", (Place(0), Place(1)), (Place(0), Place(1)), "linear"),
    ]
    asked = session("opt", treatments, model=model, parts=2)
    rows = retrain(asked)
    same(rows, pd.concat([retrain_whole(asked, t) for t in treatments]))
    begun = rows[rows.step == 0].set_index("name")["tokens"]
    cost = sum(asked.batch(step).tokens for step in range(asked.steps))
    assert all(begun[t.name] == (cost if t.is_fitted else 0) for t in treatments)
    assert cost == len(asked.fitting) * asked.batch(0).tokens
    first = rows[(rows.step == 2) & (rows.weights == "raw")].set_index("name")["tokens"]
    assert (first - begun == 2 * asked.batch(0).tokens).all()


def test_a_fit_reads_64_tokens_a_coordinate() -> None:
    asked = session("opt", steps=200, model=tiny("opt", ffn_dim=80))
    tokens = sum(batch.tokens for batch in asked.fitting)
    assert 64 * D <= tokens < 64 * D + asked.batch(0).tokens


def test_a_killed_session_goes_on(tmp_path: Path) -> None:
    treatments = [treated(0), treated(1, seed=3)]
    model = tiny("opt", ffn_dim=80)
    whole = retrain(session("opt", treatments, model=model))

    class KilledError(Exception):
        pass

    def die(step: int, _: int) -> None:
        if step == 5:
            raise KilledError

    checkpoint = tmp_path / "session.safetensors"
    with pytest.raises(KilledError):
        retrain(session("opt", treatments, model=model, save_every=0), checkpoint, progress=die)
    resumed = retrain(session("opt", treatments, model=model), checkpoint)
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_padding_has_no_say() -> None:
    model = tiny("gpt2", n_inner=80)
    plain = objective("gpt2", batch=60).at(0)
    seen = torch.ones_like(plain.inputs["input_ids"])
    longer = {"input_ids": nn.functional.pad(plain.inputs["input_ids"], (0, 4), value=9)}
    longer["attention_mask"] = nn.functional.pad(seen, (0, 4))
    padded = Batch(longer, nn.functional.pad(plain.targets, (0, 4), value=-100), plain.tokens)
    one, other = (linear_starts(model, [treated()], [batch])[0] for batch in (plain, padded))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=1e-4)


def test_processes_add_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def total(_: Share, value: Tensor) -> Tensor:
        seen.append(value)
        return value

    monkeypatch.setattr(Share, "total", total)
    model, batches = tiny("opt", ffn_dim=80), [objective("opt", batch=61).at(0)]
    for share in (Share(), Share(0, 2), Share(1, 2)):
        linear_starts(model, [treated()], batches, share=share)
    whole, first, second = seen[:2], seen[2:4], seen[4:]
    for one, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close(one, a + b, atol=1e-4, rtol=1e-5)


def test_a_student_that_was_near_at_once_crossed_at_the_tokens_of_its_fit() -> None:
    known = dict.fromkeys(KEYS, 0) | {"law": "linear", "base_tokens": 1000.0}
    columns = {"loss_base": 1.0, "loss_reset": 1.4, "stderr": 0.0, "status": "running"}
    gaps = {100: 0.4, 110: 0.3, 120: 0.04, 130: 0.03, 140: 0.02}
    rows = [
        known | columns | {"tokens": tokens, "gap": gap, "loss": 1 + gap, "weights": weights}
        for tokens, gap in gaps.items()
        for weights in ("raw", "averaged")
        if (tokens, weights) != (100, "averaged")
    ]
    found = crossings(pd.DataFrame(rows), absolute=(0.5, 0.35, 0.05)).query("kind == 'absolute'")
    for _, mine in found.groupby("weights"):
        assert mine["tokens"].iloc[0] == 100
        assert 100 < mine["tokens"].iloc[1] < 110
        assert 110 < mine["tokens"].iloc[2] < 120
        assert mine["lower"].tolist() == [0, 100, 110]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("opt", {}, "48 wide, where a map of 32 coordinates takes 64"),
        ("llama", {}, "gate_proj, mlp.up_proj, mlp.down_proj, where two products are needed"),
        ("mixtral", {}, "not experts"),
        ("mamba", {}, "has an SSM"),
        ("falcon_h1", {}, "has an SSM"),
        ("opt-350m", {"ffn_dim": 80}, "post-norm"),
        ("bert", {"intermediate_size": 80}, "post-norm"),
        ("opt", {"ffn_dim": 80, "activation_function": "relu2"}, "φ(z) − φ(−z) is not z"),
    ],
)
def test_what_cannot_be_a_linear_map(family: str, changes: dict[str, object], said: str) -> None:
    model = tiny(family, **changes)
    place = Place(1)
    with pytest.raises(ValueError, match="the law linear for 1") as error:
        linear_starts(model, [treated()], [objective(family).at(0)])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert refusal(model, place) == str(error.value)


def test_what_is_refused_elsewhere() -> None:
    model = tiny("opt", ffn_dim=80)
    assert not refusal(model, Place(1))
    assert "reset the block" in refusal(model, Place(1, "attention"))
    with pytest.raises(ValueError, match="fitted to batches"):
        starts(model, treated())


def test_an_activation_that_was_not_seen_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("opt", ffn_dim=80, activation_function="relu2")
    monkeypatch.setattr(linear_start, "_keeps_odd", lambda _: True)
    with pytest.raises(ValueError, match="holds no linear map"):
        linear_starts(model, [treated()], [objective("opt").at(0)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder that `ablate pretrain` wrote, and that has learned something."""
    folder = sayings(tmp_path_factory.mktemp("text"))
    made, _ = run_study(
        "pretrain",
        Pretraining(
            layers=3,
            d_model=D,
            heads=2,
            context=32,
            short_rows=32,
            vocab=280,
            corpus=str(folder),
            tokens=49_152,
            batch=16,
            warmup=4,
            rate=5e-3,
            repeated_share=0.0,
            curve_tokens=512,
            precision="float32",
            runs=tmp_path_factory.mktemp("bases"),
        ),
    )
    return made.path / "model"


def test_a_trained_block_is_better_begun_as_a_map_than_afresh(base: Path, tmp_path: Path) -> None:
    asked = Resetting(
        model=str(base),
        arms=("A0", "A10"),
        laws=("linear",),
        targets=("lm",),
        seeds=1,
        budget=2560.0,
        step=256,
        evaluate=1024,
        per_decade=1,
        anneal=0.0,
        precision="float32",
        runs=tmp_path,
    )
    folder, _ = run_study("reset", asked)
    rows = folder.load()
    begun = rows[rows.step == 0].set_index(["layer", "law"])
    gaps = begun["gap"].unstack()
    assert (gaps["linear"] < 0.5 * gaps["init"]).all()
    assert begun["tokens"].unstack()["linear"].unique().tolist() == [64 * D]
    last = rows[rows.weights == "averaged"].groupby(["layer", "law"])["tokens"].max().unstack()
    assert (last["linear"] - last["init"] == 64 * D).all()


def test_a_base_that_has_no_such_start_says_so(base: Path, tmp_path: Path) -> None:
    asked = Resetting(model=str(base), arms=("A10",), laws=("torch", "linear"), budget=512.0)
    asked = dataclasses.replace(asked, step=256, evaluate=512, runs=tmp_path)
    bases = opened(asked)
    assert {t.law for job in planned(asked, bases).jobs for t in job.treatments} == {
        "torch",
        "linear",
    }
    narrow = tmp_path / "narrow"
    shutil.copytree(base, narrow)
    config = json.loads((narrow / "config.json").read_text()) | {"ffn_dim": 2 * D - 1}
    (narrow / "config.json").write_text(json.dumps(config))
    asked = dataclasses.replace(asked, model=str(narrow))
    plan = planned(asked, opened(asked))
    assert {t.law for job in plan.jobs for t in job.treatments} == {"torch"}
    assert len(plan.left_out) == 1
    assert "63 wide, where a map of 32 coordinates takes 64" in plan.left_out[0]
