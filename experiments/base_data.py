"""Which rows did a base read, and which may a student of it read?

For a base that `ablate pretrain` wrote, the record, the tokenizer and the corpus give its rows
again, step by step (`exact` says whether they are the same tokens: the standard library is another
one in another Python). From them come the four origins of a student's data:

    same         the base's rows in the base's order
    reshuffled   the base's batches in another order
    held-out     files kept from the base (`ablate pretrain --reserved-share`)
    other        another corpus, in the base's tokenizer

A base without a record is held against the text it is given, and "other" is all that can be said of
that text. Held-out losses are always measured on the base's own held-out tokens.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int

from experiments import corpora, pretrain_setup, tokens
from experiments.bases import Base
from experiments.corruption import Infilling, Masking, Spans, span_count
from experiments.objectives import NextToken, Objective, Task
from experiments.orders import Leg, Order
from experiments.pretrain import Pretraining
from probes.loss import windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Origin = Literal["same", "reshuffled", "held-out", "other"]


@dataclass(frozen=True, eq=False)
class BaseData:
    """The text of a base.

    Attributes:
        objective: over the base's own order (of the given text, where it has no record).
        exact: whether step s reads the very tokens that step s of the base read.
        reserved: tokens that neither its training nor its validation read.
        corpus: what the text is, for the record.
    """

    base: Base
    objective: Objective
    exact: bool
    reserved: Int[np.ndarray, "token"]
    tokenizer: PreTrainedTokenizerBase
    corpus: str

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origins that can be had, the usual one first; `other` needs its corpus named."""
        if self.base.record is None:
            return ("other",)
        own: tuple[Origin, ...] = ("same", "reshuffled") if self.exact else ("reshuffled",)
        return (*own, "held-out", "other") if len(self.reserved) else (*own, "other")

    def reading(
        self,
        origin: Origin,
        *,
        seed: int,
        unique: float | None = None,
        other: str | None = None,
    ) -> Objective:
        """The base's objective on rows of `origin`.

        Args:
            seed: of the masks, and of the order where it is not the base's.
            unique: tokens after which the rows begin again; None reads on.
            other: the corpus of the origin `other`: 'stdlib' or a folder.

        Raises ValueError for an origin that this base has not.
        """
        order = self._order(origin, seed, other)
        if unique is not None:
            order = order.cycled(unique)
        return self.objective.reading(order, seed=seed)

    def _order(self, origin: Origin, seed: int, other: str | None) -> Order:
        order, name = self.objective.order, self.base.name
        if origin == "other":
            if other is None:
                if self.base.record is None:
                    return order.over(order.legs[0].rows.stream, seed)
                raise ValueError(f"text of another corpus than {name}'s asked for: name it")
            text = corpora.load_corpus(other)
            return order.over(tokens.token_stream(text.train, self.tokenizer), seed)
        if origin not in self.origins:
            why = {
                "same": "its corpus is not here as it was (another Python, or other files)",
                "reshuffled": "what it was trained on is not known",
                "held-out": "no file was kept from its training (`ablate pretrain "
                "--reserved-share`)",
            }[origin]
            raise ValueError(
                f"rows of origin {origin} asked for {name}: {why}; give {' or '.join(self.origins)}"
            )
        if origin == "held-out":
            return order.over(self.reserved, seed)
        return order if origin == "same" else order.reshuffled(seed)


def data_of(
    base: Base,
    *,
    corpus: str | None = None,
    context: int | None = None,
    batch: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> BaseData:
    """The text of `base` and its objective.

    Args:
        corpus: where the base's corpus is now, if not where its record says; the text for a base
            without a record ('stdlib' if not given).
        context, batch: rows of a base without a record (256 or its longest context, 8).
        tokenizer: of the base, if not the one beside its weights.

    Raises ValueError where context or batch are given against the record's, for a corpus too
    small, and for a folder without a tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = tokenizer or AutoTokenizer.from_pretrained(base.folder or base.weights)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"{base.folder or base.weights} has no tokenizer: put the one it was trained with"
            " beside its weights (tokenizer.save_pretrained)"
        )
    if base.record is None:
        return _given(base, corpus or "stdlib", context, batch or 8, tokenizer)
    if context is not None or batch is not None:
        raise ValueError(
            f"rows of another shape asked for {base.name}: its record has their shape; leave "
            "context and batch out"
        )
    return _recorded(base, base.record, corpus, tokenizer)


def study_of(record: Mapping[str, Any]) -> Pretraining:
    """The study that a record is of. Records from before options were kept have the command."""
    if "options" in record:
        return Pretraining(**record["options"])
    import tyro

    return tyro.cli(Pretraining, args=shlex.split(record["command"])[2:])


def _recorded(
    base: Base, record: Mapping[str, Any], corpus: str | None, tokenizer: PreTrainedTokenizerBase
) -> BaseData:
    assert base.folder is not None
    study = study_of(record)
    if corpus is not None:
        study = dataclasses.replace(study, corpus=corpus)
    found, reserved = pretrain_setup.split(study)
    kept = set(record["corpus"]["validation_files"])
    if found.digest != record["corpus"]["sha256"]:  # what it held out stays held out
        files = (*found.train, *found.validation)
        found = dataclasses.replace(found, train=tuple(d for d in files if d.path not in kept))
        reserved = tuple(d for d in reserved if d.path not in kept)
    text = pretrain_setup.text_of(study, found, reserved, tokenizer)
    held_out, _ = tokens.load_stream(base.folder / "validation.safetensors")
    text = dataclasses.replace(text, held_out=torch.from_numpy(held_out.astype("int64")))
    objective = pretrain_setup.objective_of(study, text)
    order = Order(_legs(record, text))
    return BaseData(
        base,
        dataclasses.replace(objective, order=order),
        tokens.digest(text.stream) == record["train_tokens_sha256"],
        text.reserved,
        tokenizer,
        found.name,
    )


def _legs(record: Mapping[str, Any], text: pretrain_setup.Text) -> tuple[Leg, ...]:
    """What an earlier model read, then what went on from it."""
    own = pretrain_setup.order_of(study_of(record), text).legs
    return (*_legs(record["earlier"], text), *own) if record["earlier"] else own


def _given(
    base: Base,
    corpus: str,
    context: int | None,
    batch: int,
    tokenizer: PreTrainedTokenizerBase,
) -> BaseData:
    text = corpora.load_corpus(corpus)
    stream = tokens.token_stream(text.train, tokenizer)
    held_out = tokens.token_stream(text.validation, tokenizer).astype("int64")
    context = context or min(256, _longest(base))
    bos = next(
        id
        for id in (
            tokenizer.bos_token_id,
            tokenizer.cls_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            0,
        )
        if isinstance(id, int)
    )
    rows = tokens.Rows(stream, context, batch, 0, 0.0, bos, 0, len(tokenizer))
    order = Order((Leg(rows, 0, rows.windows // batch, context),))
    objective = Objective(
        _task(base, tokenizer, context),
        order,
        windows(torch.from_numpy(held_out), context, bos=bos),
    )
    return BaseData(base, objective, False, stream[:0], tokenizer, text.name)


def _longest(base: Base) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.weights)
    return getattr(config, "max_position_embeddings", None) or 256


def _task(base: Base, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    """The base's objective on its own tokenizer's ids. ValueError where a token is missing."""
    from transformers import AutoConfig

    if base.objective == "lm":
        return NextToken()
    start = getattr(AutoConfig.from_pretrained(base.weights), "decoder_start_token_id", None)
    if base.objective == "denoising" and base.family in ("t5", "mt5", "umt5"):
        names = [f"<extra_id_{i}>" for i in range(span_count(context))]
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        unknown = tokenizer.unk_token_id
        sentinels = tuple(id for id in ids if isinstance(id, int) and id != unknown)
        return Spans(sentinels, eos=_id(base, "eos", tokenizer.eos_token_id), start=start or 0)
    if base.objective in ("mlm", "denoising"):
        mask = _id(base, "mask", tokenizer.mask_token_id)
        if base.objective == "mlm":
            return Masking(mask, 0, len(tokenizer))
        pad = _id(base, "pad", tokenizer.pad_token_id)
        return Infilling(mask, pad, start=_id(base, "decoder start", start))
    raise ValueError(
        f"objective {base.objective} asked for {base.name}: only a model that `ablate pretrain` "
        "wrote has its languages; give lm, mlm or denoising"
    )


def _id(base: Base, what: str, found: Any) -> int:
    if not isinstance(found, int):
        raise ValueError(
            f"objective {base.objective} asked for {base.name}: its tokenizer has no {what} token; "
            "give a base whose tokenizer has one"
        )
    return found
