"""A whole pretraining run in seconds: what it writes loads, and says what was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.pretrain import Pretraining
from experiments.tokens import load_stream
from probes.in_context import in_context_measurements
from tests.experiments.small_corpora import modules

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
    return modules(tmp_path_factory.mktemp("corpus"), 40)


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


def test_every_row_of_the_curve_is_measured_on_the_same_text(corpus: Path, tmp_path: Path):
    """A last row on other text than the rows before would show as a jump of the loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, record = Pretraining(**TINY, curve_tokens=128, corpus=str(corpus)).train(tmp_path)
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out, _ = load_stream(folder / "validation.safetensors")
    tokens = torch.from_numpy(held_out.astype("int64"))
    part, whole = (in_context_measurements(model, tokenizer, tokens, 64, n) for n in (128, None))
    assert record["curve"][-1]["validation_loss"] == pytest.approx(part["validation_loss"])
    kept = record["held_out"]
    assert kept.pop("tokens") == len(tokens)
    assert kept == pytest.approx({name: whole[name] for name in ("validation_loss", "early_loss")})
    assert abs(part["validation_loss"] - whole["validation_loss"]) > 1e-3


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
        ({"heads": 0}, "--heads 0"),
        ({"vocab": 70_000}, "--vocab 70000"),
        ({"heads": 5}, "multiple of --heads"),
        ({"layers": 0}, "--layers 0"),
        ({"repeated_share": 1.5}, r"--repeated-share 1.5.*\[0, 1\]"),
        ({"short_rows": 1000}, "--short-rows"),
        ({"device": "nonsense"}, "--device nonsense: give auto, cpu, cuda, cuda:1"),
        ({"device": "cpu:x"}, "--device cpu:x"),
        ({"rate": 0.0}, "--rate 0: give a learning rate above 0"),
        ({"rate": -1e-3}, "--rate -0.001"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"rate": float("inf")}, "--rate inf"),
        ({"seed": -1}, "--seed -1: give a number from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        Pretraining(**options)


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "xpu"])
def test_a_device_that_is_not_there_is_refused(device: str, corpus: Path, tmp_path: Path):
    present = torch.accelerator.current_accelerator(check_available=True)
    if present is not None and present.type == device:
        return
    with pytest.raises(ValueError, match=f"--device {device}: this machine has cpu"):
        Pretraining(**(TINY | {"device": device}), corpus=str(corpus)).train(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("capable", "expected"),
    [
        ({}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "avx512_f": True}, "float32"),
    ],
)
def test_precision_is_decided_by_the_processor_and_kept(
    capable, expected, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    study = Pretraining(**(TINY | {"precision": "auto", "tokens": 512}), corpus=str(corpus))
    assert study.train(tmp_path)[2]["precision"] == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": expected == "float32"})
    (tmp_path / "checkpoint.safetensors").unlink()
    assert study.train(tmp_path)[2]["precision"] == expected


def test_the_command_leaves_a_finished_run_without_its_checkpoint(
    corpus: Path, tmp_path: Path, capsys
):
    from experiments.__main__ import main

    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    arguments = ["pretrain", *options, "--corpus", str(corpus), "--runs", str(tmp_path)]
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = Path(line["run"])
    assert (run / "metrics.parquet").exists()
    assert (run / "figures" / "training.png").exists()
    assert (Path(line["model"]) / "model.safetensors").exists()
    assert not (run / "checkpoint.safetensors").exists()


def test_going_on_from_a_model_starts_where_it_ended(trained: Path, corpus: Path, tmp_path: Path):
    earlier = json.loads((trained / "model" / "training.json").read_text())
    options = TINY | {"tokens": 2_000, "rate": 1e-9, "seed": 1}
    start = str(trained / "model")
    Pretraining(**options, corpus=str(corpus), start_from=start).train(tmp_path)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    # A rate of nearly 0 leaves the loss where it was; tokens and curve go on.
    last, before = record["curve"][-1], earlier["curve"][-1]
    assert last["validation_loss"] == pytest.approx(before["validation_loss"], abs=1e-3)
    assert record["tokens_seen"] == earlier["tokens_seen"] + 8 * 4 * 64
    assert last["tokens"] == record["tokens_seen"]
    assert record["curve"][: len(earlier["curve"])] == earlier["curve"]
    assert record["earlier"]["command"] == earlier["command"]


def test_going_on_refuses_other_shapes_and_other_corpora(
    trained: Path, corpus: Path, tmp_path: Path
):
    start = str(trained / "model")
    with pytest.raises(ValueError, match="same shape options"):
        Pretraining(**(TINY | {"d_model": 32}), corpus=str(corpus), start_from=start).train(
            tmp_path / "a"
        )
    with pytest.raises(ValueError, match="another corpus"):
        Pretraining(**TINY, start_from=start).train(tmp_path / "b")
    with pytest.raises(ValueError, match="no training.json"):
        Pretraining(**TINY, corpus=str(corpus), start_from=str(corpus)).train(tmp_path / "c")


@pytest.mark.faults
def test_kill_9_at_any_moment_changes_nothing(corpus: Path, tmp_path: Path):
    """Kill the command again and again; the weights are those of the run left alone."""
    import random
    import subprocess
    import sys
    import time

    longer = TINY | {"tokens": 100_000}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in longer.items()]
    command = [sys.executable, "-m", "experiments", "pretrain", *options, "--save-every", "0"]
    command += ["--corpus", str(corpus)]

    def files(runs: Path, name: str) -> list[Path]:
        return list(runs.glob(f"pretrain/*/{name}"))

    def checkpoint() -> list[tuple[int, int]]:
        try:
            found = [file.stat() for file in files(tmp_path / "killed", "checkpoint.safetensors")]
        except FileNotFoundError:  # the run has ended and taken it away
            return []
        return [(file.st_ino, file.st_mtime_ns) for file in found]

    started = time.monotonic()
    subprocess.run([*command, "--runs", str(tmp_path / "whole")], check=True)
    duration = time.monotonic() - started
    # By its checkpoints and not by the clock: on a busy machine the clock kills it while importing.
    kills, resumed, draw = 0, 0, random.Random(0)
    while not files(tmp_path / "killed", "metrics.parquet"):
        before = checkpoint()
        resumed += bool(before)
        process = subprocess.Popen([*command, "--runs", str(tmp_path / "killed")])
        while process.poll() is None and (kills >= 10 or checkpoint() == before):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2) * duration)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills > 0
    assert resumed > 0
    (whole,) = files(tmp_path / "whole", "model/model.safetensors")
    (killed,) = files(tmp_path / "killed", "model/model.safetensors")
    assert killed.read_bytes() == whole.read_bytes()
    # The record too, but for what the clock says.
    records = [json.loads((file.parent / "training.json").read_text()) for file in (whole, killed)]
    for record in records:
        for timed in (record, *record["curve"]):
            del timed["seconds"]
        record["command"] = ""
    assert records[0] == records[1]
