"""Attention on prompts, against a model built by hand, patterns and loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import einsum, rearrange
from torch.nn.functional import silu

from experiments.hybrids.inside.ablations import ablations
from experiments.hybrids.inside.label_attention import asking_again, prompt_attention, relations
from experiments.hybrids.regression.prompts import interleaved
from probes.implicit import hidden_attention, scan_of
from tests.experiments.hybrids.hybrid_models import drawn, recall_by_hand, regressor


def generator():
    return torch.Generator().manual_seed(0)


def means(frame):
    """metric -> component -> mean over a prompt's queries."""
    return frame[frame.examples == -1].pivot(index="component", columns="metric", values="value")


def test_the_model_built_by_hand_answers_and_each_head_does_its_part():
    model, prompts = recall_by_hand(), drawn("mqar", count=40)
    table = means(prompt_attention(model, prompts, generator()))
    assert table.loc["L0H0", "previous"] > 0.99
    assert table.loc["L0H0", "pairing"] > 0.99
    assert table.loc["L0H0", "match"] < 0.2  # the y before is the right one once in 16 prompts
    assert table.loc["L1H0", "match"] > 0.95
    assert table.loc["L1H0", ["match_shuffled", "match_unasked", "duplicate"]].max() < 0.12
    assert table.loc["even", "match"] == pytest.approx(1 / 33)

    found = ablations(model, prompts)
    assert found.whole.mean() < 0.05 < 0.9 < found.zero.mean()
    frame = found.frame({"recall": 0 * found.zero.expand(-1, 17)})
    drops = frame[frame.metric == "score_drop"].set_index("component").value
    # Without its second head the model says 0, which is what the score calls 0.
    assert drops["L1H0"] == pytest.approx(1, abs=0.05)
    assert drops["L0H0"] > 0.9


def test_scores_are_sums_over_the_whole_pattern():
    model, prompts = regressor("rope-attention-swiglu-rms*2"), drawn(count=4)
    frame = prompt_attention(model, prompts, generator())
    model.model.set_attn_implementation("eager")
    with torch.no_grad(), model.capture("blocks.1.attn.hook_pattern") as cache:
        model.model(prompts=interleaved(prompts))
    pattern = cache["blocks.1.attn.hook_pattern"][:, 1]
    label, own = [], []
    for n in range(4):
        label += [sum(pattern[n, 2 * i, 2 * j + 1] for j in range(i)) for i in range(1, 12)]
        own += [pattern[n, 2 * i, 2 * i] for i in range(12)]
    table = means(frame).loc["L1H1"]
    assert table.label == pytest.approx(float(sum(label) / len(label)), abs=1e-5)
    assert table.own == pytest.approx(float(sum(own) / len(own)), abs=1e-5)
    assert table.input + table.label == pytest.approx(1 - table.own, abs=0.1)
    at_3 = frame[(frame.component == "L1H1") & (frame.examples == 3)]
    expected = pattern[:, 6, [1, 3, 5]].sum(1)
    assert at_3.value.item() == pytest.approx(float(expected.mean()), abs=1e-5)
    assert at_3.stderr.item() == pytest.approx(float(expected.std() / 2), rel=1e-3)
    assert not {"match", "match_shuffled", "match_unasked"} & set(frame.metric)  # no x repeats


def test_even_attention_is_what_position_gives():
    model, prompts = regressor("rope-attention-swiglu-rms"), drawn(count=4)
    hf: Any = model.model
    with torch.no_grad():
        for block in hf.model.blocks:
            block.attn.q_proj.weight.zero_()
    table = means(prompt_attention(model, asking_again(prompts, generator()), generator()))
    for score in table.columns:
        assert table.loc["L0H0", score] == pytest.approx(table.loc["even", score], abs=1e-6)


def test_relations_go_by_equal_vectors():
    prompts = asking_again(drawn(count=5), generator())
    found = relations(prompts, generator())
    xs = prompts.xs
    for n in range(5):
        copies = [j for j in range(11) if torch.equal(xs[n, j], xs[n, 11])]
        assert len(copies) == 1
        assert torch.equal(prompts.ys[n, 11], prompts.ys[n, copies[0]])
        assert found["match"][n].nonzero().tolist() == [[22, 2 * copies[0] + 1]]
        assert found["duplicate"][n].nonzero().tolist() == [[22, 2 * copies[0]]]
        ((query, key),) = found["match_shuffled"][n].nonzero().tolist()
        assert query == 22
        assert key in set(range(1, 22, 2)) - {2 * copies[0] + 1}
    none = relations(drawn(count=5), generator())
    assert not none["match"].any()
    assert not none["match_shuffled"].any()


def test_mixers_are_scored_by_their_implicit_attention():
    model = regressor("mamba-rms,attention-mamba_ffn-rms")
    table = means(prompt_attention(model, drawn("linear", count=4), generator()))
    assert {"L0M", "L1M", "L1H0", "L1H1", "even"} == set(table.index)
    rows = table[["label", "input", "own"]]
    assert (rows > 0).all(axis=None)
    alone = regressor("mamba-rms*2")
    assert {"L0M", "L1M", "even"} == set(
        means(prompt_attention(alone, drawn(count=4), generator())).index
    )


@torch.no_grad()
def test_implicit_attention_is_what_the_mixer_computes():
    model = regressor("mamba-rms,attention-mamba_ffn-rms")
    prompts = interleaved(drawn(count=2))
    for layer in (0, 1):
        mixer = model.model.model.blocks[layer].mixer
        given = []
        handle = mixer.register_forward_pre_hook(lambda module, args, to=given: to.append(args[0]))
        with model.capture(f"blocks.{layer}.mixer.hook_ssm_out") as cache:
            model.model(prompts=prompts)
        handle.remove()
        (hidden,) = given
        scan = scan_of(mixer, hidden)
        alpha = hidden_attention(scan, 0, prompts.shape[1])
        mixed = einsum(alpha, scan.x, "b channel q k, b channel k one -> b q channel")
        y = mixed + scan.d * rearrange(scan.x, "b channel q 1 -> b q channel")
        gate = mixer.in_proj(hidden).chunk(2, -1)[1]
        expected = cache[f"blocks.{layer}.mixer.hook_ssm_out"]
        torch.testing.assert_close(y * silu(gate), expected, rtol=1e-4, atol=1e-5)
