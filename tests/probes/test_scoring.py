"""Scoring: the fast way equals one forward per choice, and lm-eval's own model, to 1e-4."""

import math
from contextlib import redirect_stderr
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch

from ablate.components import Head
from ablate.hooked import HookedModel
from ablate.importance import gradient_importance
from ablate.masks import Mask
from probes.scoring import (
    answer_losses,
    log_likelihoods,
    prepare,
    score,
    score_choices,
    score_masks,
    summarise,
)
from probes.task_names import BUILTIN_FOLDER, quiet
from probes.tasks import Example, load_tasks
from tests.families import DECODERS, TWO_STACKS, tiny
from tests.probes.conftest import VOCAB

SHOWN = "for name in names:\n    read(name)\n\n"
EXAMPLES = (
    Example(f"{SHOWN}if name in", (" names:", " self.values:", " x"), 1, 0, "a"),
    Example(f"{SHOWN}with open(path", (", mode) as file", ")"), 0, 1, "a"),
    Example("return ", ("file", "a much longer choice than the other one"), 0, 2, "b"),
    Example("", ("def", " read"), 1, 3, "b"),
    Example("unused", (" name", " name"), 1, 4, "b", contexts=("one path", "another longer path")),
    Example(SHOWN, (" names",), 0, 5, "c"),
)


def small(family, **changes):
    """A random model of `family` that the test tokenizer fits."""
    size = {"max_position_embeddings": 128} if family in ("opt", "llama", "bart") else {}
    return tiny(family, vocab_size=VOCAB, **(size | changes))


def slow(model, example, tokenizer):
    """(Σ log p, all arg-max) of every choice: one whole forward each, no packing, no padding."""
    found = []
    for context, choice in example.pairs:
        if context:
            blanks = len(context) - len(context.rstrip())
            head = tokenizer.encode(context[: len(context) - blanks])
            whole = tokenizer.encode(context + choice)
        else:
            head = tokenizer.encode("")
            whole = head + tokenizer.encode(choice, add_special_tokens=False)
        if model.config.is_encoder_decoder:
            text = context[len(context.rstrip()) :] + choice
            target = tokenizer.encode(text, add_special_tokens=False)
            start = [model.config.decoder_start_token_id, *target]
            source, ids = torch.tensor([head]), torch.tensor([start])
            logits = model(input_ids=source, decoder_input_ids=ids[:, :-1]).logits
        else:
            ids, target = torch.tensor([whole]), whole[len(head) :]
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        log_p = logits[0, -len(target) :].double().log_softmax(-1)
        goal = torch.tensor(target)
        total = float(log_p.gather(1, goal[:, None]).sum())
        found.append((total, bool((log_p.argmax(-1) == goal).all())))
    return found


@pytest.mark.parametrize("family", [*DECODERS, *TWO_STACKS])
def test_equals_one_forward_per_choice(family, tokenizer):
    model = HookedModel(small(family), tokenizer)
    with torch.no_grad():
        expected = [slow(model.model, example, tokenizer) for example in EXAMPLES]
    layouts = (None, "rows") if family in DECODERS else (None,)
    for layout in layouts:
        for batch_tokens in (1, 90, 4096):
            prepared = prepare(model, EXAMPLES, layout=layout, batch_tokens=batch_tokens)
            (nats,), (greedy,) = log_likelihoods(model, prepared)
            flat = [pair for pairs in expected for pair in pairs]
            assert np.allclose(nats, [value for value, _ in flat], atol=1e-4)
            assert greedy.tolist() == [exact for _, exact in flat]


def test_trees_work_under_eager_attention_and_in_bfloat16(tokenizer):
    whole = HookedModel(small("opt"), tokenizer)
    eager = HookedModel(small("opt", attention="eager"), tokenizer)
    half = HookedModel(small("opt", dtype=torch.bfloat16), tokenizer)
    nats = log_likelihoods(whole, prepare(whole, EXAMPLES))[0][0]
    assert np.allclose(log_likelihoods(eager, prepare(eager, EXAMPLES))[0][0], nats, atol=1e-4)
    assert np.allclose(log_likelihoods(half, prepare(half, EXAMPLES))[0][0], nats, rtol=0.05)


@pytest.mark.parametrize("family", ["opt", "mamba2", "bart"])
def test_masks_act_in_every_forward(family, tokenizer):
    model = HookedModel(small(family), tokenizer)
    prepared = prepare(model, EXAMPLES, batch_tokens=90)
    clean = log_likelihoods(model, prepared)[0][0]
    with model.ablated(Mask(model.components[::2])), torch.no_grad():
        hurt = log_likelihoods(model, prepared)[0][0]
        expected = [value for e in EXAMPLES for value, _ in slow(model.model, e, tokenizer)]
    assert np.allclose(hurt, expected, atol=1e-4)
    assert not np.allclose(hurt, clean, atol=1e-2)
    assert np.array_equal(log_likelihoods(model, prepared)[0][0], clean)


@pytest.mark.parametrize("task", ["code_continuation", "pair_mapping"])
def test_equals_lm_evals_own_model(task, tokenizer):
    """Its Hugging Face model, its requests, its grading: nats to 1e-4, and every metric."""
    hf_model = small("opt", max_position_embeddings=512)
    model = HookedModel(hf_model, tokenizer)
    (own,) = load_tasks([task], 5, limit=6)
    frame = score_choices(model, own.examples)
    with quiet(), redirect_stderr(StringIO()):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        harness = HFLM(
            pretrained=hf_model, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=4
        )
        manager = TaskManager(include_path=str(BUILTIN_FOLDER), include_defaults=False)
        theirs = manager.load(task)["tasks"][task]
        theirs.set_config("num_fewshot", 5)
        theirs.build_all_requests(limit=6)
        answers = harness.loglikelihood(theirs.instances, disable_tqdm=True)
    by_doc = {}
    for instance, answer in zip(theirs.instances, answers, strict=True):
        by_doc.setdefault(instance.doc_id, []).append((answer, instance.doc))
    for row in frame.itertuples():
        pairs = by_doc[row.doc_id]
        assert np.allclose(row.loglik, [answer[0] for answer, _ in pairs], atol=1e-4)
        graded = theirs.process_results(pairs[0][1], [answer for answer, _ in pairs])
        assert graded == {"acc": row.acc, "acc_norm": row.acc_norm}


def test_metrics_by_hand():
    example = Example("", ("a", "bb bb", "c"), 1, golds=(1, 2))
    nats = np.array([-2.0, -3.0, -2.5])
    predicted, marks = example.marks(nats, np.array([True, False, False]))
    # By characters −2, −0.6, −2.5: the long choice wins, and is right.
    assert (predicted, marks) == (0, {"acc": 0.0, "acc_norm": 1.0, "exact_match": 0.0})
    assert example.marks(nats, np.array([False, False, True]))[1]["exact_match"] == 1
    alone = Example("", ("word",), 0)
    assert alone.marks(np.array([-9.0]), np.array([True])) == (0, {"acc": 1, "exact_match": 1})
    assert alone.marks(np.array([-9.0]), np.array([False]))[0] == -1
    own = Example("", ("a", "b"), 0, grade=lambda pairs: {"acc": pairs[1][0] > -1, "f1": (0, 1)})
    assert own.marks(np.array([-3.0, -0.5]), np.array([False, False])) == (1, {"acc": 1.0})


def test_summary_has_lm_evals_standard_error():
    rows = [
        {"task": "t", "shots": 5, "acc": float(hit), "acc_norm": math.nan, "exact_match": 0.0}
        for hit in (1, 0, 1, 1)
    ]
    summary = summarise(pd.DataFrame(rows)).set_index("metric")
    assert list(summary.index) == ["acc", "exact_match"]
    assert summary.value["acc"] == 0.75
    assert summary.stderr["acc"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert summary.examples["acc"] == 4


def test_frame_tells_what_was_answered(tokenizer):
    model = HookedModel(small("opt"), tokenizer)
    frame = score_choices(model, EXAMPLES)
    assert frame.doc_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert frame.task.tolist() == ["a", "a", "b", "b", "b", "c"]
    assert [len(nats) for nats in frame.loglik] == [3, 2, 2, 2, 2, 1]
    for row in frame[:5].itertuples():
        assert row.predicted == int(np.argmax(row.loglik))
        assert row.acc == float(row.predicted == row.gold)
    assert frame.acc_norm[:5].isin([0, 1]).all()
    assert math.isnan(frame.acc_norm[5])


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_answer_losses_are_mean_nats_and_differentiable(family, tokenizer):
    model = HookedModel(small(family), tokenizer)
    # The same example twice: importance counts both.
    examples = (*EXAMPLES[:4], EXAMPLES[0])
    layout = "rows" if family == "opt" else None
    answers = prepare(model, examples, answers_only=True, layout=layout, batch_tokens=60)
    losses = {}
    for batch in answers.batches:
        found = answer_losses(model, answers, batch)
        assert found.requires_grad
        rows = (batch.slots[batch.entry_slot] // batch.ids.shape[1]).tolist()
        owners = dict(zip(rows, batch.entry_owner.tolist(), strict=True))
        losses |= {owners[row]: loss for row, loss in enumerate(found.tolist())}
    with torch.no_grad():
        for i, example in enumerate(examples):
            nats, _ = slow(model.model, example, tokenizer)[example.gold]
            context, choice = example.pairs[example.gold]
            blanks = context[len(context.rstrip()) :]
            whole = len(tokenizer.encode(context + choice))
            count = whole - len(tokenizer.encode(context.rstrip()))
            if family == "t5":
                count = len(tokenizer.encode(blanks + choice, add_special_tokens=False))
            assert losses[i] == pytest.approx(-nats / count, abs=1e-4)
    importance = gradient_importance(
        model, answers.batches, lambda batch: answer_losses(model, answers, batch)
    )
    assert importance.gate.shape == (5, len(model.components))
    assert bool((importance.token > 0).any(0).all())


def test_losses_of_shared_rows_are_refused(tokenizer):
    model = HookedModel(small("opt"), tokenizer)
    prepared = prepare(model, EXAMPLES)
    with pytest.raises(ValueError, match="prepare with answers_only=True"):
        answer_losses(model, prepared, prepared.batches[0])


def test_long_prompts_are_cut_on_the_left_and_counted(tokenizer):
    long = Example("name = value\n" * 40 + "read", ("(name)", "(x"), 0, doc_id=7, task="long")
    model = HookedModel(small("opt"), tokenizer)
    prepared = prepare(model, [*EXAMPLES, long])
    assert prepared.truncated == (False,) * 6 + (True,)
    assert prepared.n_truncated == 1
    nats = log_likelihoods(model, prepared)[0][0]
    # lm-eval's rule: the last 128 + 1 ids, of which the very last is only predicted.
    head = tokenizer.encode(long.context)
    for choice, value in zip(long.choices, nats[-2:], strict=True):
        ids = torch.tensor([tokenizer.encode(long.context + choice)[-129:]])
        count = len(tokenizer.encode(long.context + choice)) - len(head)
        with torch.no_grad():
            log_p = model.model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
        picked = log_p.gather(1, ids[0, 1:, None])[-count:]
        assert value == pytest.approx(float(picked.sum()), abs=1e-4)
    assert score(model, prepared).truncated.tolist() == list(prepared.truncated)
    with pytest.raises(ValueError, match=r"long document 7 \(0 shots\) is \d+ tokens long: the"):
        prepare(model, [*EXAMPLES, long], strict=True)
    endless = Example("read", ("name = value\n" * 60, "x"), 0)
    with pytest.raises(ValueError, match="has a choice of .* tokens: the model reads 128"):
        prepare(model, [endless])


def test_long_sources_of_an_encoder_are_cut_and_counted(tokenizer):
    model = HookedModel(small("bart"), tokenizer)
    long = Example("name = value\n" * 60, (" x", " y"), 0)
    assert prepare(model, [long, EXAMPLES[0]]).truncated == (True, False)


def test_bos_can_be_left_to_the_tokenizer_asked_for_or_left_out(tokenizer):
    model = HookedModel(small("opt"), tokenizer)

    def first(bos):
        (batch,) = prepare(model, EXAMPLES[:1], bos=bos).batches
        return int(batch.ids[0, 0])

    bos = tokenizer.bos_token_id
    assert first(None) == first(True) == bos
    assert first(False) == tokenizer.encode(EXAMPLES[0].context)[1] != bos


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_likelihood_that_is_not_finite_names_example_and_mask(layout, tokenizer):
    model = HookedModel(small("opt"), tokenizer)
    prepared = prepare(model, EXAMPLES, layout=layout)
    with torch.no_grad():
        model.model.lm_head.weight[0] = math.nan
    mask = Mask([Head(0, 1)])
    with model.ablated(mask), pytest.raises(ValueError, match="is nan under the mask L0H1") as info:
        score(model, prepared, mask=mask)
    assert "choice 0 of a document 0 (0 shots)" in str(info.value)


def test_what_cannot_be_scored_is_refused(tokenizer):
    opt = HookedModel(small("opt"), tokenizer)
    prepared = prepare(opt, EXAMPLES)
    opt.model.train()
    with pytest.raises(ValueError, match=r"training mode asked for: call \.eval\(\)"):
        score(opt, prepared)
    with pytest.raises(ValueError, match="scoring of no examples"):
        prepare(opt, [])
    with pytest.raises(ValueError, match="came without a tokenizer"):
        prepare(HookedModel(opt.model), EXAMPLES)
    with pytest.raises(ValueError, match="BertForMaskedLM gives no log-likelihood"):
        prepare(HookedModel(small("bert"), tokenizer), EXAMPLES)
    with pytest.raises(ValueError, match="layout 'tree' asked for"):
        prepare(HookedModel(small("t5"), tokenizer), EXAMPLES, layout="tree")
    with pytest.raises(ValueError, match="layout 'tree' asked for"):
        prepare(HookedModel(small("mamba"), tokenizer), EXAMPLES, layout="tree")


@pytest.mark.parametrize(
    ("family", "layout"),
    [("opt", None), ("llama", None), ("opt", "rows"), ("mamba2", None), ("bart", None)],
)
def test_masks_in_one_sweep_equal_a_loop_over_masks(family, layout, tokenizer):
    model = HookedModel(small(family), tokenizer)
    prepared = prepare(model, EXAMPLES, layout=layout, batch_tokens=90)
    assert len(prepared.batches) > 1
    masks = [Mask(), *(Mask([c]) for c in model.components[::3]), Mask(model.components[1:])]
    values, greedy = log_likelihoods(model, prepared, masks)
    for mask, *of_mask in zip(masks, values, greedy, strict=True):
        with model.ablated(mask):
            (nats,), (exact,) = log_likelihoods(model, prepared)
        assert np.allclose(of_mask[0], nats, rtol=0, atol=1e-4)
        assert np.array_equal(of_mask[1], exact)
    assert not np.allclose(values[0], values[-1], atol=1e-2)
    frames = score_masks(model, prepared, masks, memory=10**6)
    assert [frame.loglik.tolist()[0][0] for frame in frames] == pytest.approx(values[:, 0])


def test_some_batches_may_be_asked_for(tokenizer):
    model = HookedModel(small("opt"), tokenizer)
    prepared = prepare(model, EXAMPLES, batch_tokens=1)
    whole, _ = log_likelihoods(model, prepared)
    some, _ = log_likelihoods(model, prepared, batches=[1])
    there = prepared.batches[1].entry_owner.unique()
    assert np.array_equal(some[0, there], whole[0, there])
    assert np.isnan(np.delete(some[0], there)).all()
    none, _ = log_likelihoods(model, prepared, batches=[])
    assert np.isnan(none).all()


def tokens_through(module):
    """The tokens of every call of `module` from now on."""
    counts = []
    module.register_forward_hook(lambda m, args, out: counts.append(args[0][..., 0].numel()))
    return counts


def test_what_prompts_share_is_computed_once_for_each_mask(tokenizer):
    """Demonstrations of several examples and the context of their choices: a node of the tree."""
    shots = "name = value\n" * 5
    examples = [
        Example(f"{shots}for name in {end}", (" names:", " self.values:", " x"), 0, i)
        for i, end in enumerate(("self", "path", "file"))
    ]
    model = HookedModel(small("opt"), tokenizer)
    prepared = prepare(model, examples)
    requests = [tokenizer.encode(a + b)[:-1] for e in examples for a, b in e.pairs]
    beginnings = {tuple(ids[:n]) for ids in requests for n in range(1, len(ids) + 1)}
    assert len(beginnings) * 4 < sum(map(len, requests))
    layers = model.model.model.decoder.layers
    first, middle = tokens_through(layers[0]), tokens_through(layers[1].fc1)
    masks = [Mask([Head(0, head)]) for head in range(4)]
    log_likelihoods(model, prepared, masks)
    once = len(beginnings)
    # The recorded forward, one row to measure memory, and once for each mask: never once a request.
    assert sum(first) == once * (1 + 1 + len(masks))
    assert sum(middle) == once * (1 + 1 + len(masks))


def test_choices_share_their_context_in_the_encoder(tokenizer):
    model = HookedModel(small("bart"), tokenizer)
    prepared = prepare(model, EXAMPLES[:2])
    counts = tokens_through(model.model.model.encoder.layers[0])
    log_likelihoods(model, prepared, [Mask([Head(0, 0, "encoder")])])
    (batch,) = prepared.batches
    assert (len(batch.sources), len(batch.ids)) == (2, 4)
    width = max(map(len, batch.sources))
    assert counts == [2 * width, width, 2 * width]  # recorded, measured, masked
