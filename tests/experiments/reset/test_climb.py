"""Students in one climb against full forwards of each: losses and gradients, every family."""

from __future__ import annotations

import pytest
import torch

from ablate.reset import Place
from experiments.reset.learning import climb
from experiments.reset.learning.climb import Pass, evaluate, evaluate_base, learn
from experiments.reset.learning.cohorts import Training
from experiments.reset.learning.treatments import Treatment
from experiments.reset.learning.whole import plain_loss, prepared, row_sums
from tests.experiments.reset.sessions import session

FAMILIES = [
    ("opt", None),
    ("gpt2", None),
    ("llama", None),
    ("gpt_neox", None),
    ("mamba", None),
    ("bert", None),
    ("esm", None),
    ("t5", "decoder"),
    ("t5", "encoder"),
    ("bart", "decoder"),
    ("bart", "encoder"),
]


def students(stack: str | None, targets: tuple[str, ...]) -> list[Treatment]:
    """Two seeds of each of two layers, for each target."""
    place = [Place(layer, "block", stack or "") for layer in (0, 1)]  # pyright: ignore
    return [
        Treatment("A0", (p,), (p,), "moments", target, seed, 1e-2)  # pyright: ignore
        for p in place
        for target in targets
        for seed in (0, 1)
    ]


def trainings(asked, treatments: list[Treatment]) -> list[Training]:  # noqa: ANN001
    """Two students each."""
    pairs = zip(treatments[::2], treatments[1::2], strict=True)
    return [Training.of(asked.model, pair) for pair in pairs]


@pytest.mark.parametrize(("family", "stack"), FAMILIES)
def test_losses_and_gradients_are_those_of_full_forwards(family: str, stack: str | None) -> None:
    asked = session(family, stack=stack)
    treatments = students(stack, ("lm", "hidden", "logits", "mix"))
    made = trainings(asked, treatments)
    batch = asked.batch(0)
    found = learn(Pass.of(asked.model, batch, asked.stack), [t.cohort for t in made])
    for losses, training in zip(found, made, strict=True):
        for k, member in enumerate(training.members):
            alone = prepared(asked, member)
            loss = plain_loss(asked, alone, member, batch)
            loss.backward()
            torch.testing.assert_close(losses[k], loss, rtol=1e-5, atol=1e-6)
            named = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            largest = max(float(g.abs().max()) for g in named.values())
            (layer,) = member.layers
            for name, stacked in training.cohort.blocks[layer].trained().items():
                full = next(n for n in named if n.endswith(f".{layer}.{name}") and _in(n, stack))
                assert stacked.grad is not None
                torch.testing.assert_close(
                    stacked.grad[k], named[full], rtol=1e-3, atol=2e-5 * largest
                )


def _in(name: str, stack: str | None) -> bool:
    return stack is None or f"{stack}." in name


@pytest.mark.parametrize(("family", "stack"), FAMILIES)
def test_evaluation_is_that_of_full_forwards(family: str, stack: str | None) -> None:
    asked = session(family, stack=stack)
    treatments = students(stack, ("lm",))
    made = trainings(asked, treatments)
    batch = asked.held_out[0]
    passing = Pass.of(asked.model, batch, asked.stack)
    base = row_sums(asked, asked.model, [batch])
    torch.testing.assert_close(evaluate_base(passing).double(), base, rtol=1e-5, atol=1e-5)
    for sums, training in zip(evaluate(passing, [t.cohort for t in made]), made, strict=True):
        for k, member in enumerate(training.members):
            alone = row_sums(asked, prepared(asked, member), [batch])
            torch.testing.assert_close(sums[k].double(), alone, rtol=1e-5, atol=1e-5)


def test_two_replaced_blocks_and_a_frozen_random_one() -> None:
    asked = session("opt")
    around = Treatment("A5", (Place(1),), (Place(0), Place(2)), "moments", "lm", 3)
    training = Training.of(asked.model, [around])
    batch = asked.batch(1)
    (loss,) = learn(Pass.of(asked.model, batch), [training.cohort])
    alone = prepared(asked, around)
    torch.testing.assert_close(loss[0], plain_loss(asked, alone, around, batch))
    assert not training.cohort.blocks[1].trained()
    assert training.cohort.blocks[0].trained()


def test_the_logits_in_pieces_are_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = session("opt")
    treatments = students(None, ("lm", "logits"))
    batch = asked.batch(0)
    found = []
    for chunk in (2**22, 1):
        monkeypatch.setattr(climb, "CHUNK", chunk)
        made = trainings(asked, treatments)
        losses = learn(Pass.of(asked.model, batch), [t.cohort for t in made])
        grads = [stack.grad for t in made for stack in t.stacks]
        found.append((losses, grads))
    for one, other in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_one_student_that_is_not_finite_leaves_the_others_alone() -> None:
    asked = session("opt")
    pair = students(None, ("lm",))[:2]
    whole, broken = (Training.of(asked.model, pair) for _ in range(2))
    with torch.no_grad():
        broken.stacks[0][1] = float("nan")
    batch = asked.batch(0)
    for training in (whole, broken):
        learn(Pass.of(asked.model, batch), [training.cohort])
    for one, other in zip(whole.stacks, broken.stacks, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad[0], other.grad[0])
    kept = broken.stacks[1][1].clone()
    norm = broken.update(1.0)
    assert torch.equal(broken.stacks[1][1], kept)
    assert not norm[1].isfinite()
    assert norm[0].isfinite()


def test_towards_the_old_output_is_for_one_block() -> None:
    asked = session("opt")
    two = Treatment("A12", (Place(0), Place(1)), (Place(0), Place(1)), target="hidden")
    with pytest.raises(ValueError, match="cohorts of one layer"):
        Training.of(asked.model, [two])
