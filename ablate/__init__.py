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
    from ablate.fused import masks_at
    from ablate.hooked import HookedModel
    from ablate.laws import Law, fresh
    from ablate.masks import Mask
    from ablate.places import Place, places_of, weights_at
    from ablate.reset import reset_, restored, train_only_
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
    "Law",
    "LeaveOneOut",
    "Mask",
    "Mixer",
    "Place",
    "Reading",
    "Site",
    "Swept",
    "UnknownArchitecture",
    "fresh",
    "leave_one_out",
    "masks_at",
    "mean_fill",
    "next_tokens",
    "parse_component",
    "places_of",
    "resample_fill",
    "reset_",
    "restored",
    "train_only_",
    "weights_at",
]

_HOME = {
    "anatomy": ("Anatomy", "Attention", "Blocks", "UnknownArchitecture"),
    "components": ("FFN", "Component", "Head", "KVGroup", "Mixer", "parse_component"),
    "fills": ("Fill", "mean_fill", "resample_fill"),
    "fused": ("masks_at",),
    "hooked": ("HookedModel",),
    "effects": ("LeaveOneOut", "leave_one_out"),
    "laws": ("Law", "fresh"),
    "masks": ("Mask",),
    "places": ("Place", "places_of", "weights_at"),
    "reset": ("reset_", "restored", "train_only_"),
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
