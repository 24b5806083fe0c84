"""Measure a model, ablated or not: every function takes a model and returns tidy numbers.

The names below are loaded, and torch with them, when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.criterion import judged
    from probes.induction import induction_scan
    from probes.masking import masking_effects

__all__ = ["induction_scan", "judged", "masking_effects"]

_HOME = {
    "induction_scan": "induction",
    "judged": "criterion",
    "masking_effects": "masking",
}
"""name -> the module that defines it"""


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"probes.{_HOME[name]}"), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
