"""Two-layer models whose induction circuit is written by hand: their answers are known exactly.

The residual stream has one-hot parts: token, position, previous token, prediction.

    L0H0   attends to the position before; copies that token into `previous`
    L1H1   attends where `previous` equals the current token; copies that token into `prediction`

All other heads and both FFNs write nothing. Norms are the identity on the vectors that occur,
because every such vector has the same number of ones: a LayerNorm has gain = std, bias = mean, an
RMSNorm gain = root mean square.

`induction_opt` is an OPT. `crowded_opt` has four more heads, each of which lacks one thing that an
induction head has. `induction_llama` has rotary positions and two query heads to a key head; its
induction head is L1H3, and a constant 1 stands where the OPT has positions. With p = q − k a query
and a key that are the same everywhere score Σ_i cos ω_i(p − 1) / √d_head through the first pairs of
rotated dimensions: largest at p = 1. Tokens are compared in the last pairs, where ω is so small
that nothing turns.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

VOCAB, POSITIONS, HEADS = 25, 50, 3
BOS = 0
D_HEAD = POSITIONS
D_MODEL = HEADS * D_HEAD
TOKEN, POSITION, PREVIOUS, PREDICTION = 0, VOCAB, VOCAB + POSITIONS, 2 * VOCAB + POSITIONS

LLAMA_HEADS, LLAMA_D_HEAD, LLAMA_D_MODEL = 4, 64, 80
ONE, LLAMA_PREVIOUS, LLAMA_PREDICTION = VOCAB, VOCAB + 1, 2 * VOCAB + 1
THETA, TURNING, STILL = 1e20, 6, 16
"""Of the 32 pairs the first TURNING tell positions apart; from STILL on ω ≤ 1e-10."""


def induction_opt(*, sharpness: float = 60.0, gain: float = 60.0) -> OPTForCausalLM:
    """The model in eval mode; `sharpness` is the attention score of a match, `gain` the logit's."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=4,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=None,
    )
    model = OPTForCausalLM(config).eval()
    decoder = model.model.decoder
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        decoder.embed_tokens.weight[:, TOKEN : TOKEN + VOCAB] = torch.eye(VOCAB)
        # OPT's learned positions start at row 2.
        decoder.embed_positions.weight[2:, POSITION : POSITION + POSITIONS] = torch.eye(POSITIONS)
        model.lm_head.weight[:, PREDICTION : PREDICTION + VOCAB] = gain * torch.eye(VOCAB)
        for layer, ones in zip(decoder.layers, (2, 3), strict=True):
            _identity_on(layer.self_attn_layer_norm, ones)
            _identity_on(layer.final_layer_norm, ones)
        _identity_on(decoder.final_layer_norm, 4)
        first, second = (layer.self_attn for layer in decoder.layers)
        # L0H0: query at position p, keys at position p-1.
        shifted = torch.eye(POSITIONS).roll(1, dims=0)
        _match(first, 0, POSITION, POSITION, shifted, sharpness)
        _copy(first, 0, TOKEN, PREVIOUS)
        # L1H1: query token x, keys whose previous token is x.
        _match(second, 1, TOKEN, PREVIOUS, torch.eye(VOCAB), sharpness)
        _copy(second, 1, TOKEN, PREDICTION)
    return model


def _identity_on(norm: nn.LayerNorm, ones: int) -> None:
    """LayerNorm(x) = x for every x of `ones` ones among zeros."""
    mean = ones / D_MODEL
    norm.weight.fill_(math.sqrt(mean - mean**2 + norm.eps))
    norm.bias.fill_(mean)


def _match(
    attention: nn.Module, head: int, query: int, key: int, relation: torch.Tensor, sharpness: float
) -> None:
    """Score `sharpness` where relation[query value, key value] is 1."""
    size = len(relation)
    rows = slice(head * D_HEAD, head * D_HEAD + size)
    # HF scales the query by 1/√d_head.
    attention.q_proj.weight[rows, query : query + size] = sharpness * math.sqrt(D_HEAD) * relation.T
    attention.k_proj.weight[rows, key : key + size] = torch.eye(size)


def _copy(attention: nn.Module, head: int, source: int, target: int) -> None:
    rows = slice(head * D_HEAD, head * D_HEAD + VOCAB)
    attention.v_proj.weight[rows, source : source + VOCAB] = torch.eye(VOCAB)
    attention.out_proj.weight[target : target + VOCAB, rows] = torch.eye(VOCAB)


def repeated_tokens(count: int = 4, seed: int = 0) -> torch.Tensor:
    """BOS and the same 24 distinct tokens twice: [count, 49]."""
    from probes.sequences import repeated_random_tokens

    generator = torch.Generator().manual_seed(seed)
    return repeated_random_tokens(
        torch.arange(1, VOCAB), VOCAB - 1, count=count, bos=BOS, generator=generator
    )


def crowded_opt(offset: int) -> OPTForCausalLM:
    """`induction_opt` beside heads that each lack one thing.

    L0H1   attends to its own position and copies: it matches no prefix
    L0H2   attends `offset` positions back and copies: it knows no tokens
    L1H2   matches prefixes and writes nothing
    """
    model = induction_opt()
    first, second = (layer.self_attn for layer in model.model.decoder.layers)
    with torch.no_grad():
        for head, back in ((1, 0), (2, offset)):
            _match(first, head, POSITION, POSITION, torch.eye(POSITIONS).roll(back, dims=0), 60.0)
            _copy(first, head, TOKEN, PREDICTION)
        _match(second, 2, TOKEN, PREVIOUS, torch.eye(VOCAB), 60.0)
    return model


def induction_llama(*, sharpness: float = 60.0, gain: float = 60.0) -> LlamaForCausalLM:
    """The Llama in eval mode: L0H0 and L1H3, of four heads that share two keys and values."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=LLAMA_D_MODEL,
        head_dim=LLAMA_D_HEAD,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=LLAMA_HEADS,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    eye = torch.eye(VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, TOKEN : TOKEN + VOCAB] = eye
        model.model.embed_tokens.weight[:, ONE] = 1
        model.lm_head.weight[:, LLAMA_PREDICTION : LLAMA_PREDICTION + VOCAB] = gain * eye
        first, second = model.model.layers
        norms = [(2, first.input_layernorm), (3, second.input_layernorm), (4, model.model.norm)]
        for ones, norm in norms:
            norm.weight.fill_(math.sqrt(ones / LLAMA_D_MODEL + norm.variance_epsilon))
        # L0H0, of the first key head: the same query and key everywhere, turned one apart.
        omega = THETA ** (-torch.arange(TURNING) / (LLAMA_D_HEAD // 2))
        half = LLAMA_D_HEAD // 2
        strength = sharpness * math.sqrt(LLAMA_D_HEAD)
        first.self_attn.q_proj.weight[:TURNING, ONE] = strength * omega.cos()
        first.self_attn.q_proj.weight[half : half + TURNING, ONE] = -strength * omega.sin()
        first.self_attn.k_proj.weight[:TURNING, ONE] = 1
        _llama_copy(first.self_attn, 0, TOKEN, LLAMA_PREVIOUS)
        # L1H3, of the second key head: query token x, keys whose previous token is x.
        still = [*range(STILL, half), *range(half + STILL, LLAMA_D_HEAD)][:VOCAB]
        query = torch.tensor(still) + 3 * LLAMA_D_HEAD
        key = torch.tensor(still) + LLAMA_D_HEAD
        second.self_attn.q_proj.weight[query, TOKEN : TOKEN + VOCAB] = strength * eye
        second.self_attn.k_proj.weight[key, LLAMA_PREVIOUS : LLAMA_PREVIOUS + VOCAB] = eye
        _llama_copy(second.self_attn, 3, TOKEN, LLAMA_PREDICTION)
    return model


def _llama_copy(attention: nn.Module, head: int, source: int, target: int) -> None:
    shared = head // 2 * LLAMA_D_HEAD
    own = head * LLAMA_D_HEAD
    eye = torch.eye(VOCAB)
    attention.v_proj.weight[shared : shared + VOCAB, source : source + VOCAB] = eye
    attention.o_proj.weight[target : target + VOCAB, own : own + VOCAB] = eye
