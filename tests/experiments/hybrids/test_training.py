"""Seeds that train together are the seeds that train alone; a killed run is the whole one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.hybrids.architecture.model import Hybrid, HybridConfig
from experiments.hybrids.learning import running
from experiments.hybrids.learning.regimes import Regime
from experiments.hybrids.learning.runs import Member, Run, initial_model
from experiments.hybrids.learning.streams import generator_at
from experiments.hybrids.learning.training import train, train_seeds
from experiments.hybrids.regression.tasks import Task, interleaved, predictions_at, sample

GPT2 = "learned-attention-gelu-layer*2"
MAMBAFORMER = "mamba-rms,attention-mamba_ffn-rms"
TASK = Task("linear", d=3, points=5)
STEPS = 6
QUICK = Regime(
    steps=STEPS, batch=4, rate=1e-2, held_out=8, per_decade=2, first_evaluation=2, keep=False
)


def config(blocks: str = GPT2, **sizes: int) -> HybridConfig:
    given = {"d_model": 16, "heads": 2, "expand": 2, "d_state": 4, "n_positions": 10, "x_dim": 3}
    return HybridConfig(blocks=blocks, **{**given, **sizes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, Hybrid)
    return dict(model.named_parameters())


def seen(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the biases of keys: no output depends on them, so their gradient is rounding, which
    Adam makes into whole steps."""
    return {n: w for n, w in weights.items() if not n.endswith("k_proj.bias")}


@pytest.mark.parametrize("blocks", [GPT2, MAMBAFORMER])
@pytest.mark.parametrize(
    "regime",
    [
        QUICK,
        replace(QUICK, optimiser="adam", weight_decay=0.1, clip=0.1, curriculum=0.6),
        replace(QUICK, optimiser="sgd", rate=1e-3, weight_decay=0.1, schedule="cosine", warmup=2),
    ],
    ids=["adamw", "adam-clip-curriculum", "sgd-cosine"],
)
def test_seeds_together_are_seeds_alone(blocks: str, regime: Regime, tmp_path: Path):
    together = train_seeds(config(blocks), TASK, regime, (3, 5), tmp_path / "both")
    for seed in (3, 5):
        alone = train_seeds(config(blocks), TASK, regime, (seed,), tmp_path / f"{seed}")
        ours, theirs = weights(together.model(seed)), weights(alone.model(seed))
        for name, tensor in seen(theirs).items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
        mine = together.curve[together.curve["seed"] == seed].reset_index(drop=True)
        columns = ["step", "loss", "error", "share"]
        pd.testing.assert_frame_equal(mine[columns], alone.curve[columns], rtol=1e-4)
    first, second = (weights(together.model(seed)) for seed in (3, 5))
    assert not torch.allclose(first["lm_head.weight"], second["lm_head.weight"])


def test_a_step_is_what_plain_pytorch_makes_of_it(tmp_path: Path):
    regime = replace(QUICK, weight_decay=0.3, clip=0.05, warmup=3)
    ran = train_seeds(config(), TASK, regime, (7,), tmp_path)

    model = initial_model(config(), 7)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(STEPS):
        prompts = sample(TASK, 4, generator_at(7, step, torch.device("cpu")))
        answers = predictions_at(model(prompts=interleaved(prompts)).logits)
        torch.nn.functional.mse_loss(answers, prompts.ys).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        optimiser.step()
        optimiser.zero_grad()
    for name, tensor in seen(weights(ran.model(7))).items():
        torch.testing.assert_close(
            tensor, model.get_parameter(name).detach(), atol=1e-5, rtol=1e-4, msg=name
        )


def members(*pairs: tuple[int, float]) -> tuple[Member, ...]:
    return tuple(Member(seed, rate) for seed, rate in pairs)


def test_members_of_several_rates_are_runs_at_these_rates(tmp_path: Path):
    ran = train(Run(config(), TASK, QUICK, members((1, 1e-2), (1, 1e-3)), tmp_path / "both"))
    for rate in (1e-2, 1e-3):
        regime = replace(QUICK, rate=rate)
        alone = train_seeds(config(), TASK, regime, (1,), tmp_path / f"{rate}")
        mine = ran.curve[ran.curve["rate"] == rate]["error"].to_list()
        assert mine == pytest.approx(alone.curve["error"].to_list(), rel=1e-4)
    assert not (tmp_path / "both" / "model-s1").exists()  # whose would it be?


class Killed(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("blocks", [GPT2, MAMBAFORMER])
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_a_killed_run_goes_on_bit_by_bit(blocks: str, seeds: tuple[int, ...], tmp_path: Path):
    regime = replace(QUICK, dropout=0.1, save_every=0.0, keep=True)
    whole = train_seeds(config(blocks), TASK, regime, seeds, tmp_path / "whole")

    def killer(step: int, steps: int) -> None:
        if step == 4:  # step 3's checkpoint is on disk
            raise Killed

    with pytest.raises(Killed):
        train_seeds(config(blocks), TASK, regime, seeds, tmp_path / "killed", progress=killer)
    torch.manual_seed(99)
    seen: list[int] = []
    resumed = train_seeds(
        config(blocks),
        TASK,
        regime,
        seeds,
        tmp_path / "killed",
        progress=lambda step, steps: seen.append(step),
    )
    assert seen == [4, 5, 6]
    columns = ["seed", "rate", "step", "prompts", "loss", "error", "share"]
    pd.testing.assert_frame_equal(resumed.curve[columns], whole.curve[columns], check_exact=True)
    pd.testing.assert_frame_equal(resumed.errors, whole.errors, check_exact=True)
    for seed in seeds:
        for path in (resumed.model(seed), resumed.checkpoint(seed, 2)):
            reference = whole.folder / path.relative_to(resumed.folder)
            for name, tensor in weights(reference).items():
                assert torch.equal(weights(path)[name], tensor), name
    assert not (tmp_path / "killed" / running.CHECKPOINT).exists()


def test_a_finished_run_answers_at_once(tmp_path: Path):
    first = train_seeds(config(), TASK, QUICK, (0,), tmp_path)
    again = train_seeds(config(), TASK, QUICK, (0,), tmp_path, progress=pytest.fail)
    pd.testing.assert_frame_equal(again.curve, first.curve)
    pd.testing.assert_frame_equal(again.errors, first.errors)
    pd.testing.assert_frame_equal(again.arrivals, first.arrivals)
    pd.testing.assert_frame_equal(again.ended, first.ended)
    with pytest.raises(ValueError, match="another run .its regime, members differ"):
        train_seeds(config(), TASK, replace(QUICK, rate=1.0), (0,), tmp_path)


def test_the_curve_is_the_error_of_the_kept_models(tmp_path: Path):
    regime = replace(QUICK, keep=True)
    ran = train_seeds(config(), TASK, regime, (0, 1), tmp_path)
    run = Run(config(), TASK, regime, members((0, 3e-3), (1, 3e-3)), tmp_path)
    prompts = run.prompts
    for row in ran.curve.itertuples():
        model = AutoModelForCausalLM.from_pretrained(ran.checkpoint(row.seed, row.step))
        with torch.no_grad():
            answers = predictions_at(model(prompts=interleaved(prompts)).logits)
        errors = (answers - prompts.ys).square().mean((0, 2))
        assert row.error == pytest.approx(float(errors.mean()), rel=1e-4)
        assert row.share == pytest.approx(row.error / float(prompts.ys.square().mean()), rel=1e-5)
        at = (ran.errors["seed"] == row.seed) & (ran.errors["step"] == row.step)
        assert ran.errors[at]["error"].to_list() == pytest.approx(errors.tolist(), rel=1e-4)


def test_it_learns(tmp_path: Path):
    task = Task("parity", d=1, points=4, k=1)  # y = x: learnt in no time
    ran = train_seeds(config(x_dim=1), task, replace(QUICK, steps=40), (0, 1), tmp_path)
    assert ran.curve[ran.curve["step"] == 40]["share"].max() < 0.05
    assert ran.arrivals["arrived"].tolist() == [True] * 4
    assert all(0 <= step <= 40 for step in ran.arrivals["step"])


def test_a_seed_that_arrives_or_diverges_leaves_and_the_others_go_on(tmp_path: Path):
    regime = replace(QUICK, optimiser="sgd", rate=1e-3, steps=12)
    run = Run(config(), TASK, regime, members((1, 1e-3), (2, 1e30), (3, 1e-3)), tmp_path / "three")
    ran = train(run)
    why = ran.ended.set_index("seed")["why"].to_dict()
    assert why == {1: "steps", 2: "diverged", 3: "steps"}
    assert ran.ended.set_index("seed")["step"][2] == 2  # the first evaluation that could see it
    alone = train_seeds(config(), TASK, regime, (3,), tmp_path / "alone")
    mine = ran.curve[ran.curve["seed"] == 3]["error"].to_list()
    assert mine == pytest.approx(alone.curve["error"].to_list(), rel=1e-4)

    early = train_seeds(config(), TASK, replace(QUICK, stop_at=50.0), (1, 2), tmp_path / "early")
    assert early.ended["why"].to_list() == ["arrived", "arrived"]
    assert early.ended["step"].to_list() == [0, 0]
    assert early.model(1).is_dir()


def test_what_does_not_fit_is_refused(tmp_path: Path):
    def trained(built: HybridConfig, task: Task = TASK, regime: Regime = QUICK, seeds=(0,)):
        return train_seeds(built, task, regime, seeds, tmp_path)

    with pytest.raises(ValueError, match="give a configuration with x_dim 3 and y_dim 1"):
        trained(config(x_dim=4))
    with pytest.raises(ValueError, match="reads tokens"):
        trained(config(vocab_size=7))
    with pytest.raises(ValueError, match="give each one once"):
        trained(config(), seeds=(1, 1))
    with pytest.raises(ValueError, match="at least one"):
        trained(config(), seeds=())
    mqar = Task("mqar", d=3, points=4, y_dim=3)
    with pytest.raises(ValueError, match="give curriculum 0"):
        trained(config(y_dim=3), mqar, replace(QUICK, curriculum=0.5))


def test_the_last_point_alone_counts_where_the_task_says_so(tmp_path: Path):
    task = Task("mqar", d=3, points=4, y_dim=3)
    ran = train_seeds(config(y_dim=3), task, QUICK, (0,), tmp_path)
    last = ran.errors[ran.errors["examples"] == 3]["error"].to_list()
    assert ran.curve["error"].to_list() == pytest.approx(last)


def test_bfloat16_stays_near_float32(tmp_path: Path):
    exact = train_seeds(config(), TASK, QUICK, (0, 1), tmp_path / "exact")
    half = replace(QUICK, precision="bfloat16")
    rough = train_seeds(config(), TASK, half, (0, 1), tmp_path / "rough")
    assert rough.curve["loss"].dropna().to_list() != exact.curve["loss"].dropna().to_list()
    assert rough.curve["error"].to_list() == pytest.approx(exact.curve["error"].to_list(), rel=0.1)
    assert all(w.dtype == torch.float32 for w in weights(rough.model(0)).values())


def test_nothing_of_the_callers_is_changed(tmp_path: Path):
    built = config()
    state = torch.get_rng_state()
    train_seeds(built, TASK, replace(QUICK, dropout=0.5), (0,), tmp_path)
    assert built.dropout == 0.0
    assert torch.equal(torch.get_rng_state(), state)
