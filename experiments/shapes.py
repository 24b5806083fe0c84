"""What does a model of N blocks and width D look like in each family?

One row a family: opt, gpt2 and llama decode, bert and esm encode, t5 and bart do both (N blocks in
each stack). All are Hugging Face's own classes with their own initialisers, without dropout, the
FFN four times as wide as the stream (llama's gated one 8/3 times, which is as many weights), the
output tied to the embedding. A hybrid's blocks are written (the grammar of experiments.hybrids); it
begins by its unified law, and its Mambas are twice as wide as the stream, as Mamba's own.

Where it misleads: families differ in more than their kind. opt, gpt2, llama, esm and t5 normalise
before each branch, bert and bart after it; t5 has relative positions, llama and esm rotary ones.
Trained to predict masked tokens at a width of 64, bert is still on its plateau after 16M tokens
(4.85 nat), esm, which is the same model but for norms and positions, at 3.9 after 2M. N is a
hybrid's number of layers only where its blocks are a preset; its gated and plain FFNs are equally
wide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.corruption import Infilling, Masking, Spans, span_count
from experiments.families import Family, TaskName
from experiments.objectives import NextToken, Task
from experiments.tokens import BOS, PAD, SPECIAL
from experiments.translation import Translation

MASK = "<mask>"
_BOS, _PAD = SPECIAL.index(BOS), SPECIAL.index(PAD)


@dataclass(frozen=True)
class Shape:
    """N, D, heads, the longest row, and the number of ids; `blocks` is for a hybrid."""

    layers: int
    d_model: int
    heads: int
    context: int
    vocab: int
    blocks: str = ""


def extra_tokens(family: Family, task: TaskName, context: int) -> tuple[str, ...]:
    """The special tokens that a task needs besides the usual four."""
    if task == "denoising" and family == "t5":
        return tuple(f"<extra_id_{i}>" for i in range(span_count(context)))
    return (MASK,) if task in ("mlm", "denoising") else ()


def task_of(family: Family, task: TaskName, context: int, vocab: int) -> Task:
    """The task, on the ids of this project's own tokenizer."""
    extra = range(len(SPECIAL), len(SPECIAL) + len(extra_tokens(family, task, context)))
    start = _PAD if family == "t5" else _BOS
    if task == "lm":
        return NextToken()
    if task == "mlm":
        return Masking(extra[0], extra.stop, vocab)
    if task == "translation":
        return Translation(extra.stop, vocab, eos=_BOS, start=start)
    if family == "t5":
        return Spans(tuple(extra), eos=_BOS, start=start)
    return Infilling(extra[0], _PAD, start=start)


def build(family: Family, shape: Shape) -> Any:
    """The model, drawn from torch's global generator as its own initialiser draws it."""
    return _BUILDERS[family](shape)


def _opt(shape: Shape) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        word_embed_proj_dim=shape.d_model,
        ffn_dim=4 * shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
        pad_token_id=_PAD,
    )
    return OPTForCausalLM(config)


def _gpt2(shape: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=shape.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
        pad_token_id=_PAD,
    )
    return GPT2LMHeadModel(config)


def _llama(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=round(8 * shape.d_model / 3 / 8) * 8,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
        pad_token_id=_PAD,
    )
    return LlamaForCausalLM(config)


def _hybrid(shape: Shape) -> Any:
    from experiments.hybrids.architecture.grammar import blocks_of, written
    from experiments.hybrids.architecture.model import Hybrid, HybridConfig

    blocks = blocks_of(shape.blocks, shape.layers)
    gated = all(block.ffn != "gelu" for block in blocks)
    config = HybridConfig(
        blocks=written(blocks),
        vocab_size=shape.vocab,
        d_model=shape.d_model,
        d_ff=round(8 * shape.d_model / 3 / 8) * 8 if gated else 4 * shape.d_model,
        heads=shape.heads,
        expand=2,
        n_positions=shape.context,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
        pad_token_id=_PAD,
    )
    return Hybrid(config)


def _encoder(shape: Shape) -> dict[str, Any]:
    """What the configs of BERT and of ESM call alike."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.d_model,
        "intermediate_size": 4 * shape.d_model,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.context,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": _BOS,
        "eos_token_id": _BOS,
        "pad_token_id": _PAD,
    }


def _bert(shape: Shape) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_encoder(shape)))


def _esm(shape: Shape) -> Any:
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        **_encoder(shape),
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=False,
        tie_word_embeddings=True,
    )
    return EsmForMaskedLM(config)


def _t5(shape: Shape) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=shape.vocab,
        d_model=shape.d_model,
        d_kv=shape.d_model // shape.heads,
        d_ff=4 * shape.d_model,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_heads=shape.heads,
        dropout_rate=0.0,
        eos_token_id=_BOS,
        pad_token_id=_PAD,
    )
    config.decoder_start_token_id = _PAD
    return T5ForConditionalGeneration(config)


def _bart(shape: Shape) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=shape.vocab,
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.d_model,
        decoder_ffn_dim=4 * shape.d_model,
        max_position_embeddings=shape.context,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        decoder_start_token_id=_BOS,
        forced_eos_token_id=None,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
        pad_token_id=_PAD,
    )
    return BartForConditionalGeneration(config)


_BUILDERS: Mapping[Family, Callable[[Shape], Any]] = {
    "opt": _opt,
    "gpt2": _gpt2,
    "llama": _llama,
    "hybrid": _hybrid,
    "bert": _bert,
    "esm": _esm,
    "t5": _t5,
    "bart": _bart,
}
