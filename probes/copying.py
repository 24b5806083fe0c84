"""Does a head write the tokens that it attends to?

On tokens that do not repeat, what head h adds to the logit of token k at position j is

    logit[j, k] = z_h[j] · W_O[h] · W_U[x_k]

with z the attention-mixed values. Of the tokens that j may attend to, those above the mean are
raised, by logit − mean; the score of j is the share of all raising that goes to the token attended
to most, scaled to [−1, 1]; the score of the head is the mean over positions (Olsson et al. 2022).
1 raises that token alone; −1 never raises it, or writes nothing. Logits are raw, not a softmax.

Where it misleads: small raisings of many tokens add up, so the score falls with the length; compare
heads on equal lengths. On tokens that do not repeat an induction head finds no match: what
it copies then is not what it copies when it matches. Only the direct
path counts, so a head that copies through later layers scores low; norms between the head
and the logits are left out (Gemma-2 has one behind each attention, post-norm models have one behind
each branch). `final_norm` brings back what of the last norm does not depend on the rest of the
stream, its gains and its centring; its bias is nobody's. `bias` adds W_O's bias to every head,
which is also nobody's.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

ROUNDING = 1e-5
"""Of the largest logit of a row: differences below are noise of fp32."""


def copying_scores(
    z: Float[Tensor, "batch pos head d_head"],
    attended: Int[Tensor, "batch head pos"],
    w_o: Float[Tensor, "head d_head d_model"],
    w_u: Float[Tensor, "batch pos d_model"],
    *,
    bias: Float[Tensor, "d_model"] | None = None,
    chunk: int = 2**20,
) -> Float[Tensor, "batch head"]:
    """The score of every causal head on every row, in [−1, 1].

    Args:
        attended: the position that each query attends to most.
        w_u: of the tokens of the row, which are distinct.
        chunk: how many logits are formed at once.
    """
    batch, length, heads, _ = z.shape
    read = einsum(w_o, w_u, "head d_head d_model, batch key d_model -> batch head d_head key")
    offset = None if bias is None else einsum(bias, w_u, "d_model, batch key d_model -> batch key")
    by_head = rearrange(z.float(), "batch pos head d_head -> batch head pos d_head")
    position = torch.arange(length, device=z.device)
    total = torch.zeros(batch, heads, device=z.device)
    step = max(1, chunk // (batch * heads * length))
    for first in range(1, length, step):  # the first token can attend to itself alone
        last = min(first + step, length)
        logits = by_head[:, :, first:last] @ read[..., :last]
        if offset is not None:
            logits = logits + offset[:, None, None, :last]
        hidden = position[None, :last] > position[first:last, None]
        seen = position[first:last, None] + 1
        mean = logits.masked_fill(hidden, 0).sum(-1, keepdim=True) / seen
        raised = (logits - mean).clamp(min=0).masked_fill(hidden, 0)
        # What is no more than rounding raises nothing.
        largest = logits.abs().masked_fill(hidden, 0).amax(-1, keepdim=True)
        raised = raised.masked_fill(raised <= ROUNDING * largest, 0)
        own = raised.gather(-1, attended[:, :, first:last, None])[..., 0]
        everything = raised.sum(-1)
        share = torch.where(everything > 0, own / everything, 0)
        total += share.sum(-1)
    return 2 * total / max(1, length - 1) - 1
