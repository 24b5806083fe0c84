"""The reference's numbers against its own loops, written again in plain Python on OPT, and for
other families on modules of theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablate import HookedModel, Mask
from ablate.components import Head
from probes.attention import induction_keys
from probes.reference_scores import (
    copying_reference,
    copying_shares,
    prefix_matching_reference,
    reference_keys,
)
from probes.repeats import Drawn, drawn
from tests.families import DECODERS, ENCODERS, TWO_STACKS, output_of, tiny

ATTENDING = [name for name in DECODERS if "mamba" not in name]
LENGTH, REPEATS = 5, 4


def rows_of(model: HookedModel, **options: object) -> Drawn:
    (batch_rows,) = drawn(model, (LENGTH,), REPEATS, (0, 1, 2), 3, **options)
    return batch_rows


def matching_by_loops(attn_prob: list[list[float]], length: int, repeats: int) -> float:
    """The script's index arithmetic; position 0 is the token before the blocks."""
    total, count = 0.0, 0
    for j in range(length + 1, repeats * length + 1):
        for num in range(j // length):
            total += attn_prob[j][num * length + j % length + 1]
        count += 1
    return total / count


def copying_by_loops(pattern: Tensor, logits: Tensor, tokens: list[int]) -> float:
    """Of one head: pattern [query, key], logits [pos, vocab] of what it writes of every token."""
    p = logits.softmax(-1)
    score = 0.0
    for j in range(1, len(tokens)):
        attendable = [float(p[j, token]) for token in tokens[: j + 1]]
        mean = sum(attendable) / len(attendable)
        raised = [max(x - mean, 0.0) for x in attendable]
        row = pattern[j].tolist()
        if sum(raised) != 0:
            score += raised[row.index(max(row))] / sum(raised)
    return score / (len(tokens) - 1)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "bloom", "jamba", "opt-350m"])
def test_prefix_matching_equals_the_scripts_index(family: str):
    model = HookedModel(tiny(family))
    rows = rows_of(model)
    found = prefix_matching_reference(model, rows)
    eager = HookedModel(tiny(family, attention="eager"))
    sites = [site for site in eager.sites if site.kind == "head"]
    names = [site.name.replace("hook_z", "hook_pattern") for site in sites]
    with eager.capture(names) as cache:
        output_of(eager.model, {"input_ids": rows.repeated[""]})
    for site, name in zip(sites, names, strict=True):
        ours = found[site.name, "prefix_matching_reference"]
        assert ours.shape == (3, site.width)
        for row in range(3):
            for h in range(site.width):
                expected = matching_by_loops(cache[name][row, h].tolist(), LENGTH, REPEATS)
                assert float(ours[row, h]) == pytest.approx(expected, abs=1e-6)
    assert {name for name, _ in found} == {site.name for site in sites}


def test_the_index_counts_three_entries_too_many():
    rows = rows_of(HookedModel(tiny("opt"))).repeated[""]
    extra = (reference_keys(rows, LENGTH) >= 0).sum() - (induction_keys(rows) >= 0).sum()
    assert extra == 3 * len(rows)
    at = (reference_keys(rows, LENGTH)[..., -1] >= 0).nonzero()
    assert at[:, 1].tolist() == [2 * LENGTH, 3 * LENGTH, 4 * LENGTH] * len(rows)
    assert torch.equal(
        reference_keys(rows[:, 1:], LENGTH)[0, :, -1].nonzero()[-1:], torch.tensor([[18]])
    )
    with pytest.raises(ValueError, match="back-to-back copies of 4 tokens"):
        reference_keys(rows, 4)


def opt_written(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(pattern, logits [batch, head, pos, vocab]) of every layer, as the script makes them."""
    decoder = model.model.decoder
    mask = torch.ones_like(tokens)
    hidden_states = decoder.embed_tokens(tokens) + decoder.embed_positions(mask, 0)
    found = []
    for layer in decoder.layers:
        hs = layer.self_attn_layer_norm(hidden_states)
        attention = layer.self_attn
        _, probs = attention(hs, attention_mask=causal(tokens, hs.dtype))
        value = attention.v_proj(hs).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        found.append((probs, by_head(value, attention.out_proj, model.lm_head)))
    return found


def gpt2_written(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    body = model.transformer
    hidden_states = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
    found = []
    for layer in body.h:
        hs = layer.ln_1(hidden_states)
        _, probs = layer.attn(hs, attention_mask=causal(tokens, hs.dtype))
        value = layer.attn.c_attn(hs).split(32, dim=-1)[2].unflatten(-1, (4, 8)).transpose(1, 2)
        found.append((probs, by_head(value, layer.attn.c_proj, model.lm_head)))
    return found


def llama_written(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    body = model.model
    hidden_states = body.embed_tokens(tokens)
    rotary = body.rotary_emb(hidden_states, torch.arange(tokens.shape[1])[None])
    found = []
    for layer in body.layers:
        hs = layer.input_layernorm(hidden_states)
        attention = layer.self_attn
        _, probs = attention(
            hs, position_embeddings=rotary, attention_mask=causal(tokens, hs.dtype)
        )
        value = attention.v_proj(hs).unflatten(-1, (2, 8)).transpose(1, 2)
        value = torch.stack([value[:, 0], value[:, 0], value[:, 1], value[:, 1]], dim=1)
        found.append((probs, by_head(value, attention.o_proj, model.lm_head)))
    return found


def causal(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    pos = tokens.shape[1]
    return torch.full((1, 1, pos, pos), -1e9, dtype=dtype).triu(1)


def by_head(value: Tensor, out: nn.Module, lm_head: nn.Module) -> Tensor:
    """Zeros for all other heads, the whole bias of `out`, no final norm."""
    logits = []
    for h in range(value.shape[1]):
        padded = torch.zeros_like(value)
        padded[:, h] = value[:, h]
        logits.append(lm_head(out(padded.transpose(1, 2).flatten(2))))
    return torch.stack(logits, dim=1)


WRITTEN = {"opt": opt_written, "gpt2": gpt2_written, "llama": llama_written}


@pytest.mark.parametrize("family", list(WRITTEN))
def test_copying_equals_the_scripts_loops(family: str):
    model = HookedModel(tiny(family))
    rows = rows_of(model)
    found = copying_reference(model, rows)
    tokens = rows.distinct[""]
    exact = copy.deepcopy(tiny(family, attention="eager")).double()
    with torch.no_grad():
        written = WRITTEN[family](exact, tokens)
    assert len(found) == len(written)
    for site, (probs, logits) in zip(
        (s for s in model.sites if s.kind == "head"), written, strict=True
    ):
        ours = found[site.name, "copying_reference"]
        for row in range(len(tokens)):
            for h in range(site.width):
                expected = copying_by_loops(probs[row, h], logits[row, h], tokens[row].tolist())
                assert float(ours[row, h]) == pytest.approx(expected, abs=1e-6)
        assert ours.std() > 0.01


def test_the_bundled_model_scores_as_under_the_whole_softmax():
    model = HookedModel.from_pretrained("stdlib-opt", dtype="float32")
    (rows,) = drawn(model, (12,), REPEATS, (0,), 1)
    found = copying_reference(model, rows)
    eager = HookedModel.from_pretrained(
        "stdlib-opt", dtype="float32", attn_implementation="eager"
    ).model
    tokens = rows.distinct[""]
    with torch.no_grad():
        written = opt_written(eager, tokens)
    for (probs, logits), ours in zip(written, found.values(), strict=True):
        for h in range(probs.shape[1]):
            expected = copying_by_loops(probs[0, h], logits[0, h], tokens[0].tolist())
            assert float(ours[0, h]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ATTENDING)
def test_every_decoder_writes_its_own_values(family: str):
    """z of the first position, which attends to itself alone, is its value: the values that are
    scored, mixed by the pattern, are the z of a layer that reads the embeddings."""
    from ablate.hooks import hooked
    from ablate.stack import record
    from probes.reference_scores import _decoder_sites, _projection, _values

    model = HookedModel(tiny(family))
    rows = rows_of(model)
    found = copying_reference(model, rows)
    sites = _decoder_sites(model)
    assert {name for name, _ in found} == {site.name for site in sites}
    assert all(x.shape == (3, 4) and x.min() >= 0 and x.max() <= 1 for x in found.values())
    tokens = rows.distinct[""]
    recorded = record(model.model, {"input_ids": tokens}, keep=[0])
    for site in sites:
        values: list[Tensor] = []
        edit = {_projection(site): lambda x, s=site, v=values: v.append(_values(s, x))}
        with torch.no_grad(), hooked(model.model, edit), model.capture(site.name) as cache:
            recorded.run_blocks(site.layer, site.layer + 1, recorded.resid(0))
        assert torch.allclose(cache[site.name][:, 0], values[0][:, 0], atol=1e-5)


def test_a_head_that_attends_to_itself_and_copies_and_one_that_attends_elsewhere():
    length = 6
    values = torch.eye(length)[None, :, None].expand(1, -1, 3, -1).contiguous() * 20
    attended = torch.arange(length).expand(1, 3, -1).clone()
    attended[:, 1] = (attended[:, 1] - 1).clamp(min=0)  # a perfect copier of the token before
    values[:, :, 2] = 0  # writes nothing: all p are equal
    w_o = torch.eye(length).expand(3, -1, -1).contiguous()
    w_u, offset = torch.eye(length)[None], torch.zeros(1, length)
    for chunk in (1, 2**20):
        scores = copying_shares(values, attended, w_o, None, w_u, offset, chunk=chunk)
        assert scores[0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    bias = 3 * torch.eye(length)[0]  # the bias alone raises the first token: a head of its own
    attended[:] = 0
    scores = copying_shares(values, attended, w_o, bias, w_u, offset)
    assert scores[0, 2] == pytest.approx(1, abs=1e-6)
    assert torch.equal(copying_shares(values, attended, w_o, None, w_u, bias[None]), scores)


def test_huge_logits_stay_finite():
    values = 1e4 * torch.eye(4)[None, :, None]
    attended = torch.arange(4)[None, None]
    scores = copying_shares(
        values, attended, torch.eye(4)[None], None, torch.eye(4)[None], torch.zeros(1, 4)
    )
    assert scores.tolist() == [[1]]


def test_rows_without_a_first_token_and_the_batch_make_no_difference():
    model = HookedModel(tiny("gpt2"))
    rows = rows_of(model, bos=None)
    for measure in (prefix_matching_reference, copying_reference):
        together = measure(model, rows)
        for i, alone in enumerate(drawn(model, (LENGTH,), REPEATS, (0, 1, 2), 1, bos=None)):
            for key, value in measure(model, alone).items():
                assert torch.allclose(value[0], together[key][i], atol=1e-6)


def test_a_mask_does_not_change_what_a_head_would_copy():
    model = HookedModel(tiny("opt"))
    rows = rows_of(model)
    clean = copying_reference(model, rows)
    with model.ablated(Mask([Head(0, 1), Head(2, 3)])):
        masked = copying_reference(model, rows)
    assert all(torch.equal(clean[key], masked[key]) for key in clean)


@pytest.mark.parametrize("family", [*ENCODERS, *TWO_STACKS, "mamba"])
def test_what_is_no_decoder_is_refused(family: str):
    model = HookedModel(tiny(family))
    rows = rows_of(model)
    for measure in (prefix_matching_reference, copying_reference):
        with pytest.raises(ValueError, match="defined for decoders with attention"):
            measure(model, rows)


def test_offloaded_weights_give_the_same_scores(tmp_path):
    from accelerate import disk_offload

    whole, offloaded = HookedModel(tiny("phi")), tiny("phi")
    disk_offload(offloaded, tmp_path)
    rows = rows_of(whole)
    expected = copying_reference(whole, rows)
    found = copying_reference(HookedModel(offloaded), rows)
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)
