"""Mask gradients against finite differences, per example and per token, on every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablate import HookedModel, Mask
from ablate.importance import gradient_importance
from tests.families import DECODERS, tiny, tokens


def losses_of(model: HookedModel, weights: Tensor | None = None):
    """Mean next-token loss of each row over its last three targets."""

    def losses(batch: Tensor) -> Tensor:
        logits = model.model(input_ids=batch, use_cache=False).logits[:, -4:-1]
        picked = logits.log_softmax(-1).gather(-1, batch[:, -3:, None])[..., 0]
        return -picked.mean(-1)

    return losses


# Families whose every operation runs in fp64; elsewhere something in the library falls back to
# fp32, and a finite difference divides its rounding by the step.
IN_DOUBLE = ("opt", "opt-350m", "gpt2", "gpt_neox", "bloom", "falcon", "phi")


@pytest.mark.parametrize("family", DECODERS)
def test_gate_gradients_equal_finite_differences(family: str):
    exact = family in IN_DOUBLE
    step, atol, rtol = (1e-4, 1e-6, 1e-3) if exact else (2e-2, 2e-3, 2e-2)
    model = HookedModel(tiny(family, dtype=torch.float64 if exact else torch.float32))
    batch = tokens(batch=2, pos=7)
    losses = losses_of(model)
    importance = gradient_importance(model, [batch], losses)
    assert importance.gate.shape == (2, len(model.components))
    for site in model.sites:
        for index, component in enumerate(site.components):
            plus, minus = [], []
            for results, change in ((plus, step), (minus, -step)):
                gate = torch.ones(site.width if site.kind == "head" else (), dtype=torch.float64)
                if site.kind == "head":
                    gate[index] += change
                else:
                    gate += change
                with torch.no_grad(), model.gated({site.name: gate}):
                    results.append(losses(batch))
            expected = (plus[0] - minus[0]).double() / (2 * step)
            column = model.components.index(component)
            torch.testing.assert_close(
                importance.gate[:, column].double(), expected, atol=atol, rtol=rtol
            )


def test_token_effects_are_absolute_before_the_sum():
    model = HookedModel(tiny("opt"))
    batch = tokens(batch=1, pos=6)
    importance = gradient_importance(model, [batch], losses_of(model))
    site = model.sites[0]
    # ∂L/∂ξ_t by hand: Σ_d z·∂L/∂z at every token.
    with model.capture(site.name) as cache:
        loss = losses_of(model)(batch).sum()
        (grad,) = torch.autograd.grad(loss, cache[site.name])
    by_token = (grad * cache[site.name]).sum(-1)[0]
    torch.testing.assert_close(importance.gate[0, : site.width], by_token.sum(0))
    torch.testing.assert_close(importance.token[0, : site.width], by_token.abs().sum(0))
    assert (importance.token >= importance.gate.abs() - 1e-7).all()
    assert (importance.token > importance.gate.abs() + 1e-6).any()


def test_scores_do_not_depend_on_the_batch_size():
    model = HookedModel(tiny("llama"))
    rows = tokens(batch=6, pos=8)
    whole = gradient_importance(model, [rows], losses_of(model))
    single = gradient_importance(model, rows.split(1), losses_of(model))
    torch.testing.assert_close(whole.gate, single.gate, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(whole.token, single.token, atol=1e-6, rtol=1e-4)


def test_weights_get_no_gradient_and_keep_asking_for_one():
    model = HookedModel(tiny("gpt2"))
    model.model.get_input_embeddings().weight.requires_grad_(False)
    before = [p.requires_grad for p in model.model.parameters()]
    gradient_importance(model, [tokens()], losses_of(model))
    assert [p.requires_grad for p in model.model.parameters()] == before
    assert all(p.grad is None for p in model.model.parameters())


def test_a_masked_component_has_no_effect_left():
    model = HookedModel(tiny("opt"))
    head = model.heads[2]
    with model.ablated(Mask([head])):
        importance = gradient_importance(model, [tokens()], losses_of(model))
    column = model.components.index(head)
    assert (importance.gate[:, column] == 0).all()
    assert (importance.token[:, column] == 0).all()
    assert (importance.token.sum(0) > 0).sum() >= len(model.components) - 1


def test_frame_is_tidy_and_scores_are_its_values():
    model = HookedModel(tiny("opt"))
    importance = gradient_importance(model, [tokens(batch=4)], losses_of(model))
    frame = importance.frame()
    assert len(frame) == 2 * len(model.components)
    gate = frame[frame.convention == "gate"].set_index("component")
    for component, score in importance.scores("gate").items():
        assert gate.value[str(component)] == score
        column = importance.gate[:, model.components.index(component)].abs()
        assert gate.stderr[str(component)] == pytest.approx(float(column.std() / 2))


def test_a_loss_that_is_not_finite_is_named():
    model = HookedModel(tiny("opt"))

    batches = [tokens(), tokens(seed=1)]

    def losses(batch: Tensor) -> Tensor:
        result = losses_of(model)(batch)
        return result * torch.tensor([1.0, float("nan")]) if batch is batches[1] else result

    with pytest.raises(ValueError, match="example 3 is nan"):
        gradient_importance(model, batches, losses)
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_importance(model, [], losses)


def test_a_loss_that_ignores_the_model_is_refused():
    model = HookedModel(tiny("opt"))

    def constant(batch: Tensor) -> Tensor:
        model.model(input_ids=batch)
        return torch.ones(len(batch), requires_grad=True)

    with pytest.raises(ValueError, match="does not depend on any head"):
        gradient_importance(model, [tokens()], constant)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("reduced", "message"),
    [
        (Tensor.mean, r"losses gave a tensor of shape \(\): give one loss an example"),
        (lambda loss: loss[:, None], r"losses gave a tensor of shape \(2, 1\)"),
        (Tensor.tolist, "losses gave a list"),
        (Tensor.detach, "does not depend on any head"),
    ],
)
def test_what_is_not_one_loss_an_example_is_refused(reduced, message):
    model = HookedModel(tiny("opt"))
    with pytest.raises(ValueError, match=message) as info:
        gradient_importance(model, [tokens()], lambda batch: reduced(losses_of(model)(batch)))
    assert "\n" not in str(info.value)


def test_one_example_has_an_unknown_standard_error():
    model = HookedModel(tiny("opt"))
    frame = gradient_importance(model, [tokens(batch=1)], losses_of(model)).frame()
    assert frame.stderr.isna().all()
