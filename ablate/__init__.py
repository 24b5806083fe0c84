"""Change a model, reversibly: gate, replace or read its branches and put everything back.

`import ablate` is instant: the names below are loaded, and torch with them, when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablate.anatomy import Anatomy, Attention, Blocks, UnknownArchitecture
    from ablate.components import FFN, Component, Head, KVGroup, Mixer, parse_component
    from ablate.effects import LeaveOneOut, leave_one_out
    from ablate.fills import Fill, mean_fill, resample_fill
    from ablate.hooked import HookedModel
    from ablate.masks import Mask
    from ablate.sites import Site
    from ablate.sweep import Reading, Swept, next_tokens

__all__ = [
    "FFN",
    "Anatomy",
    "Attention",
    "Blocks",
    "Component",
    "Fill",
    "Head",
    "HookedModel",
    "KVGroup",
    "LeaveOneOut",
    "Mask",
    "Mixer",
    "Reading",
    "Site",
    "Swept",
    "UnknownArchitecture",
    "leave_one_out",
    "mean_fill",
    "next_tokens",
    "parse_component",
    "resample_fill",
]

_HOME = {
    "anatomy": ("Anatomy", "Attention", "Blocks", "UnknownArchitecture"),
    "components": ("FFN", "Component", "Head", "KVGroup", "Mixer", "parse_component"),
    "fills": ("Fill", "mean_fill", "resample_fill"),
    "hooked": ("HookedModel",),
    "effects": ("LeaveOneOut", "leave_one_out"),
    "masks": ("Mask",),
    "sites": ("Site",),
    "sweep": ("Reading", "Swept", "next_tokens"),
}
"""module -> the public names it defines"""


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"ablate.{module}"), name)
    raise AttributeError(f"module 'ablate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
