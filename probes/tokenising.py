"""Where, in tokens, does a context end and a choice begin?

lm-eval's rule, so that the same prompt gives the same numbers: blanks at the end of the context go
to the choice; context and context + choice are encoded, each with what the tokenizer puts before a
text (`</s>` for OPT); the choice is what the second has beyond the length of the first. An encoder
reads the context with all its special tokens, and the decoder the choice with none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Pair = tuple[str, str]
"""A context and what may follow it."""
Encoded = tuple[tuple[int, ...], tuple[int, ...]]


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens a model can read at once, from its config, else its tokenizer; None: no bound."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    length = tokenizer.model_max_length
    return length if length < 10**9 else None  # transformers writes "none" as 10**30


def leading_ids(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> tuple[int, ...]:
    """What stands before every text: the tokenizer's own habit (None), a BOS, or nothing."""
    if bos is False:
        return ()
    bare = _ids(tokenizer, ["a"], special=False)[0]
    dressed = _ids(tokenizer, ["a"], special=True)[0]
    start = next(i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
    if bos is None or dressed[:start]:
        return dressed[:start]
    return (_conditioning_id(tokenizer),)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, bos: bool | None = None
) -> list[Encoded]:
    """(context ids, choice ids) of every pair, for a left-to-right model.

    An empty context becomes the BOS id (the EOS id if there is no BOS): something must condition
    the first token. Raises ValueError for a choice without a token.
    """
    before = leading_ids(tokenizer, bos)
    moved = [_move_blanks(context, choice) for context, choice in pairs]
    texts = {text for context, choice in moved for text in (context, context + choice)}
    ids = _encoded(tokenizer, texts)

    def dressed(text: str) -> tuple[int, ...]:
        opened = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
        return ids[text] if opened else before + ids[text]

    found = []
    for (given, _), (context, choice) in zip(pairs, moved, strict=True):
        if given:
            head = dressed(context)
            tail = dressed(context + choice)[len(head) :]
        else:
            head, tail = (), ids[choice]
        if not head:
            first = _conditioning_id(tokenizer)
            head, tail = (first,), tail[1:] if tail[:1] == (first,) else tail
        found.append((head, _something(tail, choice)))
    return found


def encode_apart(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, bos: bool | None = None
) -> list[Encoded]:
    """(encoder ids, decoder ids) of every pair, for an encoder-decoder."""
    moved = [_move_blanks(context, choice) for context, choice in pairs]
    special = bos is not False
    sources = _encoded(tokenizer, {context for context, _ in moved}, special=special)
    targets = _encoded(tokenizer, {choice for _, choice in moved})
    return [
        (sources[context] or (_conditioning_id(tokenizer),), _something(targets[choice], choice))
        for context, choice in moved
    ]


def _move_blanks(context: str, choice: str) -> Pair:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + choice


def _something(ids: tuple[int, ...], choice: str) -> tuple[int, ...]:
    if not ids:
        raise ValueError(f"the choice {choice!r} has no tokens of its own: give it some text")
    return ids


def _conditioning_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ValueError(
        "the tokenizer has neither a BOS nor an EOS token to stand before a first token: "
        "set tokenizer.bos_token"
    )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], special: bool = False
) -> dict[str, tuple[int, ...]]:
    unique = sorted(texts)
    return dict(zip(unique, _ids(tokenizer, unique, special=special), strict=True))


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool
) -> list[tuple[int, ...]]:
    if not texts:
        return []
    call: Any = tokenizer
    # verbose=False: lengths are checked against the model, by whoever truncates.
    encoded = call(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return [tuple(ids) for ids in encoded]
