"""How much memory does a call take, and how many rows may it be given?

Nothing here is guessed from shapes: what a block allocates depends on its attention kernel, its
gates, its experts. The first rows of a sweep go through alone, their peak is measured, and the rest
follow in pieces that fit (and, on a CPU, that stay in its cache: a larger piece is not faster).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE = 0.5
"""Of the memory that is free now, what a sweep may take unless told otherwise."""
CACHE = 32 * 2**20
"""Bytes of one piece on a CPU: beyond, elementwise operations wait for memory."""

Result = TypeVar("Result")


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container, where there is one
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, int(most) - used))
    return free


def with_peak(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """(result, bytes that were allocated at most at one time in between, the result included)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return result, torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as seen:
        return call(), seen.peak


def rows_that_fit(
    bytes_per_row: int,
    memory: int,
    device: torch.device,
    *,
    multiple: int = 1,
    cache: int = CACHE,
) -> int:
    """Rows that one piece may have: within `memory`, and within `cache` on a CPU.

    A multiple of `multiple` where that many fit, else as many as fit, at least one.
    """
    room = memory if device.type == "cuda" else min(memory, cache)
    rows = max(1, room // max(1, bytes_per_row))
    return rows // multiple * multiple if rows >= multiple else rows


class _Allocations(TorchDispatchMode):
    """Watches which storages the operations inside make, and how long they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            if (key := tensor.untyped_storage()._cdata) not in self.alive:
                self.given.add(key)
        out = func(*args, **(kwargs or {}))
        self.alive = {k: known for k, known in self.alive.items() if not known[0].expired()}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta]
