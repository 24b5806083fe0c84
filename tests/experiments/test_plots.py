"""Figures show what the frame says, and leave the user's matplotlib alone."""

import sys
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from experiments import plots

SCORES = pd.DataFrame(
    [
        {"layer": layer, "head": head, "value": layer + head / 10}
        for layer in (0, 1)
        for head in (0, 1, 2)
    ]
)
CURVES = pd.DataFrame(
    [
        {
            "ranking": name,
            "fraction": x,
            "value": 1 - x * k,
            "low": 0.9 - x * k,
            "high": 1.1 - x * k,
        }
        for name, k in (("random", 0.9), ("importance", 0.5), ("weird", 0.7))
        for x in (0.5, 0.0, 0.25)
    ]
)


def drawn(axes: Any) -> Figure:
    """The figure, rendered: every artist has been laid out."""
    figure = axes.figure
    figure.canvas.draw()
    return figure


def test_heatmap_has_one_cell_a_head_with_layer_0_on_top():
    axes: Any = plots.head_heatmap(SCORES.sample(frac=1, random_state=0), title="t", label="l")
    drawn(axes)
    image = axes.images[0]
    assert np.array_equal(image.get_array(), [[0, 0.1, 0.2], [1, 1.1, 1.2]])
    assert axes.yaxis.get_inverted()
    assert image.get_clim() == (0, 1.2)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[(2, 1)] == "1.2"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_heatmap_hatches_heads_that_are_not_there_and_centres_signs():
    scores = SCORES[(SCORES.layer != 1) | (SCORES["head"] != 2)].assign(value=lambda f: f.value - 1)
    axes: Any = plots.head_heatmap(scores, signed=True)
    drawn(axes)
    assert axes.images[0].get_clim() == (-1, 1)
    assert axes.images[0].get_array().mask.sum() == 1
    (patch,) = axes.patches
    assert patch.get_xy() == (1.5, 0.5)
    assert "−1.0" in {text.get_text() for text in axes.texts}
    tiny: Any = plots.head_heatmap(SCORES.assign(value=-0.001), limits=(-1, 1), digits=1)
    assert {text.get_text() for text in tiny.texts} == {"0.0"}


def test_heatmap_keeps_limits_given_and_numbers_off_many_heads():
    many = pd.DataFrame(
        [{"layer": i, "head": j, "value": 0.5} for i in range(24) for j in range(32)]
    )
    axes: Any = plots.head_heatmap(many, limits=(0, 1))
    drawn(axes)
    assert axes.images[0].get_clim() == (0, 1)
    assert not axes.texts


def test_heatmap_of_zeros_is_not_an_error():
    drawn(plots.head_heatmap(SCORES.assign(value=0.0)))
    drawn(plots.head_heatmap(SCORES.assign(value=0.0), signed=True))


def test_heatmap_refuses_two_scores_for_one_head():
    with pytest.raises(ValueError, match="several rows for one head"):
        plots.head_heatmap(pd.concat([SCORES, SCORES]))


def test_accuracy_curves_draw_each_ranking_in_its_colour_with_its_band():
    axes: Any = plots.accuracy_curves(CURVES, baseline=1.0, chance=0.25)
    drawn(axes)
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"random", "importance", "weird", "whole model", "chance"}
    assert np.array_equal(lines["importance"].get_xdata(), [0, 0.25, 0.5])
    assert np.array_equal(lines["importance"].get_ydata(), [1, 0.875, 0.75])
    assert to_hex(lines["importance"].get_color()) == plots.BLUE
    assert to_hex(lines["random"].get_color()) == plots.GREY
    assert to_hex(lines["weird"].get_color()) not in (plots.BLUE, plots.GREY, plots.ORANGE)
    assert len(axes.collections) == 3
    low = axes.collections[1].get_paths()[0].vertices[:, 1].min()
    assert low == pytest.approx(0.9 - 0.25)
    assert axes.get_legend() is not None
    assert axes.xaxis.get_major_formatter()(0.2) == "20%"


def test_accuracy_curves_without_intervals_have_no_band():
    axes: Any = plots.accuracy_curves(CURVES.drop(columns=["low", "high"]), legend=False)
    assert not axes.collections
    assert axes.get_legend() is None


def test_curve_of_losses():
    frame = pd.DataFrame({"tokens": [100, 10], "value": [2.0, 3.0]})
    axes: Any = plots.curve(frame, x="tokens", log_x=True, ylabel="nat")
    drawn(axes)
    assert axes.lines[0].get_xdata().tolist() == [10, 100]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "tokens", "nat")
    assert axes.get_legend() is None


def test_axes_given_are_the_axes_drawn_on():
    figure, grid = plots.panels(1, 2, share_y=True)
    assert plots.head_heatmap(SCORES, ax=grid[0, 0]) is grid[0, 0]
    assert plots.accuracy_curves(CURVES, ax=grid[0, 1]).figure is figure


def test_the_users_settings_and_pyplot_are_left_alone():
    before = dict(mpl.rcParams)
    plots.head_heatmap(SCORES)
    plots.accuracy_curves(CURVES)
    assert dict(mpl.rcParams) == before
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_frames_are_not_written_to():
    copies = SCORES.copy(), CURVES.copy()
    plots.head_heatmap(SCORES)
    plots.accuracy_curves(CURVES)
    pd.testing.assert_frame_equal(SCORES, copies[0])
    pd.testing.assert_frame_equal(CURVES, copies[1])


@pytest.mark.parametrize(("extent", "digits"), [(0.53, 2), (0.041, 3), (12.0, 0), (1.2, 1), (0, 0)])
def test_cells_show_two_figures_of_the_largest(extent: float, digits: int):
    assert plots._digits(0, extent) == digits
