"""Does a head look for tokens whose predecessor is the current one, by its weights alone?

An induction head takes two: an earlier head p writes the previous token into the stream, head h
compares that with the current token (Elhage et al. 2021, "A mathematical framework for transformer
circuits"). With W_QK = W_Q W_Kᵀ and W_OV = W_V W_O, both [d_model, d_model]:

    k_composition   ‖W_QK[h] W_OV[p]ᵀ‖ / (‖W_QK[h]‖ ‖W_OV[p]‖), Frobenius norms: how much of what h
                    compares its query with is what p writes, 0 … 1
    qk_matching     Σ Re λ / Σ |λ| of W_E W_Q[h] (W_E W_V[p] W_O[p] W_K[h])ᵀ, [vocab, vocab] of rank
                    d_head: 1 where the query's token matches the token before the key, −1 where it
                    is avoided, near 0 for random weights

Were what p writes turned at random against what h reads, the mean square of k_composition would be
1 / d_model, whatever the spectra: `chance` is its root. A head as a whole is scored through all
heads of earlier layers of its stack at once. If head p attends to the previous token with w_p, the
stream there holds w_p times what p writes of it, so the two scores are those of the sum

    Σ_p w_p W_OV[p] in the place of W_OV[p],    w_p the previous-token score of the scan

and nan in the first layer with an attention, which has no earlier one. No matrix of vocab² is
formed; eigenvalues are those of d_head × d_head matrices. As in `probes.circuits` gains and
centring of the norms are folded in unless told not to, and their scales, which differ from layer to
layer, are not. What is added to all keys alike does not matter: W_E is centred on their side.

Where it misleads: rotary and other positions are left out, so a head that compares tokens only at
some distances, or in the rotated part of d_head only, is not told from one that always does. The
token is its embedding alone: many models rewrite it in the first FFN. Norms behind branches are
left out. A head that matches through another path (queries moved to earlier tokens, two steps) has
no score of it here, and a high `k_composition` does not say what is composed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ablate.components import Component
from ablate.hooked import HookedModel
from ablate.sites import Site
from probes.circuits import (
    eigenvalue_share,
    embedding,
    key_weights,
    output_weights,
    query_weights,
    value_weights,
)

if TYPE_CHECKING:
    import pandas as pd

Composition = Literal["k_composition", "qk_matching"]
Heads = Float[Tensor, "head d_model d_head"]


def composition_scores(
    model: HookedModel, previous_token: Mapping[Component, float], *, norms: bool = True
) -> dict[Composition, dict[Component, float]]:
    """Both scores of every head of a self attention, through all earlier heads of its stack.

    Args:
        previous_token: the weight of every head that has a later one, such as
            `induction.head_scores(frame, "previous_token")`.
        norms: take in the gains and the centring of norms.

    Raises ValueError for a model without self attention and for a head without a weight.
    """
    found: dict[Composition, dict[Component, float]] = {"k_composition": {}, "qk_matching": {}}
    tokens = _token_products(model)
    for sites in _stacks(model):
        path = torch.zeros_like(tokens)  # Σ_p w_p W_V[p] W_O[p] of the layers so far
        for site, later in zip(sites, [*sites[1:], None], strict=True):
            ratios = shares = [float("nan")] * site.width
            if site is not sites[0]:
                w_q, w_k = (w.cpu() for w in _query_and_key(model, site, norms))
                read = einsum(path, w_k, "d_in d_out, head d_out d_k -> head d_in d_k")
                # tr(W_Qᵀ W_Q · (P W_K)ᵀ (P W_K)), the square of ‖W_Q W_Kᵀ Pᵀ‖
                size = (_gram(w_q) * _gram(read)).sum((-2, -1)).sqrt()
                ratios = _ratio(size, _size(w_q, w_k) * path.double().norm()).tolist()
                # The eigenvalues of W_E W_Q (W_E P W_K)ᵀ that are not 0.
                circuit = read.transpose(-2, -1) @ tokens @ w_q
                shares = eigenvalue_share(circuit).tolist()
            found["k_composition"] |= dict(zip(site.components, ratios, strict=True))
            found["qk_matching"] |= dict(zip(site.components, shares, strict=True))
            if later is not None:
                weights = torch.tensor([_weight(previous_token, c) for c in site.components])
                w_v, w_o = (w.cpu() for w in _value_and_output(model, site, norms))
                path += einsum(
                    weights,
                    w_v,
                    w_o,
                    "head, head d_in d_head, head d_head d_out -> d_in d_out",
                )
    return found


def pair_compositions(model: HookedModel, *, norms: bool = True) -> pd.DataFrame:
    """Both scores of every head and every head of an earlier layer of its stack.

    component, previous, k_composition, qk_matching, chance. Holds W_V and W_O of all attentions in
    fp32, and has heads² / 2 rows. Raises ValueError for a model without self attention.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    tokens = _token_products(model)
    for sites in _stacks(model):
        earlier: list[tuple[Site, Heads, Float[Tensor, "head d_head d_model"]]] = []
        for site in sites:
            w_q, w_k = (w.cpu() for w in _query_and_key(model, site, norms))
            asked = tokens @ w_q
            for before, w_v, w_o in earlier:
                ratios, shares = _pairs(w_q, w_k, w_v, w_o, asked)
                rows += [
                    {
                        "component": str(component),
                        "previous": str(previous),
                        "k_composition": float(ratios[h, p]),
                        "qk_matching": float(shares[h, p]),
                        "chance": chance(w_q.shape[1]),
                    }
                    for h, component in enumerate(site.components)
                    for p, previous in enumerate(before.components)
                ]
            w_v, w_o = (w.cpu() for w in _value_and_output(model, site, norms))
            earlier.append((site, w_v, w_o))
    columns = ["component", "previous", "k_composition", "qk_matching", "chance"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def chance(d_model: int) -> float:
    """`k_composition` of weights at random angles: the root of its mean square."""
    return d_model**-0.5


def _pairs(
    w_q: Float[Tensor, "head d_model d_k"],
    w_k: Float[Tensor, "head d_model d_k"],
    w_v: Float[Tensor, "previous d_model d_v"],
    w_o: Float[Tensor, "previous d_v d_model"],
    asked: Float[Tensor, "head d_model d_k"],
) -> tuple[Float[Tensor, "head previous"], Float[Tensor, "head previous"]]:
    """(k_composition, qk_matching), on d_head × d_head matrices; `asked` is W_Eᵀ W_E W_Q."""
    through = einsum(w_o, w_k, "p d_v d_model, h d_model d_k -> h p d_v d_k")
    read = einsum(w_v, asked, "p d_model d_v, h d_model d_q -> h p d_v d_q")
    shares = eigenvalue_share(through.transpose(-2, -1) @ read)
    squares = einsum(
        _gram(w_v),
        through.double(),
        _gram(w_q),
        through.double(),
        "p a b, h p b c, h c d, h p a d -> h p",
    )
    whole = _size(w_q, w_k)[:, None] * _size(w_v, w_o.transpose(-2, -1))
    return _ratio(squares.clamp(min=0).sqrt(), whole), shares


def _gram(weights: Heads) -> Float[Tensor, "head d_head d_head"]:
    weights = weights.double()
    return weights.transpose(-2, -1) @ weights


def _size(left: Heads, right: Heads) -> Float[Tensor, "head"]:
    """‖A Bᵀ‖ of every head."""
    return (_gram(left) * _gram(right)).sum((-2, -1)).clamp(min=0).sqrt()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where a head writes or compares nothing."""
    return torch.where(whole > 0, part / whole, 0)


def _token_products(model: HookedModel, chunk: int = 8192) -> Float[Tensor, "d_model d_model"]:
    """W_Eᵀ W_E with W_E centred over the vocabulary, summed `chunk` tokens at a time."""
    hf: Any = model.model
    vocabulary = hf.get_input_embeddings().weight.shape[0]
    products, put = torch.zeros(()), torch.zeros(())
    for ids in torch.arange(vocabulary).split(chunk):
        w_e = embedding(model, ids).cpu()
        products = products + einsum(w_e, w_e, "token d_in, token d_out -> d_in d_out")
        put = put + w_e.sum(0)
    return products - einsum(put, put / vocabulary, "d_in, d_out -> d_in d_out")


def _stacks(model: HookedModel) -> Iterator[list[Site]]:
    """The self attentions of every stack, by layer. Raises ValueError where there are none."""
    attentions = [s for s in model.sites if s.kind == "head" and s.stack != "cross"]
    if not attentions:
        raise ValueError(
            f"composition of heads of {model.name} asked for: it has no attention, so no QK circuit"
        )
    for stack in dict.fromkeys(site.stack for site in attentions):
        yield [site for site in attentions if site.stack == stack]


def _query_and_key(model: HookedModel, site: Site, norms: bool) -> tuple[Heads, Heads]:
    return query_weights(model, site, norms=norms), key_weights(model, site, norms=norms)


def _value_and_output(
    model: HookedModel, site: Site, norms: bool
) -> tuple[Heads, Float[Tensor, "head d_head d_model"]]:
    return value_weights(model, site, norms=norms), output_weights(model, site)[0]


def _weight(previous_token: Mapping[Component, float], component: Component) -> float:
    if component not in previous_token:
        raise ValueError(
            f"composition with {component} asked for: previous_token has {len(previous_token)} "
            "heads without it; give the score of every head, 0 to leave one out"
        )
    return previous_token[component]
