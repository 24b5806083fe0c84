"""What a packed batch asks of a forward: its tokens, its places, its shared sources."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ablate.hooked import HookedModel
from probes.readings import inputs_of, reading_of
from probes.scoring import prepare
from probes.tasks import Example
from tests.families import tiny
from tests.probes.conftest import VOCAB

EXAMPLES = (
    Example("for name in names:\n    if name", (" names:", " self.values:", " in"), 1, 0),
    Example("for name in names:\n    with open", ("(path", ")"), 0, 1),
)
LAYOUTS = [("opt", "tree"), ("llama", "tree"), ("opt", "rows"), ("mamba", "rows"), ("t5", None)]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_every_scored_token_is_read_where_it_is_predicted(
    family: str, layout: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = HookedModel(tiny(family, vocab_size=VOCAB), tokenizer)
    prepared = prepare(model, EXAMPLES, layout=layout)
    (batch,) = prepared.batches
    reading = reading_of(model, batch, prepared.layout)
    ids = reading.inputs.get("decoder_input_ids", reading.inputs["input_ids"])
    pairs = [pair for example in EXAMPLES for pair in example.pairs]
    for owner, (_, choice) in enumerate(pairs):
        mine = batch.entry_owner == owner
        said = reading.targets[mine].tolist()
        assert tokenizer.decode(said).strip() == choice.strip()
        row, position = reading.positions[mine].unbind(1)
        # Where the second token is read, the first one has just been seen.
        assert ids[row, position][1:].tolist() == said[:-1]
    assert reading.batch == len(ids)


@pytest.mark.parametrize("shared", [True, False])
def test_an_encoder_reads_each_context_once_if_it_may(
    shared: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = HookedModel(tiny("t5", vocab_size=VOCAB), tokenizer)
    prepared = prepare(model, EXAMPLES)
    (batch,) = prepared.batches
    reading = reading_of(model, batch, prepared.layout, shared=shared)
    whole = inputs_of(model, batch, prepared.layout)
    rows = torch.arange(4) if reading.source_rows is None else reading.source_rows
    assert len(reading.inputs["input_ids"]) == (2 if shared else 4)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(reading.inputs[name][rows], whole[name])
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        assert torch.equal(reading.inputs[name], whole[name])


def test_a_tree_mask_has_the_dtype_of_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    model = HookedModel(tiny("opt", vocab_size=VOCAB, dtype=torch.bfloat16), tokenizer)
    prepared = prepare(model, EXAMPLES)
    inputs = reading_of(model, prepared.batches[0], prepared.layout).inputs
    assert inputs["attention_mask"].dtype == torch.bfloat16
    seen = inputs["attention_mask"][0, 0] == 0
    assert seen.diagonal().all()
    assert not seen.triu(1).any()
    # As many tokens before a slot as its position says: the branch above it, and itself.
    assert torch.equal(seen.sum(1) - 1, inputs["position_ids"][0])
