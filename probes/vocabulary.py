"""From which tokens are random sequences drawn?

Very frequent tokens carry habits of their own and very rare ones are hardly trained, so a share
`drop` of each end of an order is left out (Bansal et al. 2023: 4 % of the merges at both ends):

    merge-rank        BPE merges in the order in which they were learned; tokens that no merge
                      makes (bytes, characters) are left out
    id-range          ids, ascending
    corpus-frequency  how often tokens occur in given ids, most frequent first, equals by id; tokens
                      that do not occur are left out
    all               no order: every ordinary token

int(drop · n) of the n entries of the order go at each end. Ids come back ascending. Special and
added tokens are never among them, nor ids that the model has no embedding for.

Where it misleads: merge rank stands for frequency in the text the tokenizer was learned on, not the
model, and intermediate merges rank high though they hardly occur whole. Ids follow frequency only
where the tokenizer numbers its entries so (BPE and Unigram mostly do, with bytes or characters
first). A token that several merges make (Llama) has the rank of the first one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ablate.hooked import HookedModel
from probes.sequences import ordinary_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Method = Literal["merge-rank", "id-range", "corpus-frequency", "all"]
DROP = 0.04
"""Share of the order left out at each end, the paper's."""


def vocabulary(
    model: HookedModel,
    method: Method = "all",
    *,
    drop: float = DROP,
    corpus: Int[Tensor, "token"] | None = None,
) -> Int[Tensor, "vocab"]:
    """The ids that `method` chooses, ascending; `drop` has no say in `all`.

    Args:
        corpus: token ids to count, for `corpus-frequency` alone.

    Raises ValueError for a method that does not fit the tokenizer, for a corpus that is missing or
    not asked for, and where nothing is left.
    """
    if not 0 <= drop < 0.5:
        raise ValueError(
            f"a share of {drop} dropped at both ends asked for: give 0 up to below 0.5"
        )
    if (corpus is not None) != (method == "corpus-frequency"):
        wanted = "needs token ids" if corpus is None else "takes no corpus, corpus-frequency does"
        raise ValueError(f"tokens by {method} asked for: it {wanted}; see corpus=")
    ids = ordinary_ids(model)
    match method:
        case "all":
            return ids
        case "id-range":
            chosen = _middle(ids, drop)
        case "merge-rank":
            if model.tokenizer is None:
                raise ValueError(
                    f"tokens by merge-rank asked for: {model.name} has no tokenizer; use id-range"
                )
            chosen = _ranked_between(merged_tokens(model.tokenizer), drop)
        case "corpus-frequency":
            assert corpus is not None
            chosen = _middle(_by_frequency(corpus, ids), drop)
        case _:
            raise ValueError(
                f"tokens by {method!r} asked for: use merge-rank, id-range, corpus-frequency or all"
            )
    kept = chosen[torch.isin(chosen, ids)].unique()
    if not len(kept):
        raise ValueError(
            f"tokens by {method} asked for: none of the {len(ids)} ordinary tokens of {model.name} "
            f"is left when a share of {drop} is dropped at both ends; drop less"
        )
    return kept


def fitting_method(model: HookedModel) -> Method:
    """`merge-rank` where the tokenizer has merges, `id-range` elsewhere."""
    return "merge-rank" if model.tokenizer is not None and _merges(model.tokenizer) else "id-range"


def ordinary_ids(model: HookedModel) -> Int[Tensor, "vocab"]:
    """Ids with an embedding that are no special tokens, of the tokenizer or, without one, of the
    config; ascending."""
    hf: Any = model.model
    rows = hf.get_input_embeddings().weight.shape[0]
    if model.tokenizer is not None:
        ids = ordinary_tokens(model.tokenizer)
        return ids[ids < rows]
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special: set[Any] = set()
    for name in names:
        value = getattr(hf.config, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    count = min(rows, hf.config.vocab_size)
    return torch.tensor([i for i in range(count) if i not in special])


def merged_tokens(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "merge"]:
    """The id that every merge of a BPE tokenizer makes, first merge first.

    Raises ValueError for a tokenizer without merges.
    """
    merges = _merges(tokenizer)
    if not merges:
        raise ValueError(
            f"tokens by merge-rank asked for: {type(tokenizer).__name__} is no BPE with merges; "
            "use id-range, corpus-frequency or all"
        )
    model = _backend(tokenizer)
    prefix, ids = model.get("continuing_subword_prefix") or "", model["vocab"]
    return torch.tensor([ids[left + right.removeprefix(prefix)] for left, right in merges])


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Pairs in order; none where the tokenizer is not BPE or not one of `tokenizers`."""
    model = _backend(tokenizer)
    if model.get("type") != "BPE":
        return []
    # Files of older versions keep a pair as one string.
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return [(left, right) for left, right in pairs]


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The model of a fast tokenizer as its JSON has it; empty for a slow one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else json.loads(backend.to_str())["model"]


def _ranked_between(merged: Int[Tensor, "merge"], drop: float) -> Int[Tensor, "token"]:
    """What the merges between both ends make, without what a dropped earlier one makes too."""
    end = int(drop * len(merged))
    middle = _middle(merged, drop)
    return middle[~torch.isin(middle, merged[:end])]


def _by_frequency(corpus: Int[Tensor, "token"], ids: Int[Tensor, "vocab"]) -> Int[Tensor, "seen"]:
    """The ids that occur, most frequent first. Raises ValueError for a corpus of none of them."""
    found, counts = corpus.cpu().unique(return_counts=True)  # ascending, so equals stay by id
    known = torch.isin(found, ids)
    if not known.any():
        raise ValueError(
            f"tokens by corpus-frequency asked for: none of the {len(corpus)} ids given is an "
            "ordinary token of the model; give a longer text, read by the model's tokenizer"
        )
    return found[known][counts[known].argsort(descending=True, stable=True)]


def _middle(order: Int[Tensor, "entry"], drop: float) -> Int[Tensor, "middle"]:
    """Without int(drop · n) entries at each end."""
    end = int(drop * len(order))
    return order[end : len(order) - end]
