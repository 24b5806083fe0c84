"""Ablation against the score: one component at a time through HookedModel is the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from ablate import Mask, mean_fill, resample_fill
from experiments.hybrids.inside.ablations import ablations, pieces, ratio
from experiments.hybrids.regression.prompts import interleaved, predictions_at
from probes.regression import icl_regression_score, squared_error_by_examples
from tests.experiments.hybrids.hybrid_models import drawn, regressor

BLOCKS = [
    "learned-attention-gelu-layer*2",
    "rope-attention-swiglu-rms*2",
    "mamba-rms,attention-mamba_ffn-rms,mamba-swiglu-rms",
]


@torch.no_grad()
def one_at_a_time(model, prompts, mask, fill):
    """The slow way: the whole forward under HookedModel's own mask."""
    with model.ablated(mask, fill=fill):
        logits = model.model(prompts=interleaved(prompts)).logits
    return squared_error_by_examples(predictions_at(logits), prompts.ys)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("fill", ["zero", "mean", "resample"])
def test_every_component_as_if_it_were_masked_alone(blocks, fill):
    model, prompts, reference = regressor(blocks), drawn(), drawn(seed=2)
    found = ablations(
        model,
        prompts,
        fill=fill,
        reference=reference,
        generator=torch.Generator().manual_seed(3),
    )
    stands_in = {
        "zero": lambda: "zero",
        "mean": lambda: mean_fill(model, [{"prompts": interleaved(reference)}], per_position=True),
        "resample": lambda: resample_fill(
            model, {"prompts": interleaved(prompts)}, torch.Generator().manual_seed(3)
        ),
    }[fill]()
    assert found.components == tuple(model.components)
    torch.testing.assert_close(found.whole, one_at_a_time(model, prompts, Mask(), "zero"))
    for component, errors in zip(found.components, found.without, strict=True):
        alone = one_at_a_time(model, prompts, Mask([component]), stands_in)
        torch.testing.assert_close(errors, alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(errors, found.whole, rtol=1e-3), component


def test_the_drop_is_the_difference_of_two_scores():
    model, prompts = regressor(BLOCKS[0], scale=0.1), drawn(count=40)
    found = ablations(model, prompts)
    base = 0.25 * found.zero
    frame = found.frame({"a quarter": base}, seed=7)
    whole = icl_regression_score(found.whole, base, found.zero)
    score = frame[frame.metric == "score"]
    assert score.value.item() == pytest.approx(whole)
    drops = frame[frame.metric == "score_drop"].set_index("component")
    for component, errors in zip(found.components, found.without, strict=True):
        left = icl_regression_score(errors, base, found.zero)
        assert drops.value[str(component)] == pytest.approx(whole - left, abs=1e-6)
    assert set(frame.seed) == {7}
    by_point = frame[(frame.metric == "error_increase") & (frame.examples == 3)]
    rise = (found.without - found.whole)[:, :, 3]
    assert by_point.value.tolist() == pytest.approx(rise.mean(1).tolist(), abs=1e-6)
    assert by_point.stderr.tolist() == pytest.approx((rise.std(1) / 40**0.5).tolist(), rel=1e-4)


def test_a_head_that_writes_nothing_costs_nothing():
    model, prompts = regressor(BLOCKS[1]), drawn()
    with torch.no_grad():
        model.model.model.blocks[1].attn.o_proj.weight[:, 8:] = 0
    frame = ablations(model, prompts).frame()
    cost = frame[frame.examples == -1].set_index("component").value
    assert cost["L1H1"] == 0
    assert cost.drop("L1H1").abs().min() > 1e-4


def test_only_the_scored_point_of_mqar_counts():
    model, prompts = regressor(BLOCKS[1], "mqar"), drawn("mqar")
    found = ablations(model, prompts)
    assert found.examples == (prompts.ys.shape[1] - 1,)
    expected = one_at_a_time(model, prompts, Mask(), "zero")[:, -1:]
    torch.testing.assert_close(found.whole, expected)


def test_pieces_are_all_prompts_and_never_one_alone():
    prompts = drawn(count=9)
    for size in (2, 4, 8, 9, 100):
        found = list(pieces(prompts, size))
        assert torch.equal(torch.cat([p.xs for p in found]), prompts.xs)
        assert torch.equal(torch.cat([p.hidden["w"] for p in found]), prompts.hidden["w"])
        assert min(len(p.xs) for p in found) > 1


def test_the_error_of_a_ratio_is_what_repetition_scatters():
    generator = torch.Generator().manual_seed(0)
    below = 2 + torch.rand(400, 200, generator=generator, dtype=torch.float64)
    above = 0.5 * below + 0.1 * torch.randn(400, 200, generator=generator, dtype=torch.float64)
    found = [ratio(a, b) for a, b in zip(above, below, strict=True)]
    scatter = torch.tensor([value for value, _ in found]).std()
    assert found[0][1] == pytest.approx(float(scatter), rel=0.15)
    assert math.isnan(ratio(above[0, :1], below[0, :1])[1])


def test_what_cannot_be_done_is_said():
    model, prompts = regressor(BLOCKS[0]), drawn()
    with pytest.raises(ValueError, match="give reference prompts"):
        ablations(model, prompts, fill="mean")
    with pytest.raises(ValueError, match="give a generator"):
        ablations(model, prompts, fill="resample")
    with pytest.raises(ValueError, match="no components"):
        ablations(model, prompts, components=[])
    found = ablations(model, prompts, components=[model.components[0]])
    with pytest.raises(ValueError, match="gains nothing"):
        found.frame({"worse than 0": 2 * found.zero})
