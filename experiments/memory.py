"""Why does a training step ask the system for the same memory again and again?

glibc's malloc maps every block above its threshold anew and hands the top of its heap back when
much of it is free. A step of training frees all its activations, so the next one pays a page fault
for every 4 KiB of them: 5 to 15 % of a step on a CPU (measured; `ablate bench reset`). `keep_freed`
tells malloc to keep what it has. The process then stays as large as it was at its largest.

Nothing is done where there is no glibc, and nothing to memory on a GPU, which torch keeps itself.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""What mallopt calls them (malloc.h)."""
LARGEST = (2**30, 2**25)
"""Bytes below which a block is not mapped anew; older versions refuse more than the second."""


def keep_freed() -> bool:
    """Keep freed memory in this process from now on; whether this was possible."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    kept = bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
    return kept and any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST)
