"""What would the model's own initialiser have put into this block?

    initial_weights     the family's `_init_weights`, as a new model of the same config runs it
    torch_weights       what torch's own modules start with, `reset_parameters`

transformers marks every tensor of a loaded checkpoint as initialised, after which
`block.apply(model._init_weights)` changes nothing and says nothing. So both work on a *twin*: the
same modules with new, unmarked parameters, filled with nan before. What is nan afterwards was not
initialised, and is an error.

The law runs on the CPU in fp32 with a seed of its own: a block gets the same weights on any device
and, up to rounding, in any dtype; no global generator moves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FAN_IN_AXIS = {"Conv1D": 0, "Router": -1, "Experts": -1}
"""End of a class name -> the axis of its inputs, for linear maps that have no law of torch's."""


def initial_weights(hf_model: nn.Module, path: str, seed: int) -> dict[str, Tensor]:
    """Every parameter of the block at `path` as the model's own initialiser draws it.

    By its name in the model. Children come before their parents, as in a new model: GPT-2's
    c_proj is drawn again, smaller, by the attention that it is in.
    Raises ValueError where the model has no initialiser, or it leaves a tensor out.
    """
    initialise = _initialiser(hf_model, path)
    twin = _twin(hf_model.get_submodule(path))
    with _seeded(seed):
        for module in _children_first(twin):
            initialise(module)
    return _drawn(twin, type(hf_model).__name__, path)


def torch_weights(hf_model: nn.Module, path: str, seed: int) -> dict[str, Tensor]:
    """Every parameter of the block at `path` as torch's modules start.

    Linear maps that are no torch modules (GPT-2's Conv1D, experts, routers) start as nn.Linear
    does: uniform within 1 / √inputs. What torch knows no law for (gains of RMS norms, an SSM's A
    and D) is as the model's own initialiser has it.
    """
    initialise = _initialiser(hf_model, path)
    twin = _twin(hf_model.get_submodule(path))
    with _seeded(seed):
        for module in _children_first(twin):
            initialise(module)
        for module in _children_first(twin):
            ends = [axis for end, axis in _FAN_IN_AXIS.items() if _class(module).endswith(end)]
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            elif ends:
                _as_linear(module, ends[0])
    return _drawn(twin, type(hf_model).__name__, path)


def _as_linear(module: nn.Module, axis: int) -> None:
    """Uniform within 1 / √inputs, weights and biases alike."""
    weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    for parameter in module.parameters(recurse=False):
        source = parameter if parameter.ndim > 1 else weights[0]
        bound = 1 / math.sqrt(source.shape[axis])
        nn.init.uniform_(parameter, -bound, bound)


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _initialiser(hf_model: nn.Module, path: str) -> Any:
    """`_init_weights` of the innermost model around the block, as transformers dispatches it."""
    names = path.split(".")
    for depth in range(len(names) - 1, -1, -1):
        around = hf_model.get_submodule(".".join(names[:depth]))
        if callable(initialise := getattr(around, "_init_weights", None)):
            return initialise
    raise ValueError(
        f"{_class(hf_model)} has no _init_weights: it does not say how it is initialised; use the "
        "law rewind, moments or permuted"
    )


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def _twin(module: nn.Module) -> nn.Module:
    """The same modules with parameters of their own, all nan. Its forward is not to be called:
    hooks and all else are the original's."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        name: None if parameter is None else _unset(parameter)
        for name, parameter in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {
        name: None if buffer is None else _on_cpu(buffer)
        for name, buffer in module._buffers.items()
    }
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    return twin


def _on_cpu(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu().clone()


def _unset(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.full(parameter.shape, math.nan, dtype=torch.float32, device="cpu"))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialisers draw from the CPU's global generator: seeded inside, put back after."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _drawn(twin: nn.Module, model: str, path: str) -> dict[str, Tensor]:
    drawn = {f"{path}.{name}": value.detach() for name, value in twin.named_parameters()}
    for name, value in drawn.items():
        if not value.isfinite().all():
            raise ValueError(
                f"the initialiser of {model} leaves {name} as it was: use the law rewind, "
                "moments or permuted"
            )
    return drawn
