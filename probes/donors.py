"""What would the removed components have said about another prompt, one of the same length?

    a_c(x) ← a_c(x′)      at every position, x′ the tokens of another example, as many as x has

A zero is an answer no component ever gives, a mean one that it gives to nothing in particular;
another example's activation is one that it does give, only not to this question (resample ablation:
Chan et al., causal scrubbing, 2022). Prompts and choices differ in length, so x′ is made to fit:

    prompt    the last tokens of a donor's prompt, with further examples before it where it is short
    choice    the first tokens of the donor's choice, with further choices behind it

so prompts end where prompts end. BOS, EOS and a decoder's start token stay where they stand in x:
attention rests on them, and no text is without.

    for i, batch in enumerate(prepared.batches):
        fill = donor_fill(model, batch, prepared.layout, donors, generator)
        log_likelihoods(model, prepared, masks, fill=fill, batches=[i])

The donors of a row follow from the seed and the row's prompt alone: the same in any batch, and all
choices of a question have one stand-in for the prompt they share, so that none wins by its donor.
Where it misleads: examples that share demonstrations are near to each other already, so their fill
removes less; a donor cut on the left begins in the middle of a sentence; and after a prompt of
nothing but BOS every text says the same, so nothing is removed there.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from ablate.fills import Fill, activations
from ablate.hooks import is_hooked
from probes.packing import Batch, Layout
from probes.readings import inputs_of

if TYPE_CHECKING:
    from ablate.hooked import HookedModel
    from probes.scoring import Prepared

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """One choice of an example.

    Attributes:
        prompt: what comes before it, without special tokens at either end; the encoder's text where
            there is an encoder.
        choice: the choice.
    """

    prompt: Ids
    choice: Ids


def donor_fill(
    model: HookedModel,
    batch: Batch,
    layout: Layout,
    donors: Prepared,
    generator: torch.Generator,
    *,
    shared: bool = True,
) -> Fill:
    """Stand-ins for the forward of one batch: activations of the whole model on donors' tokens.

    Args:
        model: wrapped, with its tokenizer; no context may be in force on it.
        batch: of the prompts to be scored.
        layout: of `batch`: "rows" or "encoder".
        donors: examples to draw from, in any layout; selection examples, not reporting ones. One
            with the row's own prompt, with more demonstrations or with fewer, is passed over.
        generator: only its initial seed is read; it is not advanced.
        shared: as in `probes.readings.reading_of`: whether the encoder has one row a source.

    Holds every site's activations on the batch: pack batches small for a large model. Raises
    ValueError for a tree, a row that no donor is left for, and a model that is not whole.
    """
    if layout == "tree":
        raise ValueError(
            "a resample fill of prompts laid out as a tree: a slot has no one position; prepare "
            "them with layout='rows'"
        )
    if is_hooked(model.model):
        raise ValueError(
            "donors asked for of a model that is ablated, gated or captured: leave the context "
            "first, for donors come from the whole model"
        )
    special = _special_ids(model)
    examples = texts_of(donors, special)
    by_prompt: dict[Ids, list[Text]] = {}

    def drawn(prompt: Ids) -> list[Text]:
        if prompt not in by_prompt:
            by_prompt[prompt] = _draw(prompt, examples, generator.initial_seed())
        return by_prompt[prompt]

    ids = batch.ids.clone()
    for row, (read, prompt) in enumerate(_rows(batch)):
        others = drawn(_parts(prompt, special)[1])
        if layout == "encoder":
            prompt = read[:1]  # the decoder's own: its start token
            stand_in = prompt
        else:
            before = [text.prompt + text.choice for text in others[1:]]
            stand_in = ending_of([others[0].prompt, *before], prompt, special)
        said = cycle(token for text in others for token in text.choice)
        stand_in += tuple(islice(said, len(read) - len(prompt)))
        ids[row, : len(read)] = torch.tensor(stand_in)
    sources = tuple(
        ending_of([t.prompt for t in drawn(_parts(source, special)[1])], source, special)
        for source in batch.sources
    )
    inputs = inputs_of(model, replace(batch, ids=ids, sources=sources), layout)
    values = {}
    for site, x in activations(model, inputs).items():
        if site.stack == "encoder" and shared:
            first = [batch.source_row.index(i) for i in range(len(sources))]
            x = x[torch.tensor(first, device=x.device)]
        values[site.name] = x
    return Fill("resample", values)


def texts_of(prepared: Prepared, special: Collection[int] = ()) -> list[list[Text]]:
    """Every choice of every example, put together again from the batches of any layout.

    Ids in `special` are taken off both ends of prompts.
    """
    found: list[list[Text]] = [[] for _ in prepared.examples]
    owned: dict[int, Text] = {}
    for batch in prepared.batches:
        at = torch.arange(batch.ids.shape[1])
        slots = batch.slots[batch.entry_slot]
        for owner in batch.entry_owner.unique().tolist():
            mine = batch.entry_owner == owner
            last = int(slots[mine].max())
            row, slot = divmod(last, len(at))
            # The branch that ends in the last slot: everything that it sees.
            branch = batch.ids[row, (at <= slot) & (slot < batch.ends[row])].tolist()
            targets = batch.entry_target[mine][slots[mine].argsort()]
            prompt = tuple(branch[: len(branch) + 1 - len(targets)])
            if batch.sources:
                prompt = batch.sources[batch.source_row[row]]
            owned[owner] = Text(_parts(prompt, special)[1], tuple(targets.tolist()))
    for owner in sorted(owned):
        found[bisect(prepared.offsets, owner) - 1].append(owned[owner])
    return found


def _rows(batch: Batch) -> Iterator[tuple[Ids, Ids]]:
    """(ids read, prompt) of every row; the prompt ends where the first choice is predicted."""
    slots = batch.slots[batch.entry_slot]
    width = batch.ids.shape[1]
    for row, length in enumerate(batch.lengths.tolist()):
        read = tuple(batch.ids[row, :length].tolist())
        if batch.sources:
            yield read, batch.sources[batch.source_row[row]]
        else:
            first = int(slots[slots // width == row].min()) % width
            yield read, read[: first + 1]


def _draw(prompt: Ids, examples: Sequence[Sequence[Text]], seed: int) -> list[Text]:
    """The other examples in an order that `seed` and `prompt` decide, one choice of each."""
    others = [texts for texts in examples if not any(_same(prompt, text.prompt) for text in texts)]
    if not others:
        raise ValueError(
            f"no donor for a prompt of {len(prompt)} tokens: all {len(examples)} given have the "
            "same one; give other examples"
        )
    said = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(said[:8], "big") >> 1)
    order = torch.randperm(len(others), generator=generator).tolist()
    which = torch.rand(len(others), generator=generator).tolist()
    return [others[i][int(u * len(others[i]))] for i, u in zip(order, which, strict=True)]


def _same(one: Ids, other: Ids) -> bool:
    """One prompt ends the other: with fewer demonstrations, or cut on the left, or equal."""
    shorter = min(len(one), len(other))
    return one == other if not shorter else one[-shorter:] == other[-shorter:]


def ending_of(texts: Sequence[Ids], like: Ids, special: Collection[int] = ()) -> Ids:
    """As many tokens as `like`, whose special ones at the ends are kept: in between the last of
    texts[0], after texts[1] where that is short, and so on."""
    opening, body, ending = _parts(like, special)
    if body and not any(texts):
        raise ValueError("donors without any prompt of their own: give examples with prompts")
    taken: Ids = ()
    for text in cycle(texts):
        if len(taken) >= len(body):
            break
        taken = text + taken
    return opening + taken[len(taken) - len(body) :] + ending


def _parts(ids: Ids, special: Collection[int]) -> tuple[Ids, Ids, Ids]:
    """(special ids at the beginning, what is between, special ids at the end)."""
    plain = [i for i, token in enumerate(ids) if token not in special]
    if not plain:
        return ids, (), ()
    return ids[: plain[0]], ids[plain[0] : plain[-1] + 1], ids[plain[-1] + 1 :]


def _special_ids(model: HookedModel) -> frozenset[int]:
    tokenizer: Any = model.tokenizer
    hf_model: Any = model.model
    if tokenizer is None:
        raise ValueError(
            f"{type(hf_model).__name__} came without a tokenizer: give HookedModel one"
        )
    start = getattr(hf_model.config, "decoder_start_token_id", None)
    return frozenset(tokenizer.all_special_ids) | ({start} if start is not None else set())
