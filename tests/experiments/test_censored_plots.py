"""Pictures of censored numbers: hatched where only a bound is known, and never a false end."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from experiments import censored_plots as plots
from experiments.plots import panels

CELLS = pd.DataFrame(
    [
        {"level": level, "place": place, "value": value, "bound": bound}
        for place, level, value, bound in [
            ("L0", "0.1", 0.02, 0.02),
            ("L0", "0.05", np.inf, 0.08),
            ("L1", "0.1", 0.001, 0.001),
        ]
    ]
)


def drawn(ax: Any) -> Any:
    ax.figure.canvas.draw()
    return ax


def test_map_hatches_what_is_censored_and_says_its_bound():
    ax = drawn(plots.censored_map(CELLS, x="level", y="place", text=lambda v: f"{100 * v:g} %"))
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 0): "2 %", (1, 0): ">8 %", (0, 1): "0.1 %"}
    (hatched,) = ax.patches
    assert hatched.get_xy() == (0.5, -0.5)
    assert hatched.get_hatch()
    shown = ax.images[0].get_array()
    assert shown.mask.tolist() == [[False, True], [False, True]]
    assert shown[0, 0] == 0.02
    assert ax.images[0].get_clim() == (0.001, 0.02)


def test_map_of_nothing_recovered_and_of_zero():
    ax = drawn(
        plots.censored_map(CELLS.assign(value=np.inf), x="level", y="place", label="share of T0")
    )
    assert len(ax.patches) == 3
    ax = drawn(plots.censored_map(CELLS.assign(value=0.0), x="level", y="place", label="share"))
    assert [text.get_text() for text in ax.texts] == ["0", "0", "0"]


def test_map_refuses_two_rows_for_one_cell():
    with pytest.raises(ValueError, match="several rows for one place and level"):
        plots.censored_map(pd.concat([CELLS, CELLS]), x="level", y="place")


def test_steps_hold_until_the_next_one():
    frame = pd.DataFrame(
        {"at": [4.0, 0.0, 1.0], "survival": [0.2, 1.0, 0.6], "group": "a", "low": 0, "high": 1}
    )
    ax = drawn(plots.survival_steps(frame, x="at", group="group"))
    (line,) = ax.lines
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xdata().tolist() == [0.5, 1.0, 4.0]  # 0 has no place on a logarithmic axis
    assert line.get_ydata().tolist() == [1.0, 0.6, 0.2]
    assert len(ax.collections) == 1


def test_ranges_point_on_where_there_is_no_end():
    frame = pd.DataFrame(
        {
            "name": ["a", "b"],
            "value": [0.01, np.inf],
            "low": [0.005, 0.02],
            "high": [np.inf, np.inf],
            "bound": [0.01, 0.08],
            "note": ["", "2/2 never"],
        }
    )
    ax = drawn(plots.ranges(frame, bound="bound", notes="note", log=True))
    dots, triangles = ax.lines
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist()) == ([0.01], [0])
    assert (triangles.get_xdata().tolist(), triangles.get_ydata().tolist()) == ([0.08], [1])
    assert triangles.get_marker() == ">"
    (bars,) = ax.collections
    (segment,) = bars.get_segments()
    assert segment[0][0] == 0.005
    assert segment[1][0] > ax.get_xlim()[1]  # runs out of the picture: its end is not a number
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert "2/2 never" in {text.get_text() for text in ax.texts}


def test_depth_is_seen_without_colours():
    def lightness(colour: str) -> float:
        red, green, blue = to_rgb(colour)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    for count in (2, 6, 24):
        shades = [lightness(colour) for colour in plots.depth_colours(count)]
        assert shades == sorted(shades, reverse=True)
        assert len(set(shades)) == count
    assert len(plots.depth_colours(1)) == 1


def test_one_key_for_all_panels_with_each_name_once():
    figure, axes = panels(1, 2)
    plots.key_below(figure, list(axes.flat))  # nothing to name
    assert not figure.legends
    for ax in axes.flat:
        ax.plot([1, 2], label="L0")
    axes.flat[1].plot([2, 1], label="L1")
    plots.key_below(figure, list(axes.flat))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["L0", "L1"]
