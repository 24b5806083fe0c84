"""Where does each architecture keep its blocks, output projections, FFNs, mixers and head?

One declarative row per family, dotted paths only. A branch of a block ends in the place where it
can be cut without touching the residual stream:

    head, mixer   the *input* of the output projection: z (split into heads) or ssm_out
    FFN           the *output* of the last module before the residual is added

so a new family is one row. Paths of a stack are relative to the base model (`OPTModel` inside
`OPTForCausalLM`), paths inside a block relative to the block, `lm_head` to the whole model; a path
that a given model does not have (no final norm, no head, an attention-free layer) is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from ablate.components import Stack


class UnknownArchitecture(ValueError):
    """No row of `FAMILIES` describes this model."""


@dataclass(frozen=True)
class Attention:
    """Where one attention lives inside a block."""

    module: str
    """The attention module, whose output carries the pattern."""
    out: str
    """The output projection W_O; its input is z."""
    d_head: str | int = "head_dim"
    """Attribute of `module` that holds the width of one head, or the width itself."""
    q: str = ""
    k: str = ""
    v: str = ""
    """Separate projections, where the family has them."""
    qkv: str = ""
    """The fused projection, where it has that."""
    layout: Literal["separate", "thirds", "grouped"] = "separate"
    """Order of the fused output: `thirds` is all q, all k, all v; `grouped` is, for each key/value
    head, its query heads, then k, then v (one query head per group: NeoX's and Bloom's q k v)."""
    pattern: int = 1
    """Place of the attention pattern in the output of `module` under eager attention."""
    norms: tuple[str, ...] = ()
    """The norm whose output is projected to q, k and v: the first of these that the block has.
    None where the norm stands behind the branch."""


@dataclass(frozen=True)
class Blocks:
    """One stack of blocks and what stands before and behind it."""

    path: str
    """The ModuleList of blocks."""
    attention: Attention | None = None
    cross: Attention | None = None
    ffn: str = ""
    """Module whose output is the FFN branch."""
    mixer: str = ""
    """Output projection of the SSM."""
    mixer_behind: bool = False
    """In a block that has both, the SSM reads what the attention has added; else both read the
    stream as it comes in."""
    embeddings: tuple[str, ...] = ()
    """Token embedding first, then position, type and norm modules."""
    project_in: str = ""
    final_norm: str = ""
    project_out: str = ""
    stack: Stack = ""


@dataclass(frozen=True)
class Anatomy:
    """One family: its stacks and its language-model head. Pass your own as `anatomy=`."""

    family: str
    stacks: tuple[Blocks, ...]
    lm_head: str = "lm_head"


def _separate(module: str, out: str, norms: tuple[str, ...] = ()) -> Attention:
    q, k, v = (f"{module}.{name}_proj" for name in "qkv")
    return Attention(module, f"{module}.{out}", q=q, k=k, v=v, norms=norms)


_SELF_ATTN = _separate("self_attn", "o_proj", ("input_layernorm",))
_SELF_ATTN_OUT = _separate("self_attn", "out_proj")
_BERT_ATTENTION = Attention(
    "attention.self",
    "attention.output.dense",
    "attention_head_size",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
)


_ESM_ATTENTION = replace(_BERT_ATTENTION, norms=("attention.LayerNorm",))


def _llama(
    family: str,
    attention: Attention = _SELF_ATTN,
    ffn: str = "mlp",
    mixer: str = "",
    final_norm: str = "norm",
) -> Anatomy:
    """Llama's layout, which most later decoders keep."""
    blocks = Blocks(
        "layers",
        attention,
        ffn=ffn,
        mixer=mixer,
        embeddings=("embed_tokens",),
        final_norm=final_norm,
    )
    return Anatomy(family, (blocks,))


def _hybrid(family: str) -> Anatomy:
    """Llama's layout with an SSM beside or instead of some attentions."""
    return _llama(family, _SELF_ATTN, "feed_forward", "mamba.out_proj", "final_layernorm")


def _bert(family: str, lm_head: str) -> Anatomy:
    """BERT: the FFN branch is output.dense, before the residual is added and normed."""
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    blocks = Blocks(
        "encoder.layer",
        _BERT_ATTENTION,
        ffn="output.dense",
        embeddings=tuple(f"embeddings.{name}" for name in names),
    )
    return Anatomy(family, (blocks,), lm_head)


_ESM = Blocks(
    "encoder.layer",
    _ESM_ATTENTION,
    ffn="output.dense",
    embeddings=tuple(
        f"embeddings.{name}" for name in ("word_embeddings", "position_embeddings", "layer_norm")
    ),
    final_norm="encoder.emb_layer_norm_after",
)
"""BERT's names with norms before the branches (ESM-2)."""


def _t5_attention(module: str) -> Attention:
    q, k, v = (f"{module}.{name}" for name in "qkv")
    norms = (f"{module.rpartition('.')[0]}.layer_norm",)
    return Attention(
        module, f"{module}.o", "key_value_proj_dim", q=q, k=k, v=v, pattern=2, norms=norms
    )


def _t5(stack: Stack, cross: Attention | None, ffn: str) -> Blocks:
    return Blocks(
        f"{stack}.block",
        _t5_attention("layer.0.SelfAttention"),
        cross,
        ffn=ffn,
        embeddings=(f"{stack}.embed_tokens",),
        final_norm=f"{stack}.final_layer_norm",
        stack=stack,
    )


def _bart(stack: Stack, cross: Attention | None) -> Blocks:
    names = ("embed_tokens", "embed_positions", "layernorm_embedding")
    return Blocks(
        f"{stack}.layers",
        _SELF_ATTN_OUT,
        cross,
        ffn="fc2",
        embeddings=tuple(f"{stack}.{name}" for name in names),
        stack=stack,
    )


def _mamba(family: str) -> Anatomy:
    blocks = Blocks(
        "layers", mixer="mixer.out_proj", embeddings=("embeddings",), final_norm="norm_f"
    )
    return Anatomy(family, (blocks,))


_OPT = Blocks(
    "decoder.layers",
    _separate("self_attn", "out_proj", ("self_attn_layer_norm",)),
    ffn="fc2",
    embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    project_in="decoder.project_in",
    final_norm="decoder.final_layer_norm",
    project_out="decoder.project_out",
)
_GPT2 = Blocks(
    "h",
    Attention("attn", "attn.c_proj", qkv="attn.c_attn", layout="thirds", norms=("ln_1",)),
    ffn="mlp",
    embeddings=("wte", "wpe"),
    final_norm="ln_f",
)
_NEOX = Blocks(
    "layers",
    Attention(
        "attention",
        "attention.dense",
        "head_size",
        qkv="attention.query_key_value",
        layout="grouped",
        norms=("input_layernorm",),
    ),
    ffn="mlp",
    embeddings=("embed_in",),
    final_norm="final_layer_norm",
)
_FUSED = Attention(
    "self_attention",
    "self_attention.dense",
    qkv="self_attention.query_key_value",
    layout="grouped",
    norms=("ln_attn", "input_layernorm"),
)
_ABLATE_HYBRID = Blocks(
    "blocks",
    _separate("attn", "o_proj", ("norm1",)),
    ffn="mlp",
    mixer="mixer.out_proj",
    mixer_behind=True,
    embeddings=("embed_tokens", "positions"),
    final_norm="final_norm",
)
_BLOOM = Blocks(
    "h",
    _FUSED,
    ffn="mlp.dense_4h_to_h",  # BloomMLP adds the residual itself
    embeddings=("word_embeddings", "word_embeddings_layernorm"),
    final_norm="ln_f",
)
_FALCON = Blocks("h", _FUSED, ffn="mlp", embeddings=("word_embeddings",), final_norm="ln_f")

FAMILIES: dict[str, Anatomy] = {
    row.family: row
    for row in (
        Anatomy("opt", (_OPT,)),
        Anatomy("gpt2", (_GPT2,)),
        Anatomy("gpt_neox", (_NEOX,)),
        Anatomy("bloom", (_BLOOM,)),
        Anatomy("falcon", (_FALCON,)),
        Anatomy("ablate_hybrid", (_ABLATE_HYBRID,)),
        *map(
            _llama,
            ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "mixtral"),
        ),
        _llama(
            "phi",
            _separate("self_attn", "dense", ("input_layernorm",)),
            final_norm="final_layernorm",
        ),
        _bert("bert", "cls"),
        _bert("roberta", "lm_head"),
        Anatomy("esm", (_ESM,)),
        Anatomy(
            "t5",
            (
                _t5("encoder", None, "layer.1.DenseReluDense"),
                _t5("decoder", _t5_attention("layer.1.EncDecAttention"), "layer.2.DenseReluDense"),
            ),
        ),
        Anatomy(
            "bart",
            (_bart("encoder", None), _bart("decoder", _separate("encoder_attn", "out_proj"))),
        ),
        *map(_mamba, ("mamba", "mamba2", "falcon_mamba")),
        _hybrid("falcon_h1"),
        _hybrid("jamba"),
        _hybrid("bamba"),
    )
}
"""model_type of a Hugging Face config -> its row."""

BY_POSITION_IDS = frozenset(
    ["gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi"]
    + ["qwen2", "qwen3"]
)
"""Families that know where a token stands by position ids and the attention mask alone, so that
tokens can be laid out in trees and blocks run at chosen positions; each is tested."""


def anatomy_of(hf_model: nn.Module) -> Anatomy:
    """The row that describes `hf_model`, found by its config's model_type.

    Raises UnknownArchitecture, which lists what is known and shows `anatomy=`.
    """
    config = getattr(hf_model, "config", None)
    family = getattr(config, "model_type", None) or type(hf_model).__name__
    if family not in FAMILIES:
        raise unknown_architecture(family, type(hf_model).__name__)
    return FAMILIES[family]


def unknown_architecture(family: str, model: str) -> UnknownArchitecture:
    """The error for a `family` without a row, which lists the known and shows `anatomy=`."""
    return UnknownArchitecture(
        f"no anatomy for {family!r} ({model}): known are {', '.join(sorted(FAMILIES))}; for "
        f"another pass anatomy=Anatomy({family!r}, (Blocks('layers', "
        "Attention('self_attn', 'self_attn.o_proj'), ffn='mlp'),))"
    )


def base_path(hf_model: nn.Module, path: str) -> str:
    """Dotted path from `hf_model` of a path given relative to its base model."""
    prefix = getattr(hf_model, "base_model_prefix", "")
    return f"{prefix}.{path}" if prefix and hasattr(hf_model, prefix) else path


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None where this model has none there."""
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None
