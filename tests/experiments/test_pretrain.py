"""A whole pretraining run in seconds: what it writes loads, and says what was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.pretrain import Pretraining
from experiments.tokens import load_stream
from probes.in_context import in_context_measurements

TINY = {
    "layers": 1,
    "d_model": 16,
    "heads": 2,
    "context": 64,
    "short_rows": 32,
    "vocab": 300,
    "tokens": 20_000,
    "batch": 4,
    "warmup": 5,
    "precision": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        text = "\n".join(f"def f{i}_{j}(x):\n    return x * {i * j}" for j in range(12))
        (folder / f"module{i:02}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    Pretraining(**TINY, corpus=str(corpus)).train(path)
    return path


def test_the_folder_loads_and_its_last_measurement_is_reproduced(trained: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 300
    held_out, _ = load_stream(folder / "validation.safetensors")
    again = in_context_measurements(
        model, tokenizer, torch.from_numpy(held_out.astype("int64")), 64, None
    )
    record = json.loads((folder / "training.json").read_text())
    last = record["curve"][-1]
    for name, value in again.items():
        assert last[name] == pytest.approx(value, abs=1e-4), name
    # It learned something, and the weights are kept in bf16.
    assert last["validation_loss"] < record["curve"][0]["validation_loss"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_record_says_what_was_done(trained: Path):
    record = json.loads((trained / "model" / "training.json").read_text())
    study_steps = -(-TINY["tokens"] // (TINY["batch"] * TINY["context"]))
    assert record["tokens_seen"] == study_steps * TINY["batch"] * TINY["context"]
    assert record["unique_tokens"] <= record["tokens_seen"]
    assert record["epochs"] > 1
    assert record["seed"] == 0
    assert "--d-model 16" in record["command"]
    assert "repeated span" in record["training_mix"]
    assert len(record["curve"]) > 20
    assert record["curve"][-1]["step"] == study_steps


def test_a_finished_run_trains_no_further(trained: Path, corpus: Path):
    before = (trained / "model" / "model.safetensors").read_bytes()
    Pretraining(**TINY, corpus=str(corpus)).train(trained)
    assert (trained / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 5}, "multiple of --heads"),
        ({"layers": 0}, "--layers 0"),
        ({"repeated_share": 1.5}, r"--repeated-share 1.5.*\[0, 1\]"),
        ({"short_rows": 1000}, "--short-rows"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        Pretraining(**options)
