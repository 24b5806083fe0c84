"""Effects of crossed factors: against least squares, hand-made seeds, and lifelines."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from lifelines import LogNormalAFTFitter
from scipy import stats

from experiments.hybrids.architecture.grammar import THE_TWELVE
from experiments.hybrids.cells import cells_of
from experiments.hybrids.measuring.factors import (
    Crossed,
    crossed,
    score_effects,
    step_effects,
    with_holm,
)
from experiments.hybrids.measuring.scores import drawn
from experiments.hybrids.measuring.sums import Sums
from experiments.hybrids.report.factor_figures import factor_effects
from experiments.hybrids.study import Hybrids

LEVELS = {"norm": ("LayerNorm", "RMSNorm"), "FFN": ("GELU MLP", "SwiGLU"), "std": ("0.02", "1")}
SIGNS = {"".join("-+"[x > 0] for x in s): s for s in itertools.product((-1, 1), repeat=3)}
CROSSING = Crossed(LEVELS, SIGNS, {name: 100 + 50 * (s[1] > 0) for name, s in SIGNS.items()})


def cells(**options):
    return cells_of(Hybrids(functions=("linear",), **options))


def test_the_factorial_crosses_norm_ffn_and_the_std_of_positions() -> None:
    factorial = Hybrids(preset="factorial", **Hybrids.PRESETS["factorial"])
    found = crossed(cells_of(dataclasses.replace(factorial, functions=("tree",))))
    assert found is not None
    assert found.levels == {
        "norm": ("LayerNorm", "RMSNorm"),
        "FFN": ("GELU MLP", "SwiGLU"),
        "std of positions": ("0.02", "1"),
    }
    assert found.signs["gpt2 positions 0.02"] == (-1, -1, -1)
    assert found.signs["gpt2-rms-swiglu positions 1"] == (1, 1, 1)
    assert len(found.effects()) == 7


def test_the_papers_table_crosses_norm_ffn_and_positions() -> None:
    found = crossed(cells(architectures=THE_TWELVE))
    assert found is not None
    assert list(found.levels) == ["norm", "FFN", "positions"]
    assert found.levels["positions"] == ("learned", "RoPE")
    assert len(found.signs) == 8
    assert "mamba" not in found.signs


@pytest.mark.parametrize(
    "architectures",
    [
        ("gpt2", "llama", "mambaformer"),
        ("gpt2", "gpt2-rms", "gpt2-swiglu"),
        ("gpt2", "gpt2-rms"),
        (
            *("learned-attention-gelu-layer", "learned-attention-gelu-rms"),
            *("learned-attention-swiglu-layer*3", "learned-attention-swiglu-rms*3"),
        ),
    ],
)
def test_what_is_not_crossed_has_no_factors(architectures) -> None:
    assert crossed(cells(architectures=architectures)) is None


def planted(
    noise: float = 0.0,
    seeds: int = 4,
    prompts: int = 50,
    seed: int = 0,
    shared: tuple[float, float] = (0.0, 0.0),
) -> Sums:
    """Cells with score 0.6 + 0.1 x_std − 0.04 x_norm x_std, seeds `noise` apart.

    `shared` is how much seeds of all cells, and their effects of the FFN, go up and down together.
    """
    generator = np.random.default_rng(seed)
    zero = np.full(prompts, 2.0)
    common, ffns = generator.standard_normal((2, seeds, 1))
    models = {}
    for name, (norm, ffn, std) in CROSSING.signs.items():
        score = 0.6 + 0.1 * std - 0.04 * norm * std + noise * generator.standard_normal((seeds, 1))
        models[name] = zero * (1 - score - shared[0] * common - shared[1] * ffn * ffns)
    seeds_of = {name: tuple(range(seeds)) for name in models}
    return Sums("tree", "none", zero, {"zero": zero, "best": 0 * zero}, models, seeds_of)


def test_planted_effects_come_back() -> None:
    found = score_effects(drawn(planted(), np.random.default_rng(0)), "best", CROSSING)
    value = found.set_index("effect")["value"]
    assert value["std 1, not 0.02"] == pytest.approx(0.2)
    assert value["norm × std"] == pytest.approx(-0.08)
    others = value.drop(["std 1, not 0.02", "norm × std"])
    np.testing.assert_allclose(others, 0, atol=1e-12)
    assert found["order"].tolist() == [1, 1, 1, 2, 2, 2, 3]


def test_effects_and_errors_are_those_of_each_seeds_least_squares() -> None:
    sums = planted(noise=0.05, seeds=5, shared=(0.1, 0.05))
    found = score_effects(drawn(sums, np.random.default_rng(0)), "best", CROSSING)
    chosen = [s for size in (1, 2, 3) for s in itertools.combinations(range(3), size)]
    design = [
        [1, *(np.prod([s[i] for i in each]) for each in chosen)] for s in CROSSING.signs.values()
    ]
    scores = [1 - sums.models[name].mean(1) / sums.zero.mean() for name in CROSSING.signs]
    betas = 2 * np.linalg.solve(np.array(design, dtype=float), np.array(scores))[1:]
    # Prompts are all alike: seeds are all the chance there is.
    alone = [stats.ttest_1samp(of_seeds, 0) for of_seeds in betas]
    np.testing.assert_allclose(found["value"], betas.mean(1), atol=1e-12)
    np.testing.assert_allclose(found["stderr"], stats.sem(betas, axis=1), rtol=1e-9)
    np.testing.assert_allclose(found["p"], [one.pvalue for one in alone], rtol=1e-6)


@pytest.mark.parametrize("shared", [(0.0, 0.0), (0.1, 0.1)])
def test_effects_of_nothing_are_called_as_often_as_the_level_says(shared) -> None:
    called = []
    for trial in range(200):
        sums = planted(noise=0.05, seeds=4, prompts=30, seed=trial, shared=shared)
        models = {}  # the planted effects taken out again
        for name, (norm, _, std) in CROSSING.signs.items():
            models[name] = sums.models[name] + 2 * (0.1 * std - 0.04 * norm * std)
        flat = dataclasses.replace(sums, models=models)
        found = score_effects(drawn(flat, np.random.default_rng(0), resamples=50), "best", CROSSING)
        called.append(found["p"] < 0.05)
    share = np.mean(called, axis=0)
    assert 0.03 < share.mean() < 0.07
    assert share.max() < 0.11  # of the FFN as well, whose seeds go together


def test_a_seed_that_diverged_in_one_cell_is_left_out_of_all() -> None:
    sums = planted(noise=0.05, seeds=5)
    models = {name: errors.copy() for name, errors in sums.models.items()}
    models["+-+"][2] = np.nan
    kept = [0, 1, 3, 4]
    four = dataclasses.replace(
        sums,
        models={name: errors[kept] for name, errors in sums.models.items()},
        seeds=dict.fromkeys(sums.models, tuple(kept)),
    )
    broken = drawn(dataclasses.replace(sums, models=models), np.random.default_rng(0))
    found = score_effects(broken, "best", CROSSING)
    expected = score_effects(drawn(four, np.random.default_rng(0)), "best", CROSSING)
    pd.testing.assert_frame_equal(found, expected)
    assert set(found["seeds"]) == {4}


def test_how_much_larger_a_level_makes_the_models() -> None:
    found = score_effects(drawn(planted(0.1), np.random.default_rng(0)), "best", CROSSING)
    growth = found.set_index("effect")["parameters"]
    assert growth["FFN SwiGLU, not GELU MLP"] == pytest.approx(1.5)
    assert growth["norm RMSNorm, not LayerNorm"] == pytest.approx(1)
    assert growth["norm × FFN"] != growth["norm × FFN"]


def test_one_seed_has_no_effects() -> None:
    found = drawn(planted(seeds=1), np.random.default_rng(0))
    assert score_effects(found, "best", CROSSING).empty
    assert score_effects(found, "not there", CROSSING).empty
    assert with_holm(pd.DataFrame()).empty


def arrived(last: float, seed: int = 0, shared: float = 0.0) -> pd.DataFrame:
    """Steps 1000 · 2^(x_std / 2) with some spread; none is seen after `last`."""
    generator = np.random.default_rng(seed)
    of_seed = shared * generator.standard_normal((5, 2))
    rows = []
    for name, signs in CROSSING.signs.items():
        for one in range(5):
            luck = 0.2 * generator.standard_normal() + of_seed[one, 0] + of_seed[one, 1] * signs[1]
            step = 1000 * 2 ** (signs[2] / 2) * np.exp(luck)
            rows.append(
                {"architecture": name, "task": "tree", "seed": one, "threshold": 0.5}
                | {"arrived": step < last, "step": min(step, last)}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("last", [1e9, 1400.0])
def test_ratios_of_steps_are_lifelines(last: float) -> None:
    table = arrived(last)
    found = step_effects(table, CROSSING).set_index("effect")
    signs = np.array([CROSSING.signs[name] for name in table["architecture"]]) / 2
    frame = pd.DataFrame(signs, columns=["a", "b", "c"])
    frame = frame.assign(step=table["step"] + 1, arrived=table["arrived"])
    fitter = LogNormalAFTFitter().fit(frame, "step", "arrived")
    theirs = fitter.params_["mu_"][["a", "b", "c"]]
    np.testing.assert_allclose(np.log(found["value"]), theirs, atol=2e-3)
    assert found["value"]["std 1, not 0.02"] == pytest.approx(2, rel=0.25)
    assert found["low"]["std 1, not 0.02"] > 1
    assert found["arrived"].iloc[0] == table["arrived"].sum()


def test_intervals_of_ratios_hold_where_seeds_go_together() -> None:
    called = []
    for trial in range(100):
        found = step_effects(arrived(3000.0, trial, shared=0.3), CROSSING)
        called.append(found["p"].to_numpy()[:2] < 0.05)
    assert np.mean(called, axis=0).max() < 0.12


def test_a_threshold_that_few_reach_has_no_ratio() -> None:
    assert step_effects(arrived(500.0), CROSSING).empty


def test_a_diverged_seed_counts_as_on_its_way_to_the_end() -> None:
    table = arrived(1400.0)
    lost = table.index[~table["arrived"]][0]
    early = table.assign(step=table["step"].where(table.index != lost, 20.0))
    diverged = early.assign(diverged=early.index == lost)
    columns = ["value", "low", "high"]
    expected = step_effects(table, CROSSING)[columns]
    pd.testing.assert_frame_equal(step_effects(diverged, CROSSING)[columns], expected)
    assert not np.allclose(step_effects(early, CROSSING)[columns], expected)


def test_the_picture() -> None:
    scores = score_effects(drawn(planted(noise=0.05), np.random.default_rng(0)), "best", CROSSING)
    steps = step_effects(arrived(1400.0), CROSSING)
    left, right = factor_effects(scores, steps).axes
    assert [text.get_text() for text in left.get_yticklabels()] == scores["effect"].tolist()
    assert "to 0.5" in right.get_yticklabels()[0].get_text()
    assert len(factor_effects(scores, steps.iloc[:0]).axes) == 1
