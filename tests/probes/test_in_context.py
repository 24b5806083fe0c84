"""The four numbers on a model whose induction circuit was written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ablate import Head, HookedModel, Mask
from probes.in_context import in_context_measurements
from tests.induction_model import POSITIONS, VOCAB, induction_opt


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<bos>": 0} | {f"t{i}": i for i in range(1, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<bos>")), bos_token="<bos>"
    )


def test_the_hand_built_head_scores_one_and_pays_off(tokenizer: PreTrainedTokenizerFast):
    model = induction_opt()
    text = torch.randint(1, VOCAB, (500,), generator=torch.Generator().manual_seed(0))
    found = in_context_measurements(model, tokenizer, text, POSITIONS, None)
    assert found["prefix_matching"] == pytest.approx(1.0, abs=1e-3)
    assert found["layer0_prefix_matching"] < 0.2
    assert found["second_copy_loss"] < 0.5 < found["first_copy_loss"]
    assert "late_loss" not in found  # the context ends before position 500
    # The attention implementation is what it was.
    assert model.config._attn_implementation == "sdpa"


def test_masking_the_head_takes_the_skill_but_not_the_attention(
    tokenizer: PreTrainedTokenizerFast,
):
    model = HookedModel(induction_opt())
    text = torch.randint(1, VOCAB, (500,), generator=torch.Generator().manual_seed(0))
    with model.ablated(Mask([Head(1, 1)])):
        found = in_context_measurements(model.model, tokenizer, text, POSITIONS, None)
    assert found["second_copy_loss"] == pytest.approx(math.log(VOCAB), abs=1e-4)
    assert found["prefix_matching"] == pytest.approx(1.0, abs=1e-3)


def test_a_limit_takes_windows_from_everywhere(tokenizer: PreTrainedTokenizerFast):
    model = induction_opt()
    # The first half repeats one token, which the circuit predicts; the second half is noise.
    noise = torch.randint(1, VOCAB, (1000,), generator=torch.Generator().manual_seed(0))
    text = torch.cat([torch.full((1000,), 3), noise])
    whole = in_context_measurements(model, tokenizer, text, POSITIONS, None)["validation_loss"]
    some = in_context_measurements(model, tokenizer, text, POSITIONS, 500)["validation_loss"]
    assert some == pytest.approx(whole, rel=0.2)
