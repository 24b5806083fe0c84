"""Shares against plain loops, and shares that add up to the model's logits."""

from __future__ import annotations

import pytest
import torch

from ablate import HookedModel
from probes.attribution import attended_shares, final_scale
from probes.circuits import linear_part, output_weights, unembedding
from probes.induction import induction_scan, summary
from tests.families import inputs_for, output_of, tiny
from tests.induction_model import induction_opt


def test_shares_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 3, 4, generator=generator)
    w_o = torch.randn(3, 4, 6, generator=generator)
    w_u = torch.randn(2, 5, 6, generator=generator)
    attended = torch.stack(
        [torch.randint(0, j + 1, (2, 3), generator=generator) for j in range(5)], dim=-1
    )
    found = attended_shares(z, attended, w_o, w_u)
    for b, h, j in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        written = z[b, j, h] @ w_o[h]
        logits = [float(written @ w_u[b, k]) for k in range(j + 1)]
        expected = logits[attended[b, h, j]] - sum(logits) / len(logits)
        assert float(found[b, h, j]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama", "qwen3", "gemma"])
def test_all_shares_and_the_rest_of_the_stream_are_the_logits(family: str):
    """logits = β·W_U + s·(rest + Σ heads)·Ŵ_U: nothing is left over."""
    model = HookedModel(tiny(family))
    inputs = inputs_for(model.model)
    heads = [site for site in model.sites if site.kind == "head"]
    last = f"blocks.{model.sites[-1].layer}.hook_resid_post"
    with final_scale(model, "") as scale, model.capture([*(s.name for s in heads), last]) as cache:
        logits = output_of(model.model, inputs)
    tokens = torch.arange(logits.shape[-1])[None]
    w_u = unembedding(model, tokens, final_norm=True)[0]
    norm = model.model.base_model.get_submodule(model.anatomy.stacks[0].final_norm)
    _, bias, _ = linear_part(norm, w_u.shape[-1])
    rest, total = cache[last].clone(), unembedding(model, tokens)[0] @ bias
    for site in heads:
        w_o, _ = output_weights(model, site)
        written = torch.einsum("bphd,hdm->bpm", cache[site.name], w_o)
        rest -= written
        total = total + scale()[..., None] * (written @ w_u.T)
    total = total + scale()[..., None] * (rest @ w_u.T)
    head = model.model.get_output_embeddings()
    if head.bias is not None:
        total = total + head.bias
    assert torch.allclose(total, logits, atol=1e-3 * float(logits.abs().max()))


def test_the_induction_head_alone_writes_the_answer():
    """LayerNorm is the identity on what occurs, so the share is the gain of the logit, 60, less the
    mean over the row, in which the answer stands c times at positions 0 … q."""
    frame = induction_scan(HookedModel(induction_opt()), lengths=(6,), seeds=range(2))
    table = summary(frame).set_index("component")["attribution"]
    rows = []
    for q in range(7, 25):
        answer = q % 6  # the token after this one, as an offset in the block of positions 1 … 6
        stands = sum(1 for k in range(1, q + 1) if (k - 1) % 6 == answer)
        rows.append(60 * (1 - stands / (q + 1)))
    assert table["L1H1"] == pytest.approx(sum(rows) / len(rows), rel=1e-3)
    assert all(abs(table[name]) < 1e-6 for name in table.index if name != "L1H1")


def test_without_a_final_norm_the_scale_is_one():
    model = HookedModel(tiny("opt-350m"))
    with final_scale(model, "") as scale:
        output_of(model.model, inputs_for(model.model))
    assert scale().tolist() == [[1.0]]
