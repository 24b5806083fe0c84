"""The cross-attention aside: source-use, foreign encoders, variants, and what they are called."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ablate.reset import Place, places_of, weights_at
from experiments.objectives import Batch, losses
from experiments.pretrain import Pretraining
from experiments.reset.learning import foreign
from experiments.reset.learning.aside import NO_OP, Lenders, bases, treatments, with_bases
from experiments.reset.learning.foreign import joined, retrain_foreign
from experiments.reset.learning.session import retrain
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import retrain_whole, row_sums
from experiments.reset.opened import opened
from experiments.reset.plan import planned
from experiments.reset.report.aside_sentences import aside_answer, aside_sentences
from experiments.reset.statistics.crossing import crossings
from experiments.reset.study import Resetting
from experiments.run_folder import run_study
from experiments.translation import no_sources, source_use
from tests.experiments.reset.planted import student
from tests.experiments.reset.sessions import session
from tests.families import tiny

VALUES = ["loss", "gap", "stderr", "loss_base", "loss_reset", "loss_skip", "source_use"]


def other(family: str, width: int = 32) -> Any:
    """A model of the same ids with other weights, perhaps of another width."""
    sizes = {"d_model": width, "d_kv": width // 4} if family == "t5" else {"d_model": width}
    model = tiny(family, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
            parameter.add_(0.1 * noise)
    return model.eval()


def learned(family: str) -> nn.Module:
    """A model that knows the held-out rows by heart, and needs its source for them."""
    model = tiny(family)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = session(family, stack="decoder").held_out
    for _ in range(25):
        for batch in batches:
            found, predicted = losses(model(**batch.inputs).logits, batch)
            (found.sum() / predicted.sum()).backward()
            optimiser.step()
            optimiser.zero_grad()
    return model.eval()


def variants(n_blocks: int = 2, **lenders: str) -> dict[str, Treatment]:
    found = treatments(range(n_blocks), n_blocks, Lenders(**lenders), 0, 1e-2)
    return {f"{t.variant} {t.layers}" if "one" in t.variant else t.variant: t for t in found}


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Encoders by name, instead of folders."""
    models: dict[str, Any] = {}

    def encoder_of(weights: str, dtype: str) -> nn.Module:
        assert dtype == "float32"
        return models[weights].get_encoder()

    monkeypatch.setattr(foreign, "encoder_of", encoder_of)
    return models


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_variants_without_another_encoder_are_those_of_the_plain_way(family: str) -> None:
    asked = list(variants().values())
    assert [t.arm for t in asked] == ["A1", "A13", "A13", "A13", "A13"]
    here = session(family, asked, stack="decoder", model=learned(family))
    together = retrain(here)
    alone = pd.concat([retrain_whole(here, t) for t in asked])
    keys = ["name", "step", "weights"]
    one, two = (f.sort_values(keys).reset_index(drop=True) for f in (together, alone))
    for name in VALUES:
        np.testing.assert_allclose(one[name], two[name], atol=5e-4, rtol=5e-4, err_msg=name)
    first = one[one["step"] == 0].set_index("variant")
    assert first.loc["cross-attention", "gap"] == pytest.approx(0, abs=1e-6)
    assert first.loc["cross-attention", "source_use"] == pytest.approx(1, abs=1e-3)
    assert first.loc["all wiped, silent", "source_use"] == pytest.approx(0, abs=1e-3)


def test_source_use_by_hand() -> None:
    model = learned("bart")
    here = session("bart", list(variants().values()), stack="decoder", model=model)
    rows = retrain(here)
    wiped = rows[(rows["variant"] == "all wiped") & (rows["step"] == 0)].iloc[0]
    student = foreign.joined(model, model.get_encoder(), variants()["all wiped"])

    def mean(model: nn.Module, batches: list[Batch]) -> float:
        with torch.no_grad():
            found = [losses(model(**b.inputs).logits, b)[0].sum() for b in batches]
        return float(sum(found)) / sum(int((b.targets >= 0).sum()) for b in batches)

    held_out = list(here.held_out)
    swapped = no_sources(held_out)
    u = source_use(mean(student, swapped), mean(student, held_out), mean(model, held_out))
    assert wiped["loss"] == pytest.approx(mean(student, held_out), abs=1e-5)
    assert wiped["source_use"] == pytest.approx(u, abs=1e-4)
    assert wiped["source_use"] < 0.5


def test_rows_of_other_families_have_the_column_too() -> None:
    place = (Place(0),)
    rows = retrain(session("opt", [Treatment("A0", place, place)]))
    assert np.isnan(rows["source_use"].to_numpy(float)).all()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_joined_to_its_own_encoder_a_base_is_itself(family: str) -> None:
    model = tiny(family)
    here = session(family, stack="decoder", model=model)
    bridge = variants(same="twin")["bridge"]
    student = joined(model, copy.deepcopy(model.get_encoder()), bridge)  # the identity
    held_out = list(here.held_out)
    assert torch.allclose(row_sums(here, student, held_out), row_sums(here, model, held_out))
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained == {"bridge.weight", "bridge.bias"}


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_other_encoder_is_read(family: str) -> None:
    """By hand: the base with the lender's encoder copied into it, wiped, answers the same."""
    model, lender = tiny(family), other(family)
    wiped = variants(same="lender")["all wiped, other encoder"]
    student = joined(model, lender.get_encoder(), wiped)
    byhand: Any = copy.deepcopy(model)
    with torch.no_grad():
        named = dict(byhand.named_parameters())
        for place in places_of(model, "cross"):
            for name in weights_at(model, place):
                named[name].copy_(student.get_parameter(f"model.{name}"))
    batch = session(family, stack="decoder").held_out[0]
    states = lender.get_encoder()(batch.inputs["input_ids"])
    expected = byhand(
        encoder_outputs=states, decoder_input_ids=batch.inputs["decoder_input_ids"]
    ).logits
    assert torch.allclose(student(**batch.inputs).logits, expected, atol=1e-5)
    assert not torch.allclose(expected, model(**batch.inputs).logits, atol=1e-3)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_of_another_width_keys_and_values_alone_change_shape(family: str) -> None:
    model, lender = tiny(family), other(family, 48)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = variants(other="wide")
    student = joined(model, lender.get_encoder(), found["all wiped, other width"])
    shapes = {n: p.shape for n, p in model.named_parameters()}
    changed = {
        n for n, p in student.model.named_parameters() if p.ndim == 2 and p.shape != shapes[n]
    }
    assert len(changed) == 2 * len(places_of(model, "cross"))
    assert all(student.model.get_parameter(n).shape[1] == 48 for n in changed)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    cross = {n for place in places_of(model, "cross") for n in weights_at(model, place)}
    assert trained == {f"model.{n}" for n in cross}
    assert all(p.isfinite().all() for p in student.parameters())
    norms = [n for place in places_of(model, "norms") for n in weights_at(model, place)]
    assert all(torch.equal(student.model.get_parameter(n), before[n]) for n in norms)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    kept = Treatment("A13", (), (), encoder="wide")
    with pytest.raises(ValueError, match="an encoder of width 48 for a decoder that reads 32"):
        joined(model, lender.get_encoder(), kept)


def test_every_student_of_another_encoder_trains_what_it_says(lent: dict[str, Any]) -> None:
    model = tiny("bart")
    lent |= {"lender": other("bart"), "wide": other("bart", 48)}
    before = {
        name: {n: t.clone() for n, t in each.state_dict().items()}
        for name, each in {"base": model, **lent}.items()
    }
    frames = []
    for name, treatment in variants(same="lender", other="wide").items():
        if treatment.encoder:
            here = session("bart", stack="decoder", model=model)
            frames.append(retrain_foreign(here, treatment).assign(asked=name))
    rows = pd.concat(frames)
    assert set(rows["variant"]) == {
        "all wiped, other encoder",
        "all wiped, other encoder, decoder trained",
        "all wiped, other width",
        "bridge",
        "bridge, other width",
    }
    first = rows[rows["step"] == 0].set_index("variant")["parameters"]
    assert first["bridge"] == 32 * 33
    assert first["bridge, other width"] == 32 * 49
    decoder = {id(p): p.numel() for p in model.get_decoder().parameters()}
    assert first["all wiped, other encoder, decoder trained"] == sum(decoder.values())
    assert first["all wiped, other width"] > first["all wiped, other encoder"]
    for name, each in {"base": model, **lent}.items():
        assert all(torch.equal(t, before[name][n]) for n, t in each.state_dict().items())


def test_killed_and_resumed(
    lent: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent |= {"wide": other("bart", 48)}
    treatment = variants(other="wide")["bridge, other width"]
    whole = retrain_foreign(session("bart", stack="decoder"), treatment)
    path = tmp_path / "student.safetensors"

    def stop(step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    asked = session("bart", stack="decoder", save_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        retrain_foreign(asked, treatment, path, progress=stop)
    assert path.exists()
    again = retrain_foreign(asked, treatment, path)
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True
    )


def test_without_lenders_their_variants_are_not_there() -> None:
    assert not any(t.encoder for t in variants().values())
    names = [t.name for t in variants(same="a", other="b").values()]
    assert len(set(names)) == len(names) == 10
    assert math.isfinite(sum(t.rate for t in variants(same="a").values()))


TINY: dict[str, Any] = {
    "family": "bart",
    "objective": "translation",
    "layers": 2,
    "vocab": 280,
    "context": 32,
    "short_rows": 32,
    "batch": 16,
    "tokens": 4096,
    "warmup": 2,
    "schedule": "wsd",
    "repeated_share": 0.0,
    "reserved_share": 0.2,
    "curve_tokens": 512,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for n in range(40):
        lines = [" ".join(generator.choice(["alpha", "beta", "gamma"], 12)) for _ in range(30)]
        (folder / f"{n}.txt").write_text("\n".join(lines))
    return folder


def test_the_preset_from_its_bases_to_its_answer(text: Path, tmp_path: Path) -> None:
    small = Resetting(
        preset="cross-attention", model="", arms=("A7", "A13"), stacks=("decoder",), bases=2,
        seeds=1, budget=1024, step=256, evaluate=512, per_decade=2, runs=tmp_path / "runs",
        precision="float32",
    )  # fmt: skip
    wanted = tuple(
        Pretraining(**TINY, seed=n, d_model=width, heads=2, corpus=str(text), runs=small.runs)
        for n, width in enumerate((32, 32, 48))
    )
    study = with_bases(small, wanted)
    assert len(study.models) == 2
    assert len(study.encoders) == 1
    assert with_bases(small, wanted) == study  # nothing is trained twice
    plan = planned(study, opened(study))
    assert plan.left_out == ()
    asked = [t for job in plan.jobs for t in job.treatments]
    lent = {(t.variant, t.encoder) for t in asked if t.encoder}
    assert len(lent) == 3 * 2 + 2  # each other's, and one of another width for both
    made, outcome = run_study("reset", study)
    assert "wiped cross-attention alone leaves" in outcome.headline
    rows = made.load()
    assert set(rows["arm"]) == {"A1", "A7", "A13"}
    assert rows["variant"].nunique() == 1 + 9  # A7 has none
    counts = rows[rows["arm"] == "A13"].groupby(["base", "variant"])["name"].nunique()
    assert set(counts.drop("one block wiped", level="variant")) == {1}
    assert set(counts.xs("one block wiped", level="variant")) == {2}
    assert set(rows.loc[rows["variant"] == NO_OP, "layer"]) == {-1}
    assert (made.path / "figures" / "families.png").exists()


def test_the_bases_of_the_preset() -> None:
    asked = bases(Resetting(bases=3))
    assert [(b.d_model, b.seed, b.task) for b in asked] == [
        (64, 0, "translation"), (64, 1, "translation"), (64, 2, "translation"),
        (96, 3, "translation"),
    ]  # fmt: skip


def test_a_lender_that_is_not_there_is_named(text: Path, tmp_path: Path) -> None:
    base = Pretraining(**TINY, d_model=32, heads=2, corpus=str(text), runs=tmp_path)
    made, _ = run_study("pretrain", base)
    study = Resetting(model=str(made.path / "model"), arms=("A13",), budget=1024, step=256)
    plan = planned(study, opened(study))
    assert [line.partition(" with ")[2] for line in plan.left_out] == [
        "another encoder of width 32: no other base has one; name one with --encoders",
        "another encoder of another width: no other base has one; name one with --encoders",
    ]
    usual = TINY | {"family": "opt", "objective": "auto"}
    base = Pretraining(**usual, d_model=32, heads=2, corpus=str(text), runs=tmp_path)
    made, _ = run_study("pretrain", base)
    decoder = dataclasses.replace(study, model=str(made.path / "model"))
    with pytest.raises(ValueError, match="A13 of .*: it has no cross-attention"):
        planned(decoder, opened(decoder))
    beside = dataclasses.replace(decoder, arms=("A0", "A13"))
    left_out = planned(beside, opened(beside)).left_out
    assert left_out == (f"A13 of {decoder.model}: it has no cross-attention",)


def aside(**ends: float) -> pd.DataFrame:
    """Students of two bases and two seeds, whose gap falls from 2 towards an end."""
    made = []
    for variant, end in ends.items():
        for base in (0, 1):
            for seed in (0, 1):
                far = end + 0.02 * base + 0.01 * seed
                own = student(
                    0, arm="A7" if variant == "scratch" else "A13", seed=seed, base=f"t5-{base}",
                    base_seed=base, family="encoder-decoder", weights="averaged", stack="decoder",
                    variant=variant if variant != "scratch" else "",
                    gap=lambda t, far=far: far + (2 - far) / (1 + t / 1e3) ** 2, stop=None,
                )  # fmt: skip
                made.append(own.assign(source_use=1 - own["gap"] / 2))
    return pd.concat(made, ignore_index=True)


def test_what_is_said_of_planted_students() -> None:
    own = {"all wiped": 0.01, "all wiped, other encoder": 0.5, "bridge": 0.2, "scratch": 1.0}
    rows = aside(**own)
    said = aside_sentences(rows, crossings(rows))
    assert said[0].startswith(
        "Cross-attention all wiped (4 students of 2 bases): 2.00 [2.00, 2.00]"
    )
    assert "within 0.05 nat 4 of 4 after" in said[0]
    assert "within 0.05 nat 0 of 4, the median student not after" in said[1]
    (bridge,) = [line for line in said if line.startswith("Beside wiped")]
    # 0.5 − 0.01 and 0.2 − 0.01, the same for every base and seed
    assert "one of another seed leaves 0.49 [0.49, 0.49] nat more, pair by pair" in bridge
    assert bridge.endswith("nothing wiped, 0.19 [0.19, 0.19] more.")
    assert aside_answer(rows).startswith("The encoder more than the wiping: after")
    assert said[-1].rstrip(".") == aside_answer(rows)
    # ranges over bases and seeds overlap, the pairs do not: every one says that the encoder matters
    assert aside_answer(aside(**own | {"all wiped": 0.48})).startswith("Both:")
    against = (rows["variant"] == "all wiped") & (rows["base"] == "t5-0") & (rows["seed"] == 0)
    mixed = rows.assign(gap=rows["gap"].mask(against, rows["gap"] + 0.6))
    assert aside_answer(mixed).startswith("The encoder makes no difference that every pair shows")
    assert aside_answer(aside(**own | {"all wiped": 0.9})).startswith("The wiping, not the encoder")
    assert aside_answer(aside(**own | {"all wiped": 0.4})).startswith("Both:")
    assert aside_answer(rows[rows["variant"] == "bridge"]) == ""
    assert aside_sentences(rows.assign(arm="A0"), crossings(rows)) == ()
