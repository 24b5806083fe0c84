"""A two-layer OPT with a tokenizer, saved as a checkpoint: what a study can be pointed at."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from experiments.tokens import train_tokenizer


def write_tiny_opt(folder: Path) -> Path:
    """2 layers, 2 heads of 8, 300 tokens, weights wide enough for every branch to matter."""
    text = "def read(self):\n    value = self.value\n" * 20
    tokenizer = train_tokenizer([text], 300, folder)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        init_std=0.3,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(folder)
    return folder
