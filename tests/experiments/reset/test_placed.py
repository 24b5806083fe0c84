"""Bases in bfloat16, bases of which blocks are on disk, and what a pass over a batch keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from torch import nn

from ablate.calls import Call
from ablate.parts import Part
from ablate.reset import Place
from ablate.students import Students
from experiments.reset.learning.climb import Pass, learn, needed
from experiments.reset.learning.cohorts import Training
from experiments.reset.learning.session import retrain
from experiments.reset.learning.treatments import Target, Treatment
from experiments.reset.learning.whole import retrain_whole
from tests.experiments.reset.sessions import session
from tests.families import tiny

CPU = torch.device("cpu")


def treated(layer: int, target: Target = "lm", stack: Any = "", rate: float = 1e-2) -> Treatment:
    """A reset block."""
    place = (Place(layer, stack=stack),)
    return Treatment("A0", place, place, "moments", target, rate=rate)


def placed(model: nn.Module, folder: Path, resident: str) -> nn.Module:
    """The model with all of it on disk but the module `resident`."""
    devices: dict[str, str] = {}

    def place(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}{name}"
            if resident == here or resident.startswith(f"{here}."):
                devices[here] = "cpu"
            else:
                devices[here] = "disk"
            if resident.startswith(f"{here}."):
                del devices[here]
                place(child, f"{here}.")

    place(model, "")
    devices |= {name: "cpu" for name, _ in model.named_buffers(recurse=False)}
    dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


def offloaded(model: nn.Module) -> set[str]:
    """Names of the parameters that are on disk."""
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


FAMILIES = {
    "opt": ("model.decoder.layers.1", ""),
    "llama": ("model.layers.1", ""),
    "bert": ("bert.encoder.layer.1", ""),
    "mamba": ("backbone.layers.1", ""),
    "t5": ("decoder.block.1", "decoder"),
}


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_on_disk_around_the_reset_one_change_nothing(family: str, tmp_path: Path) -> None:
    path, stack = FAMILIES[family]
    treatments = [treated(1, target, stack) for target in ("lm", "hidden", "logits")]
    kind: Any = stack or None
    whole = retrain(session(family, treatments, stack=kind))
    model = placed(tiny(family), tmp_path, path)
    before = offloaded(model)
    assert before
    assert not any(name.startswith(f"{path}.") for name in before)
    found = retrain(session(family, treatments, stack=kind, model=model))
    found, whole = (frame.drop(columns="seconds") for frame in (found, whole))
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert offloaded(model) == before


def test_blocks_in_memory_that_are_offloaded_are_fetched_again_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the weights of all blocks above would be on the device at once."""
    asked = session("opt")
    blocks = Part.of(asked.model, None, None).blocks
    alone = Training.of(asked.model, [treated(1)])
    batch = asked.batch(0)
    (wanted,) = learn(Pass.of(asked.model, batch), [alone.cohort])
    cpu_offload(blocks[2], CPU)
    again: list[nn.Module] = []
    run = Call.run

    def spied(call: Call, before: tuple[Any, ...], checkpoint: bool = False) -> tuple[Any, ...]:
        again.extend([call.block] * checkpoint)
        return run(call, before, checkpoint)

    monkeypatch.setattr(Call, "run", spied)
    training = Training.of(asked.model, [treated(1)])
    passing = Pass.of(asked.model, batch)
    assert passing.offloaded == {2}
    (found,) = learn(passing, [training.cohort])
    assert again == [blocks[2]]
    assert torch.equal(found, wanted)
    for one, other in zip(training.stacks, alone.stacks, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert all(parameter.is_meta for parameter in blocks[2].parameters())


def test_what_is_offloaded_is_not_reset(tmp_path: Path) -> None:
    model = placed(tiny("opt"), tmp_path / "one", "model.decoder.layers.1")
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ of OPT.* is offloaded: .* device_map"):
        retrain(session("opt", [treated(0)], model=model))
    everything = Treatment("A2", (), (), scope="all")
    with pytest.raises(ValueError, match=r"is offloaded .*would be lost"):
        retrain_whole(session("opt", model=model), everything)
    model = placed(tiny("opt"), tmp_path / "two", "model.decoder.layers.1.fc1")
    part = (Place(1, "ffn"),)
    with pytest.raises(ValueError, match=r"is offloaded: load the model with a device_map"):
        retrain(session("opt", [Treatment("A9", part, part)], model=model))
    norms = (Place(1, "norms"),)
    model = placed(tiny("opt"), tmp_path / "three", "model.decoder.layers.1.final_layer_norm")
    with pytest.raises(ValueError, match=r"is offloaded: .*keeps \S+ on a device"):
        retrain(session("opt", [Treatment("A9", norms, norms)], model=model))


def test_a_block_that_is_offloaded_in_part_has_no_students(tmp_path: Path) -> None:
    model: Any = placed(tiny("opt"), tmp_path, "model.decoder.layers.1.fc1")
    block = model.model.decoder.layers[1]
    fresh = {"fc1.bias": torch.zeros_like(block.fc1.bias)}
    with pytest.raises(ValueError, match="of a block with students is offloaded: .* whole block"):
        Students(block, [fresh], ["fc1.bias"])


def test_students_do_not_copy_what_accelerate_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hooks refer to the weights of all blocks."""
    model: Any = placed(tiny("opt"), tmp_path, "model.decoder.layers.1")
    block = model.model.decoder.layers[1]
    assert isinstance(block.fc1._hf_hook, AlignDevicesHook)

    def refuse(hook: AlignDevicesHook, memo: object) -> None:
        raise AssertionError("a hook is being copied")

    monkeypatch.setattr(AlignDevicesHook, "__deepcopy__", refuse, raising=False)
    students = Students(block, [{}, {}], ["fc1.weight"])
    assert not any(hasattr(module, "_hf_hook") for module in students.body[0].modules())
    assert isinstance(block.fc1._hf_hook, AlignDevicesHook)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_base_in_bfloat16_trains_students_in_float32(family: str) -> None:
    """Losses are those of a float32 base within bfloat16's rounding."""
    treatments = [treated(1, target, rate=3e-3) for target in ("lm", "hidden")]
    frames = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family, dtype=dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        frames.append(retrain(session(family, treatments, model=model, steps=30)))
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    exact, rounded = frames
    lm = exact[exact["target"] == "lm"]["loss"]
    assert lm.iloc[0] - lm.min() > 0.2
    assert (exact["loss"] - rounded["loss"]).abs().max() < 0.02  # of 5.5 nats; 0.006 is seen


def test_steps_smaller_than_bfloat16_can_tell_are_not_lost() -> None:
    asked = session("opt", model=tiny("opt", dtype=torch.bfloat16))
    training = Training.of(asked.model, [treated(1, rate=1e-5)])
    assert all(stack.dtype == torch.float32 for stack in training.stacks)
    before = [stack.detach().clone() for stack in training.stacks]
    for step in range(3):
        learn(Pass.of(asked.model, asked.batch(step)), [training.cohort])
        training.update(1.0)
    for stack, old in zip(training.stacks, before, strict=True):
        stack = stack.detach()
        moved = (stack - old).abs()
        large = old.abs() > 0.05  # where 3e-5 is less than half a unit in the last place
        assert (moved[large] > 0).float().mean() > 0.9
        assert float(moved.max()) < 1e-4
        assert torch.equal(stack[large].bfloat16(), old[large].bfloat16())
    state = training.optimiser.state.values()
    assert all(moment["exp_avg"].dtype == torch.float32 for moment in state)


@pytest.mark.parametrize(
    ("targets", "kept"),
    [
        (["lm"], {0, 1}),
        (["hidden"], {0, 1, 2}),
        (["lm", "logits"], {0, 1, 3}),
        (["mix"], {0, 1, 2}),
    ],
)
def test_a_pass_keeps_the_streams_that_are_learned_from(
    targets: list[Target], kept: set[int]
) -> None:
    asked = session("opt")
    treatments = [treated(layer, target) for layer in (0, 1) for target in targets]
    cohorts = [Training.of(asked.model, [t]).cohort for t in treatments]
    assert needed(cohorts, 3) == kept
    passing = Pass.of(asked.model, asked.batch(0), None, needed(cohorts, 3))
    assert set(passing.recorded.kept) == kept
    whole = Pass.of(asked.model, asked.batch(0))
    assert set(whole.recorded.kept) == {0, 1, 2, 3}
    for one, other in zip(learn(passing, cohorts), learn(whole, cohorts), strict=True):
        assert torch.equal(one, other)


def test_an_examiner_keeps_where_students_begin() -> None:
    asked = session("opt", [treated(1), treated(2)])
    examiner = asked.examiner()
    kept = [set(passing.recorded.kept) for passing in examiner.kept.values()]
    assert kept == [{1, 2}] * len(asked.held_out)
    cohorts = [Training.of(asked.model, [t]).cohort for t in asked.treatments]
    first = examiner.sums(cohorts)
    assert [set(passing.recorded.kept) for passing in examiner.kept.values()] == kept
    other = session("opt").examiner()  # it knows of no students
    assert torch.equal(other.base, examiner.base)
    for one, again in zip(first, other.sums(cohorts), strict=True):
        assert torch.equal(one, again)
    assert other.skipped(0) == examiner.skipped(0)
    assert other.room == examiner.room


def test_an_examiner_without_room_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = session("opt", [treated(1)])
    cohorts = [Training.of(asked.model, asked.treatments).cohort]
    wanted = asked.examiner().sums(cohorts)
    monkeypatch.setattr("experiments.reset.learning.examiner.KEPT", 0)
    examiner = asked.examiner()
    assert torch.equal(examiner.sums(cohorts)[0], wanted[0])
    assert not examiner.kept
