"""Models and baselines are asked about the same prompts, and their rows make the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.hybrids.architecture.config import HybridConfig
from experiments.hybrids.architecture.grammar import blocks_of, written
from experiments.hybrids.architecture.model import Hybrid
from experiments.hybrids.learning.streams import held_out
from experiments.hybrids.measuring import evaluation
from experiments.hybrids.measuring.evaluation import (
    baselines_evaluated,
    checkpoints_of,
    evaluated,
    first,
    followed,
    predicted,
    yardsticks,
)
from experiments.hybrids.measuring.scores import drawn_all, score_rows
from experiments.hybrids.measuring.sums import ALL, gathered
from experiments.hybrids.regression.baselines import BASELINES
from experiments.hybrids.regression.prompts import counted, interleaved
from experiments.hybrids.regression.task_table import Task, small
from probes.regression import icl_regression_score, squared_error_by_examples

LINEAR = Task("linear", d=3, points=6)
CPU = torch.device("cpu")


def tiny(task: Task, seed: int = 0, blocks: str = "gpt2") -> Hybrid:
    torch.manual_seed(seed)
    return Hybrid(
        HybridConfig(
            blocks=written(blocks_of(blocks, 1)),
            d_model=16,
            heads=2,
            n_positions=2 * task.points,
            x_dim=task.d,
            y_dim=task.y_dim,
        )
    )


@pytest.fixture(scope="module")
def measure() -> evaluation.Yardsticks:
    return yardsticks(LINEAR, "none", 40)


def test_predictions_are_the_outputs_where_an_x_stands(measure, monkeypatch) -> None:
    model = tiny(LINEAR).train()
    whole = model.eval()(prompts=interleaved(measure.prompts)).logits[:, ::2]
    model.train()
    monkeypatch.setattr(evaluation, "COORDINATES", 7 * 2 * 6 * 3)  # seven prompts at a time
    said = predicted(model, measure.prompts)
    torch.testing.assert_close(said, whole.detach())
    assert model.training
    assert not said.requires_grad


def test_prompts_are_nobody_elses_and_the_same_for_all(measure) -> None:
    again = yardsticks(LINEAR, "none", 40)
    assert torch.equal(measure.prompts.xs, again.prompts.xs)
    for purpose in ("report", "selection"):
        other = held_out(LINEAR, 40, CPU, purpose)
        assert not torch.equal(other.xs, measure.prompts.xs)


def test_rows_make_the_scores_of_the_probe(measure, tmp_path: Path) -> None:
    models: dict[int, Hybrid | Path] = {3: tiny(LINEAR, 3), 5: tiny(LINEAR, 5)}
    tiny(LINEAR, 5).save_pretrained(tmp_path / "five")
    models[5] = tmp_path / "five"
    own, given = evaluated("gpt2", models, measure), baselines_evaluated(measure)
    import pandas as pd

    sums = gathered(pd.concat([own.sums, given.sums]))
    (found,) = drawn_all(sums, np.random.default_rng(0), references=["gpt2"], resamples=50)
    rows = score_rows(found).query("metric == 'icl_score' and baseline == 'least-squares'")
    ys = measure.prompts.ys
    for seed in (3, 5):
        said = predicted(tiny(LINEAR, seed), measure.prompts)
        base = BASELINES["least-squares"](measure.prompts)
        errors = [squared_error_by_examples(p, ys) for p in (said, base, torch.zeros_like(ys))]
        score = rows.loc[rows["seed"] == seed, "value"].item()
        assert score == pytest.approx(icl_regression_score(*errors), rel=1e-4, abs=1e-6)
        curve = own.errors.query("seed == @seed").set_index("examples")["value"]
        assert curve.to_numpy() == pytest.approx(errors[0].mean(0).numpy(), rel=1e-4)
    assert "trained gpt2" in found.denominators
    at_most = given.errors.query("baseline == 'least-squares' and examples == 5")["value"].item()
    assert at_most < 1e-6
    assert set(given.errors["seed"]) == {ALL}
    assert set(given.errors["architecture"]) == {""}


def test_associative_recall_is_measured_at_its_last_point() -> None:
    task = Task("mqar", d=4, points=5, y_dim=4)
    measure = yardsticks(task, "none", 12)
    given = baselines_evaluated(measure)
    assert set(given.errors["examples"]) == {4}
    exact = given.sums.query("baseline == 'bayes'")["value"]
    assert exact.to_numpy() == pytest.approx(0, abs=1e-9)
    own = evaluated("mamba", {0: tiny(task, blocks="mamba")}, measure)
    assert len(own.errors) == 1
    assert len(own.sums) == 12


def test_slow_baselines_are_asked_about_the_first_prompts() -> None:
    task = Task("tree", d=2, points=4, depth=1)
    measure = yardsticks(task, "none", 30, slow=8, names=("zero", "neighbours", "boosted"))
    own, given = evaluated("gpt2", {0: tiny(task)}, measure), baselines_evaluated(measure)
    import pandas as pd

    tables = gathered(pd.concat([own.sums, given.sums]))
    assert [len(table.zero) for table in tables] == [30, 8]
    assert list(tables[1].baselines) == ["boosted"]
    found = drawn_all(tables, np.random.default_rng(0), references=["gpt2"], resamples=50)
    assert [sorted(one.denominators) for one in found] == [
        ["neighbours", "trained gpt2"],
        ["boosted"],
    ]
    whole, few = predicted(tiny(task), measure.prompts), measure.prompts.ys[:8]
    expected = (whole[:8] - few).square().mean(-1).sum(1)
    assert tables[1].models["gpt2"][0] == pytest.approx(expected.numpy(), rel=1e-4)


def test_first_prompts_keep_what_is_hidden_of_them() -> None:
    prompts = yardsticks(small("sparse"), "outlier", 10, names=("zero",)).prompts
    some = first(prompts, 4)
    assert some.xs.shape[0] == some.hidden["support"].shape[0] == 4
    assert torch.equal(counted(some), counted(prompts)[:4])
    assert some.hidden["noise"].ndim == 0


def test_dense_prompts_are_for_sparse_functions(measure) -> None:
    task = small("sparse")
    dense = yardsticks(task, "dense", 50, names=("least-squares", "lasso"))
    given = baselines_evaluated(dense)
    assert set(given.errors["task"]) == {"sparse"}
    assert set(given.errors["shift"]) == {"dense"}
    zero = given.errors.query("baseline == 'zero'")["value"].mean()
    assert zero == pytest.approx(task.d, rel=0.4)  # not k
    with pytest.raises(ValueError, match="shift dense of task linear"):
        yardsticks(LINEAR, "dense", 5)


class Says(torch.nn.Module):
    """A model that answers what a baseline would."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, prompts: torch.Tensor) -> object:
        from transformers.modeling_outputs import CausalLMOutput

        doubled = self.answers[: len(prompts)].repeat_interleave(2, dim=1)
        return CausalLMOutput(logits=doubled)


@pytest.mark.parametrize("shift", ["none", "dense"])
def test_checkpoints_that_say_what_a_baseline_says_are_named_after_it(shift: str) -> None:
    names = ("zero", "averaging", "least-squares", "lasso")
    measure = yardsticks(small("sparse"), shift, 60, names=names)
    order = ["zero", "least-squares", "lasso"]
    said = {(0, 10**at): Says(measure.predictions[name]) for at, name in enumerate(order)}
    far, labels = followed("gpt2", said, measure, np.random.default_rng(0))  # type: ignore[arg-type]
    assert labels["label"].tolist() == order
    assert labels["step"].tolist() == [1, 10, 100]
    at = far.query("step == 100 and baseline == 'lasso'")["value"].item()
    assert at == pytest.approx(0, abs=1e-9)
    keys = ["architecture", "task", "seed", "shift", "baseline", "step", "metric"]
    assert not far.duplicated(keys).any()


def test_schemes_are_judged_on_prompts_that_all_were_asked_about() -> None:
    task = Task("tree", d=2, points=4, depth=1)
    measure = yardsticks(task, "none", 30, slow=8, names=("zero", "neighbours", "boosted"))
    model = Says(measure.predictions["boosted"])
    _, labels = followed("a", {(0, 1): model}, measure, np.random.default_rng(0))  # type: ignore[dict-item]
    assert labels["label"].tolist() == ["boosted"]


def test_checkpoints_of_a_run_by_seed_and_step(tmp_path: Path) -> None:
    for seed, step in ((0, 0), (0, 20), (11, 20)):
        (tmp_path / "checkpoints" / f"s{seed}" / f"{step:07d}").mkdir(parents=True)
    assert [key for key, _ in checkpoints_of(tmp_path)] == [(0, 0), (0, 20), (11, 20)]
