"""Which heads look for what followed an earlier copy of the current token, and which repeat it?

Every attention head of a model, on seeded random tokens that repeat (patterns) and that do not
(copying), one tidy frame. With A the pattern, mean over queries:

    prefix_matching          Σ A[q, k] over the k that followed an earlier copy of token q
    prefix_matching_control  the same keys, on tokens that do not repeat: what position alone gives
    duplicate_token          Σ A[q, k] over the earlier copies themselves
    previous_token           A[q, q−1]
    first_position           A[q, 0]
    copying                  `probes.copying`: −1 … 1, in stacks from which logits are read
    attribution              `probes.attribution`: logits, likewise, on the tokens that repeat

The first three, and attribution, count the queries that have such a key, copies 2 and later (Olsson
et al. 2022; Bansal et al. 2023, Algorithm 1); the next two all but the first query. Definitions are
the same in encoders, where a head might look at later copies as well: these are not counted. An
encoder-decoder gets the same tokens on both sides. Cross attention, whose keys are another
sequence, and mixers, which have no pattern, are left out.

Where it misleads: a mean over queries does not say whether a head matches always or sometimes. A
head that attends evenly to all before it has (copies − 1)/q at query q on matching keys: compare
with the control. Lengths should vary, or a head that looks a fixed distance back scores too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ablate.components import Component, Stack, parse_component
from ablate.hooked import HookedModel
from ablate.sites import Site
from probes.attention import earlier_occurrences, induction_keys
from probes.attribution import attended_shares, final_scale
from probes.circuits import has_direct_path, output_weights, unembedding
from probes.copying import copying_scores
from probes.observed import Found, Relations, observe
from probes.repeats import Drawn, First, drawn

if TYPE_CHECKING:
    import pandas as pd


def induction_scan(
    model: HookedModel,
    *,
    lengths: Sequence[int] | None = None,
    repeats: int = 4,
    seeds: Sequence[int] = range(3),
    batch: int = 8,
    vocabulary: Int[Tensor, "vocab"] | None = None,
    bos: First = "model",
    bias: bool = False,
    final_norm: bool = False,
) -> pd.DataFrame:
    """Every score of every head: component, kind, stack, layer, head, seed, length, score, value.

    Args:
        lengths: block lengths; every seed draws one row of each. By default a few from 25 on that
            fit the model's context and vocabulary.
        repeats: copies of a block in one row.
        seeds: one generator each; the same seed gives the same rows whatever the batch.
        batch: rows in one forward.
        vocabulary: ids to draw from; by default all that are not special.
        bos: the id before the first block, or None for no such token; by default the tokenizer's
            (its class token where it has that instead), else the config's.
        bias: add W_O's bias to what a head writes, for `copying`.
        final_norm: put the gains of the last norm into W_U, for `copying`.

    The model is left as it is; masks in force count. Raises ValueError for a model without
    attention or in training mode, and for rows that fit neither context nor vocabulary.
    """
    import pandas as pd

    if any(module.training for module in model.model.modules()):
        raise ValueError("a scan of a model in training mode asked for: call .eval() first")
    rows: list[dict[str, Any]] = []
    for batch_rows in drawn(model, lengths, repeats, seeds, batch, vocabulary, bos):
        found = _on_repeated(model, batch_rows)
        found |= _on_distinct(model, batch_rows, bias=bias, final_norm=final_norm)
        for site in model.sites:
            for (name, score), values in found.items():
                if name == site.name:
                    rows += _rows_of(site, batch_rows, score, values.tolist())
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per head, one column per score with its standard error over seeds beside it.

    component, stack, layer, head, then `<score>` (mean over lengths, then seeds) and
    `<score>_stderr` (nan where there is one seed).
    """
    import pandas as pd

    keys = ["component", "stack", "layer", "head"]
    by_seed = frame.groupby([*keys, "seed", "score"], sort=False)["value"].mean()
    by_score = by_seed.groupby([*keys, "score"], sort=False).agg(["mean", "sem"])
    wide = by_score.unstack("score")
    columns = {}
    for score in frame["score"].unique():
        columns[score] = wide["mean"][score]
        columns[f"{score}_stderr"] = wide["sem"][score]
    table = pd.DataFrame(columns).reset_index()
    names = table["component"].tolist()
    order = sorted(range(len(table)), key=lambda i: parse_component(names[i]))
    return table.iloc[order].reset_index(drop=True)


def head_scores(frame: pd.DataFrame, score: str) -> dict[Component, float]:
    """Mean of one score of every head that has it, in the frame's order, for `pruning.ranked`.

    Raises ValueError for a score that the frame does not have.
    """
    chosen = frame[frame["score"] == score]
    if chosen.empty:
        there = ", ".join(map(str, frame["score"].unique()))
        raise ValueError(f"no score {score!r} in this scan: it has {there}")
    means = chosen.groupby("component", sort=False)["value"].mean()
    return {parse_component(str(name)): float(mean) for name, mean in means.items()}


def _rows_of(
    site: Site, batch_rows: Drawn, score: str, values: list[list[float]]
) -> list[dict[str, Any]]:
    return [
        {
            "component": str(component),
            "kind": "Head",
            "stack": component.stack,
            "layer": component.layer,
            "head": head,
            "seed": seed,
            "length": batch_rows.length,
            "score": score,
            "value": value,
        }
        for seed, by_head in zip(batch_rows.seeds, values, strict=True)
        for head, (component, value) in enumerate(zip(site.components, by_head, strict=True))
    ]


def _on_repeated(model: HookedModel, batch_rows: Drawn) -> Found:
    """Masses of attention, and what heads add to the logits of what they attend to."""
    relations: dict[Stack, Relations] = {}
    for stack, tokens in batch_rows.repeated.items():
        position = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None]
        first = torch.where(position > 0, 0, -1)
        relations[stack] = {
            "prefix_matching": induction_keys(tokens),
            "duplicate_token": earlier_occurrences(tokens),
            "previous_token": (position - 1).expand(len(tokens), -1, -1),
            "first_position": first.expand(len(tokens), -1, -1),
        }
    w_u = _unembedded(model, batch_rows.repeated, final_norm=True)
    shares: dict[str, Tensor] = {}

    def scored(site: Site, z: Tensor, attended: Tensor) -> None:
        w_o, _ = output_weights(model, site)
        shares[site.name] = attended_shares(
            z, attended, w_o.to(z.device), w_u[site.stack].to(z.device)
        ).cpu()

    with final_scale(model, "decoder" if "decoder" in w_u else "") as scale:
        found = observe(model, batch_rows.repeated, relations, scored)
    for site in model.sites:
        if site.name in shares:
            counted = (relations[site.stack]["prefix_matching"] >= 0).any(-1).cpu()
            share = shares[site.name] * scale().cpu()[:, None] * counted[:, None]
            found[site.name, "attribution"] = share.sum(-1) / counted.sum(-1)[:, None]
    return found


def _on_distinct(model: HookedModel, batch_rows: Drawn, *, bias: bool, final_norm: bool) -> Found:
    """Copying, and prefix matching where there is nothing to match."""
    relations: dict[Stack, Relations] = {
        stack: {"prefix_matching_control": induction_keys(tokens)}
        for stack, tokens in batch_rows.repeated.items()
    }
    w_u = _unembedded(model, batch_rows.distinct, final_norm=final_norm)
    found: Found = {}

    def scored(site: Site, z: Tensor, attended: Tensor) -> None:
        w_o, b_o = output_weights(model, site)
        found[site.name, "copying"] = copying_scores(
            z,
            attended,
            w_o.to(z.device),
            w_u[site.stack].to(z.device),
            bias=b_o.to(z.device) if bias and b_o is not None else None,
        ).cpu()

    return observe(model, batch_rows.distinct, relations, scored) | found


def _unembedded(
    model: HookedModel, tokens: Mapping[Stack, Tensor], *, final_norm: bool
) -> dict[Stack, Tensor]:
    """W_U of the tokens of every stack that logits are read from."""
    stacks = {site.stack for site in model.sites if has_direct_path(model, site)}
    return {
        stack: unembedding(model, ids, final_norm=final_norm)
        for stack, ids in tokens.items()
        if stack in stacks
    }
