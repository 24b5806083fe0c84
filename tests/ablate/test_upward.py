"""Masked streams climb together: blocks are fetched once, memory is kept, nothing is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils.offload import PrefixedDataset
from torch import nn

from ablate import readout
from ablate.budget import with_peak
from ablate.components import Head
from ablate.fills import mean_fill
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.sweep import Reading, _components, _recorded, _stacks, sweep
from ablate.upward import _pieces
from ablate.variants import fork
from tests.ablate.one_by_one import everywhere, few, logits_under, many_masks, padded, read_off
from tests.families import inputs_for, tiny

CPU = torch.device("cpu")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often accelerate has fetched each offloaded tensor."""
    counts: Counter[str] = Counter()
    get = PrefixedDataset.__getitem__

    def counting(self: PrefixedDataset, key: str) -> Any:
        counts[f"{self.prefix}{key}"] += 1
        return get(self, key)

    monkeypatch.setattr(PrefixedDataset, "__getitem__", counting)
    return counts


def offload(model: nn.Module, where: str, folder: Path) -> None:
    if where == "disk":
        disk_offload(model, folder, CPU, offload_buffers=True)
    else:
        cpu_offload(model, CPU, offload_buffers=True)


def left_as(model: nn.Module) -> list[Any]:
    """What a careless engine would leave behind."""
    return [
        (m.__dict__.get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks), m._buffers)
        for m in model.modules()
    ] + [(name, x.device) for name, x in model.state_dict(keep_vars=True).items()]


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(
    "family", ["opt-350m", "llama", "gemma2", "bart", "t5", "falcon_h1", "jamba"]
)
def test_offloaded_models_say_the_same_and_blocks_are_fetched_once(
    family: str,
    where: str,
    tmp_path: Path,
    fetched: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readout, "SLOTS", 1)
    monkeypatch.setattr(readout, "LOGITS", 4 * 61)  # logits in many pieces
    model = HookedModel(tiny(family))
    inputs = padded(model.model, "left")
    masks = many_masks(model)
    logits = logits_under(model, masks, few(inputs))
    offload(model.model, where, tmp_path)
    before = left_as(model.model)
    assert all(p.is_meta for p in model.model.parameters())
    counts = []
    lowest = Mask(model.components[:1])
    for reading in (few(inputs), everywhere(inputs)):
        for asked in ([lowest], masks):
            fetched.clear()
            (swept,) = sweep(model, asked, [reading])
            # All but a tensor of the model itself (BART's), which each piece of the logits takes.
            counts.append({name: n for name, n in fetched.items() if "." in name})
            assert left_as(model.model) == before
        expected = read_off(logits, reading)
        torch.testing.assert_close(swept.log_p, expected[0], rtol=0, atol=1e-5)
        assert torch.equal(swept.best, expected[1])
    one, *more = counts
    assert all(count == one for count in more), "fetches grow with the number of masks"
    blocks = tuple(site.block for site in model.sites)
    # Once for the recorded forward, once for all masks. BART's forward cannot be left behind its
    # encoder (a tensor of the model itself is offloaded), so its decoder runs once more.
    times = {n for name, n in one.items() if name.startswith(blocks)}
    assert times == ({2, 3} if family == "bart" else {2})


def test_blocks_below_the_lowest_mask_are_not_fetched_again(fetched: Counter[str]) -> None:
    model = HookedModel(tiny("opt"))
    cpu_offload(model.model, CPU)
    list(sweep(model, [Mask(), Mask([Head(2, 1)])], [few(padded(model.model, "none"))]))
    of_layers = [fetched[f"model.decoder.layers.{i}.fc1.weight"] for i in range(3)]
    assert of_layers == [1, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("family", "offloaded"),
    [("llama", False), ("bart", False), ("falcon_h1", False), ("llama", True), ("falcon_h1", True)],
)
def test_nothing_is_left_behind_whatever_happens(
    family: str, offloaded: bool, error: type[BaseException]
) -> None:
    model = HookedModel(tiny(family))
    inputs, masks = padded(model.model, "left"), many_masks(model)
    if offloaded:
        cpu_offload(model.model, CPU, offload_buffers=True)
    before = left_as(model.model)
    name = "fc2" if family == "bart" else "down_proj"
    inside = [m for path, m in model.model.named_modules() if path.endswith(name)]
    for module in inside:
        for call in (1, 2, 3):  # in the recording, while measuring, in the first piece
            left = [call]

            def fail(*_: object, left: list[int] = left) -> None:
                left[0] -= 1
                if not left[0]:
                    raise error("on purpose")

            with module.register_forward_hook(fail), pytest.raises(error, match="on purpose"):
                list(sweep(model, masks, [everywhere(inputs)]))
            assert left_as(model.model) == before
    list(sweep(model, masks, [everywhere(inputs)]))
    assert left_as(model.model) == before


# Memory


def peak(model: HookedModel, masks: list[Mask], reading: Reading, memory: int | None) -> int:
    _, found = with_peak(lambda: list(sweep(model, masks, [reading], memory=memory)), CPU)
    return found


def of_recording(model: HookedModel, masks: list[Mask], reading: Reading) -> int:
    """What the recorded forward takes and keeps."""
    stacks = _stacks(model)
    levels, _ = fork(masks, [_components(block) for stack in stacks for block in stack])
    with torch.no_grad():
        return with_peak(lambda: _recorded(model, stacks, levels, reading, True), CPU)[1]


CASES = {
    "all positions": ("opt", {"num_hidden_layers": 4}, (4, 60)),
    "a large vocabulary": ("llama", {"vocab_size": 3000}, (4, 60)),
    "a long source": ("bart", {"max_position_embeddings": 300}, (2, 200)),
    "shared sources": ("bart", {"max_position_embeddings": 300}, (2, 100)),
    "experts": ("mixtral", {}, (4, 60)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_keeps_to_its_memory(case: str) -> None:
    """Beyond the recorded forward no more than `memory` is allocated."""
    family, changes, (batch, pos) = CASES[case]
    model = HookedModel(tiny(family, **changes))
    inputs = inputs_for(model.model, batch, pos)
    if family == "bart":
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :5]
    reading = everywhere(inputs)
    if case == "shared sources":
        inputs["decoder_input_ids"] = inputs_for(model.model, 12, 62)["decoder_input_ids"]
        reading = replace(everywhere(inputs), source_rows=torch.arange(12) % 2)
    masks = [Mask([component]) for component in model.components]
    base = of_recording(model, masks, reading)
    memory = 1_300_000
    assert peak(model, masks, reading, None) > base + memory, "or there is nothing to plan"
    assert peak(model, masks, reading, memory) <= base + memory


def test_too_little_memory_means_one_row_at_a_time() -> None:
    model = HookedModel(tiny("opt"))
    rows = []
    model.model.model.decoder.layers[2].register_forward_hook(
        lambda module, args, out: rows.append(len(args[0]))
    )
    reading = everywhere(inputs_for(model.model, 4, 9))
    list(sweep(model, [Mask([Head(0, 0)]), Mask([Head(1, 0)])], [reading], memory=1))
    # The recorded forward, then each mask's four rows; a row like them was measured in layer 1.
    assert rows == [4, *[1] * 8]


def pieces_of(nodes: int, batch: int, size: int) -> Iterator[set[tuple[int, int]]]:
    for some, first, end in _pieces(range(nodes), batch, size):
        yield {(node, row) for node in some for row in range(first, end)}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 9, 100])
def test_pieces_hold_every_row_once_and_fit(size: int) -> None:
    parts = list(pieces_of(5, 4, size))
    assert all(0 < len(part) <= size for part in parts)
    assert sum(map(len, parts)) == 20
    assert len(set().union(*parts)) == 20


def test_measuring_is_done_once_for_blocks_of_a_kind() -> None:
    model = HookedModel(tiny("llama", num_hidden_layers=4))
    ones = []
    for layer in model.model.model.layers.children():
        layer.register_forward_hook(lambda m, a, out: ones.append(len(a[0]) == 1))
    reading = everywhere(padded(model.model, "none"))
    masks = [Mask([component]) for component in model.components]
    fill = mean_fill(model, [reading.inputs])
    sweeping = sweep(model, masks, [reading, reading], fill=fill)
    next(sweeping)
    assert 0 < sum(ones) <= 3, "rows that leave, rows that pass"
    ones.clear()
    next(sweeping)
    assert not any(ones)


def test_blocks_of_another_kind_are_measured_anew() -> None:
    """T5's decoder has the class of its encoder's blocks, and a cross-attention more."""
    model = HookedModel(tiny("t5"))
    ones = []
    for block in model.model.decoder.block.children():
        block.register_forward_hook(lambda m, args, out: ones.append(len(args[0]) == 1))
    list(sweep(model, [Mask([model.components[0]])], [everywhere(padded(model.model, "none"))]))
    assert any(ones)
