"""The made-up language: one translation a source, words swapped, phrases turned, eos at the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from experiments.objectives import NextToken
from experiments.translation import Translation, _language, no_source, no_sources, source_use

BOS, START, VOCAB = 2, 1, 60


def translation(**other: int) -> Translation:
    return Translation(ordinary=4, vocab=VOCAB, eos=BOS, start=START, **other)


def by_hand(source: list[int], longest: int, seed: int) -> list[int]:
    """The slow way: cut into phrases, turn each but for its last token, look words up."""
    words, ends = _language(4, VOCAB, seed)
    phrases: list[list[int]] = [[]]
    for token in source:
        phrases[-1].append(token)
        if ends[token] or len(phrases[-1]) == longest:
            phrases.append([])
    turned = [t for p in phrases for t in [*p[:-1][::-1], *p[-1:]]]
    return [int(words[t]) for t in turned]


@pytest.mark.parametrize("longest", [1, 2, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_translation_is_what_it_is_by_hand(longest: int, seed: int):
    rows = torch.randint(4, VOCAB, (30, 25))
    rows[:, 0] = BOS
    batch = translation(longest=longest, seed=seed)(rows, np.random.default_rng(0))
    assert torch.equal(batch.inputs["input_ids"], rows)
    for row, target, given in zip(
        rows.tolist(),
        batch.targets.tolist(),
        batch.inputs["decoder_input_ids"].tolist(),
        strict=True,
    ):
        assert target == [*by_hand(row[1:], longest, seed), BOS]
        assert given == [START, *target[:-1]]


def test_the_dictionary_is_one_to_one_and_keeps_special_tokens():
    words, ends = _language(4, VOCAB, 0)
    assert sorted(words) == list(range(VOCAB))
    assert list(words[:4]) == [0, 1, 2, 3]
    assert not np.array_equal(words, _language(4, VOCAB, 1)[0])
    assert 0.05 < ends.mean() < 0.4


def test_no_source_gives_every_row_another_row_s_source():
    rows = torch.randint(4, VOCAB, (5, 12))
    batch = translation()(rows, np.random.default_rng(0))
    swapped = no_source(batch)
    assert torch.equal(swapped.targets, batch.targets)
    assert torch.equal(swapped.inputs["decoder_input_ids"], batch.inputs["decoder_input_ids"])
    for i in range(5):
        assert torch.equal(swapped.inputs["input_ids"][i], rows[(i - 2) % 5])
    with pytest.raises(ValueError, match="one row"):
        no_source(batch.take(torch.tensor([0])))
    with pytest.raises(ValueError, match="no decoder"):
        no_source(NextToken()(rows, np.random.default_rng(0)))


def test_sources_are_exchanged_across_batches():
    rows = torch.randint(4, VOCAB, (5, 12))
    whole = translation()(rows, np.random.default_rng(0))
    batches = [whole.take(torch.arange(4)), whole.take(torch.tensor([4]))]  # one row alone
    swapped = no_sources(batches)
    assert [len(batch.targets) for batch in swapped] == [4, 1]
    together = torch.cat([batch.inputs["input_ids"] for batch in swapped])
    assert torch.equal(together, no_source(whole).inputs["input_ids"])
    assert torch.equal(torch.cat([batch.targets for batch in swapped]), whole.targets)
    with pytest.raises(ValueError, match="one row"):
        no_sources(batches[1:])


def test_source_use_runs_from_none_to_the_base_s():
    assert source_use(3.0, 1.0, 1.0) == 1
    assert source_use(3.0, 3.0, 1.0) == 0
    assert source_use(3.0, 2.0, 1.0) == 0.5
    assert math.isnan(source_use(1.0, 1.0, 1.0))
    assert math.isnan(source_use(1.01, 1.0, 1.0))  # a hundredth of a nat is no use to share
