"""How is a masked model written as a smaller one?

    export(model, mask, folder)          the checkpoint without the weights that `mask` removes
    sizes_and_speed(model, mask, folder, inputs)   parameters, bytes, tokens/s, before and after

Its logits are the masked model's (zero fill) up to the rounding of smaller matrix products. Two
kinds of checkpoint, both read by `HookedModel.from_pretrained`:

    standard   every attention keeps equally many query and key/value heads, no FFN goes, and the
               family's config has a head_dim of its own: a config says it all, any program loads it
    pruned     all else (`ablate.pruned`): a stock class finds no weights in it and says so

Where it misleads: norms before a removed FFN stay, a removed head's share of W_O's bias stays, and
tokens/s are those of one forward over the given inputs on this machine, not of generation.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ablate.anatomy import FAMILIES
from ablate.components import FFN
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.pruned import KEY, pruned_class, remove, require_removable
from ablate.sites import Site, sites

_OWN_HEAD_DIM = frozenset(
    ["bamba", "falcon_h1", "gemma", "gemma2", "jamba", "llama", "mistral", "mixtral", "phi"]
    + ["qwen2", "qwen3"]
)
"""Families whose config gives the width of a head apart from the width of the model."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    standard: bool
    """Loads with plain transformers; otherwise with `HookedModel.from_pretrained` alone."""
    parameters: int
    parameters_before: int


def export(model: HookedModel, mask: Mask, folder: str | Path) -> Exported:
    """Write `model` without the components of `mask` as a checkpoint, with its tokenizer.

    The model stays as it is; weights that lose nothing are not copied in memory. `folder` appears
    by rename, whole or not at all. `removed.json` in it is the mask.

    Raises ValueError, in one line, for a folder that exists, a mask that removes nothing or
    everything, a mixer, an offloaded or quantised model, one that is already pruned, and a family
    without a row of ours.
    """
    target = Path(folder).expanduser()
    removed = model.expand(mask)
    if target.exists():
        raise ValueError(f"{target} exists: name a new folder to export to")
    if not removed:
        raise ValueError(f"the mask removes nothing of {model.name}: there is nothing to export")
    if len(removed) == len(model.components):
        raise ValueError(
            f"the mask removes every component of {model.name}: keep at least one to export"
        )
    config: Any = model.model.config
    family = config.model_type
    if FAMILIES.get(family) != model.anatomy:
        raise ValueError(
            f"export of a {family} with an anatomy= of its own: it could not be loaded again; "
            "only the built-in rows of ablate.anatomy can be exported"
        )
    require_removable(model.model, removed)
    twin = _twin(model.model)
    remove(twin, removed)
    standard = _standard_config(twin, removed)
    if standard is None:
        setattr(twin.config, KEY, [str(component) for component in removed])
        twin.__class__ = pruned_class(type(model.model))
    else:
        twin.config = standard
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _save(twin, unfinished)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(unfinished)
        (unfinished / "removed.json").write_text(mask.to_json() + "\n")
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Exported(target, standard is not None, parameters(twin), parameters(model.model))


def sizes_and_speed(
    model: HookedModel,
    mask: Mask,
    folder: str | Path,
    inputs: Mapping[str, Tensor],
    *,
    rounds: int = 5,
) -> pd.DataFrame:
    """Rows (model, metric, value, low, high) of the whole model and of the one in `folder`.

    Metrics: parameters; bytes (of the weight files as they are on disk; of the whole model what
    its tensors would take in one, in the dtype it has now); tokens_per_second (median of `rounds`
    forwards over `inputs`, the two models in turn, after one forward each to warm up; low and high
    are the slowest and the fastest, nan elsewhere). Of the
    exported also largest_difference: max |logits − logits of the masked model| on `inputs`.

    Raises ValueError where `rounds` is no positive number or `folder` no checkpoint.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds asked for: a speed takes at least one")
    config: Any = model.model.config
    first = next(model.model.parameters())
    exported = HookedModel.from_pretrained(
        folder,
        dtype=first.dtype,
        device_map=None if first.device.type == "cpu" else str(first.device),
        attn_implementation=config._attn_implementation,
    )
    batch = dict(inputs)
    with torch.no_grad(), model.ablated(mask):
        masked = model.model(**batch)[0]
    with torch.no_grad():
        difference = (exported.model(**batch)[0] - masked).abs().max().item()
    tokens = sum(x.numel() for name, x in batch.items() if name.endswith("input_ids"))
    seconds: dict[str, list[float]] = {"whole": [], "exported": []}
    for _ in range(rounds + 1):
        for name, which in (("whole", model), ("exported", exported)):
            seconds[name].append(_seconds(which.model, batch))
    written = sum(path.stat().st_size for path in Path(folder).expanduser().glob("*.safetensors"))
    size = {"whole": _tensor_bytes(model.model), "exported": written}
    rows: list[tuple[str, str, float, float, float]] = []
    for name, which in (("whole", model), ("exported", exported)):
        taken = seconds[name][1:]
        speed = [tokens / some for some in (statistics.median(taken), max(taken), min(taken))]
        rows += [
            (name, "parameters", parameters(which.model), math.nan, math.nan),
            (name, "bytes", size[name], math.nan, math.nan),
            (name, "tokens_per_second", speed[0], speed[1], speed[2]),
        ]
    rows.append(("exported", "largest_difference", difference, math.nan, math.nan))
    return pd.DataFrame(rows, columns=pd.Index(["model", "metric", "value", "low", "high"]))


def parameters(hf_model: nn.Module) -> int:
    """Number of weights; shared ones count once."""
    return sum(parameter.numel() for parameter in hf_model.parameters())


def _save(hf_model: Any, folder: Path) -> None:
    """Write safetensors and config, without transformers' bar: a library is silent."""
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        hf_model.save_pretrained(folder)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def _twin(hf_model: nn.Module) -> Any:
    """A copy of the modules that shares all tensors with `hf_model`."""
    tensors = [*hf_model.parameters(), *hf_model.buffers()]
    return copy.deepcopy(hf_model, {id(tensor): tensor for tensor in tensors})


def _standard_config(twin: Any, removed: Mask) -> Any:
    """The stock config whose model has exactly the tensors of `twin`, or None if there is none."""
    if twin.config.model_type not in _OWN_HEAD_DIM:
        return None
    if any(isinstance(component, FFN) for component in removed):
        return None
    attentions: list[Site] = [site for site in sites(twin) if site.kind == "head"]
    shapes = {(site.width, site.kv_groups, site.d_head) for site in attentions}
    if len(shapes) != 1:
        return None
    heads, groups, d_head = shapes.pop()
    config = copy.deepcopy(twin.config)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    changes = dict(zip(names, (heads, groups, d_head), strict=True))
    try:  # some families insist that heads divide the width of the model
        config = type(config).from_dict(config.to_dict() | changes)
    except (ValueError, StrictDataclassError):
        return None
    with torch.device("meta"):
        stock = type(twin)(config)
    same = _tensor_shapes(stock) == _tensor_shapes(twin)
    return config if same else None


def _tensor_shapes(hf_model: nn.Module) -> dict[str, torch.Size]:
    tensors = [*hf_model.named_parameters(), *hf_model.named_buffers()]
    return {name: tensor.shape for name, tensor in tensors}


def _tensor_bytes(hf_model: nn.Module) -> int:
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in hf_model.state_dict().values()}
    return sum(kept.values())


def _seconds(hf_model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Wall-clock time of one forward, the accelerator's part included."""
    cuda = next(hf_model.parameters()).device.type == "cuda"
    with torch.no_grad():
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        hf_model(**batch)
        if cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - start
