"""Orders: the base's own steps, whole batches shuffled, begun again, or over another stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.orders import Leg, Order, two_lengths
from experiments.tokens import Rows

STEPS, SHORT, SHARE = 10, 16, 0.65


def rows_of(stream: np.ndarray, seed: int = 0) -> Rows:
    return Rows(stream, 32, 4, seed, 0.25, bos=2, ordinary=4, vocab=300)


@pytest.fixture
def rows() -> Rows:
    return rows_of(np.random.default_rng(0).integers(4, 300, 3000).astype(np.uint16))


def same(a: Order, b: Order, steps: range) -> bool:
    return all(torch.equal(a.at(s), b.at(s)) for s in steps)


def test_two_lengths_read_what_the_rows_gave_step_by_step(rows: Rows):
    order = two_lengths(rows, STEPS, SHORT, SHARE)
    for step in range(STEPS + 3):  # past the end, whole windows go on
        row = SHORT if step < SHARE * STEPS else 32
        assert torch.equal(order.at(step), rows.at(step, row))
    assert order.steps == STEPS
    assert order.tokens == sum(order.at(s).numel() for s in range(STEPS))
    assert [leg.length for leg in two_lengths(rows, STEPS, SHORT, 0.0).legs] == [32]


def test_a_second_leg_with_another_seed_follows_the_first(rows: Rows):
    other = rows_of(rows.stream, seed=1)
    order = Order((Leg(rows, 0, 3, SHORT), Leg(other, 0, 4, 32)))
    assert torch.equal(order.at(2), rows.at(2, SHORT))
    assert torch.equal(order.at(3), other.at(0))
    assert torch.equal(order.at(9), other.at(6))


def test_reshuffled_reads_the_same_batches_once_each(rows: Rows):
    order = two_lengths(rows, STEPS, SHORT, SHARE)
    mixed = order.reshuffled(5)
    assert same(mixed, order.reshuffled(5), range(STEPS))
    assert not same(mixed, order, range(STEPS))

    def contents(of: Order, steps: range) -> list:
        return sorted(str(of.at(s).tolist()) for s in steps)

    assert contents(mixed, range(STEPS)) == contents(order, range(STEPS))
    # A second pass draws another permutation of the same batches.
    second = range(STEPS, 2 * STEPS)
    assert contents(mixed, second) == contents(order, range(STEPS))
    assert any(not torch.equal(mixed.at(s), mixed.at(s + STEPS)) for s in range(STEPS))


@pytest.mark.parametrize("shuffled", [False, True])
def test_cycled_begins_again_after_its_tokens(rows: Rows, shuffled: bool):
    order = two_lengths(rows, STEPS, SHORT, SHARE)
    order = order.reshuffled(1) if shuffled else order
    cycled = order.cycled(3 * 128 - 5)
    assert cycled.cycle == 3
    assert same(cycled, order, range(3))
    assert all(torch.equal(cycled.at(s), order.at(s % 3)) for s in range(12))
    assert order.cycled(1).cycle == 1
    assert cycled.cycled(4 * 128).cycle == 4  # of the order, not of the cycle
    with pytest.raises(ValueError, match="0 unique tokens"):
        order.cycled(0)


def test_over_keeps_the_lengths_and_reads_the_other_stream(rows: Rows):
    order = two_lengths(rows, STEPS, SHORT, SHARE)
    stream = np.full(2000, 299, dtype=np.uint16)
    other = order.over(stream, seed=3)
    for step in range(STEPS):
        assert other.at(step).shape == order.at(step).shape
    plain = rows_of(stream, seed=3)
    assert torch.equal(other.at(9), plain.at(9))
    with pytest.raises(ValueError, match="smaller batch"):
        order.over(stream[:64], seed=3)
