"""Memory is measured: what lives at one time, no more and no less; rows follow from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablate.budget import CACHE, free_bytes, rows_that_fit, with_peak

CPU = torch.device("cpu")
KIB = 1024


def kib(n: int) -> Tensor:
    return torch.zeros(n * 256)


def test_the_peak_is_what_lives_at_one_time() -> None:
    def one_after_another() -> int:
        for _ in range(5):
            kib(64).sum()
        return 7

    def together() -> list[Tensor]:
        return [kib(64) for _ in range(5)]

    def in_between() -> Tensor:
        large = kib(100)
        small = large[:256].clone()
        del large
        return small

    # A sum of one number is a storage of 4 bytes as well.
    assert with_peak(one_after_another, CPU) == (7, 64 * KIB + 4)
    result, peak = with_peak(together, CPU)
    assert (len(result), peak) == (5, 5 * 64 * KIB)
    assert with_peak(in_between, CPU)[1] == 101 * KIB


def test_what_was_there_and_what_is_only_seen_otherwise_costs_nothing() -> None:
    given = kib(64)

    def views() -> Tensor:
        given.mul_(2)
        return given.view(64, 256).T[3:].expand(2, -1, -1)

    assert with_peak(views, CPU)[1] == 0
    assert with_peak(lambda: given + 1, CPU)[1] == 64 * KIB
    assert with_peak(lambda: given.new_empty(0), CPU)[1] == 0


def test_measures_nest() -> None:
    inner = []

    def outer() -> Tensor:
        first = kib(10)
        inner.append(with_peak(lambda: kib(20), CPU)[1])
        return first

    assert with_peak(outer, CPU)[1] == 30 * KIB
    assert inner == [20 * KIB]


def test_an_error_ends_the_measuring() -> None:
    with pytest.raises(ZeroDivisionError):
        with_peak(lambda: 1 // 0, CPU)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("a_row", "memory", "multiple", "rows"),
    [
        (10, 1000, 1, 100),
        (10, 1000, 30, 90),
        (10, 1000, 101, 100),
        (10, 5, 4, 1),
        (10, -5, 4, 1),
        (0, 1000, 7, 994),
        (CACHE // 8, 10 * CACHE, 1, 8),
    ],
)
def test_rows_that_fit(a_row: int, memory: int, multiple: int, rows: int) -> None:
    assert rows_that_fit(a_row, memory, CPU, multiple=multiple) == rows
    if a_row * rows > CACHE // 2:
        cuda = rows_that_fit(a_row, memory, torch.device("cuda"), multiple=multiple)
        assert cuda == memory // a_row, "the cache is a CPU's"


def test_free_memory_is_some() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50
