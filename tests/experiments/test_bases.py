"""A base is read back as it was trained: its tokens, its curve, its rows, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import base_grid
from experiments.base_data import data_of, study_of
from experiments.base_grid import grid, model_folder
from experiments.bases import base_at
from experiments.pretrain import Pretraining
from experiments.pretrain_setup import prepare
from tests.experiments.small_corpora import modules
from tests.families import tiny

TINY = {
    "layers": 1,
    "d_model": 16,
    "heads": 2,
    "context": 64,
    "short_rows": 32,
    "vocab": 300,
    "tokens": 4_000,
    "batch": 4,
    "warmup": 5,
    "reserved_share": 0.3,
    "curve_tokens": 512,
    "precision": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modules(tmp_path_factory.mktemp("corpus"), 60)


@pytest.fixture(scope="module")
def study(corpus: Path) -> Pretraining:
    return Pretraining(**TINY, schedule="wsd", seed=3, corpus=str(corpus))


@pytest.fixture(scope="module")
def trained(study: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    study.train(path)
    return path / "model"


def test_a_base_says_what_its_record_says(trained: Path):
    base = base_at(trained)
    record = json.loads((trained / "training.json").read_text())
    assert (base.kind, base.family, base.objective) == ("decoder", "opt", "lm")
    assert (base.n_layers, base.d_model, base.seed) == (1, 16, 3)
    assert base.tokens == record["tokens_seen"] == base.curve[-1][0]
    assert base.unique_tokens == min(base.tokens, record["unique_tokens_in_corpus"])
    assert base.initial == trained / "initial.safetensors"
    half = base_at(trained, share=0.5)
    assert half.weights == str(trained / "checkpoints" / "0.5")
    assert half.curve[-1] == (half.tokens, record["checkpoints"][-1]["validation_loss"])
    assert (base.tokens, half.tokens) == (4_096, 2_048)
    with pytest.raises(ValueError, match=r"share 0.3 .* kept are 0.125, 0.25, 0.5, 1"):
        base_at(trained, share=0.3)
    with pytest.raises(ValueError, match=r"5 training tokens given .* its record says 4,096"):
        base_at(trained, tokens=5)


def test_the_bundled_model_is_a_base_of_two_runs():
    base = base_at("stdlib-opt")
    assert base.tokens == 30_003_200
    assert base.unique_tokens == 10_015_471
    assert (base.objective, base.initial, base.seed) == ("lm", None, 1)
    assert [t for t, _ in base.curve] == sorted(t for t, _ in base.curve)
    assert base.curve[-1][0] == base.tokens
    assert base.record is not None
    assert study_of(base.record["earlier"]) == Pretraining()
    last = study_of(base.record)
    assert (last.seed, last.tokens, last.short_share) == (1, 6_000_000, 0.0)
    with pytest.raises(ValueError, match="kept are 1;"):
        base_at("stdlib-opt", share=0.5)


def test_the_rows_of_a_base_are_those_it_read(study: Pretraining, trained: Path, tmp_path: Path):
    read = prepare(study, tmp_path).trainer.batch_at
    data = data_of(base_at(trained))
    assert data.exact
    assert data.origins == ("same", "reshuffled", "held-out", "other")
    same = data.reading("same", seed=0)
    for step in range(study.steps):
        assert torch.equal(same.at(step).targets, read(step).targets)
    held_out = prepare(study, tmp_path).objective.held_out()
    for a, b in zip(data.objective.held_out(), held_out, strict=True):
        assert torch.equal(a.targets, b.targets)
    # The other origins read other rows, of the same shape.
    for origin in ("reshuffled", "held-out"):
        other = data.reading(origin, seed=1)
        assert other.at(0).targets.shape in {same.at(s).targets.shape for s in range(16)}
        assert not torch.equal(other.at(0).targets, same.at(0).targets)
    cycled = data.reading("same", seed=0, unique=2 * 256)
    assert torch.equal(cycled.at(5).targets, same.at(1).targets)


def test_held_out_rows_come_from_reserved_files(trained: Path):
    data = data_of(base_at(trained))
    rows = data.reading("held-out", seed=0).order.legs[0].rows
    assert rows.stream is data.reserved
    assert len(data.reserved) > 256


def test_a_model_that_went_on_reads_both_runs(
    study: Pretraining, trained: Path, corpus: Path, tmp_path: Path
):
    options = TINY | {"tokens": 1_000, "short_share": 0.0}
    later = Pretraining(**options, seed=5, corpus=str(corpus), start_from=str(trained))
    later.train(tmp_path)
    base = base_at(tmp_path / "model")
    order = data_of(base).objective.order
    assert base.tokens == order.tokens == 4_096 + 1_024
    assert base.initial is None
    first = data_of(base_at(trained)).objective.order
    assert torch.equal(order.at(study.steps - 1), first.at(study.steps - 1))
    own = prepare(later, tmp_path / "again").objective.order
    assert torch.equal(order.at(study.steps), own.at(0))


def test_a_corpus_that_changed_is_not_the_same(trained: Path, corpus: Path, tmp_path: Path):
    import shutil

    changed = tmp_path / "corpus"
    shutil.copytree(corpus, changed)
    (changed / "added.py").write_text("import new\n" * 50)
    data = data_of(base_at(trained), corpus=str(changed))
    assert not data.exact
    assert data.origins[0] == "reshuffled"
    with pytest.raises(
        ValueError,
        match=r"origin same .* \(another Python, or other files\); give reshuffled or held-out",
    ):
        data.reading("same", seed=0)
    # Held-out loss is still measured on the tokens that were held out.
    assert torch.equal(data.objective.rows, data_of(base_at(trained)).objective.rows)


def test_origins_that_are_not_there_are_refused(trained: Path, corpus: Path, tmp_path: Path):
    options = TINY | {"reserved_share": 0.0, "tokens": 300}
    Pretraining(**options, corpus=str(corpus)).train(tmp_path)
    data = data_of(base_at(tmp_path / "model"))
    assert data.origins == ("same", "reshuffled", "other")
    with pytest.raises(ValueError, match=r"held-out .* no file was kept"):
        data.reading("held-out", seed=0)
    with pytest.raises(ValueError, match="name it"):
        data.reading("other", seed=0)
    other = data.reading("other", seed=0, other=str(corpus))
    assert other.at(0).targets.shape == data.objective.at(0).targets.shape
    with pytest.raises(ValueError, match="its record has their shape"):
        data_of(base_at(tmp_path / "model"), context=32)


@pytest.mark.parametrize(
    ("name", "kind", "objective"),
    [("gpt2", "decoder", "lm"), ("esm", "encoder", "mlm"), ("bart", "encoder-decoder", "lm")],
)
def test_any_model_is_a_base_of_unknown_t0(
    name, kind, objective, trained: Path, corpus: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    tiny(name).save_pretrained(tmp_path)
    base = base_at(tmp_path, tokens=10**9)
    assert (base.kind, base.tokens, base.curve) == (kind, 10**9, ())
    assert math.isnan(base.reached(1.0))
    assert base_at(tmp_path).tokens is None
    with pytest.raises(ValueError, match="nothing is known"):
        base_at(tmp_path, share=0.5)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    if kind != "decoder":
        with pytest.raises(ValueError, match="no mask token"):
            data_of(base, corpus=str(corpus), context=16, tokenizer=tokenizer)
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    data = data_of(base, corpus=str(corpus), context=16, batch=2, tokenizer=tokenizer)
    assert data.origins == ("other",)
    assert data.reading("other", seed=0).at(0).targets.shape == (2, 16)
    with pytest.raises(ValueError, match="what it was trained on is not known"):
        data.reading("reshuffled", seed=0)


def test_equivalent_progress_is_read_off_the_curve(trained: Path):
    import dataclasses

    base = dataclasses.replace(
        base_at(trained), curve=((10, 4.0), (100, 3.0), (200, 3.5), (1000, 2.0))
    )
    assert base.reached(3.0) == 0
    assert base.reached(2.0) == pytest.approx(0.01)
    assert base.reached(1.5) == pytest.approx(math.sqrt(10 * 100) / 1000)  # the first time
    assert base.reached(1.0) == pytest.approx(0.1)
    assert base.reached(0.0) == pytest.approx(1)
    assert base.reached(-1.0) == pytest.approx(1)
    past = dataclasses.replace(base, curve=((10, 4.0), (100, 1.0), (1000, 2.0)))
    assert past.reached(0.0) < 0.1  # better on the way than at the end
    assert [t for t, _ in base.annealed] == [512, 1024, 2048, 4096]
    assert base.reached(0.0, annealed=True) == pytest.approx(1)


def test_the_bundled_curve_is_on_one_scale():
    """Its two records have rows on a part of the held-out text, and a last one on all of it."""
    curve = base_at("stdlib-opt").curve
    at = {tokens: loss for tokens, loss in curve}
    assert at[24_002_560] == 2.4841933250427246
    assert at[23_920_640] == pytest.approx(at[24_002_560])  # one update's width apart
    assert at[24_150_016] == pytest.approx(at[24_002_560], abs=0.1)  # its rate goes up again
    assert curve[0][1] > 5


def test_the_grid_matches_what_it_says():
    tokens, per = grid("tokens"), grid("tokens-per-parameter")
    decoders = [b for b in tokens if b.family == "opt"]
    assert len(decoders) == len(per) == 27
    assert {(b.layers, b.d_model) for b in per} == {
        (n, d) for n in (4, 8, 12) for d in (64, 128, 256)
    }
    assert {b.tokens for b in decoders} == {4_000_000}
    ratios = {round(b.tokens / (12 * b.layers * b.d_model**2), 3) for b in per}
    assert ratios == {2.5}
    assert {b.family for b in tokens} == {"opt", "bert", "esm", "bart", "t5"}
    assert [b.seed for b in per] == sorted(b.seed for b in per)
    assert len({model_folder(b) for b in (*tokens, *per)}) == len(tokens) + len(per)
    assert grid("tokens", Pretraining(seed=7, corpus="x"))[0].seed == 7


def test_the_grid_is_trained_once(corpus: Path, tmp_path: Path, monkeypatch, capsys):
    from experiments.__main__ import main

    monkeypatch.setattr(base_grid, "LAYERS", (1,))
    monkeypatch.setattr(base_grid, "WIDTHS", (32, 64))
    monkeypatch.setattr(base_grid, "OTHERS", ({"family": "bert", "layers": 1, "d_model": 32},))
    monkeypatch.setattr(base_grid, "MATCHED_TOKENS", 3_000)
    small = {"vocab": 300, "context": 32, "short_rows": 32, "batch": 4, "curve_tokens": 512}
    monkeypatch.setattr(base_grid, "SHARED", base_grid.SHARED | small)
    monkeypatch.setattr(base_grid, "SEEDS", 1)
    words = ["pretrain", "--grid", "tokens", "--corpus", str(corpus), "--runs", str(tmp_path)]
    words += ["--precision", "float32", "--device", "cpu"]
    bases = grid(
        "tokens",
        Pretraining(corpus=str(corpus), runs=tmp_path, precision="float32", device="cpu"),
        seeds=1,
    )
    monkeypatch.setattr(base_grid, "grid", lambda *_: bases)
    assert main(words) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(line["models"]) == 3
    assert {base_at(model).kind for model in line["models"]} == {"decoder", "encoder"}
    assert main([*words, "--layers", "2"]) == 2
    assert "--grid tokens brings its own shapes: leave out --layers" in capsys.readouterr().err
