"""How surprised is the model, position by position, and how much does context help?

ℓ_t = −log p(x_{t+1} | x_{≤t}) in nats. The in-context-learning score is the difference of mean
losses late and early in the context (Olsson et al. 2022, "In-context learning and induction
heads"): negative where context helps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@torch.no_grad()
def loss_by_position(
    model: nn.Module, tokens: Int[Tensor, "example pos"], *, batch_tokens: int = 8192
) -> Float[Tensor, "example target"]:
    """ℓ_t of every predicted token, [example, pos−1], fp32; column t predicts token t+1.

    `model` is a causal Hugging Face model; every row must be unpadded.
    """
    rows = max(1, batch_tokens // tokens.shape[1])
    losses = []
    for batch in tokens.split(rows):
        batch = batch.to(next(model.parameters()).device)
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(batch), -1).cpu())
    return torch.cat(losses)


def windows(
    stream: Int[Tensor, "token"], context: int, *, bos: int, limit: int | None = None
) -> Int[Tensor, "example pos"]:
    """Consecutive windows of `context` tokens whose first token is replaced by BOS."""
    count = len(stream) // context
    if count < 1:
        raise ValueError(
            f"windows of {context} tokens asked for: the text has {len(stream)} tokens; "
            "give more text or a shorter context"
        )
    rows = stream[: count * context].view(count, context).clone()
    rows[:, 0] = bos
    return rows[:limit]
