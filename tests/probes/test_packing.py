"""Packing: whatever the sequences, a slot sees its own beginning and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.packing import ROW_SLOTS, Tokens, layout_of, pack
from tests.families import tiny

# Few distinct ids and short sequences, so that beginnings are shared often.
SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=2, max_size=9), st.integers(1, 8)),
    min_size=1,
    max_size=12,
)


def scored(batches, layout):
    """owner → [(what the scoring slot sees, the token it predicts)], in order."""
    found = {}
    for batch in batches:
        width = batch.ids.shape[1]
        entries = zip(
            batch.slots[batch.entry_slot].tolist(),
            batch.entry_target.tolist(),
            batch.entry_owner.tolist(),
            strict=True,
        )
        for slot, target, owner in entries:
            row, query = divmod(slot, width)
            keys = [
                key
                for key in range(query + 1)
                if layout != "tree" or query < int(batch.ends[row, key])
            ]
            assert batch.positions[row, keys].tolist() == list(range(len(keys)))
            found.setdefault(owner, []).append((tuple(batch.ids[row, keys].tolist()), target))
    return found


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("alone", [False, True])
@given(sequences=SEQUENCES, batch_tokens=st.sampled_from([1, 12, 1000]))
def test_a_slot_sees_its_own_beginning(layout, alone, sequences, batch_tokens):
    sequences = [Tokens(tuple(ids), min(n, len(ids) - 1)) for ids, n in sequences]
    batches = pack(sequences, layout, batch_tokens=batch_tokens, vocab=4, alone=alone)
    found = scored(batches, layout)
    for owner, tokens in enumerate(sequences):
        first = len(tokens.ids) - tokens.scored
        expected = [(tokens.ids[:i], tokens.ids[i]) for i in range(first, len(tokens.ids))]
        assert sorted(found[owner], key=lambda entry: len(entry[0])) == expected
    if alone:
        assert sum(len(batch.ids) for batch in batches) == len(sequences)
    for batch in batches:
        assert batch.ids.numel() <= batch_tokens or len(batch.ids) == 1


def test_a_shared_beginning_is_read_once():
    demonstrations = tuple(range(10, 50))
    sequences = [
        Tokens((*demonstrations, 60 + query, 70, 80 + choice), 1)
        for query in range(3)
        for choice in range(4)
    ]
    (batch,) = pack(sequences, "tree", batch_tokens=4096, vocab=100)
    # Every choice is one token: predicted after its query, never read.
    assert batch.ids.shape == (1, 40 + 3 * 2)
    assert len(batch.slots) == 3
    assert len(batch.entry_owner) == 12


def test_rows_are_alike_in_length_and_do_not_grow_without_end():
    long = [Tokens((*range(ROW_SLOTS - 10), i, *range(20)), 20) for i in range(3)]
    short = [Tokens((5000 + i, *range(8)), 1) for i in range(30)]
    batches = pack(long + short, "tree", batch_tokens=ROW_SLOTS, vocab=100)
    widths = [batch.ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == ROW_SLOTS + 10
    assert sum(len(batch.ids) for batch in batches) == 33


def test_layouts_are_chosen_by_what_is_exact():
    assert layout_of(tiny("opt"), 50) == "tree"
    assert layout_of(tiny("bloom"), 50) == layout_of(tiny("mamba"), 50) == "rows"
    assert layout_of(tiny("jamba"), 50) == "rows"
    assert layout_of(tiny("t5"), 50) == "encoder"
    narrow = tiny("mistral", sliding_window=16)
    assert layout_of(narrow, 16) == "tree"
    assert layout_of(narrow, 17) == "rows"


@pytest.mark.parametrize("family", ["bert", "bert-bare"])
def test_no_language_model_is_refused(family):
    with pytest.raises(ValueError, match="gives no log-likelihood of a continuation"):
        layout_of(tiny(family), 10)


def test_entries_survive_tensors_of_one_row():
    (batch,) = pack([Tokens((1, 2), 1)], "rows", batch_tokens=8, vocab=4)
    assert torch.equal(batch.slots, torch.tensor([0]))
    assert batch.entry_target.tolist() == [2]
