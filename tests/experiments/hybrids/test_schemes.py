"""A model made of schemes has its own label; between two, or far from all, it has none."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.hybrids.measuring import schemes
from experiments.hybrids.measuring.schemes import (
    adoptions,
    distances,
    labelled,
    scheme_rows,
    switches,
)

PROMPTS, POINTS = 200, 9


def drawn(seed: int, y_dim: int = 1) -> torch.Tensor:
    return torch.randn(PROMPTS, POINTS, y_dim, generator=torch.Generator().manual_seed(seed))


OLS, LASSO = drawn(0), 0.8 * drawn(0) + 0.6 * drawn(1)
"""Two schemes of equal size that agree in part: D(g, h) = 0.4."""
SCHEMES = {"zero": torch.zeros_like(OLS), "least squares": OLS, "lasso": LASSO}


def label_of(prediction: torch.Tensor, given=SCHEMES, **options) -> dict:
    found = distances(prediction[None], given)
    return labelled(found, [0], np.random.default_rng(0), **options).iloc[0].to_dict()


@pytest.mark.parametrize(
    ("prediction", "label", "why"),
    [
        (OLS, "least squares", ""),
        (LASSO, "lasso", ""),
        (torch.zeros_like(OLS), "zero", ""),
        (0.05 * drawn(5), "zero", ""),
        (OLS + 0.3 * drawn(2), "least squares", ""),
        (0.9 * OLS + 0.1 * LASSO, "least squares", ""),
        ((OLS + LASSO) / 2, "none", "between"),
        (0.6 * OLS, "none", "far"),
        (drawn(3), "none", "far"),
        (3 * drawn(3), "none", "far"),
        (-OLS, "none", "far"),
        (OLS * math.nan, "none", "broken"),
    ],
)
def test_labels(prediction: torch.Tensor, label: str, why: str) -> None:
    found = label_of(prediction)
    assert (found["label"], found["why"]) == (label, why)


def test_noise_off_the_line_between_two_schemes_moves_no_margin() -> None:
    clean, noisy = label_of(OLS), label_of(OLS + 0.4 * drawn(7))
    assert noisy["distance"] > 0.1 > clean["distance"]
    assert noisy["margin"] == pytest.approx(clean["margin"], abs=0.1)
    assert noisy["label"] == "least squares"


def test_distance_and_margin_by_the_plain_formulas() -> None:
    model = 0.8 * OLS + 0.3 * drawn(4)
    found = label_of(model)

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).square().sum())

    own, other = apart(model, OLS), apart(model, LASSO)
    assert found["distance"] == pytest.approx(own / apart(model, 0 * OLS))
    margins = {
        "zero": (apart(model, 0 * OLS) - own) / apart(OLS, 0 * OLS),
        "lasso": (other - own) / apart(OLS, LASSO),
    }
    assert found["rival"] == min(margins, key=lambda name: margins[name])
    assert found["margin"] == pytest.approx(min(margins.values()))


def test_schemes_that_say_the_same_are_one() -> None:
    found = label_of(OLS + 0.1 * drawn(2), {**SCHEMES, "Bayes": OLS + 1e-3 * drawn(8)})
    assert found["label"] == "least squares = Bayes"
    different = label_of(OLS + 0.1 * drawn(2), {**SCHEMES, "Bayes": OLS + 0.2 * drawn(8)})
    assert " = " not in different["nearest"]


def test_only_points_that_count_count() -> None:
    last = drawn(9, 3)
    last[:, -1] = OLS[:, -1]
    inside = torch.arange(POINTS).eq(POINTS - 1).expand(PROMPTS, -1)
    found = distances(last[None], {"lookup": OLS.expand(-1, -1, 3)}, inside)
    assert found.to_model.shape == (1, 2, PROMPTS)
    assert labelled(found, [4], np.random.default_rng(0))["label"].tolist() == ["lookup"]
    everywhere = distances(last[None], {"lookup": OLS.expand(-1, -1, 3)})
    assert labelled(everywhere, [4], np.random.default_rng(0))["label"].tolist() == ["none"]


def test_rows_are_tidy_and_zero_is_the_unit() -> None:
    rows = scheme_rows(distances(torch.stack([OLS, LASSO]), SCHEMES), [3, 5])
    assert list(rows) == ["seed", "baseline", "metric", "value", "stderr"]
    table = rows.pivot(index="seed", columns="baseline", values="value")
    assert table["zero"].tolist() == [1.0, 1.0]
    assert table.loc[3, "least squares"] == 0
    assert table.loc[3, "lasso"] == pytest.approx(0.4, abs=0.05)


def test_stderr_of_a_distance_is_what_redrawn_prompts_scatter_by() -> None:
    model = OLS + 0.5 * drawn(2) * drawn(3)[:, :1].abs()
    found = distances(model[None], SCHEMES)
    rows = scheme_rows(found, [0]).set_index("baseline")
    generator = np.random.default_rng(1)
    picks = generator.integers(0, PROMPTS, (4000, PROMPTS))
    own, zero = found.to_model[0, 1], found.to_model[0, 0]
    ratios = own[picks].sum(1) / zero[picks].sum(1)
    assert rows.loc["least squares", "stderr"] == pytest.approx(ratios.std(), rel=0.1)


def test_support_falls_where_the_label_hangs_on_the_prompts() -> None:
    assert label_of(OLS)["support"] == 1.0
    edge = 0.755 * OLS + 0.245 * LASSO + 0.3 * drawn(2)
    assert 0.5 < label_of(edge)["support"] < 1.0


def test_a_table_of_nothing_but_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="no scheme to follow but zero"):
        distances(OLS[None], {"zero": torch.zeros_like(OLS)})


def labels(*names: str, seed: int = 0) -> pd.DataFrame:
    steps = [10 * 2**at for at in range(len(names))]
    return pd.DataFrame({"seed": seed, "step": steps, "label": names})


def test_switches_have_to_hold() -> None:
    frame = labels("zero", "zero", "ols", "zero", "ols", "ols", "none", "lasso", "lasso", "ols")
    found = switches(frame.sample(frac=1, random_state=0))
    assert found[["before", "after"]].to_numpy().tolist() == [["zero", "ols"], ["ols", "lasso"]]
    assert found["later_than"].tolist() == [80, 640]
    assert found["step"].tolist() == [160, 1280]
    assert len(switches(frame, hold=1)) == 6


def test_switches_of_a_short_or_steady_record() -> None:
    assert switches(labels("zero")).empty
    assert switches(labels("ols", "ols", "ols")).empty
    assert list(switches(labels("zero"))) == ["seed", "before", "after", "later_than", "step"]


def test_adoptions_keep_those_that_never_came() -> None:
    frame = pd.concat(
        [
            labels("zero", "ols", "ols", "lasso", "lasso"),
            labels("zero", "zero", "lasso", "zero", "ols", seed=1),
        ]
    )
    found = adoptions(frame).set_index(["seed", "scheme"])
    assert found.loc[(0, "lasso"), "step"] == 80
    assert found.loc[(0, "ols"), "step"] == 20
    assert found["arrived"].to_dict() == {
        (0, "zero"): False,  # held once only
        (0, "ols"): True,
        (0, "lasso"): True,
        (1, "zero"): True,
        (1, "ols"): False,
        (1, "lasso"): False,
    }
    assert found.loc[(1, "lasso"), "step"] == 160


def test_defaults_are_said_in_the_module() -> None:
    assert label_of(OLS + 0.45 * drawn(2))["label"] == "least squares"
    assert label_of(OLS + 0.45 * drawn(2), close=0.1)["why"] == "far"
    assert label_of(0.9 * OLS + 0.1 * LASSO, margin=0.95)["why"] == "between"
    assert (schemes.CLOSE, schemes.MARGIN) == (0.25, 0.5)
