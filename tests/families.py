"""Tiny random models of every family `ablate.anatomy` knows, built from configs (no hub).

    model = tiny("llama")                       # 3 layers, d_model 32, eval mode, seeded weights
    inputs = inputs_for(model)                  # what its forward takes, as a dict of tensors

`tiny` builds a new model at each call, so a test may do what it likes with it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 61
HEADS = 4

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
} | _IDS
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
} | _IDS
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": HEADS} | _IDS
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": 48,
} | _IDS
_SSM = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8} | _IDS
_SSM_HEADS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
} | _IDS
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
_HYBRID = {
    "vocab_size": VOCAB,
    "blocks": "mamba-rms,learned-attention-mamba_ffn-rms,rope-attention-swiglu-rms",
    "d_model": 32,
    "heads": HEADS,
    "d_state": 8,
    "expand": 2,
    "n_positions": 64,
} | _IDS
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt-350m": (
        "OPTForCausalLM",
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": HEADS, "n_positions": 64}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        | _IDS,
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _LLAMA | {"head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", _LLAMA),
    "bloom": ("BloomForCausalLM", "BloomConfig", _BLOOM),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-rw": (
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "falcon-7b": ("FalconForCausalLM", "FalconConfig", _FALCON | {"multi_query": True}),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-bare": ("BertModel", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "esm": (
        "EsmForMaskedLM",
        "EsmConfig",
        _BERT
        | {"position_embedding_type": "rotary", "mask_token_id": 4, "emb_layer_norm_before": False},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mamba": ("MambaForCausalLM", "MambaConfig", _SSM),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", _SSM),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        _SSM | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        _LLAMA | _SSM_HEADS | {"head_dim": 8, "mamba_d_ssm": 64},
    ),
    "jamba": ("JambaForCausalLM", "JambaConfig", _LLAMA | _JAMBA),
    "bamba": ("BambaForCausalLM", "BambaConfig", _LLAMA | _SSM_HEADS | {"attn_layer_indices": [1]}),
    "ablate_hybrid": ("Hybrid", "HybridConfig", _HYBRID),
}
"""name -> (model class, config class, arguments of the config)"""

FAMILIES = tuple(CONFIGS)
TWO_STACKS = ("t5", "t5-gated", "bart")
ENCODERS = ("bert", "bert-bare", "roberta", "esm")
DECODERS = tuple(name for name in FAMILIES if name not in (*TWO_STACKS, *ENCODERS))


def tiny(
    family: str,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: object,
) -> nn.Module:
    """A random model of `family` in eval mode; `changes` go into its config.

    Weights are drawn wide (std 0.3 where the family has a plain init std) and biases are not left
    at zero, so that every branch visibly matters to the logits.
    """
    name, config_name, arguments = CONFIGS[family]
    config = class_of(config_name)(**(arguments | changes))
    # Families without an sdpa path (Mamba, Bloom) have eager only; Falcon cannot switch later.
    sdpa = class_of(name)._supports_sdpa
    config._attn_implementation = attention if sdpa else "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = class_of(name)(config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias") or "norm" in path.lower() or "ln_" in path:
                    parameter += 0.2 * torch.randn_like(parameter)
                elif parameter.ndim >= 2 and not path.endswith(("A_log", "conv1d.weight")):
                    parameter.normal_(std=0.3)
    model.config.architectures = [name]
    return model.to(dtype).eval()


def class_of(name: str) -> Any:
    """A model or config class: transformers', or this project's own."""
    if name in ("Hybrid", "HybridConfig"):
        from experiments.hybrids.architecture import model

        return getattr(model, name)
    return getattr(hf, name)


def tokens(batch: int = 2, pos: int = 9, seed: int = 0) -> Tensor:
    """Random token ids [batch, pos] above the special ones."""
    return torch.randint(3, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


def inputs_for(
    model: nn.Module, batch: int = 2, pos: int = 9, seed: int = 0, padded: bool = False
) -> dict[str, Tensor]:
    """Keyword tensors for one forward of `model`; `padded` masks the end of the last example."""
    inputs = {"input_ids": tokens(batch, pos, seed)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padded:
        inputs["attention_mask"][-1, pos - 3 :] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(batch, pos - 2, seed + 1)
    return inputs


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of one forward without gradients (hidden states for a model without a head)."""
    with torch.no_grad():
        return model(**inputs)[0]
