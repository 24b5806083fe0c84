"""Every room on a model whose induction circuit was written by hand, so the answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ablate import Head, HookedModel, Mask
from ablate.importance import gradient_importance
from ablate.pruning import nested_masks, ranked
from probes.attention import attention_mass, induction_targets
from probes.loss import loss_by_position
from tests.induction_model import VOCAB, induction_opt, repeated_tokens

PREVIOUS, INDUCTION = Head(0, 0), Head(1, 1)
SECOND = slice(VOCAB, 2 * VOCAB - 2)  # losses of tokens predicted inside the second copy


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(induction_opt())


def second_copy_loss(model: HookedModel, tokens: Tensor) -> float:
    return float(loss_by_position(model.model, tokens)[:, SECOND].mean())


def test_the_second_copy_is_predicted_without_error(model: HookedModel):
    assert second_copy_loss(model, repeated_tokens()) < 1e-3


@pytest.mark.parametrize("head", [Head(layer, h) for layer in range(2) for h in range(3)], ids=str)
def test_only_the_circuits_heads_matter(model: HookedModel, head: Head):
    tokens = repeated_tokens()
    with model.ablated(Mask([head])):
        loss = second_copy_loss(model, tokens)
    if head == INDUCTION:
        assert loss == pytest.approx(math.log(VOCAB), abs=1e-5)  # blind among 25 tokens
    elif head == PREVIOUS:
        assert loss > 1
    else:
        assert loss == second_copy_loss(model, tokens)


def test_prefix_matching_finds_the_induction_head_alone():
    model = HookedModel(induction_opt())
    model.model.set_attn_implementation("eager")
    tokens = repeated_tokens()
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    with torch.no_grad(), model.capture(names) as cache:
        model.model(tokens)
    scores = torch.stack(
        [attention_mass(cache[name], induction_targets(tokens)).mean(0) for name in names]
    )
    assert scores[1, 1] == pytest.approx(1.0, abs=1e-3)
    scores[1, 1] = 0
    assert scores.max() < 0.06  # uniform attention over 25 … 49 positions


def answer_loss(model: HookedModel):
    """Mean loss of each row over its second copy."""

    def losses(tokens: Tensor) -> Tensor:
        logits = model.model(tokens, use_cache=False).logits[:, :-1]
        log_p = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return -log_p[:, SECOND].mean(-1)

    return losses


def test_importance_ranks_the_circuit_first_unless_it_is_saturated():
    tokens = repeated_tokens()
    soft = HookedModel(induction_opt(sharpness=5, gain=4))
    importance = gradient_importance(soft, [tokens], answer_loss(soft))
    scores = {h: s for h, s in importance.scores().items() if isinstance(h, Head)}
    assert set(ranked(scores)[-2:]) == {PREVIOUS, INDUCTION}
    assert all(scores[h] == 0 for h in scores if h not in (PREVIOUS, INDUCTION))
    # A head so sure that its gradient vanishes: first-order importance is blind to it.
    hard = HookedModel(induction_opt(sharpness=60, gain=200))
    saturated = gradient_importance(hard, [tokens], answer_loss(hard)).scores()
    assert saturated[INDUCTION] < 1e-6
    with hard.ablated(Mask([INDUCTION])):
        assert second_copy_loss(hard, tokens) > 3


def test_pruning_by_importance_keeps_the_skill_until_only_the_circuit_is_left():
    tokens = repeated_tokens()
    model = HookedModel(induction_opt(sharpness=5, gain=4))
    scores = gradient_importance(model, [tokens], answer_loss(model)).scores()
    ranking = ranked({h: scores[h] for h in model.heads})
    losses = []
    for mask in nested_masks(ranking, [0.0, 4 / 6, 5 / 6, 1.0]):
        with model.ablated(mask):
            losses.append(second_copy_loss(model, tokens))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] > losses[0] + 0.1
    assert losses[3] == pytest.approx(math.log(VOCAB), abs=1e-5)
