"""Every baseline by its name: causal, prompt by prompt, in the prompts' own shape and precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.hybrids.regression.baselines import (
    BASELINES,
    BAYES,
    PAPER_BASELINE,
    SLOW,
    baselines_for,
    bayes,
    lasso,
    networks,
    predictions,
)
from experiments.hybrids.regression.tasks import TASKS, Prompts, sample, small

ALL = [(task, name) for task in TASKS for name in baselines_for(task)]


def drawn(task: str, batch: int = 3) -> Prompts:
    return sample(small(task), batch, torch.Generator().manual_seed(0), points=9)


@pytest.mark.parametrize(("task", "name"), ALL)
def test_a_point_is_predicted_from_those_before_it_alone(task, name):
    prompts = drawn(task)
    said = BASELINES[name](prompts)
    assert said.shape == prompts.ys.shape
    assert said.dtype == prompts.ys.dtype
    assert said.isfinite().all()
    if name != "parity-pooled":
        assert float(said[:, 0].abs().max()) < (0.5 if task.startswith("parity") else 1e-6)
    # Other values from point 6 on, other points from 7 on: nothing up to 6 may tell.
    xs, ys = prompts.xs.clone(), prompts.ys.clone()
    xs[:, 7:] = -xs[:, 7:]
    ys[:, 6:] = 2.0
    changed = BASELINES[name](replace(prompts, xs=xs, ys=ys))
    torch.testing.assert_close(said[:, :7], changed[:, :7], rtol=1e-4, atol=1e-4)
    if name not in ("zero", "parity-pooled") and task != "mqar":  # pooled, all but one are out
        assert not torch.equal(said[:, 7:], changed[:, 7:])


@pytest.mark.parametrize(("task", "name"), [pair for pair in ALL if pair[1] != "boosted"])
def test_a_prompt_is_answered_alone_as_in_a_batch(task, name):
    if name == "parity-pooled" or name.startswith("network"):  # one pools, one draws its starts
        return
    prompts = drawn(task)
    hidden = {
        key: value[1:2] if value.dim() and len(value) == 3 else value
        for key, value in prompts.hidden.items()
    }
    alone = replace(prompts, xs=prompts.xs[1:2], ys=prompts.ys[1:2], hidden=hidden)
    together = BASELINES[name](prompts)[1:2]
    torch.testing.assert_close(BASELINES[name](alone), together, rtol=1e-4, atol=1e-4)


def test_prompts_that_do_not_fit_together_are_taken_in_parts(monkeypatch):
    prompts = {task: drawn(task, 7) for task in ("sparse", "mlp")}
    whole = {
        "lasso": BASELINES["lasso"](prompts["sparse"]),
        "bayes": BASELINES["bayes"](prompts["sparse"]),
        "network": BASELINES["network"](prompts["mlp"]),
    }
    monkeypatch.setattr(lasso, "_PROBLEMS", 20)  # of 8 a prompt
    monkeypatch.setattr(bayes, "_BYTES", {True: 3000, False: 3000})  # of 896 a prompt
    monkeypatch.setattr(networks, "_NETWORKS", {"cpu": 33})  # of up to 16 a prompt
    for name, together in whole.items():
        parts = BASELINES[name](prompts["mlp" if name == "network" else "sparse"])
        torch.testing.assert_close(parts, together, rtol=1e-4, atol=1e-4)


def test_every_name_leads_somewhere():
    assert set(BAYES) <= set(TASKS)
    assert set(BASELINES) > SLOW
    assert set(PAPER_BASELINE) <= set(TASKS)
    for task, name in PAPER_BASELINE.items():
        assert name in baselines_for(task)
    for task in TASKS:
        assert set(baselines_for(task)) <= set(BASELINES)
        assert baselines_for(task)[0] == "zero"
        assert ("bayes" in baselines_for(task)) == (task in BAYES)


def test_predictions_of_a_task_are_all_of_its_baselines():
    prompts = drawn("linear")
    found = predictions(prompts)
    assert tuple(found) == baselines_for("linear")
    assert torch.equal(found["least-squares"], BASELINES["least-squares"](prompts))
    assert tuple(predictions(prompts, ("ridge",))) == ("ridge",)


def test_unknown_names_are_refused_in_one_line():
    with pytest.raises(ValueError, match="no baselines for task 'lineal': take one of linear, "):
        baselines_for("lineal")
    with pytest.raises(ValueError, match="no baseline 'ols': take some of zero, averaging, "):
        predictions(drawn("linear"), ("ols",))
