"""Batches of every task: what is predicted, from what, and that masks are fixed by their seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.corruption import Infilling, Masking, Spans
from experiments.objectives import IGNORED, Batch, NextToken, Objective, Task, loss, losses
from experiments.orders import two_lengths
from experiments.tokens import Rows

BOS, MASK, PAD, VOCAB = 2, 4, 1, 300
SENTINELS = tuple(range(5, 15))
TASKS: list[Task] = [
    NextToken(),
    Masking(MASK, 20, VOCAB),
    Spans(SENTINELS, eos=BOS, start=PAD),
    Infilling(MASK, PAD, start=BOS),
]


def objective(task: Task, seed: int = 0) -> Objective:
    draw = np.random.default_rng(0)
    rows = Rows(draw.integers(20, VOCAB, 4000).astype(np.uint16), 40, 4, 0, 0.0, BOS, 20, VOCAB)
    held_out = torch.from_numpy(draw.integers(20, VOCAB, (23, 40)))
    return Objective(task, two_lengths(rows, 10, 40, 0.0), held_out, seed)


def equal(a: Batch, b: Batch) -> bool:
    return (
        a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
        and torch.equal(a.targets, b.targets)
        and a.tokens == b.tokens
    )


def joined(batches: list[Batch]) -> Batch:
    inputs = {k: torch.cat([b.inputs[k] for b in batches]) for k in batches[0].inputs}
    return Batch(inputs, torch.cat([b.targets for b in batches]), sum(b.tokens for b in batches))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_a_step_is_a_pure_function_of_seed_and_step(task: Task):
    one = objective(task)
    assert equal(one.at(3), objective(task).at(3))
    assert one.at(3).tokens == 4 * 40
    if not isinstance(task, NextToken):
        assert not equal(one.at(3), objective(task, seed=1).at(3))
        # A cycled order repeats the text, and the masks are drawn anew.
        cycled = one.reading(one.order.cycled(160))
        assert torch.equal(cycled.order.at(0), cycled.order.at(1))
        assert not equal(cycled.at(0), cycled.at(1))
    assert equal(one.reading(one.order, seed=1).at(3), objective(task, seed=1).at(3))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_a_held_out_row_has_one_mask_for_all(task: Task):
    one = objective(task)
    whole = joined(one.held_out(batch=16))
    assert len(whole.targets) == 23
    assert equal(whole, joined(objective(task, seed=7).held_out(batch=5)))
    pick, report = (joined(one.held_out(split=s)) for s in ("pick", "report"))
    chosen = torch.arange(23) % 4 == 0
    assert torch.equal(pick.targets, whole.targets[chosen])
    assert torch.equal(report.targets, whole.targets[~chosen])
    few = joined(one.held_out(limit=3 * 40))
    assert torch.equal(few.targets, whole.targets[[0, 11, 22]])
    assert torch.equal(few.inputs["input_ids"], whole.inputs["input_ids"][[0, 11, 22]])


def test_a_split_without_a_row_is_refused():
    one = objective(NextToken())
    few = Objective(one.task, one.order, one.rows[:1])
    with pytest.raises(ValueError, match="no held-out row to report: there are 1 rows"):
        few.held_out(split="report")


def test_loss_is_the_mean_of_the_shifted_cross_entropies():
    batch = objective(NextToken()).at(0)
    logits = torch.randn(4, 40, VOCAB)
    each, predicted = losses(logits, batch)
    assert predicted.sum() == 4 * 39
    tokens = batch.inputs["input_ids"]
    by_hand = [-logits[b, t].log_softmax(-1)[tokens[b, t + 1]] for b in range(4) for t in range(39)]
    assert loss(logits, batch) == pytest.approx(float(sum(by_hand) / len(by_hand)), rel=1e-5)
    assert torch.allclose(loss(logits, batch), each[predicted].mean())
    assert (each[~predicted] == 0).all()


def test_masking_hides_a_fixed_share_as_bert_does():
    rows = torch.randint(20, VOCAB, (400, 40))
    batch = Masking(MASK, 20, VOCAB)(rows, np.random.default_rng(0))
    inputs, chosen = batch.inputs["input_ids"], batch.targets != IGNORED
    assert (chosen.sum(1) == 6).all()
    assert not chosen[:, 0].any()
    assert torch.equal(batch.targets[chosen], rows[chosen])
    assert torch.equal(inputs[~chosen], rows[~chosen])
    masked = (inputs[chosen] == MASK).float().mean()
    itself = (inputs[chosen] == rows[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert itself == pytest.approx(0.1 + 0.1 / 280, abs=0.03)
    assert chosen[:, 1:].float().mean(0).std() < 0.05  # no position is preferred


def test_spans_put_back_give_the_text():
    rows = torch.randint(20, VOCAB, (50, 40))
    batch = Spans(SENTINELS, eos=BOS, start=PAD)(rows, np.random.default_rng(0))
    for row, source, target, given in zip(
        rows.tolist(),
        batch.inputs["input_ids"].tolist(),
        batch.targets.tolist(),
        batch.inputs["decoder_input_ids"].tolist(),
        strict=True,
    ):
        assert given == [PAD, *target[:-1]]
        assert source.pop() == target.pop() == BOS
        spans: dict[int, list[int]] = {}
        for token in target:
            if token in SENTINELS:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        assert list(spans) == list(SENTINELS[:2])  # 15 % of 40 in spans of 3
        assert sum(map(len, spans.values())) == 6
        restored = [t for s in source for t in spans.get(s, [s])]
        assert restored == row
    with pytest.raises(ValueError, match=r"12 spans: the vocabulary has 10 sentinels"):
        Spans(SENTINELS, BOS, PAD)(torch.randint(20, VOCAB, (1, 240)), np.random.default_rng(0))


def test_infilling_leaves_seven_tenths_in_order():
    rows = torch.randint(20, VOCAB, (50, 40))
    batch = Infilling(MASK, PAD, start=BOS)(rows, np.random.default_rng(0))
    assert torch.equal(batch.targets, rows)
    assert torch.equal(batch.inputs["decoder_input_ids"][:, 1:], rows[:, :-1])
    seen = batch.inputs["attention_mask"].bool()
    assert (batch.inputs["input_ids"][~seen] == PAD).all()
    lengths = []
    for row, source, here in zip(rows.tolist(), batch.inputs["input_ids"], seen, strict=True):
        kept = [t for t in source[here].tolist() if t != MASK]
        assert len(kept) == 28
        text = iter(row)
        assert all(t in text for t in kept)  # a subsequence
        lengths.append(int(here.sum()))
    assert len(set(lengths)) > 1
