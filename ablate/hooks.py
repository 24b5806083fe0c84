"""How are hooks put on a model, counted, and taken off again?

A hook that never fires is worse than none: the study goes on and reports that nothing matters. So
every hooked place is counted against the block it lives in: it must fire once for each forward of
that block. Counting blocks instead of models makes one rule hold for whole models, segments run
block by block, `generate` (the encoder runs once, the decoder many times) and encoder-decoders.

    completed(block) ≤ fired(place) ≤ started(block)

Only firings inside a call of the block count. Gradient checkpointing runs its insides again in the
backward pass: edits apply there too, or the gradients would be wrong, but transformers recomputes
`forward`, not the call. Older versions repeat the call and cut it short as soon as they have what
they need; that raises only the upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._dynamo.config
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor | None]
"""Sees the activation as [batch, pos, ...]; returns what stands in for it, or None to keep it."""


@dataclass(frozen=True)
class Place:
    """One tensor that passes through a module of a block."""

    name: str
    path: str
    where: Literal["input", "output"]
    block: str
    element: int = 0
    """Which element of a tuple output."""
    per_token: bool = True
    """Whether the tensor has batch and pos axes (an attention pattern has not)."""


class _Count:
    """How often something ran. Compiled code counts in a tensor: an int would be a constant there,
    and each new value of it a recompilation."""

    def __init__(self, device: torch.device) -> None:
        self.eager = 0
        with torch.inference_mode(False):
            self.compiled = torch.zeros((), dtype=torch.int64, device=device)

    def add(self) -> None:
        if torch.compiler.is_compiling():
            self.compiled.add_(1)
        else:
            self.eager += 1

    @property
    def total(self) -> int:
        return self.eager + int(self.compiled)


class _Block:
    """Counts the forwards of a block and remembers the [batch, pos] of the running one."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        self.started, self.completed = _Count(device), _Count(device)
        self.shape: tuple[int, ...] = ()
        self.running = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.started.add()
        hidden = args[0] if args else kwargs["hidden_states"]
        self.shape = hidden.shape[:2]
        self.running = True

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.completed.add()
        self.running = False


class _Hook:
    """Applies one edit at one place."""

    def __init__(self, place: Place, edit: Edit, block: _Block, device: torch.device) -> None:
        self.place, self.edit, self.block = place, edit, block
        self.fired = _Count(device)

    def _apply(self, tensor: Tensor) -> Tensor | None:
        """The edit on [batch, pos, ...]: OPT's FFN sees its tokens as one axis of batch·pos."""
        if self.block.running:
            self.fired.add()
        if not self.place.per_token or tensor.ndim > 2:
            return self.edit(tensor)
        edited = self.edit(tensor.unflatten(0, self.block.shape))
        return None if edited is None else edited.flatten(0, 1)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            edited = self._apply(args[0])
            return None if edited is None else ((edited, *args[1:]), kwargs)
        edited = self._apply(kwargs["hidden_states"])
        return None if edited is None else (args, kwargs | {"hidden_states": edited})

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._apply(output)
        tensor = output[self.place.element]
        if tensor is None:
            raise RuntimeError(
                f"{self.place.name} is empty: {type(module).__name__} returned no attention "
                "pattern; load the model with attn_implementation='eager'"
            )
        edited = self._apply(tensor)
        if edited is None:
            return None
        at = self.place.element
        return (*output[:at], edited, *output[at + 1 :])


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: its weights' device, or, when offloaded, where accelerate takes
    them (weights are on `meta` between forwards then)."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        return parameter.device
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")


def is_hooked(hf_model: nn.Module) -> bool:
    """Is a context of ours open on this model?"""
    return any(
        isinstance(getattr(hook, "__self__", None), _Block)
        for module in hf_model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def require_eval(hf_model: nn.Module, what: str) -> None:
    """Raises ValueError where a layer is in training mode: dropout makes no two forwards equal."""
    if any(module.training for module in hf_model.modules()):
        raise ValueError(f"{what} of a model in training mode asked for: call .eval() first")


def _let_compiled_code_see_hooks() -> None:
    """By default torch.compile does not check for hooks put on or taken off after compilation: a
    model compiled outside would run without the edits inside, and one compiled inside would keep
    them outside, both without a word. So the check is switched on, and code compiled without it
    forgotten, once per process."""
    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()


@contextmanager
def hooked(
    hf_model: nn.Module, edits: Mapping[Place, Edit], *, first: bool = False
) -> Iterator[None]:
    """Apply `edits` in every forward inside; all hooks are gone on exit, exceptions included.

    Raises RuntimeError on a clean exit when a place did not fire once per forward of its block.
    Contexts nest: a hook sees what the hooks of contexts entered before it left; `first` sees what
    the model computed, and those get to see what it leaves.
    """
    blocks: dict[str, _Block] = {}
    hooks: list[_Hook] = []
    handles = []
    if edits:
        _let_compiled_code_see_hooks()
    try:
        for place, edit in edits.items():
            if place.block not in blocks:
                module = hf_model.get_submodule(place.block)
                block = _Block(place.block, execution_device(module))
                blocks[place.block] = block
                handles.append(module.register_forward_pre_hook(block.before, with_kwargs=True))
            block = blocks[place.block]
            module = hf_model.get_submodule(place.path)
            hook = _Hook(place, edit, block, execution_device(module))
            hooks.append(hook)
            handles.append(
                module.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=first)
                if place.where == "input"
                else module.register_forward_hook(hook.after, prepend=first)
            )
        # Last, so that a hook on the output of the block itself still counts as inside.
        for block in blocks.values():
            module = hf_model.get_submodule(block.path)
            handles.append(module.register_forward_hook(block.after))
        yield
        for hook in hooks:
            _check(hook)
    finally:
        for handle in handles:
            handle.remove()


def _check(hook: _Hook) -> None:
    fired, block = hook.fired.total, hook.block
    started, completed = block.started.total, block.completed.total
    if completed <= fired <= started:
        return
    raise RuntimeError(
        f"{hook.place.name} fired {fired} times, expected {completed}: once per forward of "
        f"{block.path}. Whatever ran, {hook.place.path} was not called as a module each time; "
        "Mamba's fused training kernels do that: score in eval mode (model.eval())"
    )
