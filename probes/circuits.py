"""What does a head do whatever it attends to, by its weights alone?

Its OV circuit takes the embedding of the attended token to logits,

    W_E · W_V[h] · W_O[h] · W_U        [vocab, vocab], of rank d_head,

and copies where it raises the token it came from. The eigenvalue score Σ Re λ / Σ |λ| is 1 where
every eigenvalue is positive and real, −1 where all are negative, near 0 for a random matrix (Elhage
et al. 2021, "A mathematical framework for transformer circuits"). The nonzero eigenvalues are those
of the d_head × d_head matrix W_O W_U W_E W_V, so no matrix of vocab² is formed. Gains and centring
of the norms in front of the attention and of the logits belong to the circuit, unless told not to;
their scales do not matter. Nor does what is added to all logits alike: W_U is centred over the
vocabulary.

Where it misleads: above the first layer the stream is more than the embedding, and what W_V reads
of it may lie elsewhere. Norms behind branches are left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate.utils import align_module_device
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from ablate.anatomy import base_path, find
from ablate.components import Component
from ablate.hooked import HookedModel
from ablate.hooks import execution_device
from ablate.sites import Site


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
    rows = weight_rows(hf.get_output_embeddings(), tokens)
    stack = next(s for s in model.anatomy.stacks if s.stack in ("", "decoder"))
    project = find(hf, base_path(hf, stack.project_out))
    if project is not None:
        with align_module_device(project):
            matrix = project.get_parameter("weight").detach().float().to(rows.device)
        rows = rows @ matrix
    norm = find(hf, base_path(hf, stack.final_norm))
    if final_norm and norm is not None:
        gains, _, centred = linear_part(norm, rows.shape[-1])
        rows = rows * gains.to(rows.device)
        if centred:
            rows = rows - rows.mean(-1, keepdim=True)
    return rows


def query_weights(
    model: HookedModel, site: Site, *, norms: bool = True
) -> Float[Tensor, "head d_model d_head"]:
    """W_Q of every head, fp32; `norms` as in `value_weights`, and with them the gains (and the
    centring) of a norm of queries (Qwen3). No rotation of positions."""
    return _normed_heads(model, site, _inputs_of(model, site, "q", norms), "q", norms)


def key_weights(
    model: HookedModel, site: Site, *, norms: bool = True
) -> Float[Tensor, "head d_model d_head"]:
    """W_K of every query head, fp32, as `query_weights`: heads that share a key head have the same
    one."""
    return _normed_heads(model, site, _inputs_of(model, site, "k", norms), "k", norms)


def value_weights(
    model: HookedModel, site: Site, *, norms: bool = True
) -> Float[Tensor, "head d_model d_head"]:
    """W_V of every query head, fp32: heads that share a value head have the same one.

    With `norms`, through the gains and the centring of the norm in front of the attention.
    """
    return _inputs_of(model, site, "v", norms)


def _inputs_of(
    model: HookedModel, site: Site, part: Literal["q", "k", "v"], norms: bool
) -> Float[Tensor, "head d_model d_head"]:
    row = site.row
    assert row is not None
    block = model.model.get_submodule(site.block)
    module = block.get_submodule(row.qkv or getattr(row, part))
    with align_module_device(module):
        weight = module.get_parameter("weight").detach().float()
        by_output = (weight.T if _is_input_first(module) else weight).clone()
    if row.layout == "thirds":
        by_output = by_output.chunk(3)["qkv".index(part)]
    if row.layout == "grouped":
        parts = rearrange(
            by_output,
            "(group part d_head) d_model -> group part d_head d_model",
            group=site.kv_groups,
            d_head=site.d_head,
        )
        chosen = {"q": parts[:, :-2], "k": parts[:, -2:-1], "v": parts[:, -1:]}[part]
        heads = rearrange(chosen, "group part d_head d_model -> (group part) d_head d_model")
    else:
        heads = rearrange(
            by_output, "(head d_head) d_model -> head d_head d_model", d_head=site.d_head
        )
    norm = next((found for name in row.norms if (found := find(block, name)) is not None), None)
    # OPT-350m keeps the norm of this name behind the branch.
    if norms and norm is not None and getattr(block, "do_layer_norm_before", True):
        gains, _, centred = linear_part(norm, heads.shape[-1])
        heads = heads * gains.to(heads.device)
        if centred:
            heads = heads - heads.mean(-1, keepdim=True)
    return repeat(
        heads, "head d_head d_model -> (head share) d_model d_head", share=site.width // len(heads)
    )


def _normed_heads(
    model: HookedModel,
    site: Site,
    weights: Float[Tensor, "head d_model d_head"],
    part: Literal["q", "k"],
    norms: bool,
) -> Float[Tensor, "head d_model d_head"]:
    """Through the linear part of a norm over d_head, where the family has one."""
    attention = model.model.get_submodule(site.attention)
    norm = find(attention, f"{part}_norm") or find(attention, f"{part}_layernorm")
    if not norms or norm is None:
        return weights
    gains, _, centred = linear_part(norm, site.d_head)
    if centred:
        weights = weights - weights.mean(-1, keepdim=True)
    return weights * gains.to(weights.device)


def embedding(model: HookedModel, tokens: Int[Tensor, "token"]) -> Float[Tensor, "token d_model"]:
    """What tokens alone put into the stream, fp32: no positions; through a projection into the
    stream (OPT-350m) or a norm of embeddings (Bloom) where there is one."""
    hf: Any = model.model
    rows = weight_rows(hf.get_input_embeddings(), tokens)
    stack = next(s for s in model.anatomy.stacks if s.stack in ("", "decoder"))
    project = find(hf, base_path(hf, stack.project_in))
    if project is not None:
        with align_module_device(project):
            matrix = project.get_parameter("weight").detach().float().to(rows.device)
        rows = rows @ matrix.T
    for path in stack.embeddings[1:]:
        norm = find(hf, base_path(hf, path))
        if norm is not None and "norm" in path.lower():
            dtype = next(norm.parameters()).dtype
            with torch.no_grad():
                rows = norm(rows.to(execution_device(norm), dtype)).float()
    return rows


def ov_eigenvalue_scores(
    model: HookedModel, *, norms: bool = True, chunk: int = 8192
) -> dict[Component, float]:
    """Σ Re λ / Σ |λ| of every head that has a direct path to the logits, in [−1, 1].

    `norms` takes in the gains of the norms in front of attention and logits; `chunk` is how many
    tokens of the vocabulary are summed at once. Raises ValueError where no head has such a path.
    """
    reading = [site for site in model.sites if has_direct_path(model, site)]
    if not reading:
        raise ValueError(
            f"OV circuits of {model.name} asked for: none of its heads has a direct path to logits"
        )
    hf: Any = model.model
    vocabulary = min(_rows(hf.get_input_embeddings()), _rows(hf.get_output_embeddings()))
    through, read, put = (torch.zeros(()) for _ in range(3))
    for tokens in torch.arange(vocabulary).split(chunk):
        w_u = unembedding(model, tokens[None], final_norm=norms)[0].cpu()
        w_e = embedding(model, tokens).cpu()
        through = through + einsum(w_u, w_e, "token d_out, token d_in -> d_out d_in")
        read, put = read + w_u.sum(0), put + w_e.sum(0)
    # Σ over tokens of (W_U − its mean) W_E, [d_model, d_model]
    through = through - einsum(read / vocabulary, put, "d_out, d_in -> d_out d_in")
    scores: dict[Component, float] = {}
    for site in reading:
        w_o, _ = output_weights(model, site)
        w_v = value_weights(model, site, norms=norms).to(w_o.device)
        circuit = einsum(
            w_o,
            through.to(w_o.device),
            w_v,
            "head row d_out, d_out d_in, head d_in column -> head row column",
        )
        scores |= dict(zip(site.components, eigenvalue_share(circuit).tolist(), strict=True))
    return scores


def eigenvalue_share(circuit: Float[Tensor, "*axes row column"]) -> Float[Tensor, "*axes"]:
    """Σ Re λ / Σ |λ| of square matrices; 0 where all eigenvalues are."""
    eigenvalues = torch.linalg.eigvals(circuit.double())
    sizes = eigenvalues.abs().sum(-1)
    return torch.where(sizes > 0, eigenvalues.real.sum(-1) / sizes, 0)


def _rows(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[0]


def weight_rows(module: nn.Module, tokens: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes width"]:
    """Rows of a weight [vocab, width], fp32, offloaded or not."""
    with align_module_device(module):
        weight = module.get_parameter("weight").detach()
        return weight[tokens.to(weight.device)].float()


def linear_part(
    norm: nn.Module, d_model: int
) -> tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"], bool]:
    """(gains, bias, whether it centres) of a LayerNorm or an RMSNorm of any parametrisation.

    A vector of ±1 with mean 0 passes both with its gains on and the bias added.
    """
    dtype = next(norm.parameters()).dtype
    signs = torch.ones(d_model, device=execution_device(norm), dtype=dtype)
    with torch.no_grad():
        even = norm(torch.stack([signs, -signs])).float()
        signs[::2] = -1
        odd = norm(torch.stack([signs, -signs])).float()
    gains = signs.float() * (odd[0] - odd[1]) / 2
    centred = bool((even[0] - even[1]).abs().max() < 0.5 * gains.abs().max())
    return gains, (odd[0] + odd[1]) / 2, centred
