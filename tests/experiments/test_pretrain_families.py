"""Every family trains, is measured, loads, and resumes to the last bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.config import ZOO, config_hash, config_of
from experiments.families import KINDS, TASKS
from experiments.pretrain import Pretraining
from experiments.pretrain_curve import held_out_loss, measured_steps
from experiments.pretrain_setup import prepare
from experiments.run_folder import run_study
from experiments.training import Schedule
from tests.experiments.small_corpora import modules

TINY = {
    "layers": 1,
    "d_model": 16,
    "heads": 2,
    "context": 32,
    "short_rows": 32,
    "vocab": 300,
    "tokens": 3_000,
    "batch": 4,
    "warmup": 5,
    "repeated_share": 0.0,
    "curve_tokens": 512,
    "precision": "float32",
    "device": "cpu",
}
EVERY = [(family, task) for family, kind in KINDS.items() for task in TASKS[kind]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modules(tmp_path_factory.mktemp("corpus"), 60)


@pytest.mark.parametrize(("family", "task"), EVERY)
def test_every_family_trains_and_loads_where_it_ended(family, task, corpus: Path, tmp_path: Path):
    import transformers

    study = Pretraining(**TINY, family=family, objective=task, corpus=str(corpus))
    model, _, record = study.train(tmp_path)
    folder = tmp_path / "model"
    auto = {
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModelForMaskedLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    }[KINDS[family]]
    again = auto.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = prepare(study, tmp_path).objective.held_out()
    loss = held_out_loss(again, held_out)
    assert loss == pytest.approx(record["held_out"]["validation_loss"], abs=1e-4)
    assert (record["kind"], record["objective"]) == (KINDS[family], task)
    assert record["curve"][-1]["validation_loss"] < record["curve"][0]["validation_loss"]
    for share in (0.125, 0.25, 0.5):
        auto.from_pretrained(folder / "checkpoints" / f"{share:g}")
    # What it started from is kept whole, in fp32.
    first = load_file(folder / "initial.safetensors")
    assert first.keys() == dict(again.named_parameters()).keys()
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    fresh = dict(prepare(study, tmp_path / "again").trainer.model.named_parameters())
    assert all(torch.equal(first[name], fresh[name]) for name in first)


def test_blocks_are_a_hybrid():
    assert Pretraining(blocks="llama").family == "hybrid"
    written = Pretraining(blocks="mamba-rms, attention-mamba_ffn-rms*3")
    assert config_hash(config_of("pretrain", written)) == config_hash(
        config_of("pretrain", dataclasses.replace(written, family="hybrid"))
    )
    for options, says in (
        ({"blocks": "gpt7"}, "--blocks gpt7: no block word 'gpt7'"),
        ({"blocks": "mamba-mamba_ffn-rms"}, "two Mambas in the block"),
        ({"blocks": "gelu-rms"}, "no token sees another"),
        ({"blocks": "llama", "family": "gpt2"}, "--blocks llama of --family gpt2: only a hybrid"),
        ({"blocks": "llama", "d_model": 6, "heads": 6}, "--blocks llama: rope turns pairs"),
    ):
        with pytest.raises(ValueError, match=says):
            Pretraining(**options)


def test_a_model_without_attention_has_no_head_to_score(corpus: Path, tmp_path: Path):
    study = Pretraining(**TINY, blocks="mamba", corpus=str(corpus), runs=tmp_path)
    _, outcome = run_study("pretrain", study)
    assert "second_copy_loss" in outcome.extra
    assert "prefix_matching" not in outcome.extra
    assert "of the first" in outcome.headline


@pytest.mark.parametrize(("family", "task"), [("esm", "mlm"), ("bart", "denoising")])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    family, task, corpus: Path, tmp_path: Path
):
    study = Pretraining(**TINY, family=family, objective=task, corpus=str(corpus))
    whole = prepare(study, tmp_path / "whole").trainer
    losses = list(whole.run())

    first = prepare(study, tmp_path / "cut").trainer.run(save_every=0)
    begun = [next(first) for _ in range(6)]
    del first  # killed: step 5's checkpoint is on disk
    second = prepare(study, tmp_path / "cut").trainer
    assert second.resume()
    assert begun[:5] + list(second.run()) == losses
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wsd_checkpoint_is_the_run_that_ended_there(corpus: Path, tmp_path: Path):
    options = TINY | {"tokens": 24 * 128}
    study = Pretraining(**options, schedule="wsd", corpus=str(corpus))
    _, _, record = study.train(tmp_path / "long")
    short = Pretraining(**(options | {"tokens": 12 * 128}), schedule="wsd", corpus=str(corpus))
    short.train(tmp_path / "short")
    half = load_file(tmp_path / "long" / "model" / "checkpoints" / "0.5" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "short" / "model" / "model.safetensors").items():
        assert torch.equal(tensor, half[name]), name
    notes = record["checkpoints"]
    assert [note["share"] for note in notes] == [0.125, 0.25, 0.5]
    assert all(note["annealed"] for note in notes)
    assert [note["tokens"] for note in notes] == [3 * 128, 6 * 128, 12 * 128]
    # The trunk goes on as if nothing had been forked from it.
    plain = prepare(study, tmp_path / "plain").trainer
    list(plain.run())
    long = load_file(tmp_path / "long" / "checkpoint.safetensors")
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, long[f"model/{name}"]), name


def test_a_cosine_checkpoint_is_the_run_s_own_model(corpus: Path, tmp_path: Path):
    study = Pretraining(**TINY, corpus=str(corpus))
    _, _, record = study.train(tmp_path / "run")
    trainer = prepare(study, tmp_path / "again").trainer
    run = trainer.run()
    note = record["checkpoints"][-1]
    while trainer.step < note["step"]:
        next(run)
    kept = load_file(tmp_path / "run" / "model" / "checkpoints" / "0.5" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if name in kept:  # a tied head is kept once
            assert torch.equal(parameter.to(torch.bfloat16), kept[name]), name
    assert (note["annealed"], note["tokens"]) == (False, trainer.tokens)


def test_reserved_files_are_read_by_neither_side(corpus: Path, tmp_path: Path):
    whole = prepare(Pretraining(**TINY, corpus=str(corpus)), tmp_path / "a").text
    study = Pretraining(**TINY, reserved_share=0.3, corpus=str(corpus))
    text = prepare(study, tmp_path / "b").text
    assert text.corpus.validation == whole.corpus.validation
    assert {d.path for d in text.corpus.train} < {d.path for d in whole.corpus.train}
    assert len(text.stream) > 0
    assert len(text.reserved) > 0
    assert text.corpus.digest == whole.corpus.digest


def test_schedules_keep_their_rate_until_they_decay():
    wsd = Schedule(1.0, steps=100, warmup=10, final_share=0.1, kind="wsd")
    assert [wsd.rate(s) for s in (0, 9, 50, 80)] == pytest.approx([0.1, 1.0, 1.0, 1.0])
    assert wsd.rate(90) == pytest.approx(0.55)
    assert wsd.rate(100) == pytest.approx(0.1)
    constant = Schedule(1.0, steps=100, warmup=10, kind="constant")
    assert constant.rate(99) == 1.0


def test_the_curve_is_dense_where_it_is_steep():
    steps = sorted(measured_steps(4000))
    assert steps[0] == 40
    assert steps[-1] == 4000
    assert max(b / a for a, b in zip(steps, steps[1:], strict=False)) < 1.3
    assert measured_steps(3) == {1, 2, 3}


def test_options_younger_than_the_bundled_model_leave_its_hash():
    config = config_of("pretrain", Pretraining())
    assert config_hash(config) == "64e216d151a2"  # the run its training.json names
    record = json.loads((ZOO / "stdlib-opt" / "training.json").read_text())
    assert "runs/pretrain/64e216d151a2" in record["command"]
    assert config_hash(config_of("pretrain", Pretraining(family="gpt2"))) != "64e216d151a2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "bert", "objective": "lm"}, "--objective lm: bert can be trained on mlm"),
        ({"objective": "translation"}, "--objective translation: opt can be trained on lm"),
        ({"reserved_share": 1.0}, "--reserved-share 1.0"),
        ({"family": "llama", "d_model": 12, "heads": 4}, "llama turns pairs of dimensions"),
        ({"curve_tokens": 0}, "--curve-tokens 0"),
    ],
)
def test_bad_options_are_refused(options, words: str):
    with pytest.raises(ValueError, match=words):
        Pretraining(**options)
