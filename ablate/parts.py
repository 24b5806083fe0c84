"""Of what modules does a stack of a loaded model consist, from its first block to its head?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ablate.anatomy import Anatomy, Blocks, anatomy_of, base_path, find
from ablate.calls import beside
from ablate.components import Stack


def stacks_of(hf_model: nn.Module, anatomy: Anatomy) -> list[Stack]:
    """The stacks of blocks that this model has, in the order in which they run."""
    return [row.stack for row in _rows(hf_model, anatomy)]


def _rows(hf_model: nn.Module, anatomy: Anatomy) -> list[Blocks]:
    return [
        row for row in anatomy.stacks if find(hf_model, base_path(hf_model, row.path)) is not None
    ]


@dataclass(frozen=True, eq=False, repr=False)
class Part:
    """One stack as it stands in a loaded model."""

    stack: Stack
    blocks: tuple[nn.Module, ...]
    around: tuple[str, ...]
    """Paths of the modules around the blocks, outermost first, without the model itself."""
    closing: tuple[nn.Module, ...]
    """Final norm and output projection, as far as there are any."""
    headed: bool
    """A language-model head reads what comes out."""
    may_leave: bool
    """A forward may be left half-way. Not so where accelerate offloads a tensor of a module around
    the blocks (such as BART's logit bias): it unloads that when the module returns."""

    @classmethod
    def of(cls, hf_model: nn.Module, stack: Stack | None, anatomy: Anatomy | None) -> Part:
        """The stack asked for. Raises ValueError if the model has none of that name."""
        anatomy = anatomy or anatomy_of(hf_model)
        rows = {row.stack: row for row in _rows(hf_model, anatomy)}
        wanted = stack if stack is not None else "decoder" if "decoder" in rows else ""
        if wanted not in rows:
            there = ", ".join(map(repr, rows)) or "no blocks where its anatomy looks"
            raise ValueError(f"stack {wanted!r} of {type(hf_model).__name__}: it has {there}")
        row = rows[wanted]
        path = base_path(hf_model, row.path)
        parents = path.split(".")[:-1]
        around = tuple(".".join(parents[: n + 1]) for n in range(len(parents)))
        ends = (find(hf_model, base_path(hf_model, p)) for p in (row.final_norm, row.project_out))
        return cls(
            stack=wanted,
            blocks=tuple(hf_model.get_submodule(path).children()),
            around=around[-1:] if wanted == "encoder" else around,  # do not wait for the decoder
            closing=tuple(module for module in ends if module is not None),
            headed=wanted != "encoder" and find(hf_model, anatomy.lm_head) is not None,
            may_leave=not any(
                tensor.is_meta
                for module in (hf_model, *map(hf_model.get_submodule, around))
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            ),
        )

    def close(self, resid: Tensor) -> Tensor:
        """resid_N -> what the base model returns."""
        for module in self.closing:
            resid = module(beside(module, resid))
        return resid


def decoder_inputs(
    inputs: Mapping[str, Any],
    states: Float[Tensor, "source pos d_model"],
    rows: Int[Tensor, "batch"] | None = None,
) -> dict[str, Any]:
    """The inputs of the decoder's forward, its encoder having answered with `states`, once for all
    `rows` (None: a source each) that share it."""
    if rows is None:
        rows = torch.arange(len(states))
    mask = inputs.get("attention_mask")
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    if mask is not None:
        rest["attention_mask"] = mask[rows.to(mask.device)]
    answer = BaseModelOutput(last_hidden_state=states[rows.to(states.device)])
    return {**rest, "encoder_outputs": answer}
