"""Loss by position against one position at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from probes.loss import loss_by_position, windows


def test_loss_by_position_equals_one_position_at_a_time():
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ).eval()
    tokens = torch.randint(4, 40, (3, 9))
    losses = loss_by_position(model, tokens, batch_tokens=18)
    assert losses.shape == (3, 8)
    for row in range(3):
        for t in range(8):
            with torch.no_grad():
                logits = model(tokens[row : row + 1, : t + 1]).logits[0, -1]
            expected = -logits.log_softmax(-1)[tokens[row, t + 1]]
            assert losses[row, t] == pytest.approx(float(expected), abs=1e-5)


def test_windows_replace_their_first_token_by_bos():
    rows = windows(torch.arange(10, 31), 5, bos=2)
    assert rows.shape == (4, 5)
    assert (rows[:, 0] == 2).all()
    assert rows[1, 1:].tolist() == [16, 17, 18, 19]
    assert len(windows(torch.arange(10, 31), 5, bos=2, limit=2)) == 2
    with pytest.raises(ValueError, match="shorter context"):
        windows(torch.arange(3), 5, bos=2)
