"""A run that was killed ends where the uninterrupted one ends, to the last bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from experiments.objectives import Batch, NextToken
from experiments.training import Schedule, Trainer

STEPS = 12


def trainer(folder: Path, *, rate: float = 1e-2, name: str = "run") -> Trainer:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        dropout=0.1,  # dropout draws from the global generator, which a resume must restore
    )

    def batch_at(step: int) -> Batch:
        rows = torch.randint(4, 32, (2, 16), generator=torch.Generator().manual_seed(step))
        return NextToken()(rows, np.random.default_rng(0))

    return Trainer(
        OPTForCausalLM(config),
        batch_at,
        Schedule(rate, STEPS, warmup=3),
        folder / "checkpoint.safetensors",
        {"name": name},
        torch.device("cpu"),
    )


def test_resuming_is_bit_exact(tmp_path: Path):
    whole = trainer(tmp_path / "nowhere")
    (tmp_path / "nowhere").mkdir()
    losses = list(whole.run())

    first = trainer(tmp_path)
    run = first.run(save_every=0)  # a checkpoint after every step
    begun = [next(run) for _ in range(6)]
    del run  # the process is killed after step 6's checkpoint was due: step 5's is on disk
    torch.manual_seed(99)
    second = trainer(tmp_path)
    torch.manual_seed(99)
    assert second.resume()
    assert second.step == 5
    resumed = list(second.run())

    assert begun[:5] + resumed == losses
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    trainer(tmp_path).save()
    with pytest.raises(ValueError, match="another run"):
        trainer(tmp_path, name="other").resume()
    assert not trainer(tmp_path / "empty").resume()


def test_an_unfinished_write_leaves_the_old_checkpoint(tmp_path: Path):
    run = trainer(tmp_path)
    next(run.run())
    run.save()
    (tmp_path / "checkpoint.unfinished").write_bytes(b"half a file")
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 1


def test_a_run_that_blows_up_says_so(tmp_path: Path):
    run = trainer(tmp_path)
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.inf)
    with pytest.raises(ValueError, match="not finite at step 0"):
        next(run.run())


def test_schedule_warms_up_and_decays():
    schedule = Schedule(1.0, steps=100, warmup=10, final_share=0.1)
    rates = [schedule.rate(s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert dataclasses.replace(schedule, warmup=0).rate(0) == 1.0
