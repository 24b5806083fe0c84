"""Does a model learn in context? Four numbers that say so, from behaviour to anatomy.

On real text: the loss early and late in the context. On random tokens repeated, where nothing but
the first copy helps: the loss on the first and on the second copy. In the attention patterns: how
much the best head looks at the token that followed the last occurrence (prefix matching). Models
without induction heads can do the first two by other means; none of the three implies another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.attention import attention_mass, induction_targets
from probes.loss import loss_by_position, windows
from probes.sequences import ordinary_tokens, repeated_random_tokens, spread_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EARLY, LATE = (20, 60), (400, 500)
"""Positions whose mean losses are compared for the in-context gain on real text."""


def in_context_measurements(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Int[Tensor, "token"],
    context: int,
    limit: int | None,
) -> dict[str, float]:
    """Held-out loss and what in-context copying there is (nats; scores in [0, 1]).

    validation_loss, early_loss, late_loss: as in `held_out_losses`.
    first_copy_loss, second_copy_loss: on random tokens repeated, lengths 25 … context/4.
    prefix_matching: the best head's score; layer0_prefix_matching: the best of the first layer
    that attends. Neither is there without attention.
    """
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)
    result = held_out_losses(model, held_out, context, bos, limit)
    generator = torch.Generator().manual_seed(0)
    scores, first, second = [], [], []
    longest = context // 4 - 1  # three copies and BOS fit
    for length in spread_lengths(min(25, longest), longest, 8):
        tokens = repeated_random_tokens(
            ordinary_tokens(tokenizer), length, repeats=3, count=2, bos=bos, generator=generator
        )
        copies = loss_by_position(model, tokens)
        first.append(copies[:, :length].mean())
        second.append(copies[:, length : 2 * length].mean())
        with _eager(model), torch.no_grad():
            tokens = tokens.to(next(model.parameters()).device)
            patterns = model(tokens, use_cache=False, output_attentions=True).attentions
            targets = induction_targets(tokens)
            if patterns:
                scores.append(torch.stack([attention_mass(p, targets).mean(0) for p in patterns]))
    result |= {
        "first_copy_loss": float(torch.stack(first).mean()),
        "second_copy_loss": float(torch.stack(second).mean()),
    }
    if not scores:
        return result
    by_head = torch.stack(scores).mean(0)
    best, in_first = float(by_head.max()), float(by_head[0].max())
    return result | {"prefix_matching": best, "layer0_prefix_matching": in_first}


def held_out_losses(
    model: nn.Module,
    held_out: Int[Tensor, "token"],
    context: int,
    bos: int,
    limit: int | None = None,
) -> dict[str, float]:
    """Mean next-token losses on held-out text, nats per token.

    validation_loss: over windows of `context` tokens (`limit` tokens of them, evenly spread, or
        all).
    early_loss, late_loss: at positions 20–60 and 400–500 of those windows; late_loss is left out
        where the windows are shorter.
    """
    rows = windows(held_out, context, bos=bos)
    if limit is not None:  # spread over all files, so that it estimates what all windows give
        count = max(1, min(len(rows), limit // context))
        rows = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
    losses = loss_by_position(model, rows)
    result = {
        "validation_loss": float(losses.mean()),
        "early_loss": float(losses[:, EARLY[0] : EARLY[1]].mean()),
    }
    if context > LATE[1]:
        result["late_loss"] = float(losses[:, LATE[0] : LATE[1]].mean())
    return result


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention weights exist only under eager attention."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
