"""Stepwise rankings: by explicit loops over whole forwards, and the case they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ablate.components import FFN, Component, Head, KVGroup, Mixer
from ablate.effects import leave_one_out
from ablate.fills import mean_fill
from ablate.hooked import HookedModel
from ablate.importance import answer_importance, row_losses
from ablate.masks import Mask
from ablate.pruning import nested_masks, ranked, removed_count
from ablate.stepwise import greedy, rescored, stepwise
from ablate.sweep import Reading, next_tokens
from tests.ablate.one_by_one import few, logits_under, padded, read_off
from tests.families import tiny
from tests.induction_model import (
    BOS,
    D_HEAD,
    POSITION,
    POSITIONS,
    PREDICTION,
    PREVIOUS,
    TOKEN,
    VOCAB,
    _copy,
    _match,
    induction_opt,
    repeated_tokens,
)

UNITS: dict[str, list[Component]] = {
    "opt": [Head(0, 1), FFN(2), Head(1, 3), Head(2, 0), FFN(0)],
    "llama": [KVGroup(layer, group) for layer in (1, 0) for group in (0, 1)],
    "t5": [Head(0, 1, "encoder"), Head(1, 2, "cross"), Head(0, 0, "decoder"), FFN(0, "encoder")],
    "bart": [FFN(1, "decoder"), Head(1, 0, "encoder"), Head(0, 3, "cross"), Head(1, 1, "decoder")],
    "mamba": [Mixer(1), Mixer(0)],
    "jamba": [Mixer(0), Head(1, 2), FFN(1), Head(1, 0)],
}
COUNTS = {"mamba": [1]}


def read(model: HookedModel) -> list[Reading]:
    return [few(padded(model.model, padding)) for padding in ("none", "right")]


def loss_under(
    model: HookedModel, readings: list[Reading], removed: Sequence[Component], fill="zero"
) -> float:
    """Mean over rows of mean −log p, from whole forwards."""
    losses = []
    for reading in readings:
        log_p, _ = read_off(logits_under(model, [Mask(removed)], reading, fill), reading)
        losses += [-log_p[0, reading.positions[:, 0] == row].mean().double() for row in range(3)]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("family", UNITS)
def test_greedy_is_a_loop_of_masked_forwards(family: str) -> None:
    model = HookedModel(tiny(family))
    readings, components = read(model), UNITS[family]
    gone: list[Component] = []
    while len(gone) < len(components):
        left = [c for c in components if c not in gone]
        gone.append(min(left, key=lambda c: loss_under(model, readings, [*gone, c])))
    assert greedy(model, iter(readings), components) == tuple(gone)


def test_greedy_takes_several_at_once_where_counts_say_so() -> None:
    model = HookedModel(tiny("opt"))
    readings, components = read(model), model.heads[:7]
    fill = mean_fill(model, [reading.inputs for reading in readings])
    gone: list[Component] = []
    for count in (3, 5):
        left = [c for c in components if c not in gone]
        scores = {c: loss_under(model, readings, [*gone, c], fill) for c in left}
        order = sorted(left, key=lambda c: scores[c])
        gone, rest = [*gone, *order[: count - len(gone)]], order[count - len(gone) :]
    found = greedy(model, readings, components, counts=[0, 3, 3, 5], fill=fill, memory=10**6)
    assert found == (*gone, *rest)
    # One step of all is one-shot leave-one-out.
    effects = leave_one_out(model, readings, components=components).scores()
    assert greedy(model, readings, components, counts=[len(components)]) == ranked(effects)


def gradients_under(
    model: HookedModel, readings: list[Reading], gone: Sequence[Component], left: list[Component]
) -> dict[Component, float]:
    """|∂L/∂ξ| of a gate for a whole row, one row at a time, averaged."""
    total = dict.fromkeys(left, 0.0)
    for reading in readings:
        for row in range(3):
            gates = model.unit_gates()
            with model.ablated(Mask(gone)), model.gated(gates), torch.enable_grad():
                row_losses(model, reading.rows(row, row + 1)).sum().backward()
            slopes: dict[Component, float] = {}
            for site in model.sites:
                grad = gates[site.name].grad
                values = [0.0] * site.width if grad is None else grad.reshape(-1).tolist()
                slopes |= dict(zip(site.components, values, strict=True))
            for component in left:
                total[component] += abs(sum(slopes[c] for c in model.expand(Mask([component]))))
    return total


@pytest.mark.parametrize("family", UNITS)
def test_rescored_is_a_loop_of_masked_gradients(family: str) -> None:
    model = HookedModel(tiny(family))
    readings, components = read(model), UNITS[family]
    counts = COUNTS.get(family, [1, 3])
    gone: list[Component] = []
    rest: list[Component] = []
    for count in counts:
        left = [c for c in components if c not in gone]
        scores = gradients_under(model, readings, gone, left)
        order = sorted(left, key=lambda c: scores[c])
        gone, rest = [*gone, *order[: count - len(gone)]], order[count - len(gone) :]
    assert rescored(model, iter(readings), components, counts) == (*gone, *rest)


@pytest.mark.parametrize("convention", ["gate", "token"])
def test_rescored_in_one_step_is_one_shot(convention) -> None:
    model = HookedModel(tiny("opt"))
    readings = read(model)
    scores = answer_importance(model, readings).scores(convention)
    for counts in ([len(model.components)], [0], []):
        found = rescored(model, readings, model.components, counts, convention=convention)
        assert found == ranked(scores)


def test_the_fill_stands_in_for_what_is_gone() -> None:
    model = HookedModel(tiny("opt"))
    readings = read(model)
    fill = mean_fill(model, [reading.inputs for reading in readings])
    first, *left = rescored(model, readings, model.heads, [1], fill=fill)
    with model.ablated(Mask([first]), fill):
        scores = answer_importance(model, readings).scores()
    second = rescored(model, readings, model.heads, [1, 2], fill=fill)[1]
    assert second == min(left, key=lambda c: scores[c])


def test_nested_masks_of_the_ranking_are_the_steps() -> None:
    """Scores of a step are asked with what the steps before removed, and nothing else."""
    components = tuple(Head(0, i) for i in range(10))
    fractions = [0.0, 0.15, 0.4, 0.7]
    counts = [removed_count(10, fraction) for fraction in fractions]
    asked = []

    def scores(gone: Mask, left: tuple[Component, ...]) -> dict[Component, float]:
        assert set(left) == set(components) - gone.removed
        asked.append(gone)
        # The order turns round at every step; what is gone may be scored too.
        sign = -1 if len(asked) % 2 else 1
        return {c: float(sign * c.head) for c in components if isinstance(c, Head)}

    ranking = stepwise(components, counts, scores)
    assert ranking == tuple(Head(0, i) for i in (9, 0, 1, 2, 8, 7, 6, 5, 4, 3))
    assert asked == nested_masks(ranking, fractions)[:3]


@pytest.mark.parametrize("way", ["greedy", "rescored"])
def test_a_layer_quota_holds_at_every_step(way: str) -> None:
    """An explicit loop: of every layer as many as its share, by the scores of the step."""
    model = HookedModel(tiny("opt"))
    readings, components = read(model), model.heads
    fractions = [0.25, 0.5, 0.8]
    counts = [removed_count(len(components), fraction) for fraction in fractions]
    gone: list[Component] = []
    steps = []
    for number in (1, 2, 3):  # of the four heads of each layer
        left = [c for c in components if c not in gone]
        if way == "greedy":
            scores = {c: loss_under(model, readings, [*gone, c]) for c in left}
        else:
            scores = gradients_under(model, readings, gone, left)
        for layer in range(3):
            here = sorted((c for c in left if c.layer == layer), key=lambda c: scores[c])
            gone += here[: number - sum(c.layer == layer for c in gone)]
        steps.append(Mask(gone))

    def ranking(**asked: Any) -> tuple[Component, ...]:
        if way == "greedy":
            return greedy(model, readings, components, counts=counts, **asked)
        return rescored(model, readings, components, counts, **asked)

    assert nested_masks(ranking(quota="layer"), fractions, quota="layer") == steps
    assert nested_masks(ranking(), fractions) != steps
    if way == "greedy":  # one at a time is then one of every layer at a time
        found = greedy(model, readings, components, quota="layer")
        assert found == ranking(quota="layer")


def twins() -> HookedModel:
    """The induction circuit with its head twice, L1H1 and L1H2: one would do.

    Where nothing has been repeated yet, both rest on BOS and write nothing. L1H0 knows a little,
    and always: that no token follows itself.
    """
    hf_model = induction_opt(sharpness=20.0, gain=8.0)
    second = hf_model.model.decoder.layers[1].self_attn
    with torch.no_grad():
        for head in (1, 2):
            _match(second, head, TOKEN, PREVIOUS, torch.eye(VOCAB), 20.0)
            _copy(second, head, TOKEN, PREDICTION)
            rest = head * D_HEAD + VOCAB  # a free dimension: every token scores 10 at BOS
            second.q_proj.weight[rest, TOKEN : TOKEN + VOCAB] = 10.0 * D_HEAD**0.5
            second.k_proj.weight[rest, TOKEN + BOS] = 1.0
            second.v_proj.weight[head * D_HEAD + BOS] = 0.0
        _match(second, 0, POSITION, POSITION, torch.eye(POSITIONS), 20.0)
        _copy(second, 0, TOKEN, PREDICTION)
        second.out_proj.weight[:, :D_HEAD] *= -0.15
    return HookedModel(hf_model)


def test_one_shot_removes_both_of_two_twins_and_stepwise_keeps_one() -> None:
    """Why scores are taken again: of two heads that do the same, each alone looks needless."""
    model = twins()
    little, *same = heads = (Head(1, 0), Head(1, 1), Head(1, 2))
    reading = next_tokens({"input_ids": repeated_tokens(4)})
    readings = [reading]
    whole = loss_under(model, readings, [])
    exact = leave_one_out(model, readings, components=heads).scores()
    gradient = answer_importance(model, readings).scores()
    for one_shot in (exact, {head: gradient[head] for head in heads}):
        assert ranked(one_shot)[:2] == tuple(same)
    # Half of what is read needs one of the two: without both the model is blind there.
    assert loss_under(model, readings, same) > whole + 1
    for ranking in (greedy(model, readings, heads), rescored(model, readings, heads, [1, 2])):
        assert ranking[0] in same
        assert ranking[1] == little
        assert loss_under(model, readings, ranking[:2]) < whole + 0.05


def test_what_cannot_be_ranked_is_refused() -> None:
    model = HookedModel(tiny("llama"))
    readings = read(model)
    with pytest.raises(ValueError, match="ranking of no components"):
        greedy(model, readings, [])
    with pytest.raises(
        ValueError, match="L0G0 and L0H1 asked for in one ranking: both remove L0H1"
    ):
        greedy(model, readings, [KVGroup(0, 0), Head(0, 1)])
    with pytest.raises(ValueError, match="both remove L1F"):
        rescored(model, readings, [FFN(1), FFN(1)], [1])
    for counts in ([2, 1], [-1], [3]):
        with pytest.raises(ValueError, match=f"counts {counts[0]}.* of 2 components"):
            rescored(model, readings, model.heads[:2], counts)
    with pytest.raises(ValueError, match="no head L9H0"):
        greedy(model, readings, [Head(9, 0)])
    with pytest.raises(ValueError, match="no readings"):
        greedy(model, [], model.heads[:2])
