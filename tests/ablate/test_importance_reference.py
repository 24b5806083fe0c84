"""Conventions against plain loops, the reference's arithmetic against a calculation of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ablate import FFN, Head, HookedModel, Reading
from ablate.conventions import Importance
from ablate.importance import answer_importance, gradient_importance
from tests.families import HEADS, inputs_for, tiny, tokens

LABELS = ((9, 2), (6, 1), (12, 4))
"""(tokens of prompt and answer, tokens of the answer) of three examples"""


def examples() -> list[Tensor]:
    return [tokens(1, length, seed=i)[0] for i, (length, _) in enumerate(LABELS)]


def padded_reading(side: str = "right") -> Reading:
    """The examples as rows of one batch, each without its last token."""
    rows = [row[:-1] for row in examples()]
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    positions, targets = [], []
    for i, (row, (length, labels)) in enumerate(zip(rows, LABELS, strict=True)):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
        for j in range(length - labels, length):
            positions.append([i, start + j - 1])
            targets.append(examples()[i][j])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Reading(inputs, torch.tensor(positions), torch.stack(targets))


def by_hand(hf_model: Any) -> list[list[float]]:
    """[layer][head]: the reference's loop, from the model's own modules and nothing of ours."""
    layers = hf_model.model.decoder.layers
    sums = [[0.0] * HEADS for _ in layers]
    tot_tokens = eff_tokens = 0
    for row, (_, labels) in zip(examples(), LABELS, strict=True):
        seen: dict[int, Tensor] = {}
        handles = []
        for number, layer in enumerate(layers):

            def keep(module, args, number=number, seen=seen):
                args[0].retain_grad()
                seen[number] = args[0]

            handles.append(layer.self_attn.out_proj.register_forward_pre_hook(keep))
        logits = hf_model(input_ids=row[None, :-1]).logits[0]
        for handle in handles:
            handle.remove()
        torch.nn.functional.cross_entropy(logits[-labels:], row[-labels:]).backward()
        hf_model.zero_grad()
        for number, value in seen.items():
            assert value.grad is not None
            z, gradient = value.detach()[0].tolist(), value.grad[0].tolist()
            d_head = value.shape[-1] // HEADS
            for position in range(len(row) - 1):
                for head in range(HEADS):
                    dot = 0.0
                    for d in range(head * d_head, (head + 1) * d_head):
                        dot += z[position][d] * gradient[position][d]
                    sums[number][head] += abs(dot)
        tot_tokens += len(row) - 1
        eff_tokens += labels
    last = len(layers) - 1
    return [
        [value / (eff_tokens if number == last else tot_tokens) for value in of_layer]
        for number, of_layer in enumerate(sums)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_reference_scores_equal_the_references_own_loop(side: str):
    expected = by_hand(tiny("opt"))
    model = HookedModel(tiny("opt"))
    importance = answer_importance(model, [padded_reading(side)])
    scores = importance.scores("reference")
    for layer in range(3):
        for head in range(HEADS):
            assert scores[Head(layer, head)] == pytest.approx(expected[layer][head], rel=2e-5)
    assert importance.tokens is not None
    assert importance.tokens.tolist() == [length - 1 for length, _ in LABELS]
    assert importance.predictions.tolist() == [labels for _, labels in LABELS]
    # The rule for FFNs, which is ours: the same divisors.
    ffn = importance.components.index(FFN(1))
    assert scores[FFN(1)] == pytest.approx(float(importance.token[:, ffn].sum()) / 24, rel=1e-6)
    ffn = importance.components.index(FFN(2))
    assert scores[FFN(2)] == pytest.approx(float(importance.token[:, ffn].sum()) / 7, rel=1e-6)


def test_the_last_layer_is_the_models_not_that_of_the_components_asked_for():
    model = HookedModel(tiny("opt"))
    everything = answer_importance(model, [padded_reading()]).scores("reference")
    part = [Head(0, 1), Head(1, 2)]
    some = answer_importance(model, [padded_reading()], components=part).scores("reference")
    assert some == pytest.approx({head: everything[head] for head in part}, rel=1e-6)


def test_two_stacks_have_a_last_layer_each_and_count_the_decoders_tokens():
    model = HookedModel(tiny("bart"))
    inputs = inputs_for(model.model, batch=2, pos=9)
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    inputs["decoder_attention_mask"][1, -2:] = 0
    reading = Reading(inputs, torch.tensor([[0, 6], [0, 5], [1, 4]]), torch.tensor([5, 6, 7]))
    importance = answer_importance(model, [reading])
    assert importance.tokens.tolist() == [7, 5]
    scores = importance.scores("reference")
    for column, component in enumerate(importance.components):
        divisor = 3 if component.layer == 1 else 12  # two layers in either stack
        total = float(importance.token[:, column].sum())
        assert scores[component] == pytest.approx(total / divisor, rel=1e-6)


def test_cross_attention_is_in_the_decoders_layers():
    components = (Head(1, 0, "cross"), Head(2, 0, "decoder"), Head(1, 0, "encoder"))
    ones = torch.ones(2, 3)
    found = Importance(components, ones, ones, torch.tensor([10, 20]), torch.tensor([1, 2]))
    assert list(found.scores("reference").values()) == pytest.approx([2 / 30, 2 / 3, 2 / 3])


def drawn(examples: int) -> Importance:
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(examples, 3, generator=generator)
    counted = torch.randint(5, 60, (examples,), generator=generator)
    return Importance(
        (Head(0, 0), Head(1, 0), FFN(1)),
        gate,
        gate.abs() * counted[:, None] * torch.rand(examples, 3, generator=generator),
        counted,
        torch.randint(1, 5, (examples,), generator=generator),
    )


def test_standard_errors_of_the_reference_equal_the_jackknifes():
    importance = drawn(500)
    frame = importance.frame().set_index(["convention", "component"])
    assert set(frame.index.levels[0]) == {"gate", "token", "reference"}
    for column, component in enumerate(importance.components):
        counted = importance.tokens if component.layer == 0 else importance.predictions
        sums, counts = importance.token[:, column].double(), counted.double()
        without = (sums.sum() - sums) / (counts.sum() - counts)
        spread = ((len(sums) - 1) / len(sums) * (without - without.mean()).pow(2).sum()).sqrt()
        row = frame.loc[("reference", str(component))]
        assert row.value == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-6)
        assert row.stderr == pytest.approx(float(spread), rel=2e-2)


def test_effects_are_what_the_scores_are_means_of():
    importance = drawn(7)
    for convention in ("gate", "token"):
        effects = importance.effects(convention)
        assert (effects >= 0).all()
        expected = dict(zip(importance.components, effects.mean(0).tolist(), strict=True))
        assert importance.scores(convention) == pytest.approx(expected)
    with pytest.raises(ValueError, match="ratio of sums over all examples; use 'gate'") as info:
        importance.effects("reference")
    assert "\n" not in str(info.value)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="no convention 'paper': use"):
        drawn(3).scores("paper")


def test_foreign_losses_have_no_reference_scores():
    model = HookedModel(tiny("opt"))

    def losses(batch: Tensor) -> Tensor:
        return model.model(input_ids=batch).logits.logsumexp(-1).mean(-1)

    importance = gradient_importance(model, [tokens()], losses)
    with pytest.raises(ValueError, match="'reference' asked for without tokens") as info:
        importance.scores("reference")
    assert "\n" not in str(info.value)
    assert set(importance.frame().convention) == {"gate", "token"}


def test_one_example_has_a_reference_score_without_a_standard_error():
    frame = drawn(1).frame()
    assert frame.value.notna().all()
    assert frame.stderr.isna().all()
