"""How is a model scanned for induction: by entries seen in the forward, or from whole patterns?

Four scores of every head on rows of repeated random tokens, each the mean over queries of the
attention on the keys that count: prefix matching, duplicate token, previous token, first position
(`probes.induction`). Values are [score, row, head], shares of attention between 0 and 1.

    scan           ours: the blocks alone under fused attention, entries and row normalisers
    bridge_scan    TransformerLens' run_with_cache, its filter on patterns, eager attention; it
                   computes all logits, or with an argument of OPT's own only the last ones
    hf_scan        the blocks alone with output_attentions=True, eager attention

Peers gather the same entries from their patterns, which is less work than a product with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ablate import HookedModel
from ablate.hooks import execution_device
from experiments.bench.works import Work
from probes.attention import earlier_occurrences, induction_keys
from probes.observed import observe

Run = Callable[[], Float[np.ndarray, "..."]]
Keys = dict[str, Int[Tensor, "batch query entry"]]


def scan(model: HookedModel, work: Work) -> Run:
    """This toolkit's."""
    hf_model: Any = model.model
    hf_model.set_attn_implementation("sdpa")
    sites = [site.name for site in model.sites if site.kind == "head"]

    def run() -> Float[np.ndarray, "score row head"]:
        ids = _on_device(model, work)
        keys = counted(ids)
        found = observe(model, {"": ids}, {"": keys})
        return np.stack(
            [torch.cat([found[site, score] for site in sites], dim=1).numpy() for score in keys]
        )

    return run


def bridge_scan(model: HookedModel, work: Work, bridged: Any, *, logits: bool) -> Run:
    """The same from the patterns of a bridge over `model`."""
    options = {} if logits else {"logits_to_keep": 1, "output_attentions": False}
    names = [site.name.replace("hook_z", "hook_pattern") for site in model.sites]
    names = [name for name in names if name.endswith("hook_pattern")]

    @torch.no_grad()
    def run() -> Float[np.ndarray, "score row head"]:
        ids = _on_device(model, work)
        _, cache = bridged.run_with_cache(
            ids, names_filter=names, return_type=None, use_cache=False, **options
        )
        return _from_patterns((cache[name] for name in names), counted(ids))

    return run


def hf_scan(model: HookedModel, work: Work) -> Run:
    """The same from the patterns that the model returns."""
    hf_model: Any = model.model
    hf_model.set_attn_implementation("eager")

    @torch.no_grad()
    def run() -> Float[np.ndarray, "score row head"]:
        ids = _on_device(model, work)
        out = hf_model.base_model(input_ids=ids, output_attentions=True, use_cache=False)
        return _from_patterns(out.attentions, counted(ids))

    return run


def counted(ids: Int[Tensor, "row pos"]) -> Keys:
    """Score -> the keys that count for every query, −1 for none."""
    position = torch.arange(ids.shape[1], device=ids.device)[None, :, None]
    first = torch.where(position > 0, 0, -1)
    return {
        "prefix_matching": induction_keys(ids),
        "duplicate_token": earlier_occurrences(ids),
        "previous_token": (position - 1).expand(len(ids), -1, -1),
        "first_position": first.expand(len(ids), -1, -1),
    }


def _from_patterns(
    patterns: Iterable[Float[Tensor, "row head query key"]], keys: Keys
) -> Float[np.ndarray, "score row head"]:
    layers = [[_mass(pattern, of_score) for of_score in keys.values()] for pattern in patterns]
    return torch.cat([torch.stack(layer) for layer in layers], dim=-1).cpu().numpy()


def _mass(
    pattern: Float[Tensor, "row head query key"], keys: Int[Tensor, "row query entry"]
) -> Float[Tensor, "row head"]:
    """Mean over the queries that have a key of the attention on their keys."""
    at = keys.clamp(min=0)[:, None].expand(-1, pattern.shape[1], -1, -1)
    entries = pattern.gather(-1, at).float() * (keys >= 0)[:, None]
    queries = (keys >= 0).any(-1).sum(-1)
    return entries.sum((-2, -1)) / queries.clamp(min=1)[:, None]


def _on_device(model: HookedModel, work: Work) -> Tensor:
    return torch.from_numpy(work.rows).to(execution_device(model.model))
