"""Does a block pass the residual stream on unchanged when its branches add nothing?

    pre-norm     resid + f(norm(resid))      yes: with f = 0 it is the identity
    post-norm    norm(resid + f(resid))      no: a norm is left

`has_identity` tells which by the anatomy (no norm named before the attention) and by the configs of
OPT and Bloom; `without_branches` zeroes the projections in which the branches end, biases too.
One branch alone may be silent under post-norm too: its norm is then that of the stream as it came.
Where it misleads: an anatomy of your own that names no norms is taken for post-norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ablate.anatomy import Anatomy, find
from ablate.places import Block, Place, block_at

BRANCHES = ("attention", "vo", "cross", "mixer", "ffn")
"""Parts that can add nothing to the stream whatever is done to it behind them."""
_LAST = frozenset(["c_proj", "dense_4h_to_h", "down_proj", "fc2", "wo"])
"""What families call the last projection inside an FFN module."""


def has_identity(hf_model: nn.Module, place: Place, anatomy: Anatomy | None = None) -> bool:
    """Is the block of `place` the identity when its branches add nothing?"""
    row = block_at(hf_model, place, anatomy).row
    config = getattr(hf_model, "config", None)
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        return False
    if not getattr(config, "do_layer_norm_before", True):
        return False
    if getattr(config, "double_residual", False):  # a hybrid's silent Mamba doubles the stream
        return False
    return row.attention is None or bool(row.attention.norms)


def require_identity(hf_model: nn.Module, place: Place, anatomy: Anatomy | None = None) -> None:
    """ValueError where `place` ends in no output projection, or zeroing it is no identity."""
    if place.part in ("norms", "qk", "position_bias"):
        raise ValueError(
            f"the law identity for {place}: {place.part} has no output projection to zero; "
            "use init, or reset the block"
        )
    if place.part not in BRANCHES and not has_identity(hf_model, place, anatomy):
        raise ValueError(
            f"the law identity for {place}: {type(hf_model).__name__} norms the residual stream "
            "itself (post-norm), so its blocks have no identity; use init"
        )


def without_branches(block: Block, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, by their names in the model, with the last projection of each branch zero."""
    last = set(_last(block))
    return {
        name: torch.zeros_like(value) if name in last else value for name, value in weights.items()
    }


def _last(block: Block) -> Iterator[str]:
    """Names in the model of the parameters of the projections in which branches end."""
    row = block.row
    attentions = [attention.out for attention in (row.attention, row.cross) if attention]
    ends = [path for path in (*attentions, row.mixer) if find(block.module, path) is not None]
    ffn = find(block.module, row.ffn)
    if ffn is not None and not list(ffn.children()):
        ends.append(row.ffn)
    elif ffn is not None:
        names = [name for name, _ in ffn.named_parameters() if _LAST & set(name.split("."))]
        if not names:
            raise ValueError(
                f"the law identity for {block.path}: which matrix of {row.ffn} is its last is not "
                "known; name that one as ffn= in anatomy="
            )
        yield from (f"{block.path}.{row.ffn}.{name}" for name in names)
    for path in ends:
        for name, _ in block.module.get_submodule(path).named_parameters():
            yield f"{block.path}.{path}.{name}"
