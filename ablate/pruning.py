"""In what order do components go, and how far can it go before something is lost?

A ranking is a tuple of components, least important first. A share f of N components goes by quota:

    global   the first ⌊f·N⌋ of all (Bansal et al. 2023, §4.3)
    layer    of the N_l heads of every layer l, the first ⌊f·N_l⌋; groups of heads alike

Either way the masks of one ranking are nested. A global quota may empty a layer of its heads early;
a layer quota never does before f = 1, and removes fewer in all: each layer rounds down. Beside
every ranking that claims to know something stand two that do not: a random order, and the size of
the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils import align_module_device
from einops import rearrange
from torch import Tensor

from ablate.components import Component
from ablate.masks import Mask

if TYPE_CHECKING:
    from ablate.hooked import HookedModel

Ranking = tuple[Component, ...]
Quota = Literal["global", "layer"]


def ranked(scores: Mapping[Component, float]) -> Ranking:
    """Components by ascending score; equal scores keep the model's order (as given)."""
    for component, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"the score of {component} is {score}: a ranking needs finite scores")
    return tuple(sorted(scores, key=lambda component: scores[component]))


def random_ranking(components: Sequence[Component], generator: torch.Generator) -> Ranking:
    """A uniformly random order of `components`."""
    order = torch.randperm(len(components), generator=generator).tolist()
    return tuple(components[i] for i in order)


def weight_magnitudes(model: HookedModel) -> dict[Component, float]:
    """The Frobenius norm of the weights that masking each component silences.

    For a head, its d_head columns of W_O; for a mixer, its W_out; for an FFN, its last module.
    Knows nothing of data: a control for rankings that claim to.
    """
    norms: dict[Component, float] = {}
    for site in model.sites:
        module = model.model.get_submodule(site.path)
        with ExitStack() as aligned:  # offloaded weights are on no device otherwise
            for part in module.modules():
                aligned.enter_context(align_module_device(part))
            if site.kind == "ffn":
                squares = [p.detach().double().square().sum() for p in module.parameters()]
                norms[site.components[0]] = float(torch.stack(squares).sum().sqrt())
                continue
            weight = module.get_parameter("weight").detach().double()
            by_input: Tensor = weight if _is_input_first(module) else weight.T
            heads = rearrange(by_input, "(head d_head) out -> head (d_head out)", head=site.width)
            norms |= dict(zip(site.components, heads.norm(dim=1).tolist(), strict=True))
    return norms


def _is_input_first(module: torch.nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight [in, out]; nn.Linear keeps it [out, in]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def nested_masks(
    ranking: Ranking, fractions: Sequence[float], *, quota: Quota = "global"
) -> list[Mask]:
    """The mask of what goes at every share f, by quota.

    A layer is one of a stack (a decoder's self-attention is apart from its cross-attention), and
    kinds of components are counted apart.

    Raises ValueError for f outside [0, 1], and for a layer quota of components that stand alone in
    their layers (FFNs, mixers): none would go before f = 1.
    """
    if quota not in ("global", "layer"):
        raise ValueError(f"no quota {quota!r}: use 'global' or 'layer'")
    if quota == "global":
        return [Mask(ranking[: removed_count(len(ranking), fraction)]) for fraction in fractions]
    layers: dict[tuple[str, int, type], list[Component]] = {}
    for component in ranking:
        key = component.stack, component.layer, type(component)
        layers.setdefault(key, []).append(component)
    if len(layers) > 1 and len(layers) == len(ranking):
        raise ValueError(
            f"a layer quota of {len(ranking)} components, each alone in its layer: none would go "
            "before all; use the global quota"
        )
    return [
        Mask(c for of in layers.values() for c in of[: removed_count(len(of), fraction)])
        for fraction in fractions
    ]


def removed_count(components: int, fraction: float) -> int:
    """⌊f·N⌋, read as decimals: 0.7 of 10 is 7, whatever binary makes of 0.7."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"share {fraction} to remove asked for: give one in [0, 1]")
    return math.floor(round(fraction * components, 9))


def removable(
    counts: Sequence[int], accuracies: Sequence[float], *, tolerance: float = 0.02
) -> int:
    """The largest count before the curve first falls more than `tolerance` below its start.

    `counts` ascend and begin with the unablated model's 0. A curve that comes back up after it
    fell does not count again: the answer is what can go safely, not where luck returned.
    """
    if not counts or counts[0] != 0 or len(counts) != len(accuracies):
        raise ValueError(
            f"a curve of {len(accuracies)} accuracies at counts {list(counts)[:3]}…: "
            "give one accuracy a count, the first for 0 removed"
        )
    safe = 0
    for count, accuracy in zip(counts, accuracies, strict=True):
        # Accuracies are means of finitely many 0s and 1s: forgive their rounding, not a point.
        if accuracies[0] - accuracy > tolerance + 1e-9:
            break
        safe = count
    return safe
