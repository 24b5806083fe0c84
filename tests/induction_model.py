"""A two-layer OPT whose induction circuit is written by hand: its answers are known exactly.

The residual stream has four one-hot parts: token, position, previous token, prediction.

    L0H0   attends to the position before; copies that token into `previous`
    L1H1   attends where `previous` equals the current token; copies that token into `prediction`

All other heads and both FFNs write nothing. LayerNorms are the identity on the vectors that occur,
because every such vector has the same number of ones: gain = std, bias = mean.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

VOCAB, POSITIONS, HEADS = 25, 50, 3
BOS = 0
D_HEAD = POSITIONS
D_MODEL = HEADS * D_HEAD
TOKEN, POSITION, PREVIOUS, PREDICTION = 0, VOCAB, VOCAB + POSITIONS, 2 * VOCAB + POSITIONS


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
