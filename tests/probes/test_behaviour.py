"""Losses under many masks against one plain forward a mask, copies against loops, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ablate import Head, HookedModel, Mask, mean_fill
from probes.behaviour import context_scores, copies, copy_losses, losses, spans, text_rows
from probes.loss import loss_by_position
from probes.repeats import drawn
from tests.families import DECODERS, ENCODERS, TWO_STACKS, tiny, tokens
from tests.induction_model import VOCAB, induction_opt


def some_masks(model: HookedModel) -> list[Mask]:
    components = [c for c in model.components if c.stack != "encoder"]
    return [Mask(), Mask(components[:1]), Mask(components[1::2]), Mask(components)]


def plainly(model: HookedModel, ids: torch.Tensor, mask: Mask) -> torch.Tensor:
    """loss_by_position of one ablated forward; the decoder's where there are two stacks."""
    with torch.no_grad(), model.ablated(mask):
        if not model.model.config.is_encoder_decoder:
            return loss_by_position(model.model, ids)
        start = torch.full((len(ids), 1), model.model.config.decoder_start_token_id)
        logits = model.model(input_ids=start, decoder_input_ids=ids).logits
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", [*DECODERS, *TWO_STACKS])
def test_losses_are_those_of_one_forward_a_mask(family: str):
    model = HookedModel(tiny(family))
    ids, masks = tokens(3, 11), some_masks(model)
    chosen = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[:, 0] = False
    found = losses(model, masks, ids, chosen)
    expected = torch.stack([plainly(model, ids, mask)[chosen[:, 1:]] for mask in masks])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - found[0]).abs().max() > 1e-2  # the masks change something


def test_a_fill_stands_in():
    model = HookedModel(tiny("llama"))
    ids = tokens(2, 9)
    fill = mean_fill(model, [{"input_ids": tokens(4, 9, seed=5)}])
    chosen = torch.ones(2, 9, dtype=torch.bool)
    chosen[:, 0] = False
    mask = Mask([Head(0, 1)])
    with model.ablated(mask, fill):
        expected = loss_by_position(model.model, ids).flatten()
    found = losses(model, [mask], ids, chosen, fill=fill)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - losses(model, [mask], ids, chosen)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("bos", [0, None])
def test_copies_are_found_by_equality(bos: int | None):
    block, other = [5, 3, 9, 4], [8, 2, 6, 7]
    for rows in (
        [block * 3, other * 3],
        [[11, *block, 12, 13, *block, 14, *block], [*other, 15, 16, *other, 17, 18, *other]],
    ):
        ids = torch.tensor([([] if bos is None else [bos]) + row for row in rows])
        copy, place = copies(ids)
        for row, which in enumerate((block, other)):
            seen: dict[int, int] = {}
            for t, token in enumerate(ids[row].tolist()):
                if token in which[1:]:  # the first of a block is announced by nothing
                    assert copy[row, t] == seen.get(token, 0)
                    assert place[row, t] == which[1:].index(token)
                    seen[token] = seen.get(token, 0) + 1
                else:
                    assert copy[row, t] == place[row, t] == -1
            assert set(seen.values()) == {3}


def test_copy_losses_say_which_token_of_which_copy():
    model = HookedModel(tiny("gpt2"))
    masks = [Mask(), Mask([Head(1, 2)])]
    frame = copy_losses(model, drawn(model, (5, 7), 3, (4, 9, 2), 2), masks)
    checked = 0
    for batch in drawn(model, (5, 7), 3, (4, 9, 2), 3):
        ids = batch.repeated[""]
        for number, mask in enumerate(masks):
            expected = plainly(model, ids, mask)
            for row, seed in enumerate(batch.seeds):
                for copy in range(3):
                    for place in range(batch.length - 1):
                        at = 1 + copy * batch.length + 1 + place  # behind BOS and the first token
                        cell = frame.query(
                            f"mask == {number} and seed == {seed} and length == {batch.length} "
                            f"and copy == {copy} and place == {place}"
                        )
                        assert cell["loss"].item() == pytest.approx(
                            float(expected[row, at - 1]), abs=2e-5
                        )
                        checked += 1
    assert checked == len(frame) == 2 * 3 * 3 * (4 + 6)


def test_the_hand_written_circuit_copies_and_its_decoder_has_no_help():
    model = HookedModel(induction_opt())
    batches = list(drawn(model, (8,), 3, (0, 1), 8))
    frame = copy_losses(model, batches, [Mask(), Mask([Head(1, 1)])])
    means = frame.groupby(["mask", "copy"])["loss"].mean()
    assert means[0, 1] < 0.01
    assert means[0, 2] < 0.01
    assert means[0, 0] > 2
    assert means[1].tolist() == pytest.approx([math.log(VOCAB)] * 3, abs=1e-4)
    # An encoder that saw the same block would tell the answer in the first copy.
    bart = HookedModel(tiny("bart"))
    (batch,) = drawn(bart, (6,), 3, (0,), 8)
    ids = batch.repeated["decoder"]
    expected = plainly(bart, ids, Mask())
    found = copy_losses(bart, [batch])
    at = [1 + 6 * c + 1 + p for c in range(3) for p in range(5)]
    assert found["loss"].tolist() == pytest.approx(
        [float(expected[0, t - 1]) for t in at], abs=2e-5
    )


@pytest.mark.parametrize("context", [16, 24, 40, 64])
def test_context_scores_are_means_of_positions(context: int):
    model = HookedModel(tiny("llama"))
    rows = text_rows(model, tokens(1, 700)[0], context=context, limit=5)
    masks = some_masks(model)
    frame = context_scores(model, rows, masks, batch=2)
    frame = frame.pivot(index=["mask", "window"], columns="measure", values="value")
    (a, b), (c, d) = spans(context)
    for number, mask in enumerate(masks):
        by_position = plainly(model, rows, mask)
        for window in range(5):
            early = float(by_position[window, a:b].mean())
            late = float(by_position[window, c:d].mean())
            cells = frame.loc[(number, window)]
            assert cells["early_loss"] == pytest.approx(early, abs=2e-5)
            assert cells["late_loss"] == pytest.approx(late, abs=2e-5)
            assert cells["icl_score"] == pytest.approx(late - early, abs=4e-5)


def test_early_and_late_are_scaled_from_512():
    assert spans(512) == ((20, 60), (400, 500))
    assert spans(2048) == ((80, 240), (1600, 2000))
    for context in range(16, 700):
        (a, b), (c, d) = spans(context)
        assert 0 <= a < b <= c < d <= context - 1
    with pytest.raises(ValueError, match="15 tokens asked for: give 16 or more"):
        spans(15)


def test_text_rows_are_windows_from_everywhere():
    model = HookedModel(tiny("opt"))  # 64 positions, BOS 1
    text = torch.arange(3, 1003) % 61
    rows = text_rows(model, text)
    assert rows.shape == (15, 64)
    assert (rows[:, 0] == 1).all()
    assert torch.equal(rows[:, 1:], text[:960].view(15, 64)[:, 1:])
    some = text_rows(model, text, limit=3)
    assert torch.equal(some, rows[[0, 7, 14]])
    assert text_rows(model, text, context=20, limit=None).shape == (50, 20)
    model.model.config.bos_token_id = None
    assert torch.equal(text_rows(model, text), text[:960].view(15, 64))
    t5 = HookedModel(tiny("t5"))
    start = t5.model.config.decoder_start_token_id
    assert (text_rows(t5, text, context=30)[:, 0] == start).all()
    for options, message in (
        ({"context": 65}, "windows of 65 tokens asked for: .* positions for 64"),
        ({"limit": 0}, "0 windows of text"),
    ):
        with pytest.raises(ValueError, match=message):
            text_rows(model, text, **options)
    with pytest.raises(ValueError, match="the text has 10 tokens"):
        text_rows(model, text[:10])


def test_the_tokenizer_says_how_a_text_starts(tokenizer):
    model = HookedModel(tiny("opt", vocab_size=320), tokenizer)
    rows = text_rows(model, torch.arange(100) + 5)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()


def test_rows_of_a_batch_do_not_change_with_memory():
    model = HookedModel(induction_opt())
    batches = list(drawn(model, (5, 8), 3, (0, 1, 2), 8))
    masks = some_masks(model)
    whole = copy_losses(model, batches, masks)
    little = copy_losses(model, batches, masks, memory=1)
    np.testing.assert_allclose(little["loss"], whole["loss"], atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_predict_no_next_token(family: str):
    model = HookedModel(tiny(family))
    chosen = torch.ones(2, 9, dtype=torch.bool)
    chosen[:, 0] = False
    with pytest.raises(ValueError, match="does not predict the next token"):
        losses(model, [Mask()], tokens(2, 9), chosen)


def test_bad_input_is_one_clear_line():
    model = HookedModel(tiny("opt"))
    ids = tokens(2, 9)
    chosen = torch.zeros(2, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="choose later tokens"):
        losses(model, [Mask()], ids, chosen)
    chosen[0, 0] = chosen[1, 3] = True
    with pytest.raises(ValueError, match="choose later tokens"):
        losses(model, [Mask()], ids, chosen)
    with pytest.raises(ValueError, match="no rows asked for"):
        copy_losses(model, [])
    with torch.no_grad():
        model.model.model.decoder.layers[1].fc1.weight.fill_(math.inf)
    chosen[0, 0] = False
    with pytest.raises(ValueError, match="a loss under the mask '' is not finite"):
        losses(model, [Mask()], ids, chosen)
