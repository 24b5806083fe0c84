"""Does a head write the tokens that it attends to?

On tokens that do not repeat, what head h adds to the logit of token k at position j is

    logit[j, k] = z_h[j] · W_O[h] · W_U[x_k]

with z the attention-mixed values. Of the tokens that j may attend to, those above the mean are
raised, by logit − mean; the score of j is the share of all raising that goes to the token attended
to most, scaled to [−1, 1]; the score of the head is the mean over positions (Olsson et al. 2022).
1 raises that token alone; −1 never raises it, or writes nothing. Logits are raw, not a softmax.

Where it misleads: small raisings of many tokens add up, so the score falls with the length; compare
heads on equal lengths. On tokens that do not repeat an induction head finds no match and mostly
attends to the first position: what it copies then is not what it copies when it matches. Only the
direct path counts, so a head that copies through later layers scores low; norms between the head
and the logits are left out (Gemma-2 has one behind each attention, post-norm models have one behind
each branch). `final_norm` brings back what of the last norm does not depend on the rest of the
stream, its gains and its centring; its bias is nobody's. `bias` adds W_O's bias to every head,
which is also nobody's.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import align_module_device
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.anatomy import base_path, find
from ablate.hooked import HookedModel
from ablate.hooks import execution_device
from ablate.sites import Site

ROUNDING = 1e-5
"""Of the largest logit of a row: differences below are noise of fp32."""


def has_direct_path(model: HookedModel, site: Site) -> bool:
    """Do the heads of `site` write into a stream that an output projection reads linearly?

    So in causal language models and decoders; not in encoders, whose head transforms first.
    """
    hf: Any = model.model
    if site.kind != "head" or site.stack not in ("", "decoder") or not hf.can_generate():
        return False
    return hf.get_output_embeddings() is not None


def output_weights(
    model: HookedModel, site: Site
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, "d_model"] | None]:
    """(W_O, b_O) of an attention, fp32, offloaded or not."""
    module = model.model.get_submodule(site.path)
    with align_module_device(module):
        weight = module.get_parameter("weight").detach().float()
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach().float().clone()
        by_input = weight.clone() if _is_input_first(module) else weight.T.clone()
    heads = rearrange(by_input, "(head d_head) d_model -> head d_head d_model", head=site.width)
    return heads, bias


def _is_input_first(module: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight [in, out]; nn.Linear keeps it [out, in]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def unembedding(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], *, final_norm: bool = False
) -> Float[Tensor, "batch pos d_model"]:
    """W_U of every token, fp32: what a residual stream is multiplied with to give its logit.

    With a projection behind the last norm (OPT-350m) through that; with `final_norm` through the
    gains and the centring of the norm as well.
    """
    hf: Any = model.model
    rows = _weight_rows(hf.get_output_embeddings(), tokens)
    stack = next(s for s in model.anatomy.stacks if s.stack in ("", "decoder"))
    project = find(hf, base_path(hf, stack.project_out))
    if project is not None:
        with align_module_device(project):
            matrix = project.get_parameter("weight").detach().float().to(rows.device)
        rows = einsum(rows, matrix, "batch pos d_out, d_out d_model -> batch pos d_model")
    norm = find(hf, base_path(hf, stack.final_norm))
    if final_norm and norm is not None:
        gains, centred = _linear_part(norm, rows.shape[-1])
        rows = rows * gains.to(rows.device)
        if centred:
            rows = rows - rows.mean(-1, keepdim=True)
    return rows


def _weight_rows(module: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Tensor:
    with ExitStack() as aligned:
        aligned.enter_context(align_module_device(module))
        weight = module.get_parameter("weight").detach()
        return weight[tokens.to(weight.device)].float()


def _linear_part(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, "d_model"], bool]:
    """(gains, whether it centres) of a LayerNorm or an RMSNorm of any parametrisation.

    A vector of ±1 with mean 0 passes both with its gains on and the bias added.
    """
    parameter = next(norm.parameters())
    signs = torch.ones(d_model, device=execution_device(norm), dtype=parameter.dtype)
    with torch.no_grad():
        even = norm(torch.stack([signs, -signs]))
        signs[::2] = -1
        odd = norm(torch.stack([signs, -signs]))
    gains = signs.float() * (odd[0] - odd[1]).float() / 2
    centred = bool((even[0] - even[1]).abs().max() < 0.5 * gains.abs().max())
    return gains, centred


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
