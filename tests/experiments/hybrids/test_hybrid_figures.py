"""Every figure shows what its frame says: lines, bands, cells, strips, and no more."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from experiments.hybrids.architecture.grammar import THE_TWELVE
from experiments.hybrids.report.figures import error_curves, figures, shifted_curves
from experiments.hybrids.report.inside_figures import attention, importance, probed
from experiments.hybrids.report.line_styles import line_colours, short
from experiments.hybrids.report.published import beside_published
from experiments.hybrids.report.table_figures import beside, score_table
from experiments.hybrids.report.training_figures import scheme_colours, schemes, training
from tests.experiments.hybrids.invented_frames import findings, frames


@pytest.fixture(scope="module")
def made() -> dict[str, pd.DataFrame]:
    return frames(("gpt2", "llama", "mambaformer"))


def test_a_study_has_the_figures_that_its_frames_have_data_for(made) -> None:
    found = figures(findings(made))
    names = ["errors", "shifts", "scores", "published", "training", "schemes", "importance"]
    assert list(found) == [*names, "attention", "probes"]
    less = frames(("mambaformer",), ("mqar",), seeds=1, shifts=("none",))
    for name in ("ablations", "labels", "attention", "probes"):
        less[name] = pd.DataFrame()
    assert list(figures(findings(less))) == ["errors", "scores", "training"]
    for make in figures(findings(less)).values():
        make().canvas.draw()


def test_the_whole_table_can_be_drawn() -> None:
    many = frames(tuple(THE_TWELVE), ("linear", "tree"), seeds=2)
    for make in figures(findings(many)).values():
        make().canvas.draw()


def test_error_curves_are_means_over_seeds_with_bands_from_seed_to_seed(made) -> None:
    ax = error_curves(made["errors"], {"linear": "ridge"}).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"zero", "least-squares = bayes", "ridge", "gpt2", "llama", "mambaformer"}
    rows = made["errors"].query("architecture == 'llama' and shift == 'none'")
    means = rows.groupby("examples")["value"].mean()
    assert np.allclose(lines["llama"].get_ydata(), means)
    assert np.allclose(lines["llama"].get_xdata(), range(12))
    assert len(ax.collections) == 3
    colours = line_colours(("gpt2", "llama", "mambaformer"))
    assert {name: lines[name].get_color() for name in colours} == colours
    band = ax.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(rows["value"].max())
    assert ax.get_yscale() == "log"


def test_one_seed_has_a_line_and_no_band() -> None:
    own = frames(("gpt2",), seeds=1)
    assert not error_curves(own["errors"], {}).axes[0].collections
    assert not training(own["curve"]).axes[0].collections


def test_shifts_are_panels_with_their_names(made) -> None:
    figure = shifted_curves(made["errors"], {"linear": "least-squares"})
    assert [ax.get_title("left") or ax.get_title() for ax in figure.axes] == ["linear, noisy"]


def test_the_score_table_has_numbers_intervals_and_failures(made) -> None:
    own = findings(made)
    ax = score_table(own.table, own.failures).axes[0]
    said = [text.get_text() for text in ax.texts]
    row = own.table.set_index("architecture").loc["gpt2"]
    assert f"{row['value']:.3f}" in said
    assert f"±{(row['high'] - row['low']) / 2:.3f}" in said
    assert sum("1 of 2 failed" in text for text in said) == 1
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["linear\n/ least-squares"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["gpt2", "llama", "mambaformer"]


def test_a_score_without_an_interval_says_none() -> None:
    own = findings(frames(("gpt2",), seeds=1))
    texts = [text.get_text() for text in score_table(own.table, own.failures).axes[0].texts]
    assert not any("±" in text for text in texts)


def test_the_papers_numbers_stand_beside_ours(made) -> None:
    table = beside_published(findings(made).table)
    left, right = beside(table).axes
    theirs = [text.get_text() for text in right.texts]
    assert theirs == ["0.996", "0.997", "–"]  # mambaformer is not in the paper's table
    assert sum("[" in text.get_text() for text in left.texts) == 3


def test_training_curves_are_shares_of_zero(made) -> None:
    ax = training(made["curve"]).axes[0]
    line = next(line for line in ax.lines if line.get_label() == "gpt2")
    rows = made["curve"].query("architecture == 'gpt2'").groupby("step")["share"].mean()
    assert np.allclose(line.get_ydata(), rows)


def test_strips_have_a_block_a_checkpoint_in_the_colour_of_its_label(made) -> None:
    labels = made["labels"]
    figure = schemes(labels)
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()][:2] == ["gpt2 · 0", "gpt2 · 1"]
    own = labels.query("architecture == 'gpt2' and seed == 0 and shift == 'none'")
    colours = scheme_colours(labels)
    blocks = ax.patches[: len(own)]
    assert [to_hex(b.get_facecolor()) for b in blocks] == [colours[name] for name in own["label"]]
    assert [b.get_x() for b in blocks] == pytest.approx(np.log10(1 + own["step"]).tolist())
    assert blocks[0].get_alpha() == pytest.approx(0.6)


def test_zero_and_none_have_no_colour_of_a_scheme() -> None:
    colours = scheme_colours(
        pd.DataFrame({"label": ["none", "zero = averaging", "ridge", "lasso"]})
    )
    assert len(set(colours.values())) == 4
    assert colours["none"] == "#ffffff"


def test_the_map_has_heads_ffns_and_mixers_in_their_layers(made) -> None:
    figure = importance(made["ablations"])
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["H0", "H1", "H2", "H3", "FFN", "SSM"]
    shown = np.ma.filled(ax.images[0].get_array(), math.nan)
    rows = made["ablations"].query("architecture == 'gpt2' and seed == 0").set_index("component")
    assert shown[1, 2] == pytest.approx(rows.loc["L1H2", "value"])
    assert shown[0, 4] == pytest.approx(rows.loc["L0F", "value"])
    assert shown[1, 5] == pytest.approx(rows.loc["L1M", "value"])
    assert math.isnan(shown[0, 5])


def test_colours_are_apart_and_names_fit() -> None:
    assert len(set(line_colours(THE_TWELVE).values())) == 12
    assert len(set(line_colours(("a", "b")).values())) == 2
    long = "mamba-rms,attention-mamba_ffn-rms*4,rope-attention-swiglu-rms"
    assert len(short(long)) <= 30
    assert short("gpt2-rms-swiglu") == "gpt2-rms-swiglu"


def test_where_parts_look_is_the_first_seed_s_with_the_even_part_last(made) -> None:
    figure = attention(made["attention"])
    ax = figure.axes[0]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == [*(f"L{n}H{h}" for n in range(2) for h in range(4)), "L1M", "even"]
    shown = ax.images[0].get_array()
    assert shown is not None
    assert [label.get_text() for label in ax.get_xticklabels()] == ["label", "match"]
    assert shown[rows.index("L1H2")].tolist() == [0.5, 0.25]  # as drawn; not of the second seed
    assert sum(ax.get_visible() for ax in figure.axes) == 3


def test_probes_have_a_control_and_the_best_there_is(made) -> None:
    ax = probed(made["probes"]).axes[0]
    solid = next(line for line in ax.lines if line.get_label() == "llama")
    assert solid.get_ydata() == pytest.approx([0.025, 0.425, 0.825])
    dashed = [line for line in ax.lines if str(line.get_label()).startswith("_")]
    assert len(dashed) == 3
    assert all(line.get_ydata() == pytest.approx([0.025] * 3) for line in dashed)
    level = next(line for line in ax.lines if line.get_label() == "least squares")
    assert level.get_ydata() == pytest.approx([0.95, 0.95])
