"""Cells, curves, contrasts and the grid against plain loops, and against cases that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ablate.pruning import removable
from experiments.prune.cells import RESAMPLES, cells_of, spread, with_seeds
from experiments.prune.curves import (
    Curve,
    contrast,
    contrasts,
    curve_of,
    curves,
    grid,
    holm_of,
    p_of,
    rankings_of,
)
from experiments.prune.measured import ALONE, GRID, WHOLE
from experiments.statistics import holm, mean_and_stderr


def rows(
    task: str,
    shots: int,
    outcomes: list[float],
    *,
    unit: str = "heads",
    ranking: str = "importance",
    removed: int = 0,
    ffns: int = 0,
    seed: int = 0,
    size: int = 1,
) -> pd.DataFrame:
    """The answers of one cell; `size` examples share a text."""
    docs = range(len(outcomes))
    return pd.DataFrame(
        {
            "task": task,
            "shots": shots,
            "seed": seed,
            "unit": unit,
            "ranking": ranking,
            "removed": removed,
            "ffns": ffns,
            "component": "",
            "doc_id": docs,
            "group": [f"text {doc // size}" for doc in docs],
            "score": np.array(outcomes, dtype=float),
            "loss": 0.0,
        }
    )


def whole(task: str, shots: int, outcomes: list[float], seed: int = 0, size: int = 1):
    return rows(task, shots, outcomes, unit=WHOLE, ranking=WHOLE, seed=seed, size=size)


def one_curve(parts: list[pd.DataFrame], total: int = 10) -> Curve:
    cells = cells_of(pd.concat(parts), np.random.default_rng(0))
    (curve,) = curves(cells, {"heads": total})
    return curve


def noisy(seeds: tuple[int, ...] = (0, 1, 2), texts: int = 6) -> pd.DataFrame:
    """Two tasks of different sizes, two shot counts, two rankings, seeds, nan among the scores."""
    generator = np.random.default_rng(5)
    parts = []
    for task, shots, seed in itertools.product(("a", "b"), (0, 5), seeds):
        count = 2 * texts if task == "a" else texts + 1

        def drawn(chance: float, count: int = count) -> list[float]:
            scores = generator.binomial(1, chance, count).astype(float)
            scores[generator.random(count) < 0.1] = np.nan
            return scores.tolist()

        parts.append(whole(task, shots, drawn(0.9), seed, 2))
        for ranking, removed in itertools.product(("importance", "random"), (2, 5)):
            how = {"ranking": ranking, "removed": removed, "seed": seed, "size": 2}
            parts.append(rows(task, shots, drawn(0.9 - removed / 10), **how))
    return pd.concat(parts, ignore_index=True)


def test_the_average_weighs_tasks_and_shots_equally():
    curve = one_curve(
        [
            whole("a", 0, [1, 1, 1, 1]),
            whole("a", 5, [1, 1, 0, 0]),
            whole("b", 0, [1, 0]),
            whole("b", 5, [0, 0]),
            rows("a", 0, [1, 0, 0, 0], removed=3),
            rows("a", 5, [0, 0, 0, 0], removed=3),
            rows("b", 0, [1, 1], removed=3),
            rows("b", 5, [1, 1], removed=3),
        ]
    )
    assert curve.removed == [0, 3]
    assert curve.average.value == pytest.approx([(1 + 0.5 + 0.5 + 0) / 4, (0.25 + 0 + 1 + 1) / 4])


@pytest.mark.parametrize("seeds", [(0, 1, 2), (4,)])
def test_curves_and_their_replicates_are_those_of_plain_loops(seeds: tuple[int, ...]):
    answers = noisy(seeds, texts=10)
    cells = cells_of(answers, np.random.default_rng(3))
    curve = curve_of(cells, "heads", "importance", 10)
    assert curve is not None
    assert curve.average.seeds == seeds
    picks = cells._picks(seeds)
    order = {
        task: list(dict.fromkeys(own.group))
        for task, own in answers.loc[answers.unit == WHOLE].groupby("task")
    }

    def by_hand(resample: int | None, seed: int, removed: int) -> float:
        means = []
        for task, shots in itertools.product(("a", "b"), (0, 5)):
            chosen = answers.loc[
                (answers.task == task)
                & (answers.shots == shots)
                & (answers.seed == seed)
                & (answers.removed == removed)
                & answers.ranking.isin([WHOLE if removed == 0 else "importance"])
            ]
            found = []
            for group, score in zip(chosen.group, chosen.score, strict=True):
                place = order[task].index(group)
                times = 1 if resample is None else int(cells.weights[task][resample, place])
                found += [score] * times if np.isfinite(score) else []
            means.append(np.mean(found))
        return float(np.mean(means))

    for step, removed in enumerate((0, 2, 5)):
        points = [by_hand(None, seed, removed) for seed in seeds]
        assert curve.average.by_seed[:, step] == pytest.approx(points)
        assert curve.average.value[step] == pytest.approx(np.mean(points))
        for resample in (0, 17, RESAMPLES - 1):
            each = [by_hand(resample, seed, removed) for seed in seeds]
            middle = np.mean(each)
            drawn = [each[pick] - middle for pick in picks[resample]]
            wide = np.sqrt(len(seeds) / (len(seeds) - 1)) if len(seeds) > 1 else 0
            expected = middle + wide * np.mean(drawn)
            assert curve.average.resampled[resample, step] == pytest.approx(expected)


def test_drawn_seeds_have_the_variance_of_a_mean_of_seeds():
    values = np.array([0.3, 0.5, 0.9])
    picks = np.array(list(itertools.product(range(3), repeat=3)))
    draws = with_seeds(np.tile(values[None, :, None], (len(picks), 1, 1)), picks)[:, 0]
    assert draws.mean() == pytest.approx(values.mean())
    assert draws.var() == pytest.approx(values.var(ddof=1) / 3)
    assert with_seeds(values[None, :1, None], np.zeros((1, 1), dtype=int)) == 0.3


def test_curves_are_paired_by_example():
    # Removing changes nothing: however noisy the accuracy, the difference is exactly 0.
    outcomes = np.random.default_rng(1).integers(0, 2, 40).tolist()
    curve = one_curve([whole("a", 0, outcomes), rows("a", 0, outcomes, removed=9)])
    draws = curve.average.resampled
    assert (draws[:, 0] == draws[:, 1]).all()
    assert draws[:, 0].std() > 0.03
    assert curve.removable(0.0) == (9, 9, 9)


def test_the_standard_error_is_that_of_the_texts():
    # Four examples a text, all right or all wrong: forty examples are worth ten.
    outcomes = [float(i % 8 < 4) for i in range(40)]
    curve = one_curve(
        [whole("a", 0, outcomes, size=4), rows("a", 0, outcomes, removed=1, size=4)], total=2
    )
    frame = curve.frame()
    assert frame.fraction.tolist() == [0, 0.5]
    expected = mean_and_stderr(outcomes, clusters=[doc // 4 for doc in range(40)]).stderr
    assert float(frame.stderr[0]) == pytest.approx(expected, rel=0.05)


def test_removable_is_that_of_every_row():
    curve = one_curve(
        [whole("a", 0, [1] * 9), *(rows("a", 0, [1] * 9, removed=n) for n in (2, 3, 7))]
    )
    values = np.random.default_rng(0).normal(0, 0.03, (200, 4))
    values[:20] = np.round(values[:20], 2)  # falls of exactly the tolerance
    expected = [removable([0, 2, 3, 7], row.tolist(), tolerance=0.02) for row in values]
    assert curve._safe(values, 0.02).tolist() == expected
    assert set(expected) == {0, 2, 3, 7}


def test_removable_has_an_interval_when_the_fall_is_uncertain():
    curve = one_curve(
        [
            whole("a", 0, [1] * 50),
            rows("a", 0, [1] * 49 + [0], removed=1),  # 2 points, give or take
            rows("a", 0, [0] * 50, removed=2),
        ]
    )
    assert curve.removable(0.02) == (1, 0, 1)


def test_nothing_is_claimed_from_few_texts_or_without_spread():
    few = one_curve([whole("a", 0, [1, 0, 1, 0]), rows("a", 0, [0, 0, 1, 0], removed=1)])
    count = few.removable(0.02)
    assert count.best == 0
    assert np.isnan([count.low, count.high]).all()
    assert np.isnan(few.frame()[["stderr", "low", "high"]].to_numpy()).all()
    # Eight examples of four texts are still four; and five of five right say nothing of a spread.
    texts = one_curve([whole("a", 0, [1, 0] * 4, size=2), rows("a", 0, [1] * 8, removed=1, size=2)])
    assert not len(texts.average.resampled)
    sure = one_curve([whole("a", 0, [1] * 5), rows("a", 0, [1, 1, 0, 0, 1], removed=1)]).frame()
    assert np.isnan(sure.low[0])
    assert sure.low[1] < 0.6 < sure.high[1]


def test_a_random_order_more_than_there_are_seeds_starts_at_the_whole_model():
    right, wrong = [1.0] * 6, [0.0] * 6
    answers = [whole("a", 0, right, 0), whole("a", 0, [1, 1, 1, 1, 1, 0], 1)]
    answers += [rows("a", 0, right, ranking="random", removed=4, seed=s) for s in (0, 1)]
    answers += [rows("a", 0, wrong, ranking="random", removed=4, seed=2)]
    answers += [rows("a", 0, right, removed=4, seed=0)]
    cells = cells_of(pd.concat(answers), np.random.default_rng(0))
    curve = curve_of(cells, "heads", "random", 8)
    assert curve is not None
    assert curve.average.by_seed[:, 0] == pytest.approx([1, 5 / 6, 11 / 12])
    assert curve.average.value[1] == pytest.approx(2 / 3)
    # A ranking that only one seed has is averaged over that seed, from its own start.
    one = curve_of(cells, "heads", "importance", 8)
    assert one is not None
    assert one.average.value.tolist() == [1, 1]


def test_a_ranking_that_some_conditions_lack_is_averaged_over_the_others():
    generator = np.random.default_rng(0)
    parts = []
    for task in ("a", "b"):
        parts.append(whole(task, 0, [1] * 8))
        parts.append(rows(task, 0, generator.integers(0, 2, 8).tolist(), removed=4))
    parts.append(rows("b", 0, [1, 1, 1, 1, 1, 1, 1, 0], ranking="others", removed=4))
    cells = cells_of(pd.concat(parts), np.random.default_rng(0))
    others = curve_of(cells, "heads", "others", 8)
    assert others is not None
    assert others.average.conditions == (("b", 0),)
    assert curve_of(cells, "heads", "others", 8, [("a", 0)]) is None
    table = contrasts(cells, "heads", 8, against="importance").set_index("ranking")
    own = curve_of(cells, "heads", "importance", 8, [("b", 0)])
    assert own is not None
    expected = others.average.value[1] - own.average.value[1]
    assert table.loc["others", "value"] == pytest.approx(expected)


def test_components_removed_alone_are_in_no_curve():
    parts = [whole("a", 0, [1] * 6), rows("a", 0, [1] * 6, removed=2)]
    parts.append(rows("a", 0, [0] * 6, unit=ALONE, ranking=ALONE, removed=1))
    assert one_curve(parts).removed == [0, 2]


def test_a_contrast_is_the_mean_over_the_steps_of_paired_differences():
    cells = cells_of(noisy(texts=30), np.random.default_rng(1))
    one, other = curves(cells, {"heads": 10})
    found = contrast(one, other)
    expected = (one.average.value - other.average.value)[1:].mean()
    assert found.value == pytest.approx(expected)
    draws = (one.average.resampled - other.average.resampled)[:, 1:].mean(axis=1)
    seeds = len(one.average.seeds)
    assert seeds > 1
    ends = stats.t.interval(0.95, seeds - 1, expected, draws.std(ddof=1))
    assert (found.low, found.high) == pytest.approx(ends)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(expected) / draws.std(ddof=1), seeds - 1))
    assert contrast(one, other, (0.4, 0.6)).value == pytest.approx(
        (one.average.value - other.average.value)[2]
    )
    assert np.isnan(contrast(one, other, (0.9, 1.0))).all()


def test_a_contrast_of_one_seed_is_a_paired_test():
    generator = np.random.default_rng(2)
    before = generator.binomial(1, 0.8, 200).astype(float)
    after = np.where(generator.random(200) < 0.15, 0.0, before)
    parts = [whole("a", 0, before.tolist())]
    parts += [rows("a", 0, before.tolist(), removed=3)]
    parts += [rows("a", 0, after.tolist(), ranking="random", removed=3)]
    cells = cells_of(pd.concat(parts), generator)
    one, other = curves(cells, {"heads": 10})
    found = contrast(one, other)
    low, high = stats.norm.interval(0.95, (before - after).mean(), stats.sem(before - after))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    assert found.p == pytest.approx(2 / 2001)
    same = contrast(one, one)
    assert (same.value, same.p) == (0.0, 1.0)
    assert np.isnan([same.stderr, same.low, same.high]).all()


def test_p_of_replicates_by_eye():
    assert p_of(np.array([-1.0, 2, 3, 4])) == pytest.approx(2 * 2 / 5)
    assert p_of(np.array([-1.0, 2, 3, np.nan])) == 1.0
    assert p_of(np.zeros(10)) == 1.0
    assert np.isnan(p_of(np.full(10, 0.2)))  # without a spread nothing is known
    assert np.isnan(p_of(np.empty(0)))
    assert np.isnan(spread(np.full(10, 0.2))).all()


def test_holm_leaves_out_what_was_not_tested():
    found = holm_of(np.array([0.01, np.nan, 0.04]))
    assert found[[0, 2]] == pytest.approx(holm([0.01, 0.04]))
    assert np.isnan(found[1])
    assert np.isnan(holm_of(np.array([np.nan]))).all()


def test_contrasts_with_random_are_holms_over_the_rankings():
    answers = noisy(texts=12)
    again = answers.loc[answers.ranking == "importance"].assign(ranking="weights")
    cells = cells_of(pd.concat([answers, again]), np.random.default_rng(0))
    table = contrasts(cells, "heads", 10)
    assert table.ranking.tolist() == ["importance", "weights"]
    assert table.p_holm.to_numpy() == pytest.approx(holm(table.p))
    assert table.value[0] == table.value[1]
    alone = cells_of(answers.loc[answers.ranking != "random"], np.random.default_rng(0))
    assert contrasts(alone, "heads", 10).empty


def test_rankings_are_listed_as_in_all_tables():
    names = ["zeta.csv", "random", "weights", "alpha.csv", "importance"]
    parts = [whole("a", 0, [1] * 6)]
    parts += [rows("a", 0, [1] * 6, ranking=name, removed=1) for name in names]
    cells = cells_of(pd.concat(parts), np.random.default_rng(0))
    found = rankings_of(cells, "heads")
    assert found == ["importance", "weights", "alpha.csv", "zeta.csv", "random"]


@pytest.mark.parametrize("edges", ["own", "grid"])
def test_the_grid_is_the_change_against_the_whole_model(edges: str):
    generator = np.random.default_rng(3)
    parts, change = [], {}
    outcomes: dict[tuple[str, int, int], np.ndarray] = {}
    for task in ("a", "b"):
        for h, f in itertools.product((0, 2, 4), (0, 1)):
            outcomes[task, h, f] = generator.binomial(1, 0.9 - 0.1 * h - 0.2 * f, 20).astype(float)
            scores = outcomes[task, h, f].tolist()
            if (h, f) == (0, 0):
                parts.append(whole(task, 0, scores))
            elif edges == "own" and f == 0:
                parts.append(rows(task, 0, scores, removed=h))
            elif edges == "own" and h == 0:
                parts.append(rows(task, 0, scores, unit="ffns", removed=f))
            else:
                parts.append(rows(task, 0, scores, unit=GRID, removed=h, ffns=f))
    for h, f in itertools.product((0, 2, 4), (0, 1)):
        change[h, f] = np.mean(
            [outcomes[t, h, f].mean() - outcomes[t, 0, 0].mean() for t in ("a", "b")]
        )
    cells = cells_of(pd.concat(parts), np.random.default_rng(0))
    frame = grid(cells, heads=8, ffns=4).set_index(["removed", "ffns"])
    assert len(frame) == 6
    for place, value in change.items():
        assert frame.loc[place, "value"] == pytest.approx(value)
    row = frame.loc[(4, 1)]
    assert (row.fraction, row.ffns_fraction) == (0.5, 0.25)
    assert row.low < row.value < row.high
    errors = [stats.sem(outcomes[t, 4, 1] - outcomes[t, 0, 0]) for t in ("a", "b")]
    assert row.stderr == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 2, rel=0.06)
    assert np.isnan(frame.loc[(0, 0), "low"])
    assert grid(cells, 8, 4, [("a", 0)]).set_index(["removed", "ffns"]).loc[
        (2, 1), "value"
    ] == pytest.approx(outcomes["a", 2, 1].mean() - outcomes["a", 0, 0].mean())
