"""A baseline scores 1, zero 0; pairing cancels what is common; intervals hold what they say."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from experiments.hybrids.measuring.comparisons import compared, corrected, failures_compared
from experiments.hybrids.measuring.scores import (
    drawn,
    failure_rows,
    over_seeds,
    score_rows,
)
from experiments.hybrids.measuring.sums import ALL, Sums, error_rows, gathered, prompt_sums
from experiments.hybrids.measuring.waiting import medians, steps_text, survival
from experiments.hybrids.report.published import TABLE_3, TASKS, beside_published, published
from probes.regression import icl_regression_score, score_difference, score_interval

PROMPTS = 300


def invented(task: str = "linear", seed: int = 0, spread: float = 0.02, seeds: int = 4) -> Sums:
    """Architectures a, b and stuck at 0.9, 0.6 and 0.1 of what least squares gains."""
    generator = np.random.default_rng(seed)
    zero = 40 * generator.chisquare(2, PROMPTS)
    base = 0.1 * zero * generator.uniform(0.5, 1.5, PROMPTS)
    models = {}
    for name, share in {"a": 0.9, "b": 0.6, "stuck": 0.1}.items():
        levels = share + spread * generator.standard_normal((seeds, 1))
        noise = 0.2 * generator.standard_normal((seeds, PROMPTS)) * zero
        models[name] = zero - levels * (zero - base) + noise
    baselines = {"least squares": base, "itself zero": zero.copy()}
    return Sums(task, "none", zero, baselines, models, dict.fromkeys(models, tuple(range(seeds))))


def tidy(sums: Sums) -> pd.DataFrame:
    """The same as rows, shuffled."""
    yardsticks = {"zero": sums.zero, **sums.baselines}
    rows = [("", ALL, name, values) for name, values in yardsticks.items()]
    rows += [
        (name, seed, "", values)
        for name, table in sums.models.items()
        for seed, values in zip(sums.seeds[name], table, strict=True)
    ]
    frames = [
        pd.DataFrame({"prompt": range(len(values)), "value": values}).assign(
            architecture=name, task=sums.task, seed=seed, shift=sums.shift, baseline=baseline
        )
        for name, seed, baseline, values in rows
    ]
    return pd.concat(frames).sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def scored() -> pd.DataFrame:
    return score_rows(drawn(invented(), np.random.default_rng(0), references=["a"]))


def test_score_of_a_seed_is_that_of_the_probe() -> None:
    """The probe has errors by point; here three points of a prompt."""
    generator = torch.Generator().manual_seed(0)
    ys = torch.randn(50, 3, 2, generator=generator)
    model = 0.7 * ys[None] + 0.2 * torch.randn(2, 50, 3, 2, generator=generator)
    base = 0.9 * ys
    sums = Sums(
        "linear",
        "none",
        prompt_sums(torch.zeros_like(ys)[None], ys)[0],
        {"base": prompt_sums(base[None], ys)[0]},
        {"m": prompt_sums(model, ys)},
        {"m": (3, 7)},
    )
    rows = score_rows(drawn(sums, np.random.default_rng(0), resamples=20))
    ours = rows.loc[rows["metric"] == "icl_score"].set_index("seed")["value"]
    for seed, prediction in zip((3, 7), model, strict=True):
        errors = [(x - ys).square().mean(-1) for x in (prediction, base, torch.zeros_like(ys))]
        assert ours[seed] == pytest.approx(icl_regression_score(*errors), rel=1e-5)
    assert ours[ALL] == pytest.approx(ours[[3, 7]].mean())


def test_a_baseline_scores_one_and_zero_scores_zero() -> None:
    sums = invented()
    base = sums.baselines["least squares"]
    models = {"same": np.stack([base] * 3), "nothing": np.stack([sums.zero] * 3)}
    exact = Sums(
        "linear", "none", sums.zero, sums.baselines, models, dict.fromkeys(models, (0, 1, 2))
    )
    rows = score_rows(drawn(exact, np.random.default_rng(0)))
    rows = rows.loc[(rows["metric"] == "icl_score") & (rows["baseline"] == "least squares")]
    for name, level in (("same", 1.0), ("nothing", 0.0)):
        own = rows.loc[rows["architecture"] == name, ["value", "low", "high"]].to_numpy(float)
        assert own == pytest.approx(level, abs=1e-12)  # paired: not even an interval


def test_a_denominator_that_does_not_beat_zero_divides_nothing(scored: pd.DataFrame) -> None:
    own = scored.loc[(scored["baseline"] == "itself zero") & (scored["metric"] == "icl_score")]
    assert own[["value", "stderr", "low", "high"]].isna().to_numpy().all()
    assert set(own["note"]) == {"itself zero does not beat zero here"}


def test_a_trained_architecture_stands_below(scored: pd.DataFrame) -> None:
    own = scored.loc[(scored["baseline"] == "trained a") & (scored["seed"] == ALL)]
    own = own.loc[own["metric"] == "icl_score"].set_index("architecture")
    assert own.loc["a", ["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert own.loc["b", "value"] == pytest.approx(2 / 3, abs=0.05)


def as_errors(sums: np.ndarray) -> torch.Tensor:
    """Prompts of one point."""
    return torch.from_numpy(sums)[..., None]


def test_the_whole_table_is_what_the_probe_says_cell_by_cell() -> None:
    sums = invented()
    rows = score_rows(drawn(sums, np.random.default_rng(0), resamples=6000))
    rows = rows.query("baseline == 'least squares' and metric == 'icl_score'")
    cells = rows.set_index(["architecture", "seed"])
    base, zero = as_errors(sums.baselines["least squares"]), as_errors(sums.zero)
    for name, errors in sums.models.items():
        for seed, some in ((0, errors[:1]), (ALL, errors)):
            generator = torch.Generator().manual_seed(0)
            slow = score_interval(
                *(as_errors(some), base, zero, generator), baseline="ls", resamples=6000
            )
            fast = cells.loc[(name, seed)]
            assert fast["value"] == pytest.approx(slow.value)
            assert fast["stderr"] == pytest.approx(slow.stderr, rel=0.06)
            widths = fast["high"] - fast["low"], slow.high - slow.low
            assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_differences_are_what_the_probe_says() -> None:
    sums, generator = invented(), np.random.default_rng(0)
    found = [drawn(sums, generator, resamples=6000)]
    table = compared(found, {"linear": "least squares"}, generator, reference="a")
    base, zero = as_errors(sums.baselines["least squares"]), as_errors(sums.zero)
    for row in table.to_dict("records"):
        errors = (as_errors(sums.models[name]) for name in (row["architecture"], "a"))
        slow = score_difference(
            *errors, base, zero, torch.Generator().manual_seed(0), baseline="ls", resamples=6000
        )
        assert row["value"] == pytest.approx(slow.value)
        assert row["stderr"] == pytest.approx(slow.stderr, rel=0.06)
        assert row["high"] == pytest.approx(slow.high, abs=0.1 * (slow.high - slow.value))


def test_interval_of_a_seed_is_the_ratio_estimators() -> None:
    sums = invented(spread=0)
    rows = score_rows(drawn(sums, np.random.default_rng(0), resamples=6000))
    row = rows.query("architecture == 'b' and seed == 0 and baseline == 'least squares'").iloc[0]
    above = sums.zero - sums.models["b"][0]
    below = sums.zero - sums.baselines["least squares"]
    residual = above - row["value"] * below
    delta = residual.std(ddof=1) / math.sqrt(PROMPTS) / below.mean()
    assert row["stderr"] == pytest.approx(delta, rel=0.06)
    half = stats.t.ppf(0.975, PROMPTS - 1) * row["stderr"]
    assert row["high"] - row["value"] == pytest.approx(half)


def test_interval_over_seeds_is_students_where_seeds_are_all_the_chance() -> None:
    """Exact multiples of the baseline's gain: prompts cancel."""
    sums = invented()
    gain = sums.zero - sums.baselines["least squares"]
    levels = np.array([0.7, 0.75, 0.9])
    models = {"m": sums.zero - levels[:, None] * gain}
    alone = Sums("linear", "none", sums.zero, sums.baselines, models, {"m": (0, 1, 2)})
    rows = score_rows(drawn(alone, np.random.default_rng(0), references=["m"]))
    rows = rows.query("seed == @ALL and metric == 'icl_score'").set_index("baseline")
    row = rows.loc["least squares"]
    assert row["value"] == pytest.approx(levels.mean())
    assert row["stderr"] == pytest.approx(levels.std(ddof=1) / math.sqrt(3))
    half = stats.t.ppf(0.975, 2) * row["stderr"]
    assert (row["low"], row["high"]) == pytest.approx((row["value"] - half, row["value"] + half))
    assert rows.loc["trained m", ["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])


def test_seeds_of_a_trained_denominator_are_chance_too() -> None:
    sums = invented(spread=0.05)
    rows = score_rows(drawn(sums, np.random.default_rng(0), references=["a"]))
    rows = rows.query("architecture == 'b' and metric == 'icl_score'")
    cells = rows.set_index(["baseline", "seed"])["stderr"]
    assert cells["trained a", 0] > 1.5 * cells["least squares", 0]


def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say() -> None:
    held = 0
    for trial in range(60):
        sums = invented(seed=trial, spread=0.05, seeds=4)
        rows = score_rows(drawn(sums, np.random.default_rng(trial), resamples=200))
        row = rows.query("architecture == 'b' and seed == @ALL and baseline == 'least squares'")
        held += bool(row["low"].iloc[0] <= 0.6 <= row["high"].iloc[0])
    assert 0.88 <= held / 60 <= 1.0


def test_one_seed_has_no_interval_over_seeds() -> None:
    rows = score_rows(drawn(invented(seeds=1), np.random.default_rng(0)))
    rows = rows.query("baseline == 'least squares' and metric == 'icl_score'")
    over, own = rows.query("seed == @ALL"), rows.query("seed == 0")
    assert over[["stderr", "low", "high"]].isna().to_numpy().all()
    assert set(over["note"]) == {"one seed: no interval over seeds"}
    assert own[["value", "stderr", "low", "high"]].notna().to_numpy().all()
    assert over["value"].tolist() == own["value"].tolist()


def test_a_broken_seed_is_counted_and_failed() -> None:
    sums = invented()
    sums.models["a"][2, 5] = math.nan
    rows = score_rows(drawn(sums, np.random.default_rng(0)))
    own = rows.query("architecture == 'a' and baseline == 'least squares'").set_index("seed")
    assert math.isnan(own.loc[2, "value"])
    assert own.loc[2, "note"] == "predictions not finite"
    assert own.loc[ALL, "value"] == pytest.approx(own.loc[[0, 1, 3], "value"].mean())
    assert own.loc[ALL, ["seeds", "broken"]].tolist() == [3, 1]
    failed = failure_rows(rows, {"linear": "least squares"}).set_index("architecture")
    assert failed.loc["a", ["failed", "seeds"]].tolist() == [1, 4]
    assert failed.loc["stuck", "value"] == 1
    assert failed.loc["b", "value"] == 0
    assert 0 < failed.loc["b", "high"] < 0.6  # Wilson: none of four is not never


def test_rows_make_the_same_sums() -> None:
    sums = invented()
    (back,) = gathered(tidy(sums))
    assert np.array_equal(back.zero, sums.zero)
    assert back.seeds == sums.seeds
    for name, table in sums.models.items():
        assert np.array_equal(back.models[name], table)
    for name, values in sums.baselines.items():
        assert np.array_equal(back.baselines[name], values)


def test_cells_on_other_prompts_are_refused() -> None:
    other = tidy(invented(seed=1)).assign(
        architecture=lambda f: f["architecture"].replace("a", "c")
    )
    with pytest.raises(ValueError, match="different prompts"):
        gathered(pd.concat([tidy(invented()), other]))
    short = tidy(invented()).query("architecture != 'a' or prompt < 10")
    with pytest.raises(ValueError, match="a has 10 prompts, zero 300"):
        gathered(short)
    with pytest.raises(ValueError, match="no rows of the baseline zero"):
        gathered(tidy(invented()).query("baseline != 'zero'"))


def test_error_by_examples() -> None:
    ys = torch.arange(6, dtype=torch.float32).reshape(2, 3, 1)
    predictions = torch.stack([ys, ys + 2.0])
    rows = error_rows(predictions, ys, [4, 9]).set_index(["seed", "examples"])
    assert rows.loc[4, "value"].tolist() == [0, 0, 0]
    assert rows.loc[9, "value"].tolist() == [4, 4, 4]
    uneven = error_rows(0 * ys[None], ys, [0])
    assert uneven["value"].tolist() == [4.5, 8.5, 14.5]
    assert uneven["stderr"].tolist() == pytest.approx([4.5, 7.5, 10.5])
    assert prompt_sums(predictions, ys).tolist() == [[0, 0], [12, 12]]


def test_points_that_do_not_count_have_no_row_and_no_part() -> None:
    ys = torch.arange(6, dtype=torch.float32).reshape(2, 3, 1)
    inside = torch.tensor([[False, True, True], [False, False, True]])
    broken = ys[None] + torch.tensor([math.nan, 1.0, 2.0])[:, None]
    rows = error_rows(broken, ys, [0], inside)
    assert rows["examples"].tolist() == [1, 2]
    assert rows["value"].tolist() == [1, 4]
    assert math.isnan(rows["stderr"][0])  # one prompt counts
    assert rows["stderr"][1] == 0
    assert prompt_sums(broken, ys, inside).tolist() == [[5, 4]]


# Against a reference -----------------------------------------------------------------------------


def test_a_difference_is_seen_and_corrected_over_the_table() -> None:
    generator = np.random.default_rng(0)
    found = [drawn(invented(task, seed), generator) for seed, task in enumerate(["linear", "tree"])]
    baselines = dict.fromkeys(["linear", "tree"], "least squares")
    table = compared(found, baselines, generator, reference="a")
    assert len(table) == 4
    assert table["value"].to_numpy() == pytest.approx([-0.3, -0.8] * 2, abs=0.06)
    assert (table["holm"] < 0.05).to_numpy().all()
    assert table["p_permutation"].tolist() == pytest.approx([2 / math.comb(8, 4)] * 4)
    assert np.array_equal(table["holm"], corrected(table["p"]))
    assert (table["low"] < table["value"]).to_numpy().all()


def test_equal_architectures_are_called_as_often_as_the_level_says() -> None:
    called = 0
    for trial in range(80):
        sums = invented(seed=trial, spread=0.05)
        twin = invented(seed=10_000 + trial, spread=0.05)
        ratio = twin.models["a"] / twin.zero  # the same law on the same prompts
        models = {"a": sums.models["a"], "twin": ratio * sums.zero}
        both = Sums(
            "linear", "none", sums.zero, sums.baselines, models, dict.fromkeys(models, (0, 1, 2, 3))
        )
        generator = np.random.default_rng(trial)
        found = drawn(both, generator, resamples=200)
        called += (
            compared([found], {"linear": "least squares"}, generator, reference="a")["p"][0] < 0.05
        )
    assert called / 80 < 0.1


def test_one_seed_tests_nothing() -> None:
    generator = np.random.default_rng(0)
    table = compared(
        [drawn(invented(seeds=1), generator)], {"linear": "least squares"}, generator, reference="a"
    )
    assert table[["stderr", "p", "p_permutation", "holm", "low"]].isna().to_numpy().all()
    assert table["value"].notna().to_numpy().all()


def test_a_cell_without_a_p_counts_in_holms_family() -> None:
    assert corrected([0.02, math.nan])[0] == pytest.approx(0.04)
    assert math.isnan(corrected([0.02, math.nan])[1])
    assert corrected([]).size == 0


def test_failures_against_the_reference() -> None:
    rates = pd.DataFrame(
        {
            "architecture": ["gpt2", "gpt2-rms", "llama"],
            "task": "tree",
            "shift": "none",
            "baseline": "Bayes",
            "seed": ALL,
            "value": [0.0, 1.0, 0.2],
            "failed": [0, 5, 1],
            "seeds": 5,
        }
    )
    table = failures_compared(rates).set_index("architecture")
    assert list(table.index) == ["gpt2-rms", "llama"]
    assert table.loc["gpt2-rms", "p"] == pytest.approx(2 / math.comb(10, 5))
    assert table.loc["gpt2-rms", "holm"] == pytest.approx(4 / math.comb(10, 5))
    assert table.loc["llama", "p"] == pytest.approx(1.0)


# Time to threshold -------------------------------------------------------------------------------


def waits(*times: float, bound: float = 100.0, name: str = "gpt2") -> pd.DataFrame:
    steps = [bound if math.isinf(time) else time for time in times]
    arrived = [not math.isinf(time) for time in times]
    return pd.DataFrame({"architecture": name, "step": steps, "arrived": arrived})


def test_censored_seeds_are_not_dropped() -> None:
    frame = pd.concat(
        [waits(10, 20, 30), waits(10, 20, 30, math.inf, math.inf, math.inf, name="b")]
    )
    table = medians(frame, ["architecture"]).set_index("architecture")
    assert table.loc["gpt2", "median"] == 20
    assert table.loc["b", "median"] == 30  # three of six
    assert table.loc["b", ["seeds", "arrived"]].tolist() == [6, 3]
    never = medians(waits(10, math.inf, math.inf), ["architecture"])
    assert (never["median"][0], never["text"][0]) == (math.inf, "> 100")
    nobody = medians(waits(math.inf, math.inf), ["architecture"]).iloc[0]
    assert math.isinf(nobody["median"])
    assert math.isnan(nobody["low"])


def test_a_diverged_seed_stays_on_its_way() -> None:
    frame = waits(10, 50, math.inf).assign(diverged=[False, False, True])
    frame.loc[2, "step"] = 5  # it broke early: as if it had left, two would be half of two
    assert medians(frame, ["architecture"])["median"][0] == 50
    left = medians(frame.drop(columns="diverged"), ["architecture"])
    assert left["median"][0] == 10


def test_one_seed_has_a_time_and_no_interval() -> None:
    row = medians(waits(40), ["architecture"]).iloc[0]
    assert row["median"] == 40
    assert math.isnan(row["low"])


def test_survival_falls_from_one() -> None:
    table = survival(waits(10, 20, math.inf), ["architecture"])
    assert table["survival"].iloc[0] == 1
    assert table["survival"].is_monotonic_decreasing
    assert table["survival"].iloc[-1] == pytest.approx(1 / 3)
    assert list(survival(waits().head(0), ["architecture"])) == [
        *["architecture", "step", "survival", "low", "high"]
    ]
    assert steps_text(1250.4, 2000) == "1\u202f250"


# The paper's table -------------------------------------------------------------------------------


def test_the_papers_table_as_it_is_printed() -> None:
    table = published()
    assert len(table) == 12 * 5 - 6  # six GPT-2 and Llama hybrids were not run on parity
    assert set(table["architecture"]) == set(TABLE_3)
    cells = table.set_index(["architecture", "task"])["value"]
    assert cells["gpt2-rms", "tree"] == 0.114
    assert cells["gpt2-rms-swiglu", "sparse"] == 0.754
    assert cells["mamba", "tree"] == 0.832
    assert table.loc[table["own"], "value"].tolist() == [1.0, 1.0]


def test_ours_beside_the_papers() -> None:
    ours = pd.DataFrame(
        {
            "architecture": ["mamba", "gpt2", "gpt2", "mambaformer"],
            "task": ["tree", "linear", "mqar", "linear"],
            "baseline": ["tree-signs", "least-squares", "bayes", "least-squares"],
            "value": [0.8, 0.5, 0.9, 0.7],
            "low": [0.7, 0.4, 0.8, 0.6],
            "high": [0.9, 0.6, 1.0, 0.8],
            "seeds": 3,
        }
    )
    table = beside_published(ours)
    assert table["architecture"].iloc[0] == "gpt2"
    assert table["architecture"].iloc[-1] == "mambaformer"
    assert table["task"].iloc[: len(TASKS) + 1].tolist() == [*TASKS, "mqar"]
    cells = table.set_index(["architecture", "task"])
    assert pd.isna(cells.loc[("mamba", "tree"), "within"])  # divided by something else
    assert not cells.loc[("gpt2", "linear"), "within"]
    assert pd.isna(cells.loc[("gpt2", "mqar"), "within"])
    assert pd.isna(cells.loc[("llama", "linear"), "value"])
    with pytest.raises(ValueError, match="several scores"):
        beside_published(pd.concat([ours, ours]))


def test_over_seeds_takes_the_named_denominator(scored: pd.DataFrame) -> None:
    table = over_seeds(scored, {"linear": "trained a"}, "none")
    assert table["architecture"].tolist() == ["a", "b", "stuck"]
    assert set(table["baseline"]) == {"trained a"}
    assert over_seeds(scored, {"linear": "trained a"}, "noisy").empty
