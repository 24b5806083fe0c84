"""Removing a component by editing weights: the independent answer that masks are held against."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ablate.components import Head
from ablate.sites import Site

_LAST = ("fc2", "c_proj", "dense_4h_to_h", "down_proj", "wo", "output.dense")


def without(model: nn.Module, site: Site, component: object) -> nn.Module:
    """A copy of `model` with a component's last weights zeroed.

    A head loses its input columns of W_O (its rows in GPT-2's transposed Conv1D), a mixer all
    columns; an FFN loses weight and bias of its last linear map, or of every expert's.
    """
    twin = copy.deepcopy(model)
    module = twin.get_submodule(site.path)
    with torch.no_grad():
        if site.kind == "ffn":
            last = [
                parameter
                for name, parameter in module.named_parameters(prefix=site.path)
                if name.removesuffix(".weight").removesuffix(".bias").endswith(_LAST)
            ]
            assert last, f"no last linear map in {site.path}"
            for parameter in last:
                parameter.zero_()
        else:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            first = component.head * site.d_head if isinstance(component, Head) else 0
            weight[:, first : first + site.d_head] = 0
    return twin
