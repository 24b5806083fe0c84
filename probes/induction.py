"""Which heads look for what followed an earlier copy of the current token, and which repeat it?

Every attention head of a model, on seeded random tokens that repeat (patterns) and that do not
(copying), one tidy frame. With A the pattern, mean over queries:

    prefix_matching           Σ A[q, k] over the k that followed an earlier copy of token q
    prefix_matching_control   the same keys, on tokens that do not repeat: what position alone gives
    prefix_matching_shuffled  the keys behind another token of the earlier copies: what any look
                              at the earlier copies gives
    duplicate_token           Σ A[q, k] over the earlier copies of token q themselves
    previous_token            A[q, q−1]
    first_position            A[q, 0]
    entropy, distance         how A is spread over keys and distances: `probes.observed`
    copying                   `probes.copying`: −1 … 1, in stacks from which logits are read
    attribution               `probes.attribution`: logits, likewise, on the tokens that repeat
    …_reference               prefix matching and copying as the code of Bansal et al. has them:
                              `probes.reference_scores`

Prefix matching, duplicate tokens and attribution count the queries that have such a key, copies 2
and later (Olsson et al. 2022; Bansal et al. 2023, Algorithm 1); previous token and first position
all but the first query. Definitions are the same in encoders, where a head might look at later
copies as well: these are not counted. An encoder-decoder gets the same tokens on both sides, other
ones in another order for the control; in cross attention every occurrence on the encoder's side is
a copy, and there is neither a previous token nor a distance. Mixers have no pattern; with `mixers`
they are scored by their implicit attention (`probes.implicit`).

Where it misleads: a mean over queries does not say whether a head matches always or sometimes. A
head that attends evenly to all before it has (copies − 1)/q at query q on matching keys: compare
with the controls. Lengths should vary, or spacing, or a head that looks a fixed distance back
scores too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from ablate.components import Component, Head, Stack, parse_component
from ablate.hooked import HookedModel
from ablate.sites import Site
from probes.attention import earlier_occurrences, induction_keys, occurrences
from probes.attribution import attended_shares, final_scale
from probes.circuits import has_direct_path, output_weights, unembedding
from probes.copying import copying_scores
from probes.observed import Found, Relations, Whole, observe
from probes.reference_scores import copying_reference, prefix_matching_reference
from probes.repeats import Drawn, First, Spacing, drawn

if TYPE_CHECKING:
    import pandas as pd

Score = Literal[
    "prefix_matching",
    "prefix_matching_control",
    "prefix_matching_shuffled",
    "duplicate_token",
    "previous_token",
    "first_position",
    "copying",
    "attribution",
    "entropy",
    "distance",
    "prefix_matching_reference",
    "copying_reference",
]
DEFAULT: tuple[Score, ...] = get_args(Score)[:8]
EVERY: tuple[Score, ...] = get_args(Score)[:10]
"""All but the reference's own, which are for comparison."""


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
    spacing: Spacing = "fixed",
    dealt: bool = False,
    scores: Collection[Score] = DEFAULT,
    mixers: bool = False,
) -> pd.DataFrame:
    """Every score of every head: component, kind, stack, layer, head, seed, length, score, value.

    Args:
        lengths: block lengths; every seed draws one row of each, or with `dealt` seed s one row of
            the length number s, counted round and round. By default a few from 25 on that fit the
            model's context and vocabulary.
        repeats: copies of a block in one row.
        seeds: one generator each; the same seed gives the same rows whatever the batch.
        batch: rows in one forward.
        vocabulary: ids to draw from; by default all that are not special.
        bos: the id before the first block, or None for no such token; by default the tokenizer's
            (its class token where it has that instead), else the config's.
        bias: add W_O's bias to what a head writes, for `copying`.
        final_norm: put the gains of the last norm into W_U, for `copying`.
        spacing: copies back to back, or at varying distances (`probes.repeats`).
        scores: which; `distance` gives one a bin.
        mixers: score SSM mixers as well, as one head each (`head` is −1).

    The model is left as it is; masks in force count. Raises ValueError for a model without
    attention or in training mode, for rows that fit neither context
    nor vocabulary, and for reference scores of a model that the reference's procedure does not fit.
    """
    import pandas as pd

    if any(module.training for module in model.model.modules()):
        raise ValueError("a scan of a model in training mode asked for: call .eval() first")
    rows: list[dict[str, Any]] = []
    batches = drawn(model, lengths, repeats, seeds, batch, vocabulary, bos, spacing, dealt)
    for batch_rows in batches:
        found = _on_repeated(model, batch_rows, scores, mixers)
        if {"copying", "prefix_matching_control"} & set(scores):
            found |= _on_distinct(
                model, batch_rows, scores, mixers, bias=bias, final_norm=final_norm
            )
        if "prefix_matching_reference" in scores:
            found |= prefix_matching_reference(model, batch_rows)
        if "copying_reference" in scores:
            found |= copying_reference(model, batch_rows)
        for site in model.sites:
            for (name, score), values in found.items():
                if name == site.name:
                    rows += _rows_of(site, batch_rows, score, values.tolist())
    return _with_far_bins(pd.DataFrame(rows))


def _with_far_bins(frame: pd.DataFrame) -> pd.DataFrame:
    """0 in the distance bins that a row is too short for, so that means are over the same rows."""
    import pandas as pd

    bins = [name for name in frame["score"].unique() if name.startswith("distance_")]
    of_row = ["component", "seed", "length"]
    parts = [frame]
    near = frame.loc[frame["score"] == "distance_0"]
    for name in bins:
        there = pd.MultiIndex.from_frame(frame.loc[frame["score"] == name, of_row])
        missing = ~pd.MultiIndex.from_frame(near[of_row]).isin(there)
        if missing.any():
            parts.append(near.loc[missing].assign(score=name, value=0.0))
    return pd.concat(parts, ignore_index=True) if len(parts) > 1 else frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per head, one column per score with its standard error over seeds beside it.

    component, stack, layer, head, then `<score>` (mean over lengths, then seeds) and
    `<score>_stderr` (nan where there is one seed, or none).
    """
    import pandas as pd

    keys = ["component", "stack", "layer", "head"]
    by_seed = frame.groupby([*keys, "seed", "score"], sort=False, dropna=False)["value"].mean()
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
            "kind": type(component).__name__,
            "stack": component.stack,
            "layer": component.layer,
            "head": head if isinstance(component, Head) else -1,
            "seed": seed,
            "length": batch_rows.length,
            "score": score,
            "value": value,
        }
        for seed, by_head in zip(batch_rows.seeds, values, strict=True)
        for head, (component, value) in enumerate(zip(site.components, by_head, strict=True))
    ]


def _on_repeated(
    model: HookedModel, batch_rows: Drawn, scores: Collection[Score], mixers: bool
) -> Found:
    """Masses of attention, and what heads add to the logits of what they attend to."""
    relations = _relations(batch_rows)
    wanted: dict[Stack, Relations] = {
        stack: {score: keys for score, keys in by_score.items() if score in scores}
        for stack, by_score in relations.items()
    }
    whole: list[Whole] = [score for score in get_args(Whole) if score in scores]
    if "attribution" not in scores:
        return observe(model, batch_rows.repeated, wanted, whole=whole, mixers=mixers)
    w_u = _unembedded(model, batch_rows.repeated, final_norm=True)
    shares: dict[str, Tensor] = {}

    def scored(site: Site, z: Tensor, attended: Tensor) -> None:
        w_o, _ = output_weights(model, site)
        shares[site.name] = attended_shares(
            z, attended, w_o.to(z.device), w_u[site.stack].to(z.device)
        ).cpu()

    with final_scale(model, "decoder" if "decoder" in w_u else "") as scale:
        found = observe(model, batch_rows.repeated, wanted, scored, whole=whole, mixers=mixers)
    for site in model.sites:
        if site.name in shares:
            counted = (relations[site.stack]["prefix_matching"] >= 0).any(-1).cpu()
            share = shares[site.name] * scale().cpu()[:, None] * counted[:, None]
            found[site.name, "attribution"] = share.sum(-1) / counted.sum(-1)[:, None]
    return found


def _relations(batch_rows: Drawn) -> dict[Stack, Relations]:
    """The keys that count on the rows that repeat."""
    relations: dict[Stack, Relations] = {}
    for stack, tokens in batch_rows.repeated.items():
        position = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None]
        first = torch.where(position > 0, 0, -1)
        relations[stack] = {
            "prefix_matching": induction_keys(tokens),
            "prefix_matching_shuffled": batch_rows.shuffled[stack],
            "duplicate_token": earlier_occurrences(tokens),
            "previous_token": (position - 1).expand(len(tokens), -1, -1),
            "first_position": first.expand(len(tokens), -1, -1),
        }
    if "decoder" in batch_rows.repeated:
        encoder, decoder = batch_rows.repeated["encoder"], batch_rows.repeated["decoder"]
        same = occurrences(decoder, encoder)
        same[:, 0] = -1  # the start token may be the encoder's first
        relations["cross"] = {
            "prefix_matching": _behind(same, encoder.shape[1]),
            "prefix_matching_shuffled": _shuffled_across(batch_rows, encoder.shape[1]),
            "duplicate_token": same,
            "first_position": relations["decoder"]["first_position"],
        }
    return relations


def _shuffled_across(batch_rows: Drawn, length: int) -> Tensor:
    """In the encoder's row the keys behind another token of the block, for copies 2 and later."""
    keys = batch_rows.shuffled["decoder"][..., 0]
    another = batch_rows.repeated["decoder"].gather(-1, (keys - 1).clamp(min=0))
    found = occurrences(another, batch_rows.repeated["encoder"])
    return _behind(found.masked_fill(keys[..., None] < 0, -1), length)


def _behind(keys: Tensor, length: int) -> Tensor:
    """The positions after those, where there is one."""
    return torch.where((keys >= 0) & (keys + 1 < length), keys + 1, -1)


def _on_distinct(
    model: HookedModel,
    batch_rows: Drawn,
    scores: Collection[Score],
    mixers: bool,
    *,
    bias: bool,
    final_norm: bool,
) -> Found:
    """Copying, and prefix matching where there is nothing to match."""
    relations: dict[Stack, Relations] = {
        stack: {"prefix_matching_control": by_score["prefix_matching"]}
        for stack, by_score in _relations(batch_rows).items()
        if "prefix_matching_control" in scores
    }
    if "copying" not in scores:
        return observe(model, batch_rows.distinct, relations, mixers=mixers)
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

    return observe(model, batch_rows.distinct, relations, scored, mixers=mixers) | found


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
