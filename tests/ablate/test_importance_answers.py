"""Importance of what is read: groups, checkpointing, dtype, masks, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ablate import FFN, Head, HookedModel, KVGroup, Mask, Reading, mean_fill, next_tokens
from ablate.answers import row_losses
from ablate.budget import with_peak
from ablate.importance import Importance, answer_importance, backward
from ablate.sites import Site
from tests.families import FAMILIES, inputs_for, tiny, tokens

# Every way in which a family keeps its blocks; bert-bare has nothing to read.
HEADED = tuple(family for family in FAMILIES if family != "bert-bare")
STEP = 1e-4


def same(found: Importance, expected: Importance, atol: float = 1e-5) -> None:
    assert found.components == expected.components
    torch.testing.assert_close(found.gate, expected.gate, atol=atol, rtol=1e-4)
    torch.testing.assert_close(found.token, expected.token, atol=atol, rtol=1e-4)


def exact_losses(model: HookedModel, reading: Reading) -> Tensor:
    """Mean −log p of each row in fp64, from the model's plain forward."""
    with torch.no_grad():
        logits = model.model(**reading.inputs, use_cache=False).logits.double()
    row, position = reading.positions.unbind(1)
    log_p = logits.log_softmax(-1)[row, position, reading.targets]
    return -torch.stack([log_p[row == i].mean() for i in range(reading.batch)])


def difference(model: HookedModel, reading: Reading, site: Site, columns: list[int]) -> Tensor:
    """∂L/∂ξ of one gate on all `columns` of a site, by central differences; [example]."""
    losses = []
    for change in (STEP, -STEP):
        gate = torch.ones(site.width if site.kind == "head" else (), dtype=torch.float64)
        if site.kind == "head":
            gate[columns] += change
        else:
            gate += change
        with model.gated({site.name: gate}):
            losses.append(exact_losses(model, reading))
    return (losses[0] - losses[1]) / (2 * STEP)


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "falcon", "opt", "t5"])
def test_groups_move_all_their_heads(family: str):
    model = HookedModel(tiny(family))
    reading = next_tokens(inputs_for(model.model))
    found = answer_importance(model, [reading], components=model.kv_groups)
    assert found.components == model.kv_groups
    assert found.gate.shape == (2, len(model.kv_groups))
    with model.gate_gradients() as gradients:
        row_losses(model, reading).sum().backward()
    for site in model.sites:
        for group in site.groups:
            heads = [site.components.index(h) for h in model.expand(Mask([group]))]
            by_token = gradients[site.name][0][..., heads].sum(-1)
            column = model.kv_groups.index(group)
            torch.testing.assert_close(found.gate[:, column], by_token.sum(1), atol=1e-6, rtol=1e-4)
            expected = by_token.abs().sum(1)
            torch.testing.assert_close(found.token[:, column], expected, atol=1e-6, rtol=1e-4)


def test_a_groups_gradient_equals_the_finite_difference_of_a_gate_on_its_heads():
    # Falcon computes in fp64 throughout; Llama's norms do not.
    model = HookedModel(tiny("falcon", dtype=torch.float64))
    reading = next_tokens(inputs_for(model.model))
    found = answer_importance(model, [reading], components=model.kv_groups)
    assert len(model.kv_groups) == 4
    for site in (site for site in model.sites if site.kind == "head"):
        for group, heads in zip(site.groups, ([0, 1], [2, 3]), strict=True):
            column = model.kv_groups.index(group)
            expected = difference(model, reading, site, heads)
            torch.testing.assert_close(
                found.gate[:, column].double(), expected, atol=1e-5, rtol=1e-4
            )
            assert expected.abs().max() > 0.02


def test_any_components_may_be_asked_for_in_any_order():
    model = HookedModel(tiny("llama"))
    reading = next_tokens(inputs_for(model.model))
    everything = answer_importance(model, [reading])
    chosen = [FFN(1), KVGroup(1, 1), Head(0, 3)]
    some = answer_importance(model, [reading], components=chosen)
    assert some.components == tuple(chosen)
    for column, component in ((0, FFN(1)), (2, Head(0, 3))):
        expected = everything.gate[:, everything.components.index(component)]
        assert torch.equal(some.gate[:, column], expected)
    assert set(some.frame().kind) == {"FFN", "KVGroup", "Head"}
    with pytest.raises(ValueError, match="no key/value group L0G2 in llama: .* groups 0–1"):
        answer_importance(model, [reading], components=[KVGroup(0, 2)])
    with pytest.raises(ValueError, match="importance of no components asked for"):
        answer_importance(model, [reading], components=[])


# --- checkpointing ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HEADED)
def test_checkpointing_changes_no_score(family: str):
    model = HookedModel(tiny(family))
    reading = next_tokens(inputs_for(model.model, batch=3, padded=True))
    plain = answer_importance(model, [reading])
    same(answer_importance(model, [reading], checkpointing=True), plain, atol=1e-6)


def test_checkpointing_leaves_the_model_as_it_was_and_masks_in_force():
    model = HookedModel(tiny("opt"))
    model.model.get_input_embeddings().weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.model.parameters()]
    reading = next_tokens(inputs_for(model.model))
    fill = mean_fill(model, [inputs_for(model.model, seed=3)])
    mask = Mask([Head(0, 1), FFN(1)])
    with model.ablated(mask, fill):  # counts on exit that every hook fired
        plain = answer_importance(model, [reading])
        again = answer_importance(model, [reading], checkpointing=True)
    same(again, plain, atol=1e-6)
    assert (again.token[:, model.components.index(Head(0, 1))] == 0).all()
    assert [p.requires_grad for p in model.model.parameters()] == asked
    assert all(p.grad is None for p in model.model.parameters())
    assert not any(module.training for module in model.model.modules())
    for module in model.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_checkpointing_takes_less_memory():
    model = HookedModel(tiny("opt", num_hidden_layers=12, attention="eager"))
    ids = tokens(batch=1, pos=60)
    reading = Reading({"input_ids": ids}, torch.tensor([[0, 58]]), ids[0, 59:])

    def peak(checkpointing: bool) -> int:
        def run() -> None:
            backward(model, lambda: row_losses(model, reading, checkpointing=checkpointing))

        return with_peak(run, torch.device("cpu"))[1]

    assert peak(True) < 0.25 * peak(False)  # 0.33 if z were kept outside of the checkpoint


# --- precision ----------------------------------------------------------------------------------


def test_bf16_models_are_summed_in_fp32():
    model = HookedModel(tiny("opt", dtype=torch.bfloat16))
    reading = next_tokens(inputs_for(model.model, batch=1, pos=40))
    found = answer_importance(model, [reading])
    names = [site.name for site in model.sites]
    with model.capture(names) as cache:
        loss = row_losses(model, reading).sum()
    values = [cache[name] for name in names]
    gradients = torch.autograd.grad(loss, values)
    coarse = []
    for site, z, g in zip(model.sites, values, gradients, strict=True):
        assert z.dtype == g.dtype == torch.bfloat16
        z = z.detach()
        by_token = (z.double() * g.double()).sum(-1)[0].view(-1, site.width)
        columns = [found.components.index(c) for c in site.components]
        scale = float(by_token.abs().sum(0).max())
        torch.testing.assert_close(
            found.gate[0, columns].double(), by_token.sum(0), atol=1e-6 * scale, rtol=1e-5
        )
        torch.testing.assert_close(
            found.token[0, columns].double(), by_token.abs().sum(0), atol=1e-6 * scale, rtol=1e-5
        )
        rounded = (z * g).sum(-1)[0].view(-1, site.width).abs().sum(0).double()
        coarse.append(float((rounded / by_token.abs().sum(0) - 1).abs().max()))
    assert max(coarse) > 1e-3  # what sums in bf16 would give is far outside the tolerance


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", ["zero", "mean"])
def test_scores_on_a_masked_model_are_those_of_the_masked_model(filled: str):
    model = HookedModel(tiny("opt"))
    reading = next_tokens(inputs_for(model.model))
    fill = mean_fill(model, [inputs_for(model.model, seed=5)]) if filled == "mean" else "zero"
    removed = [Head(0, 1), Head(1, 0), Head(1, 1), FFN(0), FFN(2)]
    whole = answer_importance(model, [reading])
    with model.ablated(Mask(removed), fill):
        masked = answer_importance(model, [reading])
        # By hand: gates of a context entered later see what the mask left.
        with model.gated(gates := model.unit_gates((2, 9))):
            row_losses(model, reading).sum().backward()
    for site in model.sites:
        expected = gates[site.name].grad.sum(1).view(2, -1)
        for index, component in enumerate(site.components):
            column = model.components.index(component)
            if component in removed:
                assert (masked.gate[:, column] == 0).all()
                assert (masked.token[:, column] == 0).all()
            else:
                torch.testing.assert_close(
                    masked.gate[:, column], expected[:, index], atol=1e-5, rtol=1e-4
                )
                assert not torch.allclose(masked.gate[:, column], whole.gate[:, column], atol=1e-4)


@pytest.mark.parametrize("filled", ["zero", "mean"])
def test_scores_on_a_masked_model_equal_finite_differences(filled: str):
    model = HookedModel(tiny("opt", dtype=torch.float64))
    reading = next_tokens(inputs_for(model.model))
    fill = mean_fill(model, [inputs_for(model.model, seed=5)]) if filled == "mean" else "zero"
    removed = [Head(0, 1), Head(1, 0), Head(1, 1), FFN(0), FFN(2)]
    with model.ablated(Mask(removed), fill):
        masked = answer_importance(model, [reading])
        for site in model.sites:
            for index, component in enumerate(site.components):
                if component not in removed:
                    column = model.components.index(component)
                    expected = difference(model, reading, site, [index])
                    torch.testing.assert_close(
                        masked.gate[:, column].double(), expected, atol=1e-5, rtol=1e-4
                    )
    assert masked.gate.abs().median() > 0.02


# --- what must not matter -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama", "bart", "mamba"])
def test_scores_do_not_depend_on_how_many_rows_go_together(family: str):
    model = HookedModel(tiny(family))
    reading = next_tokens(inputs_for(model.model, batch=4))
    together = answer_importance(model, [reading], memory=2**30)
    alone = answer_importance(model, [reading], memory=1)
    split = answer_importance(model, [reading.rows(0, 1), reading.rows(1, 4)])
    for other in (alone, split):
        same(other, together)
        assert torch.equal(other.tokens, together.tokens)


def test_scores_follow_the_order_of_the_examples():
    model = HookedModel(tiny("llama"))
    reading = next_tokens(inputs_for(model.model, batch=4))
    order = torch.tensor([2, 0, 3, 1])
    turned = next_tokens(reading.inputs_of(order))
    straight, found = (answer_importance(model, [r]) for r in (reading, turned))
    torch.testing.assert_close(found.gate, straight.gate[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.token, straight.token[order], atol=1e-5, rtol=1e-4)
    for convention in ("gate", "token", "reference"):
        assert found.scores(convention) == pytest.approx(straight.scores(convention), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bloom"])
def test_padding_changes_no_score(family: str, side: str):
    model = HookedModel(tiny(family))
    rows = [tokens(1, length, seed=length)[0] for length in (9, 5, 7)]
    plain = [answer_importance(model, [next_tokens({"input_ids": row[None]})]) for row in rows]
    ids, mask = torch.zeros(2, 3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family != "bloom":  # alibi follows the mask
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = answer_importance(model, [next_tokens(inputs)])
    for i, alone in enumerate(plain):
        torch.testing.assert_close(found.gate[i], alone.gate[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.token[i], alone.token[0], atol=1e-5, rtol=1e-4)
    assert found.tokens.tolist() == [9, 5, 7]


# --- what is taken, what is refused -------------------------------------------------------------


def test_inputs_that_all_rows_share_are_taken():
    model = HookedModel(tiny("llama"))
    plain = next_tokens(inputs_for(model.model, batch=3))
    shared = {"use_cache": False, "position_ids": torch.arange(9)[None]}
    reading = replace(plain, inputs={**plain.inputs, **shared})
    expected = answer_importance(model, [plain])
    for memory in (1, None):
        same(answer_importance(model, [reading], memory=memory), expected)


def test_rows_that_share_a_source_are_taken():
    model = HookedModel(tiny("t5"))
    inputs = inputs_for(model.model, batch=3)
    of = torch.tensor([1, 1, 0])
    sources = {name: inputs[name][:2] for name in ("input_ids", "attention_mask")}
    shared = replace(next_tokens({**inputs, **sources}), source_rows=of)
    spread = {name: value[of] for name, value in sources.items()}
    same(
        answer_importance(model, [shared]),
        answer_importance(model, [next_tokens({**inputs, **spread})]),
    )


def test_a_row_of_which_nothing_is_read_is_named():
    model = HookedModel(tiny("opt"))
    whole = next_tokens(inputs_for(model.model, batch=3))
    kept = whole.positions[:, 0] != 1
    reading = Reading(whole.inputs, whole.positions[kept], whole.targets[kept])
    with pytest.raises(ValueError, match="nothing is read of row 1 of reading 1: name") as info:
        answer_importance(model, [whole, reading])
    assert "\n" not in str(info.value)


def test_layers_in_training_mode_are_refused():
    model = HookedModel(tiny("opt"))
    reading = next_tokens(inputs_for(model.model))
    model.model.model.decoder.layers[1].train()
    with pytest.raises(ValueError, match=r"importance of a model in training mode .*\.eval\(\)"):
        answer_importance(model, [reading])


def test_no_readings_are_refused():
    with pytest.raises(ValueError, match="importance of no examples asked for"):
        answer_importance(HookedModel(tiny("opt")), [])
