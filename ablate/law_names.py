"""What are the laws called, by which a reset place gets fresh weights? Without torch, so that a
command line can list them at once; `ablate.laws` says what they do."""

from __future__ import annotations

from typing import Literal

Law = Literal[
    "init",
    "rewind",
    "torch",
    "identity",
    "copy-below",
    "copy-above",
    "copy-mean",
    "moments",
    "permuted",
]
