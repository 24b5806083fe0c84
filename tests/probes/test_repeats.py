"""The rows of a scan: what repeats where, and what the controls look at."""

from __future__ import annotations

import pytest
import torch

from ablate import HookedModel
from probes.attention import earlier_occurrences, induction_keys, occurrences
from probes.repeats import drawn
from tests.families import tiny


@pytest.mark.parametrize("spacing", ["fixed", "varied"])
@pytest.mark.parametrize("family", ["opt", "bart"])
@pytest.mark.parametrize("bos", [7, None])
def test_shuffled_keys_are_behind_another_token_of_every_earlier_copy(spacing, family, bos):
    model = HookedModel(tiny(family))
    (rows,) = drawn(model, (6,), 3, (0, 1, 2), 8, torch.arange(10, 60), bos, spacing)
    for stack, tokens in rows.repeated.items():
        keys = induction_keys(tokens)
        for row in range(3):
            another: dict[int, int] = {}
            for q in range(tokens.shape[1]):
                right = [k for k in keys[row, q].tolist() if k >= 0]
                wrong = [k for k in rows.shuffled[stack][row, q].tolist() if k >= 0]
                assert len(wrong) == len(right)
                token = int(tokens[row, q])
                for key, own in zip(wrong, right, strict=True):
                    behind = int(tokens[row, key - 1])
                    assert another.setdefault(token, behind) == behind != token
                    assert abs(key - own) < 6  # in the same copy
            assert sorted(another) == sorted(another.values())
            assert len(another) == 6


def test_fixed_copies_stand_back_to_back_and_varied_ones_do_not():
    model = HookedModel(tiny("opt"))
    (fixed,) = drawn(model, (6,), 3, range(8), 8)
    block = fixed.repeated[""][:, 1:7]
    assert (fixed.repeated[""][:, 1:] == block.repeat(1, 3)).all()
    (varied,) = drawn(model, (6,), 3, range(8), 8, spacing="varied")
    tokens = varied.repeated[""]
    assert tokens.shape == varied.distinct[""].shape == (8, 1 + 4 * 6)
    distances = set()
    for row in earlier_occurrences(tokens):
        found = [(q, int(k)) for q, k in enumerate(row[:, 0]) if k >= 0]
        assert len(found) == 12
        own = {q - k for q, k in found}
        assert min(own) >= 6
        distances |= own
    assert len(distances) > 4


def test_controls_do_not_change_the_rows():
    model = HookedModel(tiny("opt"))
    generator = torch.Generator().manual_seed(5)
    vocabulary = torch.arange(10, 60)
    (rows,) = drawn(model, (4,), 2, (5,), 8, vocabulary, 7)
    block = vocabulary[torch.randperm(50, generator=generator)[:4]]
    distinct = vocabulary[torch.randperm(50, generator=generator)[:8]]
    assert rows.repeated[""][0].tolist() == [7, *block.tolist(), *block.tolist()]
    assert rows.distinct[""][0].tolist() == [7, *distinct.tolist()]


def test_occurrences_in_another_sequence():
    queries, keys = torch.tensor([[1, 5, 2, 1]]), torch.tensor([[2, 1, 3, 1, 1]])
    found = occurrences(queries, keys)[0].tolist()
    assert [[k for k in entry if k >= 0] for entry in found] == [[1, 3, 4], [], [0], [1, 3, 4]]


def test_one_token_has_no_other():
    (rows,) = drawn(HookedModel(tiny("opt")), (1,), 3, (0,), 8)
    assert (rows.shuffled[""] == -1).all()
