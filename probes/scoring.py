r"""Which of these continuations does the model find most likely?

    ℓ_c = Σ_t log p(y_ct | x, y_c,<t)      of every choice c after its context x, in nats

`acc` takes arg-max ℓ_c; `acc_norm` divides ℓ_c by the characters of the choice first, as lm-eval
does; `exact_match` asks whether every token of the answer is the most likely one. Tokens, split and
truncation are those of lm-eval's own Hugging Face model, and so are the numbers, only sooner: a
shared beginning is read once (probes/packing.py), logits are formed only where a token is scored,
and many masks are scored in one sweep (ablate/sweep.py).

    prepared = prepare(model, examples)            # tokenised and packed once ...
    frame = score(model, prepared)                 # ... and scored, as the model stands
    frames = score_masks(model, prepared, [Mask([head]) for head in model.heads])

Where it misleads: sums favour short choices and `acc_norm` long ones; report both. A tree row puts
tokens side by side that are not in one sequence, so a fill that depends on the position needs
`layout="rows"`.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from ablate.importance import row_losses
from ablate.masks import Mask
from ablate.sweep import sweep
from probes.examples import METRICS, Example, all_right
from probes.packing import Batch, Layout, Tokens, layout_of, pack
from probes.readings import reading_of
from probes.tokenising import context_length, encode_apart, encode_pairs

if TYPE_CHECKING:
    import pandas as pd

    from ablate.fills import Fill
    from ablate.hooked import HookedModel

BATCH_TOKENS = 4096
"""Slots of one forward, at most, unless one row is longer."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Examples as packed token ids, for one model.

    Attributes:
        examples: what was prepared.
        layout: how the batches are laid out.
        batches: every forward that scoring takes.
        offsets: sequences offsets[i] … offsets[i + 1] − 1 are the choices of example i.
        truncated: for every example, whether its context was cut on the left.
    """

    examples: tuple[Example, ...]
    layout: Layout
    batches: tuple[Batch, ...]
    offsets: tuple[int, ...]
    truncated: tuple[bool, ...]

    @property
    def n_truncated(self) -> int:
        """How many examples lost the beginning of their context."""
        return sum(self.truncated)


def score_choices(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    bos: bool | None = None,
    strict: bool = False,
    layout: Layout | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """`prepare`, then `score`."""
    prepared = prepare(
        model, examples, bos=bos, strict=strict, layout=layout, batch_tokens=batch_tokens
    )
    return score(model, prepared)


def prepare(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    answers_only: bool = False,
    bos: bool | None = None,
    strict: bool = False,
    layout: Layout | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Prepared:
    """Tokenise and pack `examples`, to be scored any number of times.

    Args:
        model: its tokenizer, context length and family decide; nothing is run.
        examples: of any tasks and shot counts together.
        answers_only: leave the wrong choices out (for `answer_losses`).
        bos: whether a BOS opens every context; None leaves it to the tokenizer.
        strict: refuse a context longer than the model's instead of cutting it on the left.
        layout: how to lay sequences out; None takes the fastest that is exact for this model.
        batch_tokens: slots of one forward, at most.

    Raises ValueError for no examples, a model without a tokenizer or that is no left-to-right
    language model, a choice longer than the context, and under `strict` a prompt that is.
    """
    hf_model: Any = model.model
    tokenizer = model.tokenizer
    if not examples:
        raise ValueError("scoring of no examples asked for: give at least one")
    if tokenizer is None:
        raise ValueError(
            f"{type(hf_model).__name__} came without a tokenizer: give HookedModel one"
        )
    pairs = [
        pair
        for example in examples
        for pair in (example.pairs[example.gold :][:1] if answers_only else example.pairs)
    ]
    counts = [1 if answers_only else len(example.choices) for example in examples]
    offsets = (0, *accumulate(counts))
    room = context_length(hf_model.config, tokenizer)
    if layout_of(hf_model, 0) == "encoder":
        start = hf_model.config.decoder_start_token_id
        encoded = encode_apart(tokenizer, pairs, bos=bos)
        whole = [Tokens((start, *tail), len(tail), head) for head, tail in encoded]
        cut = [_cut_source(tokens, room) for tokens in whole]
    else:
        encoded = encode_pairs(tokenizer, pairs, bos=bos)
        whole = [Tokens(head + tail, len(tail)) for head, tail in encoded]
        cut = [_cut(tokens, room) for tokens in whole]
    rows = hf_model.get_input_embeddings().weight.shape[0]
    largest = max(max((*tokens.ids, *tokens.source)) for tokens in cut)
    if largest >= rows:
        raise ValueError(
            f"token {largest} of the tokenizer in a prompt: {model.name} has embeddings of {rows} "
            "tokens; give the tokenizer it was trained with"
        )
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    for owner, before, after in zip(owners, whole, cut, strict=True):
        _check_length(examples[owner], before, after, room, strict)
    shortened = {owner for owner, a, b in zip(owners, whole, cut, strict=True) if a is not b}
    fastest = layout_of(hf_model, max(len(tokens.ids) for tokens in cut))
    layout = layout or fastest
    if layout not in (fastest, "rows") or (fastest == "encoder" and layout == "rows"):
        raise ValueError(
            f"layout {layout!r} asked for: {type(hf_model).__name__} is exact under {fastest!r}"
        )
    return Prepared(
        tuple(examples),
        layout,
        pack(cut, layout, batch_tokens=batch_tokens, vocab=len(tokenizer), alone=answers_only),
        offsets,
        tuple(i in shortened for i in range(len(examples))),
    )


def _cut(tokens: Tokens, room: int | None) -> Tokens:
    """The last room + 1 ids, of which the last one is only predicted."""
    if room is None or len(tokens.ids) <= room + 1:
        return tokens
    return Tokens(tokens.ids[-room - 1 :], tokens.scored)


def _cut_source(tokens: Tokens, room: int | None) -> Tokens:
    if room is None or len(tokens.source) <= room:
        return tokens
    return Tokens(tokens.ids, tokens.scored, tokens.source[-room:])


def _check_length(
    example: Example, before: Tokens, after: Tokens, room: int | None, strict: bool
) -> None:
    if room is not None and after.scored > room:
        raise ValueError(
            f"{_called(example)} has a choice of {after.scored} tokens: the model reads {room} at "
            "once; shorten the choice"
        )
    if strict and before is not after:
        length = len(before.ids) - 1 + len(before.source)
        raise ValueError(
            f"{_called(example)} is {length} tokens long: the model reads {room}; "
            "ask for fewer shots, or have its beginning cut (--overlong cut)"
        )


def _called(example: Example) -> str:
    return f"{example.task or 'example'} document {example.doc_id} ({example.shots} shots)"


def score(model: HookedModel, prepared: Prepared, *, mask: Mask | None = None) -> pd.DataFrame:
    """One row per example: what the model, as it stands, answers, and whether it is right.

    Columns: task, shots, doc_id, group, gold, predicted (−1 where no right answer was produced),
    METRICS (nan where the task lacks one), truncated, loglik (list: nats of every choice).

    `mask` is only named in errors. Raises ValueError for a log-likelihood that is not finite, with
    the example, and for a model in training mode.
    """
    values, greedy = log_likelihoods(model, prepared)
    return grade(prepared, values[0], greedy[0], mask=mask)


def score_masks(
    model: HookedModel,
    prepared: Prepared,
    masks: Sequence[Mask],
    *,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
) -> list[pd.DataFrame]:
    """What `score` says under each of `masks`, in one sweep."""
    values, greedy = log_likelihoods(model, prepared, masks, fill=fill, memory=memory)
    return [grade(prepared, *of, mask=m) for *of, m in zip(values, greedy, masks, strict=True)]


def log_likelihoods(
    model: HookedModel,
    prepared: Prepared,
    masks: Sequence[Mask] = (Mask(),),
    *,
    fill: Literal["zero"] | Fill = "zero",
    memory: int | None = None,
    batches: Sequence[int] | None = None,
) -> tuple[Float[np.ndarray, "mask choice"], Bool[np.ndarray, "mask choice"]]:
    """(nats of every choice, whether all its tokens are arg-max), in the order of `offsets`.

    `fill` and `memory` are those of `ablate.sweep.sweep`. `batches` are the numbers of the batches
    to run (default: all); the choices of others are nan. Sums are taken in fp64 over fp32
    log-probabilities. Nothing is checked but what the sweep checks.
    """
    count = prepared.offsets[-1]
    values = np.full((len(masks), count), np.nan)
    greedy = np.ones((len(masks), count), dtype=bool)
    numbers = range(len(prepared.batches)) if batches is None else batches
    chosen = [prepared.batches[i] for i in numbers]
    readings = [reading_of(model, batch, prepared.layout) for batch in chosen]
    swept = sweep(model, masks, readings, fill=fill, memory=memory)
    for batch, of_masks in zip(chosen, swept, strict=True):
        owners = batch.entry_owner.numpy()
        values[:, owners] = 0
        np.add.at(values.T, owners, of_masks.log_p.double().numpy().T)
        np.logical_and.at(greedy.T, owners, of_masks.best.numpy().T)
    return values, greedy


def answer_losses(model: HookedModel, prepared: Prepared, batch: Batch) -> Float[Tensor, "example"]:
    """−(1/T) Σ_t log p(y_t | …) of each row's answer y, differentiable, in the order of the rows.

    For gradients with respect to gates: prepare with `answers_only=True` and `layout="rows"`
    ("encoder" for an encoder-decoder), so that a row is an example. Raises ValueError when not.
    """
    count = len(batch.ids)
    if prepared.layout == "tree" or len(batch.entry_owner.unique()) != count:
        raise ValueError(
            "losses of examples that share a row asked for: prepare with answers_only=True and "
            "layout='rows'"
        )
    return row_losses(model, reading_of(model, batch, prepared.layout, shared=False))


def grade(
    prepared: Prepared,
    values: Float[np.ndarray, "choice"],
    greedy: Bool[np.ndarray, "choice"],
    *,
    mask: Mask | None = None,
) -> pd.DataFrame:
    """The frame of `score` from the log-likelihoods of all choices; `mask` is named in errors."""
    import pandas as pd

    _require_finite(prepared, values, mask)
    rows = []
    for i, example in enumerate(prepared.examples):
        first, last = prepared.offsets[i], prepared.offsets[i + 1]
        predicted, marks = example.marks(values[first:last], greedy[first:last])
        rows.append(
            {
                "task": example.task,
                "shots": example.shots,
                "doc_id": example.doc_id,
                "group": example.group,
                "gold": example.gold,
                "predicted": predicted,
                **{metric: marks.get(metric, float("nan")) for metric in METRICS},
                "truncated": prepared.truncated[i],
                "loglik": values[first:last].tolist(),
            }
        )
    frame = pd.DataFrame(rows)
    return frame.assign(acc_all=all_right(prepared.examples, frame.acc.to_numpy()))


def task_scores(
    prepared: Prepared,
    values: Float[np.ndarray, "choice"],
    greedy: Bool[np.ndarray, "choice"],
    *,
    mask: Mask | None = None,
) -> Float[np.ndarray, "example"]:
    """What a task reports of each example, as `grade` has it: `acc_all` (nan at all but the first
    example of a question) if it asks whole questions, else `acc`."""
    _require_finite(prepared, values, mask)
    bounds = pairwise(prepared.offsets)
    marks = [
        example.marks(values[first:last], greedy[first:last])[1]
        for example, (first, last) in zip(prepared.examples, bounds, strict=True)
    ]
    acc = np.array([of_example.get("acc", float("nan")) for of_example in marks])
    by_question = all_right(prepared.examples, acc)
    return acc if np.isnan(by_question).all() else by_question


def _require_finite(
    prepared: Prepared, values: Float[np.ndarray, "choice"], mask: Mask | None
) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        owner = bisect(prepared.offsets, bad[0]) - 1
        under = f" under the mask {mask}" if mask else ""
        raise ValueError(
            f"the log-likelihood of choice {bad[0] - prepared.offsets[owner]} of "
            f"{_called(prepared.examples[owner])} is {values[bad[0]]}{under}: "
            "check the weights and the dtype (float16 overflows)"
        )


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error (σ/√n, as lm-eval has it) of every metric, per task and shots.

    Columns: task, shots, metric, value, stderr, examples. Metrics a task has not are left out; the
    standard error of one example is unknown, not zero.
    """
    metrics = [metric for metric in METRICS if metric in frame]
    long = frame.melt(["task", "shots"], metrics, "metric", "value").dropna(subset="value")
    grouped = long.groupby(["task", "shots", "metric"], sort=False)["value"]
    return grouped.agg(value="mean", stderr="sem", examples="size").reset_index()
