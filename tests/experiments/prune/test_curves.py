"""Average curves against a plain loop, and their bootstrap against cases that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.removal_curves import average_curves


def examples(right: dict[tuple[str, int, str, int], list[int]], group_size: int = 1):
    """Rows from {(task, shots, ranking, removed): outcomes}."""
    rows = []
    for (task, shots, ranking, removed), outcomes in right.items():
        for doc, acc in enumerate(outcomes):
            rows.append(
                {
                    "task": task,
                    "shots": shots,
                    "ranking": ranking,
                    "seed": 0,
                    "removed": removed,
                    "group": doc // group_size,
                    "doc_id": doc,
                    "acc": float(acc),
                }
            )
    return pd.DataFrame(rows)


def test_the_average_weighs_tasks_and_shots_equally():
    frame = examples(
        {
            ("a", 0, "whole", 0): [1, 1, 1, 1],
            ("a", 5, "whole", 0): [1, 1, 0, 0],
            ("b", 0, "whole", 0): [1, 0],
            ("b", 5, "whole", 0): [0, 0],
            ("a", 0, "importance", 3): [1, 0, 0, 0],
            ("a", 5, "importance", 3): [0, 0, 0, 0],
            ("b", 0, "importance", 3): [1, 1],
            ("b", 5, "importance", 3): [1, 1],
        }
    )
    (curve,) = average_curves(frame, np.random.default_rng(0))
    assert curve.removed.tolist() == [0, 3]
    assert curve.mean == pytest.approx([(1 + 0.5 + 0.5 + 0) / 4, (0.25 + 0 + 1 + 1) / 4])
    assert curve.resampled.mean(axis=0) == pytest.approx(curve.mean, abs=0.01)


def test_curves_are_paired_by_example():
    # Removing changes nothing: however noisy the accuracy, the difference is exactly 0.
    outcomes = list(np.random.default_rng(1).integers(0, 2, 40))
    frame = examples({("a", 0, "whole", 0): outcomes, ("a", 0, "importance", 9): outcomes})
    (curve,) = average_curves(frame, np.random.default_rng(0))
    assert (curve.resampled[:, 0] == curve.resampled[:, 1]).all()
    assert curve.resampled[:, 0].std() > 0.03
    assert curve.removable(0.0) == (9, 9, 9)


def test_the_standard_error_is_that_of_the_groups():
    # Four examples a text, all right or all wrong: forty examples are worth ten.
    outcomes = [int(i % 8 < 4) for i in range(40)]
    frame = examples(
        {("a", 0, "whole", 0): outcomes, ("a", 0, "importance", 1): outcomes}, group_size=4
    )
    (curve,) = average_curves(frame, np.random.default_rng(0))
    stderr = float(curve.frame(2).stderr[0])
    assert stderr == pytest.approx(np.sqrt(0.25 / 10), rel=0.06)


def test_removable_has_an_interval_when_the_fall_is_uncertain():
    right = {("a", 0, "whole", 0): [1] * 50}
    right |= {("a", 0, "importance", 1): [1] * 49 + [0]}  # 2 points, give or take
    right |= {("a", 0, "importance", 2): [0] * 50}
    (curve,) = average_curves(examples(right), np.random.default_rng(0))
    assert curve.removable(0.02) == (1, 0, 1)
    assert curve.frame(4).fraction.tolist() == [0, 0.25, 0.5]
