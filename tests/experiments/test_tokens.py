"""Training rows: every window once an epoch, rows a pure function of the step, spans repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.corpora import Document
from experiments.tokens import (
    BOS,
    SPECIAL,
    Rows,
    load_stream,
    save_stream,
    token_stream,
    train_tokenizer,
)

CONTEXT = 32


def rows_of(stream: np.ndarray, *, repeated: float = 0.0, batch: int = 4, seed: int = 0) -> Rows:
    return Rows(stream, CONTEXT, batch, seed, repeated, bos=2, ordinary=4, vocab=300)


@pytest.fixture
def stream() -> np.ndarray:
    return np.arange(4, 4 + 41 * CONTEXT, dtype=np.uint16)


def test_an_epoch_reads_every_window_once(stream: np.ndarray):
    rows = rows_of(stream)
    starts = torch.cat([rows.at(step)[:, 1] for step in range(rows.windows // 4)]).tolist()
    assert len(set(starts)) == len(starts) == 40
    assert {s % CONTEXT for s in starts} == {starts[0] % CONTEXT}  # one shift an epoch


def test_rows_are_a_pure_function_of_seed_and_step(stream: np.ndarray):
    one, other = rows_of(stream, repeated=0.5), rows_of(stream, repeated=0.5)
    late = one.at(25)
    for step in (3, 0, 25):
        other.at(step)
    assert torch.equal(late, other.at(25))
    assert not torch.equal(late, rows_of(stream, repeated=0.5, seed=1).at(25))


def test_epochs_differ_in_order(stream: np.ndarray):
    rows = rows_of(stream)
    assert not torch.equal(rows.at(0), rows.at(10))


def test_short_rows_split_the_same_windows(stream: np.ndarray):
    rows = rows_of(stream)
    whole, short = rows.at(1), rows.at(1, 16)
    assert short.shape == (8, 16)
    assert (short[:, 0] == 2).all()
    assert torch.equal(short[0, 1:], whole[0, 1:16])
    assert torch.equal(short[1, 1:], whole[0, 17:])


def test_repeated_rows_repeat_with_one_period_after_a_prefix(stream: np.ndarray):
    found = set()
    for step in range(10):
        for row in rows_of(stream, repeated=1.0).at(step).numpy():
            # The smallest period of the row's last half.
            tail = row[CONTEXT // 2 :]
            periods = [p for p in range(1, 17) if (tail[p:] == tail[:-p]).all()]
            assert periods, row
            found.add(periods[0])
    assert len(found) > 3  # no fixed distance to learn


def test_too_large_a_batch_is_refused(stream: np.ndarray):
    with pytest.raises(ValueError, match="smaller batch"):
        rows_of(stream, batch=41)


def test_tokenizer_round_trips_and_opens_with_bos(tmp_path: Path):
    texts = ["def f(x):\n    return x + 1\n" * 5, "naïve → ünïcode\t\0"]
    tokenizer = train_tokenizer(texts, 280, tmp_path)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == SPECIAL.index(BOS)
        assert tokenizer.decode(ids[1:]) == text
    stream = token_stream([Document("a", texts[0]), Document("b", texts[1])], tokenizer)
    assert (stream == tokenizer.bos_token_id).sum() == 2
    with pytest.raises(ValueError, match="260"):
        train_tokenizer(texts, 100, tmp_path / "small")


def test_an_altered_stream_is_refused(tmp_path: Path):
    path = tmp_path / "stream.safetensors"
    save_stream(np.arange(100, dtype=np.uint16), path, note="kept")
    stream, notes = load_stream(path)
    assert stream[99] == 99
    assert notes["note"] == "kept"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="altered"):
        load_stream(path)


def test_a_kept_stream_is_that_of_its_text_and_its_tokenizer(tmp_path: Path):
    texts = ["def f(x):\n    return x\n" * 20, "y = f(3)\n" * 20]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    small = train_tokenizer(texts, 270, tmp_path / "small")
    large = train_tokenizer(texts, 290, tmp_path / "large", extra=("<mask>",))
    first = token_stream(documents, small)
    assert token_stream(documents, small) is first
    assert not np.array_equal(token_stream(documents, large), first)
    assert not np.array_equal(token_stream(documents[::-1], small), first)
    # An id's text decodes back, and a later special token changes the tokenizer, so the key.
    assert large.convert_tokens_to_ids("<mask>") == len(SPECIAL)
    large.add_tokens(["return"])
    assert len(large) - 1 in token_stream(documents, large)
