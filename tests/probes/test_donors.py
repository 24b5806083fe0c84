"""Donors' activations: by plain hooks on plain forwards, whatever the batch, never one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ablate import FFN, Component, Head, HookedModel, Mask
from ablate.sweep import sweep
from probes.donors import Text, donor_fill, ending_of, texts_of
from probes.examples import Example
from probes.packing import Layout
from probes.readings import reading_of
from probes.scoring import log_likelihoods, prepare
from probes.tokenising import encode_pairs
from tests.families import tiny
from tests.probes.conftest import VOCAB

RECIPIENTS = (
    Example("for name in names:\n    if name", (" names:", " in self.values", " in"), 1, 0),
    Example("for name in names:\n    with open", ("(path", ")"), 0, 1),
    Example("return file.read()\n\ndef", (" read(path)", " values"), 0, 2),
)
DONORS = (
    Example("with open(path, mode) as", (" file", " names"), 0, 7),
    Example("self.values[name] = read(name)\nfor name in names:\n    if", (" name", " read"), 0, 8),
    Example("def read(path,", (" mode", " values"), 1, 9),
)
LAYOUTS: list[tuple[str, Layout]] = [
    ("opt", "rows"),
    ("mamba", "rows"),
    ("t5", "encoder"),
    ("bart", "encoder"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hooked_model(family: str, tokenizer: PreTrainedTokenizerBase) -> HookedModel:
    return HookedModel(tiny(family, vocab_size=VOCAB), tokenizer)


@contextmanager
def replaced(module: nn.Module, change: Callable[[Tensor], Tensor]):
    """A plain hook on the input of a projection."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def patched(
    hf_model: Any, path: str, columns: slice, inputs: dict[str, Tensor], donor: dict[str, Tensor]
) -> Tensor:
    """log p at every position of one row, with some columns of a projection's input the donor's."""
    module, seen = hf_model.get_submodule(path), []
    with replaced(module, lambda x: seen.append(x.clone()) or x):
        hf_model(**donor)

    def patch(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., columns] = seen[0][..., columns]
        return x

    with replaced(module, patch):
        return hf_model(**inputs).logits[0].float().log_softmax(-1)


HEADS: dict[str, list[tuple[Component, str, slice]]] = {
    "opt": [
        (Head(0, 2), "model.decoder.layers.0.self_attn.out_proj", slice(16, 24)),
        (Head(2, 0), "model.decoder.layers.2.self_attn.out_proj", slice(0, 8)),
    ],
    "t5": [
        (Head(1, 1, "encoder"), "encoder.block.1.layer.0.SelfAttention.o", slice(8, 16)),
        (Head(0, 3, "decoder"), "decoder.block.0.layer.0.SelfAttention.o", slice(24, 32)),
        (Head(1, 0, "cross"), "decoder.block.1.layer.1.EncDecAttention.o", slice(0, 8)),
    ],
}


@pytest.mark.parametrize("family", HEADS)
def test_scores_are_those_of_a_plain_patch(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """One donor with one choice: what it says at each length can be written down."""
    model = hooked_model(family, tokenizer)
    layout: Layout = "encoder" if family == "t5" else "rows"
    donor = Example("with open(path, mode) as file", (":\n return file",), 0)
    prepared = prepare(model, RECIPIENTS, layout=layout)
    donors = prepare(model, [donor])
    masks = [Mask([head]) for head, _, _ in HEADS[family]]
    (batch,) = prepared.batches
    fill = donor_fill(model, batch, layout, donors, seeded())
    found, _ = log_likelihoods(model, prepared, masks, fill=fill)

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    (bos,) = tokenizer("")["input_ids"]

    said_there = plain(donor.context + donor.choices[0])[len(plain(donor.context)) :]

    def prompt_like(length: int, joined: list[int]) -> list[int]:
        return [*joined * 20, *plain(donor.context)][-length:]

    def choice_like(length: int, joined: list[int]) -> list[int]:
        return (joined * 20)[:length]

    choice = 0
    for example in RECIPIENTS:
        for context, said in example.pairs:
            tail = plain(context + said)[len(plain(context)) :]
            if layout == "encoder":
                source, read = plain(context), [0, *plain(said)[:-1]]
                tail = plain(said)
                mine = {"input_ids": [bos, *source], "decoder_input_ids": read}
                other = {
                    "input_ids": [bos, *prompt_like(len(source), plain(donor.context))],
                    "decoder_input_ids": [
                        0,
                        *choice_like(len(read) - 1, plain(donor.choices[0])),
                    ],
                }
            else:
                read = [bos, *plain(context), *tail[:-1]]
                mine = {"input_ids": read}
                other = [
                    *prompt_like(len(plain(context)), plain(donor.context)),
                    *choice_like(len(tail) - 1, said_there),
                ]
                other = {"input_ids": [bos, *other]}
            row, theirs = (
                {name: torch.tensor([ids]) for name, ids in of.items()} for of in (mine, other)
            )
            for number, (_, path, columns) in enumerate(HEADS[family]):
                log_p = patched(model.model, path, columns, row, theirs)
                at = range(len(read) - len(tail), len(read))
                by_hand = sum(float(log_p[i, t]) for i, t in zip(at, tail, strict=True))
                assert found[number, choice] == pytest.approx(by_hand, abs=1e-4)
            choice += 1
    whole, _ = log_likelihoods(model, prepared)
    assert (abs(found - whole).max(1) > 1e-3).all()


def scores(
    model: HookedModel, batch_tokens: int, donors: Sequence[Example] = DONORS, seed: int = 0
) -> Any:
    prepared = prepare(
        model,
        RECIPIENTS,
        layout=None if model.model.config.is_encoder_decoder else "rows",
        batch_tokens=batch_tokens,
    )
    givers = prepare(model, donors)
    generator = seeded(seed)
    masks = [Mask([c]) for c in model.components[:: max(1, len(model.components) // 5)]]
    total = 0.0
    for i, batch in enumerate(prepared.batches):
        fill = donor_fill(model, batch, prepared.layout, givers, generator)
        values, _ = log_likelihoods(model, prepared, masks, fill=fill, batches=[i])
        total = total + torch.nan_to_num(torch.tensor(values))
    return len(prepared.batches), total


@pytest.mark.parametrize(("family", "_"), LAYOUTS)
def test_scores_do_not_depend_on_the_batch_size(
    family: str, _: Layout, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = hooked_model(family, tokenizer)
    (one, together), (many, apart) = scores(model, 4096), scores(model, 1)
    assert one == 1
    assert many > 3 or family in ("t5", "bart")
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    assert torch.equal(together, scores(model, 4096)[1])
    assert not torch.allclose(together, scores(model, 4096, seed=1)[1])


def test_the_donor_is_never_the_example_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not its other choices, and not itself after demonstrations."""
    model = hooked_model("opt", tokenizer)
    mine = RECIPIENTS[0]
    shot = Example(DONORS[0].context + "\n" + mine.context, mine.choices[::-1], 0)
    prepared = prepare(model, [mine], layout="rows")
    (batch,) = prepared.batches
    for seed in range(5):
        fills = [
            donor_fill(model, batch, "rows", prepare(model, donors), seeded(seed))
            for donors in ([DONORS[1]], [mine, DONORS[1], shot])
        ]
        for name, value in fills[0].values.items():
            assert torch.equal(value, fills[1].values[name])
    with pytest.raises(ValueError, match="all 2 given have the same one"):
        donor_fill(model, batch, "rows", prepare(model, [mine, shot]), seeded())


def test_choices_of_a_question_have_one_stand_in_for_its_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = hooked_model("opt", tokenizer)
    (batch,) = prepare(model, RECIPIENTS[:1], layout="rows").batches
    shared = len(tokenizer(RECIPIENTS[0].context)["input_ids"])
    assert batch.lengths.min() >= shared
    assert batch.lengths.unique().numel() > 1
    for seed in range(5):
        fill = donor_fill(model, batch, "rows", prepare(model, DONORS), seeded(seed))
        for value in fill.values.values():
            for row in value[1:]:
                torch.testing.assert_close(row[:shared], value[0, :shared])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_read_once_or_for_every_choice(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = hooked_model(family, tokenizer)
    prepared, donors = prepare(model, RECIPIENTS), prepare(model, DONORS)
    (batch,) = prepared.batches
    masks = [Mask([c]) for c in (Head(0, 1, "encoder"), FFN(0, "encoder"), Head(1, 0, "cross"))]
    found = []
    for shared in (True, False):
        fill = donor_fill(model, batch, "encoder", donors, seeded(), shared=shared)
        reading = reading_of(model, batch, "encoder", shared=shared)
        assert len(fill.values["encoder_blocks.0.attn.hook_z"]) == (3 if shared else len(batch.ids))
        (swept,) = sweep(model, masks, [reading], fill=fill, memory=50_000)
        found.append(swept.log_p)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_special_tokens_stay_and_prompts_are_made_to_measure() -> None:
    special = {1, 2}
    assert ending_of([(11, 12), (13,), (14,)], (1, 5, 6, 7, 2), special) == (1, 13, 11, 12, 2)
    assert ending_of([(11, 12, 13, 14, 15)], (5, 6, 7), special) == (13, 14, 15)
    assert ending_of([(), (11, 12, 13)], (1, 5, 1, 6, 7), special) == (1, 13, 11, 12, 13)
    assert ending_of([(11,)], (1, 2), special) == (1, 2)
    with pytest.raises(ValueError, match="without any prompt of their own"):
        ending_of([(), ()], (1, 5), special)


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_texts_come_back_from_any_layout(
    layout: Layout, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = hooked_model("opt", tokenizer)
    examples = (*RECIPIENTS, *DONORS)
    encoded = [encode_pairs(tokenizer, example.pairs) for example in examples]
    bos = encoded[0][0][0][0]
    for batch_tokens in (4096, 1):
        prepared = prepare(model, examples, layout=layout, batch_tokens=batch_tokens)
        found = texts_of(prepared, {bos})
        assert found == [[Text(head[1:], tail) for head, tail in of] for of in encoded]
    with_bos = texts_of(prepare(model, examples, layout=layout, answers_only=True))
    assert with_bos[1] == [Text(*encoded[1][0])]


def test_what_cannot_be_filled_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    model = hooked_model("opt", tokenizer)
    donors = prepare(model, DONORS)
    tree, rows = (prepare(model, RECIPIENTS, layout=of).batches[0] for of in ("tree", "rows"))
    with pytest.raises(ValueError, match="laid out as a tree.*layout='rows'"):
        donor_fill(model, tree, "tree", donors, seeded())
    with (
        pytest.raises(ValueError, match="donors come from the whole model"),
        model.ablated(Mask([Head(0, 0)])),
    ):
        donor_fill(model, rows, "rows", donors, seeded())
    with pytest.raises(ValueError, match="came without a tokenizer"):
        donor_fill(HookedModel(model.model), rows, "rows", donors, seeded())
