"""Chosen tokens against orders written out by hand, on tokenizers of every kind."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ablate import HookedModel
from probes.sequences import ordinary_tokens
from probes.vocabulary import fitting_method, merged_tokens, ordinary_ids, vocabulary
from tests.families import VOCAB, tiny

LETTERS = "abcdefghij"
PAIRS = [(a, b) for a in "abcde" for b in "fghij"]  # 25 merges, ids 14 … 38


def wrapped(model: models.Model) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def entries(words: list[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}


def bpe(pairs: list[tuple[str, str]] = PAIRS, **options: object) -> PreTrainedTokenizerFast:
    made = list(dict.fromkeys(left + right for left, right in pairs))
    return wrapped(models.BPE(vocab=entries([*LETTERS, *made]), merges=pairs, **options))


def wordpiece() -> PreTrainedTokenizerFast:
    return wrapped(models.WordPiece(vocab=entries([*LETTERS, "##a"]), unk_token="<unk>"))


def unigram() -> PreTrainedTokenizerFast:
    words = [(word, -float(i)) for word, i in entries([*LETTERS, "ab", "cd"]).items()]
    return wrapped(models.Unigram(words, unk_id=3))


def with_tokenizer(tokenizer: PreTrainedTokenizerFast | None) -> HookedModel:
    return HookedModel(tiny("opt"), tokenizer)


def test_merge_rank_leaves_out_the_paper_s_share_at_both_ends():
    model = with_tokenizer(bpe())
    assert merged_tokens(model.tokenizer).tolist() == list(range(14, 39))
    for drop, end in ((0.04, 1), (0.0799, 1), (0.2, 5), (0.0, 0)):
        kept = vocabulary(model, "merge-rank", drop=drop)
        assert kept.tolist() == list(range(14 + end, 39 - end))
    assert torch.equal(vocabulary(model, "merge-rank"), vocabulary(model, "merge-rank", drop=0.04))


def test_merge_rank_is_the_order_of_merges_not_of_ids():
    ids = entries([*LETTERS, *(a + b for a, b in PAIRS)])
    backwards = wrapped(models.BPE(vocab=ids, merges=PAIRS[::-1]))
    assert merged_tokens(backwards).tolist() == list(range(38, 13, -1))
    tokenizer = wrapped(models.BPE(vocab=ids, merges=PAIRS[5:] + PAIRS[:5]))
    kept = vocabulary(with_tokenizer(tokenizer), "merge-rank", drop=0.2)
    assert kept.tolist() == list(
        range(24, 39)
    )  # the first five merges are 19 … 23, the last 14 … 18


def test_a_token_that_two_merges_make_has_the_first_rank():
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("ab", "c"), ("d", "e"), ("a", "bc"), ("e", "f")]
    tokenizer = bpe(pairs)
    names = tokenizer.convert_ids_to_tokens(merged_tokens(tokenizer).tolist())
    assert names == ["ab", "bc", "cd", "abc", "de", "abc", "ef"]
    kept = vocabulary(with_tokenizer(tokenizer), "merge-rank", drop=0.15)  # one at each end
    assert tokenizer.convert_ids_to_tokens(kept.tolist()) == ["bc", "cd", "abc", "de"]
    early = bpe([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc"), ("d", "e"), ("e", "f")])
    kept = vocabulary(with_tokenizer(early), "merge-rank", drop=0.34)  # two at each end
    assert early.convert_ids_to_tokens(kept.tolist()) == ["bc"]


def test_merges_with_a_prefix_of_continued_words():
    pairs = [("a", "##b"), ("ab", "##c")]
    words = ["a", "##b", "##c", "ab", "abc"]
    tokenizer = wrapped(
        models.BPE(vocab=entries(words), merges=pairs, continuing_subword_prefix="##")
    )
    made = merged_tokens(tokenizer).tolist()
    assert tokenizer.convert_ids_to_tokens(made) == ["ab", "abc"]


def test_the_bundled_model_s_tokenizer():
    model = HookedModel.from_pretrained("stdlib-opt")
    merges = merged_tokens(model.tokenizer)
    kept = vocabulary(model, "merge-rank")
    end = int(0.04 * len(merges))
    assert end > 10
    assert len(kept) == len(merges) - 2 * end
    assert kept.tolist() == sorted(set(merges[end : len(merges) - end].tolist()))
    assert not set(kept.tolist()) & set(model.tokenizer.all_special_ids)
    # What a merge makes is what the tokenizer makes of its text.
    text = model.tokenizer.decode([int(merges[end])])
    assert model.tokenizer(text, add_special_tokens=False).input_ids == [int(merges[end])]
    assert fitting_method(model) == "merge-rank"


@pytest.mark.parametrize("make", [bpe, wordpiece, unigram])
def test_all_and_id_range_take_any_tokenizer(make):
    model = with_tokenizer(make())
    ordinary = [i for i in range(len(model.tokenizer)) if i > 3]
    assert vocabulary(model).tolist() == ordinary
    end = int(0.2 * len(ordinary))
    kept = vocabulary(model, "id-range", drop=0.2).tolist()
    assert end
    assert kept == ordinary[end:-end]


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_no_merges_no_merge_rank(make):
    model = with_tokenizer(make())
    assert fitting_method(model) == "id-range"
    with pytest.raises(ValueError, match="no BPE with merges; use id-range"):
        vocabulary(model, "merge-rank")


def test_added_tokens_are_never_drawn():
    tokenizer = bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["fg"]})
    tokenizer.add_tokens(["af", "<new>"])  # one that a merge makes, one that is new
    model = with_tokenizer(tokenizer)
    added = set(tokenizer.get_added_vocab().values())
    assert len(added) == 7
    for method in ("merge-rank", "id-range", "all"):
        kept = vocabulary(model, method, drop=0.0).tolist()
        assert not added & set(kept)
        assert kept == sorted(set(kept))


def test_without_a_tokenizer_ids_come_from_the_config():
    model = with_tokenizer(None)
    assert vocabulary(model).tolist() == list(range(3, VOCAB))
    assert vocabulary(model, "id-range").tolist() == list(range(5, VOCAB - 2))  # int(0.04 · 58) = 2
    model.model.config.eos_token_id = [5, 7]
    assert {5, 7}.isdisjoint(ordinary_ids(model).tolist())
    with pytest.raises(ValueError, match="has no tokenizer; use id-range"):
        vocabulary(model, "merge-rank")


def test_ids_beyond_the_embeddings_are_left_out():
    tokenizer = bpe()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    model = HookedModel(tiny("opt", vocab_size=30), tokenizer)
    assert vocabulary(model).tolist() == list(range(4, 30))
    assert vocabulary(model, "merge-rank", drop=0.0).tolist() == list(range(14, 30))
    assert len(ordinary_tokens(tokenizer)) == 35


def test_corpus_frequency_ranks_what_occurs():
    model = with_tokenizer(bpe())
    corpus = torch.tensor([5] * 9 + [20] * 7 + [9] * 7 + [30] * 3 + [11] + [0] * 50)
    assert vocabulary(model, "corpus-frequency", corpus=corpus).tolist() == [5, 9, 11, 20, 30]
    kept = vocabulary(model, "corpus-frequency", corpus=corpus, drop=0.2)
    assert kept.tolist() == [9, 20, 30]  # without the most and the least frequent
    kept = vocabulary(model, "corpus-frequency", corpus=corpus, drop=0.4)
    assert kept.tolist() == [20]  # 5, 9, 20, 30, 11: 9 before 20, which occurs as often
    by_loop: dict[int, int] = {}
    random = torch.randint(4, 39, (500,), generator=torch.Generator().manual_seed(0))
    for token in random.tolist():
        by_loop[token] = by_loop.get(token, 0) + 1
    order = sorted(by_loop, key=lambda token: (-by_loop[token], token))
    end = int(0.1 * len(order))
    kept = vocabulary(model, "corpus-frequency", corpus=random, drop=0.1)
    assert kept.tolist() == sorted(order[end:-end])


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_one_line():
    model = with_tokenizer(bpe())
    corpus = torch.tensor([0, 1, 2])
    cases = [
        (("merge-rank",), {"drop": 0.5}, "give 0 up to below 0.5"),
        (("id-range",), {"drop": -0.1}, "give 0 up to below 0.5"),
        (("corpus-frequency",), {}, "needs token ids; see corpus="),
        (("merge-rank",), {"corpus": corpus}, "takes no corpus, corpus-frequency does"),
        (("corpus-frequency",), {"corpus": corpus}, "none of the 3 ids given is an ordinary token"),
        (("rank",), {}, "use merge-rank, id-range, corpus-frequency or all"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            vocabulary(model, *arguments, **options)
        assert "\n" not in str(error.value)
    one = with_tokenizer(bpe([("a", "b")]))
    one.tokenizer.add_special_tokens({"additional_special_tokens": ["ab"]})
    with pytest.raises(ValueError, match="is left when a share of 0.04 is dropped"):
        vocabulary(one, "merge-rank")
