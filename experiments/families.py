"""Which kind of model is each family, and what can it be trained on?

Nothing but names, so that a command line can check them without loading torch; shapes.py builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Family = Literal["opt", "gpt2", "llama", "hybrid", "bert", "esm", "t5", "bart"]
Kind = Literal["decoder", "encoder", "encoder-decoder"]
TaskName = Literal["lm", "mlm", "denoising", "translation"]

KINDS: Mapping[Family, Kind] = {
    "opt": "decoder",
    "gpt2": "decoder",
    "llama": "decoder",
    "hybrid": "decoder",
    "bert": "encoder",
    "esm": "encoder",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
}
TASKS: Mapping[Kind, tuple[TaskName, ...]] = {
    "decoder": ("lm",),
    "encoder": ("mlm",),
    "encoder-decoder": ("denoising", "translation"),
}
"""What a kind of model can be trained on; the first is what `auto` means."""
