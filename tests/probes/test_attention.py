"""Targets from token equality, checked against loops and patterns whose answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.attention import (
    attention_mass,
    earlier_occurrences,
    induction_keys,
    induction_targets,
)
from probes.sequences import ordinary_tokens, repeated_random_tokens, spread_lengths


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_targets_equal_the_plain_loop(ids: list[int]):
    targets = induction_targets(torch.tensor([ids]))[0]
    for q in range(len(ids)):
        for k in range(len(ids)):
            expected = 1 <= k <= q and ids[k - 1] == ids[q]
            assert bool(targets[q, k]) == expected, (ids, q, k)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_key_lists_are_the_same_relations(ids: list[int]):
    tokens = torch.tensor([ids, ids[::-1]])
    targets, keys, earlier = (
        induction_targets(tokens),
        induction_keys(tokens),
        earlier_occurrences(tokens),
    )
    for row, q in torch.cartesian_prod(torch.arange(2), torch.arange(len(ids))).tolist():
        here = [k for k in earlier[row, q].tolist() if k >= 0]
        expected = [k for k in range(q - 1, -1, -1) if tokens[row, k] == tokens[row, q]]
        assert here == expected
        marked = targets[row, q].nonzero().flatten().tolist()
        assert sorted(k for k in keys[row, q].tolist() if k >= 0) == marked


def test_a_perfect_induction_head_scores_one_and_a_bos_head_zero():
    length, repeats = 5, 3
    tokens = repeated_random_tokens(
        torch.arange(10, 40), length, repeats=repeats, bos=2, generator=torch.Generator()
    )
    n = tokens.shape[1]
    pattern = torch.zeros(1, 3, n, n)
    pattern[:, 0, :, 0] = 1  # attends to BOS
    for q in range(n):
        pattern[0, 1, q, q - length + 1 if q > length else 0] = 1  # the token after the copy
        pattern[0, 2, q, max(0, q - length)] = 1  # the copy itself: a duplicate-token head
    mass = attention_mass(pattern, induction_targets(tokens))
    assert mass.tolist() == [[0.0, 1.0, 0.0]]


def test_repeats_are_distinct_tokens_and_seeded():
    def draw(seed: int) -> torch.Tensor:
        return repeated_random_tokens(
            torch.arange(100), 20, repeats=2, count=3, generator=torch.Generator().manual_seed(seed)
        )

    rows = draw(0)
    assert rows.shape == (3, 40)
    assert torch.equal(rows[:, :20], rows[:, 20:])
    assert all(len(set(r[:20].tolist())) == 20 for r in rows)
    assert torch.equal(rows, draw(0))
    assert not torch.equal(rows, draw(1))


def test_a_block_longer_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="shorter length"):
        repeated_random_tokens(torch.arange(5), 6, generator=torch.Generator())


def test_lengths_are_spread_and_ordinary_tokens_are_not_special(tmp_path):
    from experiments.tokens import train_tokenizer

    assert spread_lengths(25, 127, 3) == [25, 76, 127]
    tokenizer = train_tokenizer(["some text"], 262, tmp_path)
    assert ordinary_tokens(tokenizer).tolist() == list(range(4, len(tokenizer)))
