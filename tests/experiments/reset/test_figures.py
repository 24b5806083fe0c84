"""Every figure shows what its frame says: the numbers are read back from the Axes."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.reset.report.data_figures import predictors, speed, unique_data
from experiments.reset.report.figures import DEFAULT, figures
from experiments.reset.report.grid_figures import base_length, depth, exponents
from experiments.reset.report.recovery_figures import by_family, by_target, recovery
from experiments.reset.report.threshold_figures import arms, named_arms, shares, survival
from experiments.reset.result import Result, lead, main, most_varied
from experiments.reset.statistics.crossing import crossings
from experiments.reset.statistics.summaries import medians
from experiments.reset.statistics.survival import survival_steps
from tests.experiments.reset import planted
from tests.experiments.reset.planted import T0, diverged, gap_of, ledger, result, student


def drawn(figure: Any) -> list[Any]:
    """The panels that are seen, laid out."""
    figure.canvas.draw()
    return [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return ledger(range(3))


@pytest.fixture(scope="module")
def marked(rows: pd.DataFrame) -> pd.DataFrame:
    return crossings(rows)


def test_recovery_draws_each_layers_mean_over_seeds(rows: pd.DataFrame):
    left, right = drawn(recovery(rows))
    assert (left.get_title("left"), right.get_title("left")) == ("LM loss", "local regression")
    for ax, target in ((left, "lm"), (right, "hidden")):
        found = lines(ax)
        assert list(found) == ["L0", "L1", "L2", "from scratch"]
        for layer in range(3):
            line = found[f"L{layer}"]
            tokens = np.asarray(line.get_xdata()) * T0
            expected = [np.mean([gap_of(t, layer, target, s) for s in (0, 1, 2)]) for t in tokens]
            assert np.allclose(line.get_ydata(), expected, rtol=1e-6)
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        names = ax.get_legend_handles_labels()[1]
        assert "no reset" in names
        assert {text.get_text() for text in ax.texts} == {"0.1", "0.05", "0.02", "0.01"}
    assert "share" in left.get_xlabel()
    scratch = lines(left)["from scratch"]
    tokens = np.asarray(scratch.get_xdata()) * T0
    assert np.allclose(scratch.get_ydata(), 4.5 * (1 + tokens / 2e4) ** -0.5)


def test_recovery_band_runs_from_the_smallest_to_the_largest_seed(rows: pd.DataFrame):
    left, _ = drawn(recovery(rows.loc[rows["arm"] == "A0"]))
    assert len(left.collections) == 3  # a band a layer, no no-op
    corners = left.collections[0].get_paths()[0].vertices
    at = np.isclose(corners[:, 0] * T0, 4000)
    ends = [gap_of(4000, 0, "lm", seed) for seed in (0, 2)]
    assert (corners[at, 1].min(), corners[at, 1].max()) == pytest.approx((min(ends), max(ends)))


def test_one_seed_has_no_band_and_one_layer_is_a_picture():
    one = ledger([0], seeds=(0,), targets=("lm",))
    (ax,) = drawn(recovery(one.loc[one["arm"] == "A0"]))
    assert not ax.collections
    assert list(lines(ax)) == ["L0"]
    drawn(shares(crossings(one)))
    drawn(arms(one, crossings(one)))


def test_unknown_length_is_tokens():
    unknown = ledger(range(2), base_tokens=np.nan)
    left, _ = drawn(recovery(unknown))
    assert left.get_xlabel() == "tokens"
    assert np.asarray(lines(left)["L0"].get_xdata()).max() == pytest.approx(0.08 * T0)
    panels = drawn(shares(crossings(unknown)))
    assert any(text.get_text() == ">640 k" for text in panels[0].texts)


def test_a_student_that_diverged_is_a_line_of_its_own(rows: pd.DataFrame):
    lost = diverged(2)
    left, _ = drawn(recovery(pd.concat([rows, lost], ignore_index=True)))
    (cross,) = [line for line in left.lines if line.get_marker() == "x"]
    last = lost.iloc[-1]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (last["tokens"] / T0, last["gap"])
    without, _ = drawn(recovery(rows))
    assert np.array_equal(lines(left)["L2"].get_ydata(), lines(without)["L2"].get_ydata())


def test_averaged_weights_are_read_where_there_are_any(rows: pd.DataFrame):
    better = rows.assign(weights="averaged", gap=rows["gap"] / 2)
    left, _ = drawn(recovery(pd.concat([rows, better], ignore_index=True)))
    line = lines(left)["L1"]
    plain = np.mean([gap_of(line.get_xdata()[0] * T0, 1, "lm", s) for s in (0, 1, 2)])
    assert line.get_ydata()[0] == pytest.approx(plain / 2)


def test_shares_are_medians_and_censored_cells_are_hatched(marked: pd.DataFrame):
    panels = drawn(shares(marked))
    assert len(panels) == 4
    own = main(marked)
    for number, (target, kind) in enumerate(
        [(t, k) for t in ("lm", "hidden") for k in ("absolute", "relative")]
    ):
        ax = panels[number]
        part = own.loc[(own["target"] == target) & (own["kind"] == kind)]
        levels = sorted(set(part["threshold"]), reverse=kind == "absolute")
        shown = ax.images[0].get_array()
        hatched = {(p.get_x() + 0.5, p.get_y() + 0.5) for p in ax.patches}
        for row in medians(part, ["layer", "threshold"], "share").to_dict("records"):
            cell = levels.index(row["threshold"]), row["layer"]
            assert (cell in hatched) == np.isinf(row["value"])
            if np.isfinite(row["value"]) and row["value"] > 0:
                low = ax.images[0].get_clim()[0]
                assert shown[cell[1], cell[0]] == pytest.approx(max(row["value"], low))
        assert hatched
        assert any(text.get_text() == ">8 %" for text in ax.texts)


def test_what_one_base_was_asked_is_shown_of_that_base():
    small = planted.arms(layers=(0, 1), seeds=(0,))
    large = ledger(range(2)).assign(base="large", n_layers=12)
    rows = pd.concat([small, large], ignore_index=True)
    assert set(lead(rows)["base"]) == {"large"}
    assert set(most_varied(rows, "arm")["base"]) == set(small["base"])
    reached, *_ = drawn(arms(rows, crossings(rows)))
    assert "A10 law rewind" in [label.get_text() for label in reached.get_yticklabels()]


def test_arms_show_medians_censored_students_and_gaps_at_the_budget():
    rows = planted.arms(layers=(0, 1), seeds=(0, 1))
    reached, gaps = drawn(arms(rows, crossings(rows)))
    names = [label.get_text() for label in reached.get_yticklabels()]
    assert names[:3] == [
        "A0 reset, LM loss",
        "A0 reset, local regression",
        "A0 reset, KL to the old logits",
    ]
    assert "A9 only ffn" in names
    assert "A10 law rewind" in names
    assert "A12 layers 2 (L2)" in names
    assert not [name for name in names if name.startswith(("A1 ", "A2", "A4", "A5", "A6"))]
    dots = reached.lines[0]
    own = crossings(rows)
    own = own.loc[
        (own["arm"] == "A0") & (own["target"] == "lm") & (own["kind"] == "absolute")
        & (own["threshold"] == 0.05)
    ]  # fmt: skip
    median = medians(own, ["arm"], "share")["value"].iloc[0]
    assert dots.get_xdata()[list(dots.get_ydata()).index(0)] == pytest.approx(median)
    assert "2/4 never" in {text.get_text() for text in reached.texts}
    gap_names = [label.get_text() for label in gaps.get_yticklabels()]
    assert [name[:2] for name in gap_names] == ["A1", "A2", "A4", "A5", "A6", "A7"]
    place = gap_names.index("A6 reset, train nothing")
    ends = [1.6, 1.6 / 2**1.6]
    shown = dict(zip(gaps.lines[0].get_ydata(), gaps.lines[0].get_xdata(), strict=True))
    assert shown[place] == pytest.approx(np.median(ends))


def test_by_target_marks_where_local_regression_overtakes(rows: pd.DataFrame):
    panels = drawn(by_target(rows))
    assert [ax.get_title("left") for ax in panels] == ["L0", "L1", "L2"]
    for layer, ax in enumerate(panels):
        assert {"LM loss", "local regression"} <= set(lines(ax))
        (mark,) = [
            line for line in ax.lines
            if len(set(line.get_xdata())) == 1 and list(line.get_ydata()) == [0, 1]
        ]  # fmt: skip
        tokens = mark.get_xdata()[0] * T0
        gaps = [
            np.mean([gap_of(tokens, layer, target, s) for s in (0, 1, 2)])
            for target in ("lm", "hidden")
        ]
        assert gaps[0] == pytest.approx(gaps[1], rel=0.01)


def test_families_side_by_side_and_the_aside():
    made = [ledger(range(2)), ledger(range(2), base="bert", family="encoder")]
    for stack in ("encoder", "decoder"):
        made += [student(n, stack=stack, base="t5", family="encoder-decoder") for n in range(2)]
    for name, end in (("all wiped", 0.8), ("bridge", 0.4)):
        own = student(
            0, arm="A13", stack="decoder", variant=name, base="t5", family="encoder-decoder",
            gap=lambda t, e=end: 2 * (1 + t / 3e4) ** -e,
        )  # fmt: skip
        made.append(own.assign(source_use=1 - own["gap"] / 2.2))
    panels = drawn(by_family(pd.concat(made, ignore_index=True)))
    assert [ax.get_title("left") for ax in panels] == [
        "decoder", "encoder", "encoder-decoder", "cross-attention: gap",
        "cross-attention: source-use",
    ]  # fmt: skip
    assert list(lines(panels[2])) == ["encoder L0", "encoder L1", "decoder L0", "decoder L1"]
    used = lines(panels[4])["bridge"]
    assert used.get_ydata()[-1] == pytest.approx(1 - 2 / 2.2 * (1 + 0.08 * T0 / 3e4) ** -0.4)


def test_depth_has_a_line_for_each_number_of_layers():
    made = []
    for layers in (2, 3):
        for layer in range(layers):
            own = student(layer + 1, n_layers=layers, base=f"n{layers}")
            made.append(own.assign(layer=layer))
    marked = crossings(pd.concat(made, ignore_index=True))
    (ax,) = drawn(depth(marked))
    found = lines(ax)
    assert list(found) == ["N = 2", "N = 3"]
    for name, layers in (("N = 2", 2), ("N = 3", 3)):
        begin, hurt = 0.0006, [1.6 / (2 + n) ** 1.6 * 0.94 for n in range(layers)]
        exact = [begin * ((h / 0.05) ** (1 / 0.6) - 1) for h in hurt]
        assert np.allclose(found[name].get_ydata(), exact, rtol=0.01)
        assert np.allclose(found[name].get_xdata(), np.linspace(0, 1, layers), atol=0.02)


def test_exponents_beside_the_band_of_equivalence():
    slopes = pd.DataFrame(
        [
            {"term": "N", "target": "lm", "value": 0.05, "low": -0.1, "high": 0.1},
            {"term": "D", "target": "lm", "value": 0.6, "low": 0.4, "high": 0.8},
        ]
    )
    (ax,) = drawn(exponents(slopes))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["N, LM loss", "D, LM loss"]
    (band,) = ax.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.15, 0.15))
    segments = ax.collections[0].get_segments()
    assert [s[:, 0].tolist() for s in segments] == [[-0.1, 0.1], [0.4, 0.8]]


def test_base_length_in_tokens_with_both_guides():
    made = [
        ledger([1, 2], base_share=s, base_tokens=s * T0, targets=("lm",)) for s in (0.25, 0.5, 1)
    ]
    (ax,) = drawn(base_length(crossings(pd.concat(made, ignore_index=True))))
    line = lines(ax)["L2"]
    assert line.get_xdata().tolist() == [0.25 * T0, 0.5 * T0, T0]
    # Planted: the same share of the base's tokens, whatever they are.
    share = np.asarray(line.get_ydata()) / np.asarray(line.get_xdata())
    assert np.allclose(share, share[0], rtol=1e-3)
    assert {text.get_text() for text in ax.texts} == {"β = 0", "β = 1"}


def test_unique_data_rings_the_smallest_gap():
    def worn(unique: float):
        return lambda t: 0.2 - t / T0 + 0.15 * (t / T0) ** 2 / unique

    made = [
        student(2, unique=unique, seed=seed, gap=worn(unique))
        for unique in (0.01, 0.1)
        for seed in (0, 1)
    ]
    rows = pd.concat(made, ignore_index=True)
    (ax,) = drawn(unique_data(rows))
    rings = next(line for line in ax.lines if line.get_marker() == "o")
    for x, u in zip(rings.get_xdata(), rings.get_ydata(), strict=True):
        own = rows.loc[(rows["unique"] == u) & (rows["tokens"] > 0)]
        assert x * T0 == pytest.approx(own.loc[own["gap"].idxmin(), "tokens"])


def test_survival_is_drawn_from_absolute_thresholds(marked: pd.DataFrame):
    frame = survival_steps(main(marked), unit="share")
    panels = drawn(survival(frame))
    assert len(panels) == 2
    found = lines(panels[0])
    assert list(found) == ["0.1 nat", "0.05 nat", "0.02 nat", "0.01 nat"]
    own = frame.loc[
        (frame["target"] == "lm") & (frame["kind"] == "absolute") & (frame["threshold"] == 0.05)
    ].sort_values("share")
    assert np.allclose(found["0.05 nat"].get_ydata(), own["survival"])


def test_predictors_have_open_triangles_where_nothing_recovered(marked: pd.DataFrame):
    values = pd.DataFrame(
        [
            {"stack": "", "layer": n, "predictor": "block_influence", "value": 0.1 * n}
            for n in range(3)
        ]
    )
    (ax,) = drawn(predictors(values, marked))
    assert ax.get_title("left") == "block influence"
    points = ax.collections[0].get_offsets()
    own = main(marked)
    own = own.loc[
        (own["target"] == "lm") & (own["kind"] == "absolute") & (own["threshold"] == 0.05)
    ]
    table = medians(own, ["layer"], "share").set_index("layer")
    assert np.allclose(points, [[0.1, table.loc[1, "value"]], [0.2, table.loc[2, "value"]]])
    (triangle,) = [line for line in ax.lines if line.get_marker() == "^"]
    assert (triangle.get_xdata()[0], triangle.get_ydata()[0]) == (0.0, table.loc[0, "bound"])
    assert {text.get_text() for text in ax.texts} == {"L0", "L1", "L2"}


def test_speed_beside_its_bound():
    frame = pd.DataFrame(
        {
            "layer": [1, 0],
            "n_layers": 2,
            "mode": "cached",
            "measured": [1.9, 1.4],
            "bound": [2.0, 1.5],
        }
    )
    (ax,) = drawn(speed(frame))
    bound, measured = ax.lines[:2]
    assert (bound.get_xdata().tolist(), bound.get_ydata().tolist()) == ([0, 0.5], [1.5, 2.0])
    assert measured.get_ydata().tolist() == [1.4, 1.9]


def test_figures_are_those_that_have_data(rows: pd.DataFrame):
    own = result(rows)
    assert tuple(figures(own, paper=False)) == DEFAULT
    assert tuple(figures(own)) == DEFAULT
    nothing = pd.DataFrame()
    assert not figures(Result("tiny", nothing, nothing))
    assert not figures(result(rows.iloc[:0]))
    alone = result(rows.loc[(rows["arm"] == "A0") & (rows["target"] == "lm")])
    assert set(figures(alone)) == {"recovery", "shares", "arms"}
    calm = result(rows.loc[rows["arm"] == "A1"])
    assert set(figures(calm)) == {"arms"}


def test_all_figures_of_a_paper_are_made():
    made = [
        ledger(
            range(2), base_share=share, base_tokens=share * T0, n_layers=layers, base=f"n{layers}"
        )
        for layers in (2, 3)
        for share in (0.5, 1)
    ]
    made += [ledger(range(2), base="bert", family="encoder", n_layers=2)]
    made += [
        student(1, unique=u, base="n3", n_layers=3, seed=s) for u in (0.01, 0.1) for s in (0, 1)
    ]
    rows = pd.concat(made, ignore_index=True)
    marked = crossings(rows)
    slopes = pd.DataFrame([{"term": "N", "target": "lm", "value": 0.1, "low": 0.0, "high": 0.2}])
    known = pd.DataFrame(
        [{"stack": "", "layer": n, "predictor": "cka", "value": n} for n in range(2)]
    )
    speeds = pd.DataFrame([{"layer": 0, "n_layers": 2, "mode": "a", "measured": 1.0, "bound": 1.1}])
    own = Result(
        "grid", rows, marked, slopes=slopes, predictors=known, speeds=speeds,
        survival=survival_steps(main(marked)),
    )  # fmt: skip
    made_figures = figures(own)
    assert set(made_figures) == {
        "recovery", "shares", "arms", "targets", "families", "depth", "exponents", "base_length",
        "unique", "survival", "predictors", "speed",
    }  # fmt: skip
    for make in made_figures.values():
        drawn(make())


def test_cycled_data_and_other_laws_are_not_the_question(rows: pd.DataFrame):
    others = [
        student(1, unique=0.01, gap=lambda t: 0.3),
        student(1, arm="A10", law="identity", gap=lambda t: 0.4),
        student(1, arm="A9", part="ffn", gap=lambda t: 0.5),
        student(1, origin="other", seed=7, gap=lambda t: 0.6),
        student(1, base_share=0.5, base_tokens=T0 / 2, gap=lambda t: 0.7),
    ]
    with_them, _ = drawn(recovery(pd.concat([rows, *others], ignore_index=True)))
    without, _ = drawn(recovery(rows))
    for name, line in lines(without).items():
        assert np.array_equal(lines(with_them)[name].get_ydata(), line.get_ydata())


def test_several_layers_are_named_where_the_ledger_names_them(rows: pd.DataFrame):
    pair = student(-1, arm="A12", layers="1 2", gap=lambda t: 0.5)
    both = pd.concat([rows, pair], ignore_index=True)
    _, gaps = drawn(arms(both, crossings(rows)))
    assert "A7 all from scratch" in {label.get_text() for label in gaps.get_yticklabels()}
    names = set(named_arms(both)["name"])
    assert "A12 layers 1+2" in names
    assert "A0 reset, LM loss" in names
