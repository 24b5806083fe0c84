"""What are the whole attention patterns of a few chosen heads on one row of tokens?

`patterns_of` is for looking at, not for measuring: T² numbers are kept for every head that is
asked for, and for none beside them. What is to be measured over all heads, `probes.observed`
measures while the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ablate.components import Component, Stack
from ablate.hooked import HookedModel
from probes.rows import Rows, watched


@torch.no_grad()
def patterns_of(
    model: HookedModel,
    tokens: Mapping[Stack, Int[Tensor, "batch pos"]],
    components: Sequence[Component],
) -> dict[Component, Float[Tensor, "query key"]]:
    """The pattern of each of `components` in one forward of the blocks, fp32, on the CPU.

    `tokens` are what each stack reads: {"": ids}, or {"encoder": ids, "decoder": ids}. Raises
    ValueError for a component that is no attention head of the model and for several rows.
    """
    places = {
        component: (site.name, head)
        for site in model.sites
        if site.kind == "head"
        for head, component in enumerate(site.components)
    }
    heads: dict[str, dict[Component, int]] = {}  # site -> wanted component -> its head there
    for component in components:
        if component not in places:
            raise ValueError(
                f"the pattern of {component} asked for: {model.name} has no such attention head"
            )
        name, head = places[component]
        heads.setdefault(name, {})[component] = head
    if (count := max(map(len, tokens.values()))) != 1:
        raise ValueError(f"patterns on {count} rows asked for: give one row at a time")
    parts: dict[str, list[Tensor]] = {name: [] for name in heads}

    def see(rows: Rows) -> None:
        if rows.site.name in parts:
            chosen = list(heads[rows.site.name].values())
            parts[rows.site.name].append(rows.pattern()[0, chosen].cpu())

    hf: Any = model.model
    with watched(model, see):
        if "decoder" in tokens:
            hf.base_model(
                input_ids=tokens["encoder"], decoder_input_ids=tokens["decoder"], use_cache=False
            )
        else:
            hf.base_model(input_ids=tokens[""], use_cache=False)
    found: dict[Component, Tensor] = {}
    for name, several in parts.items():
        width = max(part.shape[-1] for part in several)  # causal rows end at their last key
        whole = torch.cat([pad(part, (0, width - part.shape[-1])) for part in several], dim=1)
        found |= dict(zip(heads[name], whole, strict=True))
    return {component: found[component] for component in components}
