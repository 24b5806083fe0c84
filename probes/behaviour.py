"""What does a model do with repetition and with context, whole and without some of its heads?

ℓ_t = −log p(x_t | x_{<t}) in nats, for many masks at once and exactly (`ablate.sweep`):

    copy_losses     on random tokens that repeat, for every token of every copy of the block. In the
                    first copy nothing helps; from the second on, looking up what followed does.
    context_scores  on text: mean ℓ late in the context minus mean ℓ early in it, below 0 where
                    context helps (Olsson et al. 2022, "In-context learning and induction heads")

Tokens of a copy are found by equality: a token counts if it and the token before it recur together
every time that it recurs. That leaves out the first token of a block, which nothing announces, so
that all copies are compared on the same tokens. Early and late are the positions 20–60 and 400–500
of 512 (`probes.in_context`), in the same places of a shorter or longer context. The decoder of an
encoder-decoder is read with an encoder that sees its start token alone, for there the answer would
be on the other side.

Where it misleads: the in-context score falls too when a model gets worse early, so look at both
losses. A copy gain says that something copies, not that attention does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ablate.hooked import HookedModel
from ablate.hooks import execution_device
from ablate.masks import Mask
from ablate.sweep import Reading, sweep
from probes.in_context import EARLY, LATE
from probes.loss import windows

if TYPE_CHECKING:
    import pandas as pd

    from ablate.fills import Fill
    from probes.repeats import Drawn

CONTEXT = 512
"""The context in which EARLY and LATE lie, and the longest one read by default."""
SHORTEST = 16
"""Tokens of a context below which there is no early and late."""
WHOLE = (Mask(),)


def losses(
    model: HookedModel,
    masks: Sequence[Mask],
    tokens: Int[Tensor, "example pos"],
    chosen: Bool[Tensor, "example pos"],
    *,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> Float[Tensor, "mask entry"]:
    """ℓ of every chosen token, row by row, under every mask.

    `tokens` are unpadded rows of a causal model, or of the decoder of an encoder-decoder. Raises
    ValueError for a model that does not predict the next token, for a chosen first token, and what
    `sweep` raises.
    """
    _require_causal(model)
    if bool(chosen[:, 0].any()) or not bool(chosen.any()):
        raise ValueError("losses of no tokens, or of a first one, asked for: choose later tokens")
    hf: Any = model.model
    chosen = chosen.cpu()
    row, position = chosen.nonzero().unbind(1)
    ids = tokens.to(execution_device(hf.get_input_embeddings()))
    inputs = {"input_ids": ids}
    if hf.config.is_encoder_decoder:
        start = torch.full_like(ids[:, :1], hf.config.decoder_start_token_id)
        inputs = {"input_ids": start, "decoder_input_ids": ids}
    reading = Reading(inputs, torch.stack([row, position - 1], 1), tokens.cpu()[chosen])
    (swept,) = sweep(model, masks, [reading], fill=fill, memory=memory)
    found = -swept.log_p
    if not found.isfinite().all():
        mask = masks[int((~found.isfinite()).any(1).nonzero()[0])]
        raise ValueError(
            f"a loss under the mask '{mask}' is not finite: check the weights and the dtype"
        )
    return found


def copy_losses(
    model: HookedModel,
    batches: Iterable[Drawn],
    masks: Sequence[Mask] = WHOLE,
    *,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> pd.DataFrame:
    """Loss of every token of every copy: mask, seed, length, copy, place, loss.

    Args:
        batches: rows that repeat, from `probes.repeats.drawn`, with any spacing.
        masks: sets of removed components; `mask` is the place in this list.

    `copy` counts from 0, the first one; `place` is the token's place among those of its block that
    count, in the order of the first copy. Raises what `losses` raises, and ValueError for no rows.
    """
    import pandas as pd

    frames = []
    for batch in batches:
        tokens = batch.repeated["decoder" if "decoder" in batch.repeated else ""].cpu()
        copy, place = copies(tokens)
        row, position = (copy >= 0).nonzero().unbind(1)
        found = losses(model, masks, tokens, copy >= 0, fill=fill, memory=memory)
        seeds = torch.tensor(batch.seeds)[row]
        frames.append(
            pd.DataFrame(
                {
                    "mask": torch.arange(len(masks)).repeat_interleave(len(row)).numpy(),
                    "seed": seeds.repeat(len(masks)).numpy(),
                    "length": batch.length,
                    "copy": copy[row, position].repeat(len(masks)).numpy(),
                    "place": place[row, position].repeat(len(masks)).numpy(),
                    "loss": found.flatten().numpy(),
                }
            )
        )
    if not frames:
        raise ValueError("losses on no rows asked for: give batches of probes.repeats.drawn")
    return pd.concat(frames, ignore_index=True)


def copies(
    tokens: Int[Tensor, "example pos"],
) -> tuple[Int[Tensor, "example pos"], Int[Tensor, "example pos"]]:
    """(in which copy of its block a token is, which one of it); −1 where it does not count."""
    same = tokens[:, :, None] == tokens[:, None, :]
    pair = torch.zeros_like(same)
    pair[:, 1:, 1:] = same[:, 1:, 1:] & same[:, :-1, :-1]
    counts = (pair.sum(-1) == same.sum(-1)) & (same.sum(-1) > 1)
    copy = same.tril(-1).sum(-1).masked_fill(~counts, -1)
    # Its place is how many others of the first copy come before it there.
    is_first = copy == 0
    rank = is_first.cumsum(-1) - 1
    first = same.int().argmax(-1)
    return copy, rank.gather(-1, first).masked_fill(~counts, -1)


def context_scores(
    model: HookedModel,
    rows: Int[Tensor, "example pos"],
    masks: Sequence[Mask] = WHOLE,
    *,
    batch: int = 8,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> pd.DataFrame:
    """The in-context-learning score of every row of text: mask, window, measure, value.

    Measures: early_loss, late_loss, icl_score = late − early. Raises what `losses` and `spans`
    raise.
    """
    import pandas as pd

    early, late = spans(rows.shape[1])
    chosen = torch.zeros(rows.shape, dtype=torch.bool)
    for first, end in (early, late):  # what is read at t is the loss of token t + 1
        chosen[:, first + 1 : end + 1] = True
    split = early[1] - early[0]
    means = []
    for ids, of in zip(rows.split(batch), chosen.split(batch), strict=True):
        found = losses(model, masks, ids, of, fill=fill, memory=memory)
        by_row = found.reshape(len(masks), len(ids), -1)
        means.append(torch.stack([by_row[..., :split].mean(-1), by_row[..., split:].mean(-1)]))
    early_loss, late_loss = torch.cat(means, dim=-1).unbind(0)
    measures = {
        "early_loss": early_loss,
        "late_loss": late_loss,
        "icl_score": late_loss - early_loss,
    }
    index = pd.MultiIndex.from_product(
        [range(len(masks)), range(len(rows))], names=["mask", "window"]
    )
    wide = pd.DataFrame({name: v.flatten().numpy() for name, v in measures.items()}, index=index)
    return wide.melt(var_name="measure", ignore_index=False).reset_index()


def spans(context: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(early, late) positions [first, end) in a context of so many tokens, scaled from 512.

    Raises ValueError for a context that is too short to have both.
    """
    if context < SHORTEST:
        raise ValueError(
            f"an in-context score over {context} tokens asked for: give {SHORTEST} or more"
        )
    a, b, c, d = (at * context // CONTEXT for at in (*EARLY, *LATE))
    return (a, b), (c, d)


def text_rows(
    model: HookedModel,
    text: Int[Tensor, "token"],
    *,
    context: int | None = None,
    limit: int | None = 32,
) -> Int[Tensor, "example pos"]:
    """Windows of a text, evenly spread over it, for `context_scores`.

    Args:
        context: tokens of a window; by default 512, or what the model has positions for.
        limit: windows at most; None for all.

    The first token of each is replaced by the one a text starts with in this model, where there is
    one. Raises ValueError for a text shorter than one window, and for more than the model has
    positions for.
    """
    positions = getattr(getattr(model.model, "config", None), "max_position_embeddings", None)
    if context is None:
        context = min(CONTEXT, positions or CONTEXT)
    if positions is not None and context > positions:
        raise ValueError(
            f"windows of {context} tokens asked for: {model.name} has positions for {positions}; "
            "give a shorter context"
        )
    first = _start(model)
    rows = windows(text, context, bos=0 if first is None else first)
    if first is None:
        rows[:, 0] = text[: rows.numel() : context]
    if limit is None or limit >= len(rows):
        return rows
    if limit < 1:
        raise ValueError(f"{limit} windows of text asked for: give at least 1, or None for all")
    return rows[torch.linspace(0, len(rows) - 1, limit).round().long()]


def _start(model: HookedModel) -> int | None:
    """The token that a row begins with; None for a model that has no such token."""
    config: Any = model.model.config
    if config.is_encoder_decoder:
        return config.decoder_start_token_id
    bos = getattr(config, "bos_token_id", None) if model.tokenizer is None else None
    if model.tokenizer is not None:
        bos = model.tokenizer.bos_token_id
    return bos if isinstance(bos, int) else None


def _require_causal(model: HookedModel) -> None:
    hf: Any = model.model
    if not getattr(hf, "can_generate", lambda: False)():
        raise ValueError(
            f"losses of {type(hf).__name__} asked for: it does not predict the next token; give a "
            "causal language model or an encoder-decoder with its head"
        )
