"""`ablate reset` on a base of its own: the whole way, killed and resumed, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.__main__ import main
from experiments.pretrain import Pretraining
from experiments.reset.opened import opened
from experiments.reset.plan import planned
from experiments.reset.study import Resetting
from experiments.reset.work import do
from experiments.run_folder import run_study
from tests.experiments.small_corpora import sayings

SMALL = {"budget": 2048.0, "step": 256, "evaluate": 512, "per_decade": 3, "precision": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus."""
    return sayings(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder that `ablate pretrain` wrote, with its first weights and checkpoints."""
    made, _ = run_study(
        "pretrain",
        Pretraining(
            layers=3,
            d_model=32,
            heads=2,
            context=32,
            short_rows=32,
            vocab=280,
            corpus=str(text),
            tokens=16_384,
            batch=16,
            warmup=4,
            schedule="wsd",
            repeated_share=0.0,
            reserved_share=0.2,
            curve_tokens=512,
            precision="float32",
            runs=tmp_path_factory.mktemp("bases"),
        ),
    )
    return made.path / "model"


def study(base: Path, runs: Path, **options: object) -> Resetting:
    """Two thousand tokens of retraining."""
    return Resetting(model=str(base), runs=runs, **(SMALL | options))  # pyright: ignore


def test_every_arm_runs_and_leaves_a_page(base: Path, tmp_path: Path):
    arms = ("A0", "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A12")
    laws = ("rewind", "torch", "identity", "copy-below", "moments")
    asked = study(
        base, tmp_path, arms=arms, laws=laws, layers=(1,), seeds=2, predictors=True, targets=("lm",)
    )
    folder, outcome = run_study("reset", asked)
    rows = folder.load()
    assert set(rows["arm"]) == set(arms)
    assert set(rows.loc[rows.arm == "A10", "law"]) == set(laws)
    assert set(rows.loc[rows.arm == "A11", "target"]) == {"hidden", "logits", "mix"}
    assert {"figures", "report.html", "crossings.parquet", "predictors.parquet"} <= {
        path.name for path in folder.path.iterdir()
    }
    assert outcome.extra["answers"][0]["students"] == 2
    started = rows[(rows.step == 0) & (rows.arm == "A0")]
    assert (started["gap"].abs() > 0).all()
    assert started["loss_base"].nunique() == 1
    page = (folder.path / "report.html").read_text()
    assert "median share of the original training tokens" in page


def test_a_run_again_answers_at_once_and_a_killed_one_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = study(base, tmp_path, arms=("A0", "A7"), layers=(0,), seeds=2)
    whole = run_study("reset", dataclasses.replace(asked, runs=tmp_path / "other"))[0].load()

    class KilledError(Exception):
        pass

    begun: list[str] = []

    def dying(study: Resetting, job, checkpoint: Path, progress=None):  # noqa: ANN001, ANN202
        begun.append(checkpoint.name)
        if len(begun) == 3:
            raise KilledError
        return do(study, job, checkpoint)

    monkeypatch.setattr("experiments.reset.work.do", dying)
    with pytest.raises(KilledError):
        run_study("reset", asked)
    monkeypatch.setattr("experiments.reset.work.do", do)
    resumed = run_study("reset", asked)[0].load()
    drop = ["seconds"]
    pd.testing.assert_frame_equal(resumed.drop(columns=drop), whole.drop(columns=drop))


def test_learning_rates_are_picked_on_other_rows(base: Path, tmp_path: Path):
    asked = study(
        base, tmp_path, arms=("A0",), layers=(0,), seeds=1, rates=(1e-5, 1e-2), budget=4096.0
    )
    folder, _ = run_study("reset", asked)
    tried = pd.read_parquet(folder.path / "rates.parquet")
    assert len(tried) == 4
    assert set(tried.groupby("target")["picked"].sum()) == {1}
    best = tried[tried.picked].set_index("target")["rate"]
    rows = folder.load()
    assert rows.groupby("target")["rate"].unique().map(list).to_dict() == {
        target: [rate] for target, rate in best.items()
    }
    assert set(tried["seed"]) == {1}
    assert set(rows["seed"]) == {0}


def test_every_base_picks_rates_of_its_own(base: Path, tmp_path: Path):
    asked = study(
        base,
        tmp_path,
        arms=("A0",),
        targets=("lm",),
        layers=(0,),
        seeds=1,
        rates=(1e-5, 1e-2),
        shares=(0.5, 1.0),
    )
    folder, _ = run_study("reset", asked)
    tried = pd.read_parquet(folder.path / "rates.parquet")
    assert sorted(tried["base_share"]) == [0.5, 0.5, 1.0, 1.0]
    best = tried[tried.picked].set_index("base_share")["rate"].to_dict()
    rows = folder.load().groupby("base_share")["rate"].first().to_dict()
    assert rows == best
    assert 1e-2 in best.values()


def test_two_processes_give_the_same_rows(base: Path, tmp_path: Path):
    asked = study(base, tmp_path, arms=("A0",), layers=(1,), seeds=2, targets=("lm",))
    one = run_study("reset", asked)[0].load()
    two = run_study("reset", dataclasses.replace(asked, jobs=2, runs=tmp_path / "two"))[0].load()
    np.testing.assert_allclose(one["value"], two["value"], atol=1e-5)


def test_the_costliest_job_is_first_and_jobs_have_names_of_their_own(base: Path, tmp_path: Path):
    asked = study(base, tmp_path, arms=("A0", "A3", "A7"), unique=(0, 512), seeds=2)
    bases = opened(asked)
    plan = planned(asked, bases)
    costs = [job.cost for job in plan.jobs]
    assert costs == sorted(costs, reverse=True)
    keys = [job.key(bases, asked) for job in plan.jobs]
    assert len(set(keys)) == len(keys)
    assert sum(job.is_whole for job in plan.jobs) == 2 * 3 + 1


def test_cycled_data_is_a_share_of_t0(base: Path, tmp_path: Path):
    asked = study(base, tmp_path, arms=("A0",), layers=(0,), seeds=1, unique=(512,))
    rows = run_study("reset", asked)[0].load()
    assert rows["unique"].unique() == pytest.approx([512 / 16_384])
    assert rows["base_tokens"].unique() == [16_384]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "7"], "--layers 7 asked for"),
        (["--origin", "other"], "go together"),
        (["--unique", "9000000"], "9,000,000 different tokens asked for"),
        (["--origin", "held-out", "--budget", "1e9"], "different tokens asked for"),
        (["--shares", "0.3"], "share 0.3 of the training"),
        (["--budget", "0"], "--budget 0"),
        (["--budget", "10"], "a step of"),
        (["--rates", "0"], "learning rates above 0"),
        (["--seeds", "0"], "--seeds 0"),
        (["--layers", "1", "1"], "--layers 1 1: give each once"),
        (["--layers", "-1"], "layers count from 0"),
        (["--evaluate", "1"], "held-out row"),
        (["--row", "7"], "read rows of 32 tokens"),
    ],
)
def test_what_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
):
    code = main(["reset", "--model", str(base), "--runs", str(tmp_path / "runs"), *options])
    err = capsys.readouterr().err
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_base_of_unknown_length_has_no_shares(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in base.iterdir():
        if path.is_file() and path.name not in ("training.json", "initial.safetensors"):
            (bare / path.name).write_bytes(path.read_bytes())
    words = ["reset", "--model", str(bare), "--corpus", str(text), "--runs", str(tmp_path / "runs")]
    assert main([*words, "--budget", "0.01"]) == 2
    assert "nobody knows" in capsys.readouterr().err
    small = ["--budget", "512", "--step", "256", "--evaluate", "512", "--context", "32"]
    few = ["--seeds", "1", "--layers", "0", "--arms", "A0", "--targets", "lm", "--per-decade", "1"]
    assert main([*words, *small, *few]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record["answers"][0]["unit"] == "tokens"
    assert "tokens to come within" in record["headline"]


def test_the_base_is_left_as_it_was(base: Path, tmp_path: Path):
    from safetensors.torch import load_file

    before = load_file(base / "model.safetensors")
    run_study("reset", study(base, tmp_path, layers=(0,), seeds=1))
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


FEW = {"layers": (1,), "seeds": 1, "targets": ("lm",)}


@pytest.mark.parametrize(
    "options",
    [
        {"arms": ("A2",)},
        {"arms": ("A7",)},
        {"arms": ("A12",)},
        {"arms": ("A9",), "parts": ("ffn",)},
        {"arms": ("A0",), "unique": (1024.0,)},
    ],
)
def test_arms_without_the_question_say_where_they_ended(base: Path, tmp_path: Path, options):
    folder, outcome = run_study("reset", study(base, tmp_path, **(FEW | options)))
    assert outcome.headline.startswith("no student of A0 on fresh data")
    assert (options["arms"][0] + " ") in outcome.headline
    assert (folder.path / "report.html").exists()


def bare_model(folder: Path, base: Path, **change) -> Path:
    """A model without a record, of random weights; no reset of it does any harm."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(base)
    for name, value in change.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_layer_that_was_not_missed_has_a_page(base: Path, text: Path, tmp_path: Path):
    model = bare_model(tmp_path / "random", base)
    options = FEW | {"arms": ("A0",), "corpus": str(text), "context": 32}
    folder, outcome = run_study("reset", study(model, tmp_path, **options))
    assert "to come within 0.05 nat: 0, 0 % censored" in outcome.headline
    assert (folder.path / "report.html").exists()


def test_models_that_cannot_be_measured_are_refused(base: Path, text: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    options = FEW | {"arms": ("A0",), "corpus": str(text), "context": 32}
    small = bare_model(tmp_path / "small", base, vocab_size=64)
    with pytest.raises(ValueError, match="has 64 embeddings, and its tokenizer gives ids up to"):
        run_study("reset", study(small, tmp_path / "a", **options))
    broken = bare_model(tmp_path / "broken", base)
    weights = load_file(broken / "model.safetensors")
    for weight in weights.values():
        weight.fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="held-out loss is nan"):
        run_study("reset", study(broken, tmp_path / "b", **options))
    mute = bare_model(tmp_path / "mute", base)
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        run_study("reset", study(mute, tmp_path / "c", **options))
    with pytest.raises(ValueError, match="nothing is left to do: A13 of .* has no cross-attention"):
        run_study("reset", study(base, tmp_path / "d", **(FEW | {"arms": ("A13",)})))
    for name in "abcd":
        assert not any((tmp_path / name).glob("reset/*/metrics.parquet"))


def test_another_corpus_is_not_called_the_bases_own(base: Path, text: Path, tmp_path: Path):
    ours = run_study("reset", study(base, tmp_path, **(FEW | {"arms": ("A0",)})))[0]
    assert "token for token" not in (ours.path / "report.html").read_text()
    changed = tmp_path / "changed"
    shutil.copytree(text, changed)
    (changed / "0.txt").write_text("other words altogether " * 400)
    asked = study(base, tmp_path, **(FEW | {"arms": ("A0",), "corpus": str(changed)}))
    page = (run_study("reset", asked)[0].path / "report.html").read_text()
    assert "the corpus given is not, token for token, the one its record names" in page
    assert "not the base&#x27;s own training text" in page or "not the base's own training" in page
