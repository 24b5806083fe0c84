"""K students run as one block: equal to each of them run alone, values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from ablate.parts import Part
from ablate.stack import record
from ablate.students import Students
from tests.families import FAMILIES, inputs_for, tiny


def drawn(block: torch.nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    """Weights of `count` students near the block's own."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p)
            for name, p in block.named_parameters()
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_students_are_the_block_with_each_ones_weights(family: str, count: int) -> None:
    model = tiny(family)
    part = Part.of(model, None, None)
    layer = len(part.blocks) - 1
    block = part.blocks[layer]
    recorded = record(model, inputs_for(model), keep=[layer])
    resid = recorded.resid(layer)
    weights = drawn(block, count)
    names = list(weights[0])
    students = Students(block, weights, names)
    before = {name: p.clone() for name, p in block.named_parameters()}

    tiled = recorded.tile(count).calls[layer]
    together = replace(tiled, block=students).run((resid.repeat(count, 1, 1),))[0]
    together.square().sum().backward()

    call = recorded.calls[layer]
    for k, given in enumerate(weights):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        alone = _called(call, block, leaves, resid)
        alone.square().sum().backward()
        torch.testing.assert_close(together[k * len(resid) :][: len(resid)], alone)
        # The bias of k has no gradient but rounding: the largest gradient sets the scale.
        size = max(
            float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None
        )
        for name, leaf in leaves.items():
            grad = students.trained()[name].grad
            assert grad is not None
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(grad[k], expected, rtol=1e-4, atol=1e-5 + 1e-5 * size)
    for name, p in block.named_parameters():
        assert torch.equal(p, before[name])


def _called(call, block, leaves, resid):  # noqa: ANN001, ANN202
    """The block's own code with other weights, on the rows of one student."""

    class Other(torch.nn.Module):
        def forward(self, *args, **kwargs):  # noqa: ANN002, ANN003, ANN202
            return functional_call(block, leaves, args, kwargs)

    return replace(call, block=Other()).run((resid,))[0]


def test_only_what_is_trained_is_a_parameter() -> None:
    block = Part.of(tiny("opt"), None, None).blocks[0]
    students = Students(block, [{}, {}], ["fc1.weight"])
    own = dict(block.named_parameters())["fc1.weight"]
    assert [p.shape for p in students.parameters()] == [(2, *own.shape)]
    assert list(students.trained()) == ["fc1.weight"]
    assert torch.equal(students.weights(1)["fc1.weight"], own)


def test_a_student_that_differs_in_a_frozen_tensor() -> None:
    model = tiny("opt")
    block = Part.of(model, None, None).blocks[0]
    other = torch.zeros_like(block.fc1.weight)
    students = Students(block, [{}, {"fc1.weight": other}], ["fc2.weight"])
    recorded = record(model, inputs_for(model), keep=[0])
    call = replace(recorded.tile(2).calls[0], block=students)
    out = call.run((recorded.resid(0).repeat(2, 1, 1),))[0]
    whole, without = out.chunk(2)
    torch.testing.assert_close(whole, recorded.calls[0].run((recorded.resid(0),))[0])
    assert not torch.allclose(whole, without)
    assert "fc1.weight" not in students.trained()


@pytest.mark.parametrize(
    ("weights", "trained", "said"),
    [
        ([], [], "at least one"),
        ([{"fc9.weight": torch.zeros(1)}], [], "fc9.weight"),
        ([{}], ["nothing"], "nothing is to be trained"),
        ([{"fc1.weight": torch.zeros(1)}], [], "same shape"),
    ],
)
def test_what_is_refused(weights: list, trained: list, said: str) -> None:
    block = Part.of(tiny("opt"), None, None).blocks[0]
    with pytest.raises(ValueError, match=said):
        Students(block, weights, trained)


def test_hooks_of_the_user_stay_on_the_users_block() -> None:
    model = tiny("opt")
    block = Part.of(model, None, None).blocks[0]
    seen: list[int] = []
    block.fc1.register_forward_hook(lambda *_: seen.append(1))
    students = Students(block, [{}], ["fc2.weight"])
    recorded = record(model, inputs_for(model), keep=[0])
    seen.clear()
    replace(recorded.calls[0], block=students).run((recorded.resid(0),))
    assert not seen
